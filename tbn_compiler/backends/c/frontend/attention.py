"""Products of computed matrices, and attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.elementwise import broadcast
from tbn_compiler.backends.c.frontend.importer import Importer
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
    accesses = (ir.Access.whole(result.shape), broadcast(operand.shape, result.shape))
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
    first, second = (broadcast(matrix, (*batch, *matrix[-2:])) for matrix in (left, right))
    if transposed:
        (*outer, n, k), (*steps, row, column) = second.sizes, second.strides
        second = ir.Access((*outer, k, n), (*steps, column, row))
    result = ir.Access.whole((*batch, left[-2], second.sizes[-1]))
    return ir.MatMul(**head, accesses=(first, second), result=result)


@converts(_aten.scaled_dot_product_attention.default)
def _attention(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    if args["dropout_p"]:
        raise importer.unsupported(node, f"dropout_p={args['dropout_p']} is not 0")
    operands = [args["query"], args["key"], args["value"]]
    shapes = [importer.operand(node, operand).shape for operand in operands]
    if any(len(shape) > 4 or shape[:-2] != shapes[0][:-2] for shape in shapes):
        raise importer.unsupported(node, "query, key and value need the same batch and heads, in at most 4 dimensions")
    accesses = [ir.Access.whole((1,) * (4 - len(shape)) + shape) for shape in shapes]
    mask = args["attn_mask"]
    if mask is not None:
        scores = (*accesses[0].sizes[:3], accesses[1].sizes[2])
        mask = importer.additive_mask(node, mask)
        accesses.append(broadcast(importer.operand(node, mask).shape, scores))
        operands.append(mask)
    scale = args["scale"] if args["scale"] is not None else 1 / math.sqrt(shapes[0][-1])
    head = importer.head(node, *operands)
    result = ir.Access.whole((*accesses[0].sizes[:3], accesses[2].sizes[3]))
    return ir.Attention(
        **head, accesses=tuple(accesses), result=result, scale=float(scale), causal=bool(args["is_causal"])
    )
