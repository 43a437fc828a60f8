"""What the integers of inputs and outputs stand for, and int8 in place of a model's floats there.

Where a model gives a float input an int8 scale, or rounds an output to int8, the graph can take and give these integers
themselves::

    x -> Quantize(s) -> ...                x' -> Dequantize(s) -> x -> Quantize(s) -> ...
    ... -> Dequantize(s) -> y              ... -> Dequantize(s) -> y -> Quantize(s) -> y'

with ``x'`` and ``y'`` as the ports. What stands between them is rewritten as anywhere else: both pairs disappear.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from tbn_compiler.backends.c import ir, tables
from tbn_compiler.errors import ExportError


@dataclass(frozen=True)
class NumberFormat:
    """``number = scale * (element - zero point)``.

    Attributes:
        scales, zero_points: one each, or as many as there are places (colours) with constants of their own.
        replaces_floats: whether the model's own input or output is a float; else it is this integer.
    """

    scales: tuple[float, ...]
    zero_points: tuple[float, ...]
    replaces_floats: bool

    @property
    def single_scale(self) -> float | None:
        """The scale of int8 that stands for floats, if it does."""
        return self.scales[0] if self.replaces_floats else None


def to_int8(numbers: np.ndarray, scale: float) -> np.ndarray:
    """Floats as int8, rounded as in the model: halves to even, NaN as 0."""
    factor = np.float32(1) / np.float32(scale)
    with np.errstate(over="ignore"):
        rounded = np.rint(numbers.astype(np.float32) * factor)
    limited: np.ndarray = np.clip(np.nan_to_num(rounded), -ir.INT8_LIMIT, ir.INT8_LIMIT)
    return limited.astype(np.int8)


def from_int8(elements: np.ndarray, scale: float) -> np.ndarray:
    """What int8 stands for, as floats."""
    numbers: np.ndarray = elements.astype(np.float32) * np.float32(scale)
    return numbers


def take_int8(graph: ir.Graph, kept: Collection[int] = ()) -> ir.Graph:
    """A graph with int8 in place of its float inputs, but those with the indices ``kept``.

    Raises:
        ExportError: there is none, or the model gives one no int8 scale.
    """
    floats = [index for index, value in enumerate(graph.inputs) if value.dtype == "float32" and index not in kept]
    if not floats:
        raise ExportError("int8_inputs=True: the model has no float inputs")
    inputs, ways = list(graph.inputs), []
    for index in floats:
        value = graph.inputs[index]
        scale = next(_scales_ahead(graph, value), None)
        if scale is None:
            raise ExportError(
                f"int8_inputs=True: input {value.name!r} is read as a float, by layers without a scale of int8: give "
                "tbn_compiler.optimize activation='int8' and calibration batches"
            )
        inputs[index] = ir.Value(f"{value.name}_int8", value.shape, "int8")
        ways.append(ir.Dequantize(value.name, value.name, (inputs[index],), value, scale))
    return replace(graph, inputs=tuple(inputs), operations=(*ways, *graph.operations))


def give_int8(graph: ir.Graph, kept: Collection[int] = ()) -> ir.Graph:
    """A graph with int8 in place of its float outputs, but those with the indices ``kept``.

    Raises:
        ExportError: there is none, or one is not rounded to int8.
    """
    floats = [index for index, value in enumerate(graph.outputs) if value.dtype == "float32" and index not in kept]
    if not floats:
        raise ExportError("int8_outputs=True: the model has no float outputs")
    outputs, ways = list(graph.outputs), []
    for index in floats:
        value = graph.outputs[index]
        scale = _scale_behind(graph, value)
        if scale is None:
            raise ExportError(
                f"int8_outputs=True: output {index} ({value.name!r}) is not rounded to int8: give "
                "tbn_compiler.optimize outputs='int8'"
            )
        outputs[index] = ir.Value(f"{value.name}_int8_{index}", value.shape, "int8")
        ways.append(ir.Quantize(outputs[index].name, value.name, (value,), outputs[index], scale))
    return replace(graph, outputs=tuple(outputs), operations=(*graph.operations, *ways))


def _scales_ahead(graph: ir.Graph, value: ir.Value) -> Iterator[float]:
    """The scales with which a value is rounded, itself or moved."""
    for operation in graph.operations:
        if value in operation.inputs:
            if isinstance(operation, ir.Quantize):
                yield operation.scale
            elif isinstance(operation, _MOVES):
                yield from _scales_ahead(graph, operation.output)


def _scale_behind(graph: ir.Graph, value: ir.Value) -> float | None:
    """The scale of the integers that a value, itself or moved, was made from."""
    makers = {operation.output: operation for operation in graph.operations}
    while isinstance(maker := makers.get(value), ir.Alias | ir.Strided | ir.Part):
        (source,) = maker.inputs
        if not isinstance(source, ir.Value):
            return None
        value = source
    return maker.scale if isinstance(maker, ir.Dequantize) else None


_MOVES = (ir.Alias, ir.Strided, ir.Part, ir.Pad, ir.Concat)


def number_formats(graph: ir.Graph) -> tuple[list[NumberFormat | None], list[NumberFormat | None]]:
    """What the elements of each input and output stand for; ``None`` for floats, indices and what is no such number."""
    makers = {operation.output: operation for operation in graph.operations}
    inputs = [_input_format(graph, value) for value in graph.inputs]
    rounded = (makers.get(value) for value in graph.outputs)
    outputs = [NumberFormat((m.scale,), (0.0,), True) if isinstance(m, ir.Quantize) else None for m in rounded]
    return inputs, outputs


def _input_format(graph: ir.Graph, value: ir.Value) -> NumberFormat | None:
    """As far as a single operation after the other reads the input, and is affine."""
    slope, addend = np.ones(1), np.zeros(1)
    converted = False
    while True:
        readers = [operation for operation in graph.operations if value in operation.inputs]
        if len(readers) != 1:
            break
        (reader,) = readers
        if isinstance(reader, ir.Dequantize):
            return NumberFormat((reader.scale,), (0.0,), True)
        if isinstance(reader, ir.Convert) and reader.output.dtype == "float32":
            converted = value.dtype != "int32"
        elif not isinstance(reader, ir.Alias | ir.Strided | ir.Part):
            function = tables.function_of(reader, value) if converted else None
            if function is None or not function.affine:
                break
            slope, addend = _composed(function.apply, slope, addend)
        value = reader.output
    if not converted or not (np.isfinite(slope) & np.isfinite(addend) & (slope != 0)).all():
        return None
    slope, addend = np.broadcast_arrays(slope, addend)
    return NumberFormat(tuple(slope.tolist()), tuple((-addend / slope + 0.0).tolist()), False)


def _composed(
    function: Callable[[torch.Tensor], torch.Tensor], slope: np.ndarray, addend: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Slope and addend of an affine function behind another one, by what it makes of 0 and 1."""
    ends = torch.from_numpy(np.stack([addend, slope + addend], 1))
    first, second = function(ends).unbind(1)
    return (second - first).numpy(), first.numpy()
