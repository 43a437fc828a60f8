"""Products of two computed matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.costs import round_up
from tbn_compiler.backends.c.float_instances import matmul_name
from tbn_compiler.backends.c.kernels.elementwise import merge_dimensions
from tbn_compiler.backends.c.plan import At, Call, Implementation, Struct, Workspace
from tbn_compiler.backends.c.registry import Context, implements

MAX_BATCH_RANK = 3  # leading dimensions of a product, once neighbouring ones are merged


@implements(ir.MatMul)
def _matmul(operation: ir.MatMul, context: Context) -> Implementation:
    operands = list(zip(operation.inputs, operation.accesses, strict=True))
    small = _product(operation, context, operands, operation.result, "matmul", (1, 1))
    (*_, rows, columns) = operation.result.sizes
    if max(rows, columns) < 4:
        return small
    result = operation.result
    if rows < 4:
        # At least four rows are taken at once: the same product is (B^T A^T)^T.
        operands = [(operand, _transposed(access)) for operand, access in reversed(operands)]
        result, columns = _transposed(result), rows
    at_once = min(columns, 2)
    return context.fastest(small, _product(operation, context, operands, result, matmul_name(at_once), (4, at_once)))


def _product(
    operation: ir.MatMul,
    context: Context,
    operands: Sequence[tuple[ir.Operand, ir.Access]],
    result: ir.Access,
    kernel: str,
    at_once: tuple[int, int],
) -> Implementation:
    """A kernel that takes so many rows and columns at once."""
    accesses = [access for _, access in operands]
    (m, k), n = accesses[0].sizes[-2:], accesses[1].sizes[-1]
    batch, strides = merge_dimensions(*(_leading(access) for access in (*accesses, result)))
    fill = MAX_BATCH_RANK - len(batch)
    fields: tuple[tuple[str, tuple[int, ...] | int], ...] = (
        ("batch", (1,) * fill + batch),
        ("rows", m),
        ("inner", k),
        ("columns", n),
        *(
            (name, (0,) * fill + stride + access.strides[-2:])
            for name, stride, access in zip("aby", strides, (*accesses, result), strict=True)
        ),
    )
    title = f"product {' x '.join(map(str, (*batch, m, k)))} by {k} x {n}"
    struct = Struct("matmul_sizes", f"{operation.layer}_matmul", title, fields)
    pointers = [At(operand, access.offset) for operand, access in operands]
    call = Call(kernel, (struct, *pointers, At(operation.output, result.offset)))
    results = math.prod(batch) * round_up(m, at_once[0]) * round_up(n, at_once[1])
    return context.implementation(f"matrix {title}", (call,), {kernel: results * k, f"{kernel}.result": results})


def _transposed(access: ir.Access) -> ir.Access:
    """The matrix with rows and columns exchanged."""
    (*sizes, m, n), (*strides, down, right) = access.sizes, access.strides
    return ir.Access((*sizes, n, m), (*strides, right, down), access.offset)


def _leading(access: ir.Access) -> ir.Access:
    return ir.Access(access.sizes[:-2], access.strides[:-2])


@implements(ir.Attention)
def _attention(operation: ir.Attention, context: Context) -> Implementation:
    q, k, v = operation.accesses[:3]
    batch, heads, queries, width = q.sizes
    keys, value_width = v.sizes[-2:]
    mask = operation.accesses[3] if len(operation.accesses) > 3 else None
    fields = (
        ("size", (batch, heads, queries, keys)),
        ("width", width),
        ("value_width", value_width),
        ("q", q.strides),
        ("k", k.strides),
        ("v", v.strides),
        ("mask", mask.strides if mask else (0, 0, 0, 0)),
        ("y", operation.result.strides),
        ("scale", operation.scale),
        ("causal", int(operation.causal)),
    )
    title = f"attention of {queries} on {keys} tokens, {heads} heads of {width}"
    struct = Struct("attention_sizes", f"{operation.layer}_attention", title, fields)
    operands = [At(x, access.offset) for x, access in zip(operation.inputs, operation.accesses, strict=True)]
    pointers = (*operands, *([] if mask else [None]), At(operation.output, operation.result.offset))
    arguments = (struct, *pointers, Workspace("scores", keys))
    # Keys that a query sees, over all queries.
    seen = [min(query + 1, keys) if operation.causal else keys for query in range(queries)]
    rows, pairs = batch * heads, batch * heads * sum(seen)

    def implementation(kernel: str, at_once: int) -> Implementation:
        scores = rows * sum(round_up(count, at_once) for count in seen)
        work = {
            kernel: scores * width + pairs * round_up(value_width, at_once),
            "attention.pair": pairs,
            "attention.query": rows * queries,
            "attention.result": rows * queries * value_width,
        }
        return context.implementation(title, (Call(kernel, arguments),), work)

    small = implementation("attention", 1)
    side_by_side = {access.strides[-1] for access in (q, k, v, operation.result)} == {1}
    if min(keys, value_width) < 4 or not side_by_side:
        return small
    return context.fastest(small, implementation("attention_by_4", 4))
