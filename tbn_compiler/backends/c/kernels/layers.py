"""Linear layers with float weights, and rows of tables."""

from __future__ import annotations

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.costs import round_up
from tbn_compiler.backends.c.element_instances import typed
from tbn_compiler.backends.c.float_instances import linear_name
from tbn_compiler.backends.c.kernels.elementwise import nest
from tbn_compiler.backends.c.plan import At, Call, Implementation
from tbn_compiler.backends.c.registry import Context, implements


@implements(ir.Linear)
def _linear(operation: ir.Linear, context: Context) -> Implementation:
    out_features, in_features = operation.weight.shape
    (source,), vectors = operation.inputs, operation.output.size // out_features
    title = f"float linear {in_features} -> {out_features}{layer_suffix(operation.bias, operation.relu)}"
    arguments = (operation.weight, operation.bias, in_features, out_features)
    relu = int(operation.relu)

    def implementation(call: Call, results: int) -> Implementation:
        work = {call.kernel: results * in_features, f"{call.kernel}.result": results}
        return context.implementation(title, (call,), work)

    pointers = (At(source, stride=in_features), At(operation.output, stride=out_features))
    small = implementation(Call("linear", (*arguments, relu, *pointers), repeat=vectors), vectors * out_features)
    if out_features < 4:
        return small
    at_once = min(vectors, 2)
    several = (vectors,) if at_once > 1 else ()
    call = Call(linear_name(at_once), (*arguments, *several, relu, source, operation.output))
    return context.fastest(small, implementation(call, round_up(out_features, 4) * round_up(vectors, at_once)))


@implements(ir.Gather)
def _gather(operation: ir.Gather, context: Context) -> Implementation:
    indices, table = operation.inputs
    kernel = typed("gather", operation.output.dtype)
    sizes = (operation.outer, indices.size, operation.rows, operation.columns)
    call = Call(kernel, (indices, table, operation.output, *sizes))
    what = "number" if operation.columns == 1 else f"{operation.columns} numbers"
    title = f"look up {what} in {operation.rows} rows"
    work = {"copy": operation.output.nbytes / 4, "copy.block": operation.outer * indices.size}
    return context.implementation(title, (call,), work)


@implements(ir.Pick)
def _pick(operation: ir.Pick, context: Context) -> Implementation:
    indices, array = operation.inputs
    access, kernel = operation.access, typed("pick", operation.output.dtype)
    loops = nest(operation.layer, access, ir.Access.whole(access.sizes))
    numbers = (operation.rows, operation.stride)
    call = Call(kernel, (loops, indices, At(array, access.offset), *numbers, operation.output))
    work = {"strided_copy": 2 * operation.output.size}
    return context.implementation(f"pick one of {operation.rows} for each result", (call,), work)


@implements(ir.Scatter)
def _scatter(operation: ir.Scatter, context: Context) -> Implementation:
    array, indices, written = operation.inputs
    dtype, size = operation.output.dtype, operation.output.size
    loops = nest(operation.layer, operation.access, operation.result)
    pointers = (indices, At(written, operation.access.offset), operation.rows, operation.stride)
    kernel = "scatter_add" if operation.add else typed("scatter", dtype)
    calls = (
        Call(typed("copy", dtype), (array, operation.output, size)),
        Call(kernel, (loops, *pointers, At(operation.output, operation.result.offset))),
    )
    work = {"copy": operation.output.nbytes / 4, "strided_copy": 2 * indices.size}
    return context.implementation(f"{'add to' if operation.add else 'write'} one of {operation.rows}", calls, work)


def layer_suffix(bias: ir.Constant | None, relu: bool) -> str:
    """What a title says of a layer's bias and activation."""
    return f"{', bias' if bias else ''}{', ReLU' if relu else ''}"
