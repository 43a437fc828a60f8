"""Operations that combine elements: along an axis, of a row, in a window."""

from __future__ import annotations

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.geometry import window_struct
from tbn_compiler.backends.c.kernels.elementwise import typed
from tbn_compiler.backends.c.plan import Call, Implementation
from tbn_compiler.backends.c.registry import Context, implements


@implements(ir.Softmax)
def _softmax(operation: ir.Softmax, context: Context) -> Implementation:
    axis, kernel = operation.axis, "log_softmax" if operation.log else "softmax"
    call = Call(kernel, (*operation.inputs, operation.output, axis.outer, axis.size, axis.inner))
    return Implementation(kernel, (call,), cost=4 * operation.output.size)


@implements(ir.Reduce)
def _reduce(operation: ir.Reduce, context: Context) -> Implementation:
    axis = operation.axis
    call = Call(
        f"reduce_{operation.function}", (*operation.inputs, operation.output, axis.outer, axis.size, axis.inner)
    )
    title = f"{operation.function} of {axis.size}"
    return Implementation(title, (call,), cost=axis.outer * axis.size * axis.inner)


@implements(ir.Norm)
def _norm(operation: ir.Norm, context: Context) -> Implementation:
    size, columns = operation.output.size, operation.columns
    numbers = (size // columns, columns, operation.eps)
    call = Call("norm", (*operation.inputs, operation.weight, operation.bias, operation.output, *numbers))
    return Implementation(f"normalise each {columns}", (call,), cost=6 * size)


@implements(ir.Pool)
def _pool(operation: ir.Pool, context: Context) -> Implementation:
    window = operation.window
    numbers: tuple[int, ...] = ()
    if operation.function == "avg_pool":
        numbers = (int(operation.include_padding), operation.divisor)
    pointers = (*operation.inputs, operation.output)
    call = Call(typed(operation.function, operation), (window_struct(window), operation.planes, *numbers, *pointers))
    height, width = window.kernel
    what = operation.function.removesuffix("_pool")
    return Implementation(f"{what} pool {height} x {width}", (call,), cost=operation.output.size * window.kernel_size)


@implements(ir.Resample)
def _resample(operation: ir.Resample, context: Context) -> Implementation:
    sizes = (*operation.input_size, *operation.output_size)
    call = Call(operation.function, (*operation.inputs, operation.output, operation.planes, *sizes))
    height, width = operation.output_size
    title = f"{operation.function.replace('_', ' ')} to {height} x {width}"
    elements = operation.planes * max(sizes[0] * sizes[1], sizes[2] * sizes[3])
    return Implementation(title, (call,), cost=elements)


@implements(ir.SumNeighbours)
def _sum_neighbours(operation: ir.SumNeighbours, context: Context) -> Implementation:
    size, count, inner = operation.output.size, operation.count, operation.inner
    call = Call("sum_neighbours", (*operation.inputs, count, inner, operation.output, size // inner))
    what = "inputs" if inner == 1 else "channels"
    return Implementation(f"sum every {count} neighbouring {what}", (call,), cost=count * size)
