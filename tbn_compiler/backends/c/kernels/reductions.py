"""Operations that combine the elements along an axis."""

from __future__ import annotations

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.registry import Context, implements
from tbn_compiler.backends.c.plan import Call, Implementation


@implements(ir.Softmax)
def _softmax(operation: ir.Softmax, context: Context) -> Implementation:
    size, columns = operation.output.size, operation.output.shape[-1]
    call = Call("softmax", (*operation.inputs, operation.output, size // columns, columns))
    return Implementation("softmax", (call,), cost=4 * size)


@implements(ir.SumNeighbours)
def _sum_neighbours(operation: ir.SumNeighbours, context: Context) -> Implementation:
    size, count, inner = operation.output.size, operation.count, operation.inner
    call = Call("sum_neighbours", (*operation.inputs, count, inner, operation.output, size // inner))
    what = "inputs" if inner == 1 else "channels"
    return Implementation(f"sum every {count} neighbouring {what}", (call,), cost=count * size)
