"""Products of two computed matrices."""

from __future__ import annotations

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.kernels.elementwise import merge_dimensions
from tbn_compiler.backends.c.plan import At, Call, Implementation, Struct, Workspace
from tbn_compiler.backends.c.registry import Context, implements

MAX_BATCH_RANK = 3  # leading dimensions of a product, once neighbouring ones are merged


@implements(ir.MatMul)
def _matmul(operation: ir.MatMul, context: Context) -> Implementation:
    a, b = operation.accesses
    result = operation.result
    (m, k), n = a.sizes[-2:], b.sizes[-1]
    batch, strides = merge_dimensions(*(_leading(access) for access in (a, b, result)))
    fill = MAX_BATCH_RANK - len(batch)
    fields: tuple[tuple[str, tuple[int, ...] | int], ...] = (
        ("batch", (1,) * fill + batch),
        ("rows", m),
        ("inner", k),
        ("columns", n),
        *(
            (name, (0,) * fill + stride + access.strides[-2:])
            for name, stride, access in zip("aby", strides, (a, b, result), strict=True)
        ),
    )
    shape = f"{' x '.join(map(str, (*batch, m, k)))} by {k} x {n}"
    struct = Struct("matmul_sizes", f"{operation.layer}_matmul", f"product {shape}", fields)
    pointers = [At(operand, access.offset) for operand, access in zip(operation.inputs, (a, b), strict=True)]
    call = Call("matmul", (struct, *pointers, At(operation.output, result.offset)))
    return Implementation(f"matrix product {shape}", (call,), cost=operation.output.size * k)


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
    call = Call("attention", (struct, *pointers, Workspace("scores", keys)))
    cost = batch * heads * queries * keys * (width + value_width + 4)
    return Implementation(title, (call,), cost=cost)
