"""Operators that move elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.elementwise import binary
from tbn_compiler.backends.c.frontend.importer import Importer, layer_of
from tbn_compiler.backends.c.frontend.registry import Arguments, converts, converts_results

_aten = torch.ops.aten


@converts(_aten._to_copy.default)
def _convert(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation | Sequence[ir.Operation]:
    source, output = importer.operand(node, args["self"]), importer.value_of(node)
    if isinstance(source, ir.Value) and source.dtype in ir.BYTES and output.dtype in ("float32", "int32"):
        return ir.Convert(node.name, layer_of(node), (source,), output)
    return _alias(importer, node, args)


# The same elements under another shape. Dropout in evaluation arrives as a clone.
@converts(
    _aten._unsafe_view.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.detach.default,
    _aten.dropout.default,
    _aten.flatten.using_ints,
    _aten.lift_fresh_copy.default,
    _aten.reshape.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unflatten.int,
    _aten.unsqueeze.default,
    _aten.view.default,
)
def _alias(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    if args.get("train"):
        raise importer.unsupported(node, "it is in training mode")
    value = next(iter(args.values()))
    before, after = value.meta["val"].dtype, node.meta["val"].dtype
    if before not in (torch.bool, after) and after == torch.int16:
        raise importer.unsupported(node, f"it turns {before} into {after}, which in C has more bits")
    return ir.Alias(**importer.typed_head(node, None, value))


def rearrange(importer: Importer, node: fx.Node, value: Any, access: ir.Access) -> ir.Operation:
    """The elements of ``value`` that ``access`` names: a part of it, or a copy."""
    head = importer.typed_head(node, None, value)
    return moved(head["name"], head["layer"], head["inputs"][0], head["output"], access)


def moved(name: str, layer: str, source: ir.Operand, output: ir.Value, access: ir.Access) -> ir.Operation:
    """As :func:`rearrange`, between an operand and a value."""
    if access.in_order and math.prod(access.sizes) == math.prod(source.shape):
        return ir.Alias(name, layer, (source,), output)
    if access.in_order:
        return ir.Part(name, layer, (source,), output, offset=access.offset)
    return ir.Strided(name, layer, (source,), output, access=access)


def _shape(importer: Importer, node: fx.Node, value: Any) -> tuple[int, ...]:
    return importer.operand(node, value).shape


@converts(_aten.permute.default)
def _convert_permute(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return _permute(importer, node, args["self"], args["dims"])


def _permute(importer: Importer, node: fx.Node, value: Any, dims: Sequence[int]) -> ir.Operation:
    shape = _shape(importer, node, value)
    whole = ir.Access.whole(shape)
    order = [dim % len(shape) for dim in dims]
    access = ir.Access(tuple(shape[d] for d in order), tuple(whole.strides[d] for d in order))
    return rearrange(importer, node, value, access)


@converts(_aten.transpose.int)
def _transpose(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    dims = list(range(len(_shape(importer, node, args["self"]))))
    first, second = args["dim0"], args["dim1"]
    dims[first], dims[second] = dims[second], dims[first]
    return _permute(importer, node, args["self"], dims)


@converts(_aten.t.default, _aten.numpy_T.default, _aten.mT.default)
def _matrix_transpose(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    rank = len(_shape(importer, node, args["self"]))
    dims = list(range(rank))
    if rank >= 2:
        dims[-2:] = dims[:-3:-1]
    if node.target == _aten.numpy_T.default:
        dims = dims[::-1] if rank == 2 else list(range(rank))[::-1]
    return _permute(importer, node, args["self"], dims)


def sliced(shape: tuple[int, ...], dim: int, start: int, size: int, step: int = 1) -> ir.Access:
    """``size`` elements along an axis from ``start`` on."""
    whole = ir.Access.whole(shape)
    sizes, strides = list(shape), list(whole.strides)
    sizes[dim], strides[dim] = size, strides[dim] * step
    return ir.Access(tuple(sizes), tuple(strides), whole.strides[dim] * start)


@converts(_aten.slice.Tensor)
def _slice(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    shape, dim = _shape(importer, node, args["self"]), args["dim"]
    start, stop, step = slice(args["start"], args["end"], args["step"]).indices(shape[dim])
    size = len(range(start, stop, step))
    return rearrange(importer, node, args["self"], sliced(shape, dim, start, size, step))


@converts(_aten.narrow.default)
def _narrow(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    shape, dim, start = _shape(importer, node, args["self"]), args["dim"], args["start"]
    start = start % shape[dim] if start < 0 else start
    return rearrange(importer, node, args["self"], sliced(shape, dim, start, args["length"]))


@converts(_aten.select.int)
def _select(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    shape, dim = _shape(importer, node, args["self"]), args["dim"]
    return rearrange(importer, node, args["self"], sliced(shape, dim, args["index"] % shape[dim], 1))


@converts_results(_aten.split.Tensor, _aten.split_with_sizes.default, _aten.chunk.default, _aten.unbind.int)
def _split(importer: Importer, node: fx.Node, args: Arguments, index: int) -> ir.Operation:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape, dim = _shape(importer, node, args["self"]), args["dim"]
    sizes = [1 if source.target == _aten.unbind.int else value.shape[dim] for value in source.meta["val"]]
    access = sliced(shape, dim, sum(sizes[:index]), sizes[index])
    return rearrange(importer, node, args["self"], access)


@converts(_aten.flip.default)
def _flip(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    shape = _shape(importer, node, args["self"])
    access = ir.Access.whole(shape)
    for dim in args["dims"]:
        strides = list(access.strides)
        offset = access.offset + (shape[dim] - 1) * strides[dim]
        strides[dim] = -strides[dim]
        access = replace(access, strides=tuple(strides), offset=offset)
    return rearrange(importer, node, args["self"], access)


@converts(_aten.expand.default)
def _expand(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    sizes = importer.value_of(node).shape
    return rearrange(importer, node, args["self"], ir.Access.broadcast(_shape(importer, node, args["self"]), sizes))


@converts(_aten.repeat.default)
def _repeat(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    repeats, shape = args["repeats"], _shape(importer, node, args["self"])
    aligned = (1,) * (len(repeats) - len(shape)) + shape
    strides = ir.row_major(aligned)
    # Each dimension becomes two: how often it is repeated, and itself.
    sizes = tuple(size for both in zip(repeats, aligned, strict=True) for size in both)
    steps = tuple(step for stride in strides for step in (0, stride))
    return rearrange(importer, node, args["self"], ir.Access(sizes, steps))


@converts(_aten.pixel_shuffle.default)
def _pixel_shuffle(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    *outer, channels, height, width = _shape(importer, node, args["self"])
    r = args["upscale_factor"]
    whole = ir.Access.whole((math.prod(outer), channels // r**2, r, r, height, width))
    order = (0, 1, 4, 2, 5, 3)
    access = ir.Access(tuple(whole.sizes[d] for d in order), tuple(whole.strides[d] for d in order))
    return rearrange(importer, node, args["self"], access)


@converts(_aten.channel_shuffle.default)
def _channel_shuffle(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    samples, channels, *image = _shape(importer, node, args["self"])
    whole = ir.Access.whole((samples, args["groups"], channels // args["groups"], math.prod(image)))
    order = (0, 2, 1, 3)
    access = ir.Access(tuple(whole.sizes[d] for d in order), tuple(whole.strides[d] for d in order))
    return rearrange(importer, node, args["self"], access)


@converts(_aten.cat.default)
def _cat(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    # An empty cache of keys and values is joined like any other.
    head = importer.typed_head(node, None, *(value for value in args["tensors"] if value.meta["val"].numel()))
    return _concat(head["name"], head["layer"], head["inputs"], head["output"], args["dim"])


def _concat(name: str, layer: str, inputs: Sequence[ir.Operand], output: ir.Value, dim: int) -> ir.Concat:
    dim %= len(output.shape)
    outer = math.prod(output.shape[:dim])
    blocks = tuple(math.prod(source.shape) // outer for source in inputs)
    return ir.Concat(name, layer, tuple(inputs), output, outer=outer, blocks=blocks)


@converts(_aten.stack.default)
def _stack(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    head = importer.typed_head(node, None, *args["tensors"])
    dim = args["dim"] % len(head["output"].shape)
    outer = math.prod(head["output"].shape[:dim])
    blocks = (head["output"].size // outer // len(args["tensors"]),) * len(args["tensors"])
    return ir.Concat(**head, outer=outer, blocks=blocks)


@converts(_aten.roll.default)
def _roll(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    head = importer.typed_head(node, None, args["self"])
    (source,) = head["inputs"]
    # Without axes all elements are rolled as one row.
    shape, dims = (source.shape, args["dims"]) if args["dims"] else ((math.prod(source.shape),), [0])
    operations: list[ir.Operation] = []
    for number, (dim, shift) in enumerate(zip(dims, args["shifts"], strict=True)):
        shift %= shape[dim]
        if not shift:
            continue
        pieces = [sliced(shape, dim, shape[dim] - shift, shift), sliced(shape, dim, 0, shape[dim] - shift)]
        result = importer.temporary(node, f"rolled_{number}", shape, head["output"].dtype)
        operations += _joined(head["layer"], source, dim, pieces, result)
        source = result
    return *operations, ir.Alias(**head | {"inputs": (source,)})


def _joined(
    layer: str, source: ir.Operand, dim: int, pieces: Sequence[ir.Access], output: ir.Value
) -> Sequence[ir.Operation]:
    """Parts of an array, one behind the other along an axis."""
    parts = [ir.Value(f"{output.name}_part_{index}", piece.sizes, output.dtype) for index, piece in enumerate(pieces)]
    moves = [moved(part.name, layer, source, part, piece) for part, piece in zip(parts, pieces, strict=True)]
    return *moves, _concat(output.name, layer, parts, output, dim)


@converts(_aten.slice_scatter.default)
def _slice_scatter(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    """Another array in the place of a part along an axis."""
    head = importer.typed_head(node, None, args["self"], args["src"])
    (source, part), layer, shape = head["inputs"], head["layer"], head["output"].shape
    dim = args["dim"] % len(shape)
    start, stop, step = slice(args["start"], args["end"], args["step"]).indices(shape[dim])
    if step != 1:
        raise importer.unsupported(node, f"it writes every {step}th element; in C neighbours can be written")
    operations: list[ir.Operation] = []
    values: list[ir.Operand] = [part]
    for name, place, first, size in (("before", 0, 0, start), ("after", 2, stop, shape[dim] - stop)):
        if size:
            access = sliced(shape, dim, first, size)
            kept = importer.temporary(node, name, access.sizes, head["output"].dtype)
            operations.append(moved(kept.name, layer, source, kept, access))
            values.insert(place, kept)
    return *operations, _concat(head["name"], layer, values, head["output"], dim)


@converts(_aten.unfold.default)
def _unfold(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    """Windows along an axis, which may overlap: a further axis over each of them."""
    whole, dim = ir.Access.whole(_shape(importer, node, args["self"])), args["dimension"]
    strides = list(whole.strides)
    strides[dim] *= args["step"]
    access = ir.Access(importer.value_of(node).shape, (*strides, whole.strides[dim]))
    return rearrange(importer, node, args["self"], access)


@converts(_aten.diagonal.default)
def _diagonal(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    shape = _shape(importer, node, args["self"])
    whole, first, second = ir.Access.whole(shape), args["dim1"] % len(shape), args["dim2"] % len(shape)
    down, right = whole.strides[first], whole.strides[second]
    start = args["offset"] * right if args["offset"] > 0 else -args["offset"] * down
    others = [stride for dim, stride in enumerate(whole.strides) if dim not in (first, second)]
    access = ir.Access(importer.value_of(node).shape, (*others, down + right), start)
    return rearrange(importer, node, args["self"], access)


@converts(_aten.constant_pad_nd.default)
def _constant_pad(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    return _pad_with(importer, node, args["self"], args["pad"], args["value"])


@converts(_aten.pad.default)
def _pad(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    if args["mode"] == "constant":
        return _pad_with(importer, node, args["self"], args["pad"], args["value"] or 0.0)
    return _pad_from_itself(importer, node, args["self"], args["pad"], args["mode"])


def _pad_with(
    importer: Importer, node: fx.Node, value: Any, pad: Sequence[int], number: float
) -> Sequence[ir.Operation]:
    head = importer.typed_head(node, None, value)
    (source,), output = head["inputs"], head["output"]
    before, crop = [0] * len(source.shape), list(source.shape)
    start = [0] * len(source.shape)
    for index in range(0, len(pad), 2):
        dim = len(source.shape) - 1 - index // 2
        left, right = pad[index], pad[index + 1]
        before[dim], start[dim] = max(left, 0), max(-left, 0)
        crop[dim] += min(left, 0) + min(right, 0)
    operations: list[ir.Operation] = []
    if tuple(crop) != source.shape:  # negative padding
        whole = ir.Access.whole(source.shape)
        offset = sum(s * i for s, i in zip(whole.strides, start, strict=True))
        cropped = importer.temporary(node, "cropped", tuple(crop), output.dtype)
        access = ir.Access(tuple(crop), whole.strides, offset)
        operations.append(moved(cropped.name, head["layer"], source, cropped, access))
        source = cropped
    strides = ir.row_major(output.shape)
    result = ir.Access(tuple(crop), strides, sum(s * i for s, i in zip(strides, before, strict=True)))
    return *operations, ir.Pad(**head | {"inputs": (source,)}, value=float(number), result=result)


def _pad_from_itself(
    importer: Importer, node: fx.Node, value: Any, pad: Sequence[int], mode: str
) -> Sequence[ir.Operation]:
    """Padding with elements of the input, one axis after the other."""
    head = importer.typed_head(node, None, value)
    (source,), layer, dtype = head["inputs"], head["layer"], head["output"].dtype
    operations: list[ir.Operation] = []
    for index in range(0, len(pad), 2):
        dim = len(source.shape) - 1 - index // 2
        left, right = pad[index], pad[index + 1]
        if left < 0 or right < 0:
            raise importer.unsupported(node, f"negative padding with mode={mode!r}")
        if not left and not right:
            continue
        shape, size = source.shape, source.shape[dim]
        ends = {
            "reflect": (sliced(shape, dim, left, left, -1), sliced(shape, dim, size - 2, right, -1)),
            "replicate": (sliced(shape, dim, 0, left, 0), sliced(shape, dim, size - 1, right, 0)),
            "circular": (sliced(shape, dim, size - left, left), sliced(shape, dim, 0, right)),
        }[mode]
        values: list[ir.Operand] = [source]
        for place, length, access in ((0, left, ends[0]), (2, right, ends[1])):
            if length:
                end = importer.temporary(node, f"{dim}_{'before' if place == 0 else 'after'}", access.sizes, dtype)
                operations.append(moved(end.name, layer, source, end, access))
                values.insert(place, end)
        padded = list(shape)
        padded[dim] += left + right
        result = importer.temporary(node, f"{dim}", tuple(padded), dtype)
        operations.append(_concat(result.name, layer, values, result, dim))
        source = result
    return *operations, ir.Alias(**head | {"inputs": (source,)})


@converts(_aten.glu.default)
def _glu(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    head = importer.head(node, args["self"])
    (source,), output, dim = head["inputs"], head["output"], args["dim"]
    halves = []
    for index, name in enumerate(("value", "gate")):
        half = importer.temporary(node, name, output.shape)
        access = sliced(source.shape, dim, index * output.shape[dim], output.shape[dim])
        halves.append(moved(half.name, head["layer"], source, half, access))
    value, gate = (half.output for half in halves)
    open_gate = importer.temporary(node, "open_gate", output.shape)
    sigmoid = ir.Unary(open_gate.name, head["layer"], (gate,), open_gate, function="sigmoid")
    return *halves, sigmoid, binary(importer, node, "multiply", value, open_gate)
