"""The C backend: one standalone C99 file and its header.

``frontend`` turns the module into a small typed graph (``ir``), ``fuse`` simplifies it, ``kernels`` and
``tiled_kernels`` choose how each operation is computed, ``planner`` and ``memory`` give everything a place, and
``emit`` prints the plan through the templates. ``host`` compiles and runs the result on this computer.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from tbn_compiler.backends.c.frontend import import_graph, supported_operators
from tbn_compiler.backends.c.options import OptimizeFor, Options, ScratchOwner
from tbn_compiler.backends.c.package import (
    PACKAGES,
    Inputs,
    PackageInfo,
    check_source_path,
    compute_vectors,
    self_test_inputs,
    single_file,
    write_files,
)
from tbn_compiler.backends.c.plan import Plan
from tbn_compiler.backends.c.planner import build_plan
from tbn_compiler.backends.c.state import state_pairs
from tbn_compiler.backends.c.targets import Target
from tbn_compiler.errors import ExportError

Package = Literal["arduino", "cmake", "cmsis-pack", "zephyr"]

_SELF_TEST_RUNS = 3  # of a model with a state

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
    int8_inputs: bool = False,
    int8_outputs: bool = False,
    state: Mapping[str, int] | None = None,
    initial_state: Mapping[str, Tensor] | None = None,
    self_test: bool | Sequence[Inputs] = False,
    package: Package | None = None,
    package_version: str = "1.0.0",
    package_vendor: str = "tbn_compiler",
) -> Plan:
    """Write a model as one C99 file and a header, without malloc or any dependency but the standard library.

    The header declares ``void <name>_run(const float *input, float *output)``, or a parameter for each of several
    inputs and outputs, and the macros ``<NAME>_INPUT_SIZE``, ``<NAME>_OUTPUT_SIZE`` (elements),
    ``<NAME>_SCRATCH_BYTES``, ``<NAME>_WEIGHT_BYTES`` and ``<NAME>_TOTAL_BYTES``. Tiles stay packed at one bit an
    element, and of a tiled layer only the rows that differ are computed.

    Args:
        module: a lowered module (:func:`tbn_compiler.lower`); a trained one is lowered on the way, and layers in
            float become float arrays. Always exported in evaluation mode, and never changed.
        example_inputs: a tensor, or a tuple with one for each argument of ``forward``; float32, ``uint8`` or ``int8``,
            which are bytes in C, other integers, which are ``int32_t``, or booleans, which are bytes (``uint8_t``).
            They fix every shape, the batch (usually 1)
            included.
        path: the ``.c`` file to write, beside which the header goes; with ``package`` the folder. All files are
            written, or none.
        name: prefix of every symbol, so that several models link into one program; that of macros is in capitals, or as
            it is if it has capitals already.
        scratch: ``"static"``, intermediate results lie in one static block, or ``"caller"``, the run function takes
            ``void *scratch`` with ``<NAME>_SCRATCH_BYTES`` bytes aligned for float, and is reentrant.
        optimize: what kernels are chosen for: ``"speed"``, ``"size"`` (code, constants and scratch), or ``"balanced"``.
        target: the processor whose costs decide; the C stays portable.
        skip_zeros: let kernels skip inputs that are 0; the run time then depends on the data.
        layer_hook: call the macro ``<NAME>_LAYER_HOOK(index, layer)`` behind every step, for a timer of yours.
        int8_inputs: take int8 in place of floats, with the scale that calibration gave what reads the input;
            ``<NAME>_INPUT_SCALE`` and ``_ZERO_POINT`` (which is 0) say what an element stands for, and nothing is
            rounded in C. As macros also have it for ``uint8`` and ``int8`` inputs of the model itself.
        int8_outputs: give int8 in place of floats, where :func:`tbn_compiler.optimize` was told ``outputs="int8"``;
            ``<NAME>_OUTPUT_SCALE`` and ``_ZERO_POINT`` are theirs.
        state: names of inputs that the caller keeps from run to run, each with the index of the output that is its next
            value: ``{"hidden": 1}``. The header has a structure ``<name>_state`` with these arrays, its size
            ``<NAME>_STATE_BYTES``, ``void <name>_init(<name>_state *state)`` and a run function that takes the state
            first and changes it; nothing is kept elsewhere. ``int8_inputs`` and ``int8_outputs`` leave it as it is.
        initial_state: what the state holds before the first run, by the name of the input; the rest is zeros.
        self_test: add ``int <name>_self_test(void)``, which runs the model on the example inputs, or on each of a list
            of inputs like them, and compares with what PyTorch gives. It takes flash for inputs and results, where it
            is called. With ``state`` the runs follow one another from the initial state on: those of the list, or
            three on the example inputs; what these hold of the state is not used. Give a list where the state reaches
            further back.
        package: a folder for a build system, with the self-test: ``"arduino"``, a library for the Arduino IDE with
            examples that run the first input and the self-test; ``"cmake"``, a project with an interface target and a
            test; ``"cmsis-pack"``, a software pack with one component; ``"zephyr"``, a module for Zephyr.
        package_version: version that the package has. It names no license: that is yours to choose.
        package_vendor: who answers for it.

    Returns:
        The plan: kernels, constants, buffers with their offsets, and sizes in bytes.

    Raises:
        ExportError: an operator, dtype, shape, name or path that is not supported; the message says which are.
        LoweringError: a trained module cannot be lowered.

    Warns:
        UserWarning: a tiled weight is stored decoded, at 32 bits an element, because of what uses it (``einsum``).

    Example:
        >>> packed = tbn.lower(qat)                                 # doctest: +SKIP
        >>> plan = export_c(packed, torch.zeros(1, 784), "mlp.c")   # doctest: +SKIP
        >>> plan.weight_bytes, plan.scratch_bytes                   # doctest: +SKIP
        (3316, 512)
    """
    options = Options(
        name, scratch, optimize, target, skip_zeros, layer_hook, int8_inputs, int8_outputs, state_pairs(state)
    )
    if package is not None and package not in PACKAGES:
        raise ExportError(f"package={package!r} is not one of {', '.join(map(repr, PACKAGES))}, or None")
    info = PackageInfo(package_version, package_vendor)
    if package is None:
        check_source_path(Path(path))
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    tested = self_test_inputs(self_test, inputs)
    plan = build_plan(import_graph(module, example_inputs), options, initial_state)
    for step in plan.steps:
        for note in step.notes:
            warnings.warn(f"{step.title}: {note}", stacklevel=3)  # the public function calls this one
    if package is None and self_test is False:
        write_files(single_file(plan, Path(path), None))
        return plan
    if plan.states and isinstance(self_test, bool):
        tested *= _SELF_TEST_RUNS
    vectors = compute_vectors(module, tested, plan)
    if package is None:
        write_files(single_file(plan, Path(path), vectors))
    else:
        write_files(PACKAGES[package](plan, Path(path), vectors, info), folder=Path(path))
    return plan
