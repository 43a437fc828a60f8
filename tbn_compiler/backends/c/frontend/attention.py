"""Products of computed matrices, and attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.importer import Importer, layer_of
from tbn_compiler.backends.c.frontend.registry import Arguments, converts

_aten = torch.ops.aten


@converts(_aten.matmul.default)
def _matmul(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return product(importer, node, args["self"], args["other"])


@converts(_aten.mm.default, _aten.bmm.default)
def _bmm(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return product(importer, node, args["self"], args["mat2"])


@converts(_aten.mv.default)
def _mv(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return product(importer, node, args["self"], args["vec"])


@converts(_aten.addmm.default)
def _addmm(importer: Importer, node: fx.Node, args: Arguments) -> list[ir.Operation]:
    return _plus_product(importer, node, args["self"], args["mat1"], args["mat2"], args)


@converts(_aten.baddbmm.default)
def _baddbmm(importer: Importer, node: fx.Node, args: Arguments) -> list[ir.Operation]:
    return _plus_product(importer, node, args["self"], args["batch1"], args["batch2"], args)


def _plus_product(
    importer: Importer, node: fx.Node, addend: Any, a: Any, b: Any, args: Arguments
) -> list[ir.Operation]:
    if args["alpha"] != 1 or args["beta"] != 1:
        raise importer.unsupported(node, f"alpha={args['alpha']}, beta={args['beta']} are not 1")
    operation = product(importer, node, a, b)
    result = operation.output
    between = importer.temporary(node, "product", result.shape)
    (operand,) = importer.head(node, addend)["inputs"]
    accesses = (ir.Access.whole(result.shape), ir.Access.broadcast(operand.shape, result.shape))
    head = (node.name, operation.layer, (between, operand), result)
    first = ir.MatMul(between.name, operation.layer, operation.inputs, between, operation.accesses, operation.result)
    return [first, ir.Binary(*head, function="add", accesses=accesses)]


def product(importer: Importer, node: fx.Node, a: Any, b: Any, transposed: bool = False) -> ir.MatMul:
    """A product as ``torch.matmul`` defines it: vectors are rows on the left, columns on the right.

    With ``transposed``, ``b`` is a matrix ``[n, k]``.
    """
    head = importer.head(node, a, b)
    left, right = (operand.shape for operand in head["inputs"])
    left = left if len(left) > 1 else (1, *left)
    right = right if len(right) > 1 else (*right, 1)
    batch = tuple(torch.broadcast_shapes(left[:-2], right[:-2]))
    first, second = (ir.Access.broadcast(matrix, (*batch, *matrix[-2:])) for matrix in (left, right))
    if transposed:
        (*outer, n, k), (*steps, row, column) = second.sizes, second.strides
        second = ir.Access((*outer, k, n), (*steps, column, row))
    result = ir.Access.whole((*batch, left[-2], second.sizes[-1]))
    return ir.MatMul(**head, accesses=(first, second), result=result)


@converts(_aten.scaled_dot_product_attention.default)
def _attention(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    if args["dropout_p"]:
        raise importer.unsupported(node, f"dropout_p={args['dropout_p']} is not 0")
    operands = [importer.operand(node, args[name], "float32") for name in ("query", "key", "value")]
    shapes = [_four(operand.shape) for operand in operands]
    batch, heads, queries, width = shapes[0]
    groups = max(shape[1] for shape in shapes[1:]) if args["enable_gqa"] else heads
    if any(shape[0] not in (1, batch) or shape[1] not in (1, groups) for shape in shapes[1:]) or heads % groups:
        raise importer.unsupported(node, "query, key and value need the same batch and heads, or 1, but for enable_gqa")
    sizes = [(batch, count, *shape[2:]) for shape, count in zip(shapes, (heads, groups, groups), strict=True)]
    accesses = [ir.Access.broadcast(shape, size) for shape, size in zip(shapes, sizes, strict=True)]
    if args["attn_mask"] is not None:
        mask = importer.operand(node, importer.additive_mask(node, args["attn_mask"]), "float32")
        shape = (1,) * (4 - len(mask.shape)) + mask.shape
        if len(shape) > 4:
            raise importer.unsupported(node, "a mask has at most 4 dimensions")
        operands.append(mask)
        accesses.append(ir.Access.broadcast(shape, (batch, heads, queries, shapes[1][2])))
    result = ir.Access.whole((batch, heads, queries, shapes[2][3]))
    if groups != heads:
        for index, access in enumerate(accesses):
            operands[index], accesses[index] = _grouped(importer, node, operands[index], access, groups)
        result = ir.Access.whole((batch * groups, heads // groups, *result.sizes[2:]))
    scale = args["scale"] if args["scale"] is not None else 1 / math.sqrt(width)
    head = importer.head(node, *operands)
    return ir.Attention(
        **head, accesses=tuple(accesses), result=result, scale=float(scale), causal=bool(args["is_causal"])
    )


def _four(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape as batch, heads, tokens and features."""
    shape = (1,) * (4 - len(shape)) + shape
    return math.prod(shape[:-3]), *shape[-3:]


def _grouped(
    importer: Importer, node: fx.Node, operand: ir.Operand, access: ir.Access, groups: int
) -> tuple[ir.Operand, ir.Access]:
    """An operand whose batch is samples times groups, and whose heads are those of a group; keys have one for all.

    It is copied where one stride does not lead from sample to sample and from group to group.
    """
    (batch, heads, *sizes), (sample, step, *strides) = access.sizes, access.strides
    each = heads // groups
    if batch > 1 and sample != groups * each * step:
        copy = importer.temporary(node, f"{operand.name}_copy", access.sizes)
        importer.add_before(ir.Strided(copy.name, layer_of(node), (operand,), copy, access))
        return _grouped(importer, node, copy, ir.Access.whole(access.sizes), groups)
    across = (step * each, step if each > 1 else 0)
    return operand, ir.Access((batch * groups, each, *sizes), (*across, *strides), access.offset)
