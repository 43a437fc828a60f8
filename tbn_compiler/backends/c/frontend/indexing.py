"""Elements by index: stored indices become strides or a table, computed ones are read while the model runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.importer import Importer, layer_of
from tbn_compiler.backends.c.frontend.registry import Arguments, converts, converts_results
from tbn_compiler.backends.c.frontend.shapes import rearrange

_aten = torch.ops.aten


@converts(_aten.index.Tensor)
def _index(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    value, indices = args["self"], args["indices"]
    given = [dim for dim, index in enumerate(indices) if index is not None]
    shape = importer.operand(node, value).shape
    if all(importer.is_stored(indices[dim]) for dim in given):
        everything = (slice(None) if index is None else importer.stored(index) for index in indices)
        return at_positions(importer, node, value, _positions(shape)[tuple(everything)])
    if any(importer.dtype(node, indices[dim]) == "bool" for dim in given):
        raise importer.unsupported(node, "how many elements a computed mask takes is known only when the model runs")
    if given != list(range(given[0], given[-1] + 1)):
        raise importer.unsupported(node, "its indices are computed, and of axes that are not neighbours")
    index = _joint_index(importer, node, [indices[dim] for dim in given], [shape[dim] for dim in given])
    return _rows(importer, node, value, index, given[0], given[-1] + 1)


def _along_an_axis(importer: Importer, node: fx.Node, args: Arguments) -> tuple[Any, Any, tuple[int, ...], int]:
    """What is read, where, its shape, and the axis."""
    shape = importer.operand(node, args["self"]).shape
    return args["self"], args["index"], shape, args["dim"] % max(len(shape), 1)


@converts(_aten.index_select.default)
def _index_select(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    value, index, shape, dim = _along_an_axis(importer, node, args)
    if importer.is_stored(index):
        return at_positions(importer, node, value, _positions(shape).index_select(dim, importer.stored(index)))
    return _rows(importer, node, value, index, dim, dim + 1)


@converts(_aten.gather.default)
def _gather(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    value, index, shape, dim = _along_an_axis(importer, node, args)
    if importer.is_stored(index):
        return at_positions(importer, node, value, _positions(shape).gather(dim, importer.stored(index)))
    head = importer.typed_head(node, None, value)
    strides = ir.row_major(shape)
    access = ir.Access(head["output"].shape, (*strides[:dim], 0, *strides[dim + 1 :]))
    head["inputs"] = (importer.operand(node, index, "int32"), *head["inputs"])
    return ir.Pick(**head, access=access, rows=shape[dim], stride=strides[dim])


@converts_results(_aten.sort.default, _aten.sort.stable, _aten.topk.default)
def _sort(importer: Importer, node: fx.Node, args: Arguments, index: int) -> ir.Operation:
    """Where the elements stand in order, and the elements that stand there."""
    value, source = args["self"], node.args[0]
    head, largest = importer.typed_head(node, None, value), bool(args.get("largest", args.get("descending")))
    if importer.dtype(node, value) != "float32" or not head["output"].shape:
        raise importer.unsupported(node, "only floats along an axis can be put in order")
    (array,) = importer.typed_head(node, "float32", value)["inputs"]
    shape, dim = array.shape, args["dim"] % len(array.shape)
    axis = ir.Axis(math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]))
    assert isinstance(source, fx.Node)
    ranks = ir.Value(f"{source.name}_ranks", head["output"].shape, "int32")
    importer.add_once(ir.Rank(ranks.name, head["layer"], (array,), ranks, axis, ranks.shape[dim], largest))
    if index:
        return ir.Alias(head["name"], head["layer"], (ranks,), head["output"])
    strides = ir.row_major(shape)
    access = ir.Access(ranks.shape, (*strides[:dim], 0, *strides[dim + 1 :]))
    return ir.Pick(head["name"], head["layer"], (ranks, array), head["output"], access, shape[dim], strides[dim])


def _positions(shape: tuple[int, ...]) -> Tensor:
    """An array whose elements say where they stand."""
    return torch.arange(math.prod(shape)).reshape(shape)


def at_positions(importer: Importer, node: fx.Node, value: Any, positions: Tensor) -> ir.Operation:
    """The elements of a value at stored positions: a copy with strides if that gives them, else by a table of rows."""
    access = _as_access(positions)
    if access is not None:
        return rearrange(importer, node, value, access)
    size = math.prod(importer.operand(node, value).shape)
    leading = _repeated(positions, size)
    outer, rows = math.prod(positions.shape[:leading]), positions[(0,) * leading]
    step = size // outer
    columns = _columns(rows, step)
    index = importer.new_constant(f"{node.name} rows", (rows.reshape(-1, columns)[:, 0] // columns).int().numpy())
    head = importer.typed_head(node, None, value)
    head["inputs"] = (index, *head["inputs"])
    return ir.Gather(**head, outer=outer, rows=step // columns, columns=columns)


def _as_access(positions: Tensor) -> ir.Access | None:
    """Positions as offset and strides, if they are that."""
    offset = int(positions.reshape(-1)[0])
    found, strides = torch.tensor(offset), []
    for dim, size in enumerate(positions.shape):
        stride = int(positions.select(dim, min(1, size - 1)).reshape(-1)[0]) - offset
        strides.append(stride)
        found = found[..., None] + stride * torch.arange(size)
    return ir.Access(tuple(positions.shape), tuple(strides), offset) if found.equal(positions) else None


def _repeated(positions: Tensor, size: int) -> int:
    """The number of leading axes along which the same positions repeat, in parts of the array behind one another."""
    for leading in reversed(range(positions.dim())):
        outer = math.prod(positions.shape[:leading])
        parts = positions.reshape(outer, -1)
        inside = not size % outer and bool((parts[0] < size // outer).all())
        if inside and parts.equal(parts[0] + (size // outer) * torch.arange(outer)[:, None]):
            return leading
    return 0


def _columns(rows: Tensor, step: int) -> int:
    """How many neighbours are always taken together, from a multiple of their number on."""
    columns = 1
    for dim in reversed(range(rows.dim())):
        count = columns * rows.shape[dim]
        blocks = rows.reshape(-1, count)
        whole = not step % count and not (blocks[:, 0] % count).any()
        if not whole or not blocks.equal(blocks[:, :1] + torch.arange(count)):
            break
        columns = count
    return columns


def _joint_index(importer: Importer, node: fx.Node, indices: Sequence[Any], sizes: Sequence[int]) -> ir.Operand:
    """One index into neighbouring axes that are taken for one: each is made positive, times what lies behind it."""
    if len(indices) == 1:
        return importer.operand(node, indices[0], "int32")
    layer, joint = layer_of(node), None
    for number, (index, size) in enumerate(zip(indices, sizes, strict=True)):
        part = importer.operand(node, index, "int32")
        output = importer.temporary(node, f"index_{number}", part.shape, "int32")
        wrapped = ir.Unary(output.name, layer, (part,), output, "remainder_scalar", (size,))
        part = importer.add_before(wrapped)
        if joint is None:
            joint = part
            continue
        scaled = importer.temporary(node, f"scaled_{number}", joint.shape, "int32")
        importer.add_before(ir.Unary(scaled.name, layer, (joint,), scaled, "multiply_scalar", (size,)))
        shape = tuple(torch.broadcast_shapes(scaled.shape, part.shape))
        total = importer.temporary(node, f"joint_{number}", shape, "int32")
        accesses = tuple(ir.Access.broadcast(operand.shape, shape) for operand in (scaled, part))
        joint = importer.add_before(ir.Binary(total.name, layer, (scaled, part), total, accesses, "add"))
    assert joint is not None
    return joint


def _rows(importer: Importer, node: fx.Node, value: Any, index: Any, first: int, last: int) -> ir.Operation:
    """The elements that an index names of axes ``first`` to ``last``, which count as one."""
    head = importer.typed_head(node, None, value)
    (source,) = head["inputs"]
    head["inputs"] = (importer.operand(node, index, "int32"), source)
    outer, rows, columns = (math.prod(source.shape[a:b]) for a, b in ((0, first), (first, last), (last, None)))
    return ir.Gather(**head, outer=outer, rows=rows, columns=columns)


@converts(_aten.index_put.default, _aten._unsafe_index_put.default)
def _index_put(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    """``x[mask] = number`` is a choice between both; what is written elsewhere has no kernel."""
    mask, *others = args["indices"]
    values = importer.operand(node, args["values"])
    if others or mask is None or importer.dtype(node, mask) != "bool" or values.size > 1 or args["accumulate"]:
        raise importer.unsupported(node, "only one number can be written, where a mask of booleans is true")
    chosen = importer.select(node, mask, args["values"], args["self"], importer.value_of(node))
    shown, *rest = chosen.accesses
    shape = importer.operand(node, mask).shape
    # A mask of fewer axes is one of the first ones.
    strides = (*ir.row_major(shape), *(0,) * (len(shown.sizes) - len(shape)))
    return replace(chosen, accesses=(ir.Access(shown.sizes, strides), *rest))


@converts(_aten.scatter.value, _aten.scatter.src, _aten.scatter_add.default)
def _scatter(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    head = importer.typed_head(node, None, args["self"])
    shape, written = head["output"].shape, args.get("src", args.get("value"))
    dim, add = args["dim"] % max(len(shape), 1), node.target == _aten.scatter_add.default
    if add and head["output"].dtype != "float32":
        raise importer.unsupported(node, f"it adds {node.meta['val'].dtype}; in C floats can be added at indices")
    index = importer.operand(node, args["index"], "int32")
    source = importer.operand(node, written, head["output"].dtype)
    # Numbers are the same for all indices; an array may be larger than that of the indices.
    strides = ir.row_major(source.shape) if source.shape else (0,) * len(shape)
    steps = ir.row_major(shape)
    head["inputs"] = (*head["inputs"], index, source)
    return ir.Scatter(
        **head,
        access=ir.Access(index.shape, strides),
        result=ir.Access(index.shape, (*steps[:dim], 0, *steps[dim + 1 :])),
        rows=shape[dim],
        stride=steps[dim],
        add=add,
    )


@converts(_aten.copy.default)
def _copy(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    shape = importer.value_of(node).shape
    access = ir.Access.broadcast(importer.operand(node, args["src"]).shape, shape)
    return rearrange(importer, node, args["src"], access)
