"""Operations that combine elements: along an axis, of a row, in a window."""

from __future__ import annotations

import math

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.element_instances import typed
from tbn_compiler.backends.c.geometry import inside, window_struct
from tbn_compiler.backends.c.plan import Call, Implementation
from tbn_compiler.backends.c.registry import Context, implements


@implements(ir.Softmax)
def _softmax(operation: ir.Softmax, context: Context) -> Implementation:
    axis, kernel = operation.axis, "log_softmax" if operation.log else "softmax"
    call = Call(kernel, (*operation.inputs, operation.output, axis.outer, axis.size, axis.inner))
    work = {kernel: operation.output.size, f"{kernel}.row": axis.outer * axis.inner}
    return context.implementation(kernel, (call,), work)


@implements(ir.Reduce)
def _reduce(operation: ir.Reduce, context: Context) -> Implementation:
    axis, kernel = operation.axis, typed(f"reduce_{operation.function}", operation.inputs[0].dtype)
    sizes = (axis.outer, axis.size, axis.inner)
    call = Call(kernel, (*operation.inputs, *operation.parameters, operation.output, *sizes))
    title = f"{operation.function} of {axis.size}"
    results = axis.outer * axis.inner
    return context.implementation(title, (call,), {kernel: results * axis.size, "reduce.result": results})


@implements(ir.Scan)
def _scan(operation: ir.Scan, context: Context) -> Implementation:
    axis, kernel = operation.axis, typed(operation.function, operation.inputs[0].dtype)
    call = Call(kernel, (*operation.inputs, operation.output, axis.outer, axis.size, axis.inner))
    title = f"{operation.function.replace('_', ' ')} of {axis.size}"
    return context.implementation(title, (call,), {kernel: operation.output.size})


@implements(ir.Rank)
def _rank(operation: ir.Rank, context: Context) -> Implementation:
    axis, ranks = operation.axis, operation.ranks
    sizes = (axis.outer, axis.size, axis.inner)
    call = Call("rank", (*operation.inputs, int(operation.largest), ranks, operation.output, *sizes))
    title = f"the {ranks} {'largest' if operation.largest else 'smallest'} of {axis.size}"
    return context.implementation(title, (call,), {"rank": axis.outer * axis.inner * ranks * axis.size})


@implements(ir.Norm)
def _norm(operation: ir.Norm, context: Context) -> Implementation:
    size, columns = operation.output.size, operation.columns
    numbers = (size // columns, columns, operation.eps)
    call = Call("norm", (*operation.inputs, operation.weight, operation.bias, operation.output, *numbers))
    return context.implementation(f"normalise each {columns}", (call,), {"norm": size, "norm.row": size // columns})


@implements(ir.Pool)
def _pool(operation: ir.Pool, context: Context) -> Implementation:
    window = operation.window
    numbers: tuple[int, ...] = ()
    if operation.function == "avg_pool":
        numbers = (int(operation.include_padding), operation.divisor)
    pointers = (*operation.inputs, operation.output)
    call = Call(
        typed(operation.function, operation.output.dtype),
        (window_struct(window), operation.planes, *numbers, *pointers),
    )
    height, width = window.kernel
    title = f"{operation.function.removesuffix('_pool')} pool {height} x {width}"
    if operation.output.dtype == "int8":
        elements = operation.output.size * window.kernel_size
        return context.implementation(
            title, (call,), {call.kernel: elements, f"{call.kernel}.result": operation.output.size}
        )
    rows, columns = (inside(window, axis) for axis in (0, 1))
    work = {
        operation.function: operation.planes * sum(rows) * sum(columns),
        f"{operation.function}.line": operation.planes * sum(rows) * len(columns),
        f"{operation.function}.result": operation.output.size,
        "window_inside": operation.planes * len(rows) * sum(count != window.kernel[1] for count in columns),
    }
    return context.implementation(title, (call,), work)


@implements(ir.Resample)
def _resample(operation: ir.Resample, context: Context) -> Implementation:
    sizes = (*operation.input_size, *operation.output_size)
    call = Call(
        operation.function, (*operation.inputs, operation.output, operation.planes, *sizes, *operation.parameters)
    )
    height, width = operation.output_size
    title = f"{operation.function.replace('_', ' ')} to {height} x {width}"
    elements = operation.output.size
    if operation.function.startswith("adaptive"):
        pairs = zip(operation.input_size, operation.output_size, strict=True)
        elements = operation.planes * math.prod(_covered(*pair) for pair in pairs)
    work = {operation.function: elements, f"{operation.function}.result": operation.output.size}
    if operation.function == "resize_linear":  # what lies around a place is found once for all images
        work = {operation.function: elements, "resize_linear.place": height * width}
    return context.implementation(title, (call,), work)


def _covered(inputs: int, outputs: int) -> int:
    """Inputs under the windows of adaptive pooling along one side, those under two windows twice."""
    return sum(-(-(i + 1) * inputs // outputs) - i * inputs // outputs for i in range(outputs))


@implements(ir.SumNeighbours)
def _sum_neighbours(operation: ir.SumNeighbours, context: Context) -> Implementation:
    size, count, inner = operation.output.size, operation.count, operation.inner
    call = Call("sum_neighbours", (*operation.inputs, count, inner, operation.output, size // inner))
    what = "inputs" if inner == 1 else "channels"
    work = {"sum_neighbours": count * size, "sum_neighbours.result": size}
    return context.implementation(f"sum every {count} neighbouring {what}", (call,), work)
