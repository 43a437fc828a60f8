"""The C backend: one standalone C99 file and its header.

``frontend`` turns the module into a small typed graph (``ir``), ``fuse`` simplifies it, ``kernels`` and
``tiled_kernels`` choose how each operation is computed, ``planner`` and ``memory`` give everything a place, and ``emit``
prints the plan through the templates. ``host`` compiles and runs the result on this computer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from tbn_compiler.backends.c.emit import emit_header, emit_source
from tbn_compiler.backends.c.frontend import import_graph, supported_operators
from tbn_compiler.backends.c.options import Options, OptimizeFor, ScratchOwner, Target
from tbn_compiler.backends.c.plan import Plan
from tbn_compiler.backends.c.planner import build_plan
from tbn_compiler.errors import ExportError
from tbn_compiler.files import replacing

__all__ = ["Plan", "export_c", "supported_operators"]


def export_c(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    name: str = "model",
    scratch: ScratchOwner = "static",
    optimize: OptimizeFor = "balanced",
    target: Target = "generic",
    skip_zeros: bool = False,
    layer_hook: bool = False,
) -> Plan:
    """Write a model as one C99 file and a header, without malloc or any dependency but the standard library.

    The header declares ``void <name>_run(const float *input, float *output)`` and the macros
    ``<NAME>_INPUT_SIZE``, ``<NAME>_OUTPUT_SIZE`` (elements), ``<NAME>_SCRATCH_BYTES`` and ``<NAME>_WEIGHT_BYTES``.
    Tiles stay packed at one bit an element, and of a tiled layer only the rows that differ are computed.

    Args:
        module: a lowered module (:func:`tbn_compiler.lower`); a trained one is lowered on the way, and layers in
            float become float arrays. Always exported in evaluation mode, and never changed.
        example_inputs: a float32 tensor, or a tuple with one; it fixes every shape, the batch (usually 1) included.
        path: the ``.c`` file to write; the header goes beside it. Both are written, or none.
        name: prefix of every symbol, so that several models link into one program.
        scratch: ``"static"``, intermediate results lie in one static block, or ``"caller"``, the run function takes
            ``void *scratch`` with ``<NAME>_SCRATCH_BYTES`` bytes aligned for float, and is reentrant.

    Returns:
        The plan: kernels, constants, buffers with their offsets, and sizes in bytes.

    Raises:
        ExportError: an operator, dtype, shape, name or path that is not supported; the message says which are.
        LoweringError: a trained module cannot be lowered.

    Example:
        >>> packed = tbn.lower(qat)                                 # doctest: +SKIP
        >>> plan = export_c(packed, torch.zeros(1, 784), "mlp.c")   # doctest: +SKIP
        >>> plan.weight_bytes, plan.scratch_bytes                   # doctest: +SKIP
        (3316, 512)
    """
    options = Options(name, scratch, optimize, target, skip_zeros, layer_hook)
    source = Path(path)
    if source.suffix != ".c" or any(char in source.name for char in '"\\\n'):
        raise ExportError(f"path {str(source)!r} must end in .c and hold no quote, backslash or line break")
    header = source.with_suffix(".h")
    plan = build_plan(import_graph(module, example_inputs), options)
    source_text, header_text = emit_source(plan, header.name), emit_header(plan)
    try:
        with replacing(source) as new_source, replacing(header) as new_header:
            new_source.write_text(source_text, encoding="utf-8", newline="\n")
            new_header.write_text(header_text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise ExportError(f"cannot write {error.filename or source}: {error.strerror}") from error
    return plan
