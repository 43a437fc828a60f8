"""The ONNX backend: one ``.onnx`` file that ONNX Runtime runs, with tiles at one bit an element.

``forms`` rewrites the layers for the forms that need the weights' values, ``program`` goes through ``torch.export`` and
PyTorch's own exporter, ``bits`` says how packed bits are decoded in the graph, ``model`` finishes the file: names,
metadata, checks. Nothing here is loaded before the first export.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from tbn_compiler.backends.onnx import forms, model, program
from tbn_compiler.backends.onnx.bits import tiled_calls, unpack_calls, use_bits
from tbn_compiler.compiler import deploy, lower
from tbn_compiler.errors import ExportError, TBNError
from tbn_compiler.files import replacing
from tbn_compiler.graph.copying import share_tensors_copy
from tbn_compiler.graph.records import get_records, graph_parts, join_key
from tbn_compiler.graph.tiled_parameters import read_forms
from tbn_compiler.torch_private import original_module

__all__ = ["ExportedFile", "WeightForm", "export_onnx"]

WeightForm = Literal["bits", "nbits", "dense"]

_READ = "its code reads the weight, which is decoded for it"


@dataclass(frozen=True)
class ExportedFile:
    """What :func:`export_onnx` wrote.

    Attributes:
        path: the file.
        size: its size in bytes.
        opset: version of the standard operators.
        forms: for each tiled layer, by the name of its weight, the form that it has in the file.
        reasons: for each layer whose form is not the one that was asked for, why.
    """

    path: Path
    size: int
    opset: int
    forms: dict[str, WeightForm]
    reasons: dict[str, str]


def export_onnx(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    weights: WeightForm = "bits",
    dynamic_batch: bool | Sequence[str] = True,
    opset: int = 18,
    optimized: bool = True,
    bits: int = 4,
    accuracy_level: int = 0,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ExportedFile:
    """Write a model as an ONNX file.

    The forms of the tiled layers:

    * ``"bits"``: tiles at 1 bit an element (``uint8`` initialisers), decoded by standard operators in the graph. Only
      the unique rows are multiplied, and their results replicated with the alphas.
    * ``"nbits"``: the unique rows of linear layers as ONNX Runtime's ``com.microsoft::MatMulNBits``; the other layers
      as ``"bits"``.
    * ``"dense"``: the whole weights in float.

    Args:
        module: a lowered module (:func:`tbn_compiler.lower`); a trained one is lowered on the way. Also any module
            that holds lowered ones. Always exported in evaluation mode, and never changed.
        example_inputs: a tensor, a tuple of the arguments of ``forward``, or a dictionary of them by name; floating
            point in float32. They fix every shape but the batch.
        path: the file to write.
        weights: the form of the tiled layers.
        dynamic_batch: whether the first dimension of the inputs may have any size when the file is run: of all
            inputs with the same first dimension as the first one, or of those named.
        opset: version of the standard operators, 18 to 25.
        optimized: rewrite for the least arithmetic first, as :func:`tbn_compiler.optimize` does: norms folded,
            replicas passed on. Results are equal up to rounding.
        bits: bits of an element in ``"nbits"``, 2 or 4.
        accuracy_level: of ``MatMulNBits``: 0 computes in float32; 4 lets ONNX Runtime round the inputs of the layer
            to int8, block by block, which is faster and less accurate (2 bits are fast only with it).
        input_names: names of the inputs; default: those of the parameters of ``forward``.
        output_names: names of the outputs; default: ``output``, ``output_0``, ..., or the keys of a dictionary.

    Returns:
        What was written: size and the form of each layer.

    Raises:
        ExportError: an option out of range, an operator without ONNX form, a dtype other than float32, a model that
            ``torch.export`` cannot trace, a path that cannot be written, or the packages of the ``onnx`` extra are
            missing. An existing file at ``path`` then stays as it was.
        LoweringError: a trained module cannot be lowered.

    Example:
        >>> packed = tbn.lower(qat)                                                # doctest: +SKIP
        >>> export_onnx(packed, torch.zeros(1, 784), "mlp.onnx").size              # doctest: +SKIP
        6480
    """
    _check_options(weights, opset, bits, accuracy_level)
    _check_packages()
    inputs = program.named_inputs(module, example_inputs)
    batched = program.batched_names(inputs, dynamic_batch)
    inputs = program.doubled(inputs, batched)
    prepared = _prepare(module, inputs, optimized)
    records = get_records(prepared) or ()
    outcome: dict[str, str | None] = dict(_read_by_code(prepared, weights))
    for part_path, part in graph_parts(prepared):
        found = _rewrite(part, weights, bits, accuracy_level)
        outcome |= {join_key(part_path, name): reason for name, reason in found.items()}
    if weights == "dense":
        forms.store_dense_parameters(prepared)
    traced = program.trace(prepared, inputs, batched)
    names = (input_names or list(inputs), output_names or program.output_names(traced))
    finished = program.translate(traced, inputs, batched, opset)
    fallback: WeightForm = "bits"
    written_forms = {name: weights if reason is None else fallback for name, reason in outcome.items()}
    reasons = {name: reason for name, reason in outcome.items() if reason is not None}
    model.finish(finished, names, model.description(weights, records, written_forms, reasons))
    data = model.serialize(finished)
    try:
        with replacing(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise ExportError(f"cannot write {error.filename or path}: {error.strerror}") from error
    return ExportedFile(Path(path), len(data), opset, written_forms, reasons)


def _check_options(weights: str, opset: int, bits: int, accuracy_level: int) -> None:
    def check(name: str, value: object, choices: Sequence[object]) -> None:
        if value not in choices or isinstance(value, bool):
            raise ExportError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")

    check("weights", weights, get_args(WeightForm))
    if isinstance(opset, bool) or not isinstance(opset, int):
        raise ExportError(f"opset must be an integer, got {opset!r}")
    if not program.MIN_OPSET <= opset <= program.MAX_OPSET:
        problem = "too old: the bits are decoded by operators of" if opset < program.MIN_OPSET else "too new: latest is"
        limit = program.MIN_OPSET if opset < program.MIN_OPSET else program.MAX_OPSET
        raise ExportError(
            f"opset {opset} is {problem} opset {limit}; give one from {program.MIN_OPSET} to {program.MAX_OPSET}"
        )
    check("bits", bits, (2, 4))
    check("accuracy_level", accuracy_level, (0, 4))
    if weights != "nbits" and (bits != 4 or accuracy_level != 0):
        raise ExportError(f"bits and accuracy_level are options of weights='nbits', not of {weights!r}")


def _check_packages() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f"export_onnx needs the packages onnx and onnxscript ({error}): pip install 'tbn-compiler[onnx]'"
        ) from error


def _prepare(module: nn.Module, inputs: program.Inputs, optimized: bool) -> nn.Module:
    """A copy of the module in evaluation mode that may be rewritten."""
    module = original_module(module)
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        program.check_dtype(name, tensor)
    if get_records(module) is None:
        copied: nn.Module = share_tensors_copy(module)
        return copied.eval()
    lowered = lower(module)
    if not optimized:
        return lowered
    try:
        prepared, _ = deploy(lowered, inputs)
    except TBNError as error:
        raise ExportError(str(error)) from error
    return prepared


def _read_by_code(module: nn.Module, weights: WeightForm) -> Iterator[tuple[str, str | None]]:
    """The weights that code outside of graphs reads, each with the reason for its form if another one was asked for."""
    for path, owner in module.named_modules():
        for form in read_forms(owner):
            yield join_key(path, form.record.weight), _READ if weights == "nbits" else None


def _rewrite(part: Any, weights: WeightForm, bits: int, accuracy_level: int) -> dict[str, str | None]:
    """Bring the tiled layers of a graph into their form; for each why it has another one, or ``None``."""
    outcome: dict[str, str | None] = {forms.tile_name(call): None for call in tiled_calls(part)}
    if weights == "nbits":
        outcome |= forms.use_nbits(part, bits, accuracy_level)
    for _, name, _ in unpack_calls(part):
        outcome.setdefault(name, _READ if weights == "nbits" else None)
    if weights == "dense":
        forms.use_dense(part)
    use_bits(part)  # what is left
    return outcome
