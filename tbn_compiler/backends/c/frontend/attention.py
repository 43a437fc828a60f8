"""Products of computed matrices, and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
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
    return plus(importer, node, product(importer, node, a, b), addend, args["alpha"], args["beta"])


def plus(
    importer: Importer, node: fx.Node, operation: ir.MatMul, addend: Any, alpha: float = 1, beta: float = 1
) -> list[ir.Operation]:
    """``alpha`` times a product plus ``beta`` times an array, which is not read if that is 0."""
    result, layer = operation.output, operation.layer
    between = importer.temporary(node, "product", result.shape)
    operations: list[ir.Operation] = [replace(operation, name=between.name, output=between)]
    (operand,) = importer.head(node, addend)["inputs"]
    terms: list[ir.Operand] = []
    for name, factor, term in (("scaled", alpha, between), ("addend", beta, operand)):
        if factor != 1:
            scaled = importer.temporary(node, name, term.shape)
            scale = ir.Unary(scaled.name, layer, (term,), scaled, "multiply_scalar", (float(factor),))
            operations.append(scale)
            term = scaled
        terms.append(term)
    if beta == 0:
        return [*operations[:-1], ir.Alias(node.name, layer, (terms[0],), result)]
    accesses = tuple(ir.Access.broadcast(term.shape, result.shape) for term in terms)
    return [*operations, ir.Binary(node.name, layer, (terms[0], terms[1]), result, accesses, "add")]


@converts(_aten.bilinear.default)
def _bilinear(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    """``y[o] = a @ W[o] @ b``: a product of rows with each matrix, and of what that gives with the other rows."""
    head = importer.head(node, args["input1"], args["weight"], args["input2"])
    (a, weight, b), output = head["inputs"], head["output"]
    rows, (outputs, n, m) = math.prod(a.shape[:-1]), weight.shape
    middle = importer.temporary(node, "middle", (rows, outputs, 1, m))
    first = ir.MatMul(
        middle.name,
        head["layer"],
        (a, weight),
        middle,
        (ir.Access((rows, outputs, 1, n), (n, 0, 0, 1)), ir.Access((rows, outputs, n, m), (0, n * m, m, 1))),
        ir.Access.whole(middle.shape),
    )
    access = ir.Access((rows, 1, m, 1), (m, 0, 1, 0))
    accesses = (ir.Access((rows, 1, outputs, m), (outputs * m, 0, m, 1)), access)
    result = ir.Access.whole((rows, 1, outputs, 1))
    second = ir.MatMul(head["name"], head["layer"], (middle, b), output, accesses, result)
    if args["bias"] is None:
        return first, second
    return first, *plus(importer, node, second, args["bias"])


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
