"""Rewrites of the graph before it is planned: less to compute and less to store, with the same results."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.integers import keep_integers
from tbn_compiler.backends.c.turn import turned
from tbn_compiler.backends.c.views import absorb_copies
from tbn_compiler.tiling import TileLayout

_FUSES_RELU = (ir.Linear, ir.Conv, ir.TiledLinear, ir.TiledConv)


def simplify(graph: ir.Graph) -> tuple[list[ir.Operation], list[ir.Value]]:
    """Apply every rewrite.

    Returns:
        The operations that the outputs need, and the value of each output: different ones, each made by an operation.
    """
    operations, outputs = _resolve_aliases(graph)
    operations = _needed(absorb_copies(operations, outputs), outputs)
    operations = _fold_affines(_copy_last(operations, outputs), outputs)
    operations = _fuse_relus(_sum_neighbours(_turn(operations)), outputs)
    operations, outputs = keep_integers(operations, outputs)
    operations = _needed(absorb_copies(operations, outputs), outputs)  # copies of integers, which met only now
    return _give_outputs_values(operations, outputs)


def _resolve_aliases(graph: ir.Graph) -> tuple[list[ir.Operation], list[ir.Operand]]:
    """Read original values instead of views of the whole of them, and drop what no output needs."""
    original: dict[ir.Operand, ir.Operand] = {}
    operations: list[ir.Operation] = []
    for operation in graph.operations:
        inputs = tuple(original.get(value, value) for value in operation.inputs)
        if isinstance(operation, ir.Alias):
            original[operation.output] = inputs[0]
        else:
            operations.append(replace(operation, inputs=inputs))
    outputs = [original.get(value, value) for value in graph.outputs]
    return _needed(operations, outputs), outputs


def _needed(operations: Sequence[ir.Operation], outputs: Sequence[ir.Operand]) -> list[ir.Operation]:
    """The operations that the outputs depend on."""
    needed = set(outputs)
    for operation in reversed(operations):
        if operation.output in needed:
            needed.update(operation.inputs)
    return [operation for operation in operations if operation.output in needed]


def _copy_last(operations: Sequence[ir.Operation], outputs: Sequence[ir.Operand]) -> list[ir.Operation]:
    """``f(copy(layer(x)))`` becomes ``copy(f(layer(x)))`` where a layer can apply it: a ReLU, factors of channels.

    The copy has to be all of the layer's result in another order, and nothing else may read either.
    """
    reads = Counter(value for operation in operations for value in operation.inputs)
    result = list(operations)
    made_by: dict[ir.Operand, int] = {operation.output: index for index, operation in enumerate(result)}
    for index, function in enumerate(result):
        relu = isinstance(function, ir.Unary) and function.function == "relu"
        if not (relu or isinstance(function, ir.ChannelAffine)) or function.inputs[0] not in made_by:
            continue
        copy = result[made_by[function.inputs[0]]]
        if not isinstance(copy, ir.Strided) or copy.inputs[0] not in made_by:
            continue
        layer = result[made_by[copy.inputs[0]]]
        read_once = all(reads[value] < 2 and value not in outputs for value in (layer.output, copy.output))
        if not read_once or not isinstance(layer, (*_FUSES_RELU, ir.ChannelAffine)):
            continue
        moved = _before_copy(function, copy)
        if moved is not None:
            place = made_by[copy.output]
            result[place] = moved
            result[index] = replace(copy, inputs=(moved.output,), output=function.output)
            made_by |= {moved.output: place, function.output: index}
    return result


def _before_copy(function: ir.Operation, copy: ir.Strided) -> ir.Operation | None:
    """A function of elements or channels on what a copy reads; ``None`` where its channels are not an axis of that."""
    (source,), access = copy.inputs, copy.access
    assert isinstance(source, ir.Value)
    axes = [(stride, size) for stride, size in zip(access.strides, access.sizes, strict=True) if size > 1]
    strides, sizes = zip(*sorted(axes, reverse=True), strict=True) if axes else ((), ())
    if access.offset or math.prod(sizes) != source.size or strides != ir.row_major(sizes):
        return None
    output = replace(copy.output, shape=source.shape)
    if isinstance(function, ir.ChannelAffine):
        channels = (function.scale.size, function.inner)
        found = [
            stride
            for axis, (stride, size) in enumerate(zip(access.strides, access.sizes, strict=True))
            if (size, math.prod(access.sizes[axis + 1 :])) == channels
        ]
        if not found:
            return None
        function = replace(function, inner=found[0])
    return replace(function, inputs=(source,), output=output)


def _fold_affines(operations: Sequence[ir.Operation], outputs: Sequence[ir.Operand]) -> list[ir.Operation]:
    """Fold the scale and shift of each channel into the float layer that is read by nothing else.

    ``s * (W x + b) + t = (s W) x + (s b + t)``. For layers on tiles a pass does that before the export.
    """
    reads = Counter(value for operation in operations for value in operation.inputs)
    result: list[ir.Operation] = []
    made_by: dict[ir.Operand, int] = {}
    for operation in operations:
        if isinstance(operation, ir.ChannelAffine):
            (value,) = operation.inputs
            index = made_by.get(value)
            if index is not None and reads[value] == 1 and value not in outputs:
                folded = _folded(result[index], operation)
                if folded is not None:
                    made_by[operation.output] = index
                    result[index] = folded
                    continue
        if isinstance(operation, ir.Linear | ir.Conv):
            made_by[operation.output] = len(result)
        result.append(operation)
    return result


def _folded(layer: ir.Operation, affine: ir.ChannelAffine) -> ir.Operation | None:
    """A layer that does what an affine does behind it; ``None`` if that scales something else than its rows."""
    assert isinstance(layer, ir.Linear | ir.Conv)
    inner = layer.window.output_size if isinstance(layer, ir.Conv) else 1
    weight = layer.weight
    if affine.inner != inner or affine.scale.size != weight.shape[0]:
        return None
    scale, shift = affine.scale.array, affine.shift.array
    bias = shift if layer.bias is None else scale * layer.bias.array + shift
    scaled = scale.reshape(-1, *(1,) * (weight.array.ndim - 1)) * weight.array
    return replace(
        layer,
        output=affine.output,
        weight=replace(weight, array=scaled),
        bias=ir.Constant(f"{layer.layer}.bias", bias),
    )


def _turn(operations: Sequence[ir.Operation]) -> list[ir.Operation]:
    """Let transpose convolutions be convolutions, where they can."""
    result: list[ir.Operation] = []
    for operation in operations:
        found = turned(operation) if isinstance(operation, ir.TiledConvTranspose) else None
        result += found or (operation,)
    return result


def _sum_neighbours(operations: Sequence[ir.Operation]) -> list[ir.Operation]:
    """Sum inputs that share a weight before they are multiplied.

    A two-axis layer becomes ``SumNeighbours`` and a flat layer on ``n / p_in`` inputs. It stays as it is where
    neighbours are scaled differently: by alphas along the input, or by input alphas whose replicas end between them.
    Layers that read the same value share the sums.
    """
    result: list[ir.Operation] = []
    sums: dict[tuple[ir.Operand, int], ir.Value] = {}
    for operation in operations:
        floats = isinstance(operation, ir.TiledLinear | ir.TiledConv) and operation.input_scale is None
        if isinstance(operation, ir.TiledLinear | ir.TiledConv) and floats and operation.product.summed > 1:
            layout, count, (source,) = operation.layout, operation.product.summed, operation.inputs
            key = (source, count)
            if key not in sums:
                shape, inner = _summed(operation)
                sums[key] = ir.Value(f"{operation.name}_sums", shape)
                head = (sums[key].name, operation.layer, (source,), sums[key])
                result.append(ir.SumNeighbours(*head, count=count, inner=inner))
            rows, inputs, *kernel = layout.shape
            flat = TileLayout((rows, inputs // count, *kernel), layout.p_out)
            operation = replace(operation, inputs=(sums[key],), layout=flat)
        result.append(operation)
    return result


def _summed(operation: ir.TiledLinear | ir.TiledConv) -> tuple[tuple[int, ...], int]:
    """Shape of the summed input of a layer, and the elements behind each feature or channel."""
    count = operation.product.summed
    if isinstance(operation, ir.TiledConv):
        window = operation.window
        return (operation.samples, operation.input_channels // count, *window.input), window.input_size
    return (*operation.output.shape[:-1], operation.layout.row_size // operation.replicas // count), 1


def _fuse_relus(operations: Sequence[ir.Operation], outputs: Sequence[ir.Operand]) -> list[ir.Operation]:
    """Let a layer apply the ReLU that is the only reader of its result."""
    reads = Counter(value for operation in operations for value in operation.inputs)
    result: list[ir.Operation] = []
    made_by: dict[ir.Operand, int] = {}
    for operation in operations:
        if isinstance(operation, ir.Unary) and operation.function == "relu":
            (value,) = operation.inputs
            index = made_by.get(value)
            if index is not None and reads[value] == 1 and value not in outputs:
                result[index] = replace(result[index], output=operation.output, relu=True)  # type: ignore[call-arg]
                continue
        if isinstance(operation, _FUSES_RELU):
            made_by[operation.output] = len(result)
        result.append(operation)
    return result


def _give_outputs_values(
    operations: Sequence[ir.Operation], outputs: Sequence[ir.Operand]
) -> tuple[list[ir.Operation], list[ir.Value]]:
    """Copy what is not an operation's result, or is an output already, so that each output has memory of its own."""
    result = list(operations)
    made = {operation.output for operation in operations if not isinstance(operation, ir.Part)}
    values: list[ir.Value] = []
    for output in outputs:
        if not isinstance(output, ir.Value) or output not in made or output in values:
            dtype = output.dtype if isinstance(output, ir.Value) else "float32"
            copy = ir.Value(f"{output.name}_copy_{len(values)}", output.shape, dtype)
            result.append(ir.Copy(copy.name, copy.name, (output,), copy))
            output = copy
        values.append(output)
    return result, values
