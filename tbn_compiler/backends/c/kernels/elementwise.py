"""Operations that treat each element alike."""

from __future__ import annotations

import math

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.element_instances import typed
from tbn_compiler.backends.c.plan import At, Call, Implementation, Struct
from tbn_compiler.backends.c.registry import Context, implements
from tbn_compiler.errors import ExportError

MAX_RANK = 6  # of an access, once neighbouring dimensions are merged; the size of the arrays in its structure


@implements(ir.Copy)
def _copy(operation: ir.Copy, context: Context) -> Implementation:
    call = Call(typed("copy", operation.output.dtype), (*operation.inputs, operation.output, operation.output.size))
    return context.implementation("copy", (call,), {"copy": operation.output.nbytes / 4})


@implements(ir.Convert)
def _convert(operation: ir.Convert, context: Context) -> Implementation:
    (source,), size = operation.inputs, operation.output.size
    kernel = typed(f"to_{operation.output.dtype}", source.dtype)
    call = Call(kernel, (source, operation.output, size))
    return context.implementation(f"{source.dtype} to {operation.output.dtype}", (call,), {kernel: size})


@implements(ir.Unary)
def _unary(operation: ir.Unary, context: Context) -> Implementation:
    size, parameters = operation.output.size, operation.parameters
    kernel = typed(operation.function, operation.inputs[0].dtype)
    call = Call(kernel, (*operation.inputs, *parameters, operation.output, size))
    title = operation.function.removesuffix("_scalar")
    title = " ".join([title, *(f"{number:g}" for number in parameters)])
    return context.implementation(title, (call,), {kernel: size})


@implements(ir.Binary)
def _binary(operation: ir.Binary, context: Context) -> Implementation:
    a, b = operation.accesses
    size = operation.output.size
    pointers = (At(operation.inputs[0], a.offset), At(operation.inputs[1], b.offset), operation.output)
    kernel = typed(operation.function, operation.inputs[0].dtype)
    if a.in_order and b.in_order:
        call, work = Call(kernel, (*pointers, size)), {}
    else:
        loops = nest(operation.layer, a, b, _result(a))
        call, work = Call(f"broadcast_{kernel}", (loops, *pointers)), moves("broadcast", loops)
    return context.implementation(operation.function, (call,), {kernel: size, **work})


@implements(ir.Select)
def _select(operation: ir.Select, context: Context) -> Implementation:
    size, accesses = operation.output.size, operation.accesses
    pointers = [At(x, access.offset) for x, access in zip(operation.inputs, accesses, strict=True)]
    kernel = typed("select", operation.output.dtype)
    # What is read is one element for all results, or one for each of them.
    steps = [int(any(access.strides)) for access in accesses]
    if accesses[0].in_order and all(access.in_order or not step for access, step in zip(accesses, steps, strict=True)):
        call = Call(kernel, (*pointers, *steps[1:], operation.output, size))
        return context.implementation("select", (call,), {"select": size})
    loops = nest(operation.layer, *accesses, _result(accesses[0]))
    call = Call(f"broadcast_{kernel}", (loops, *pointers, operation.output))
    return context.implementation("select", (call,), {"select": size, **moves("broadcast", loops)})


@implements(ir.ChannelAffine)
def _channel_affine(operation: ir.ChannelAffine, context: Context) -> Implementation:
    size, channels = operation.output.size, operation.scale.size
    samples = size // (channels * operation.inner)
    pointers = (*operation.inputs, operation.scale, operation.shift, operation.output)
    call = Call("channel_affine", (*pointers, samples, channels, operation.inner))
    return context.implementation("scale and shift each channel", (call,), {"channel_affine": size})


@implements(ir.Strided)
def _strided(operation: ir.Strided, context: Context) -> Implementation:
    access, (source,) = operation.access, operation.inputs
    loops = nest(operation.layer, access, _result(access))
    call = Call(typed("strided_copy", operation.output.dtype), (loops, At(source, access.offset), operation.output))
    return context.implementation("rearrange", (call,), moves(call.kernel, loops))


@implements(ir.Pad)
def _pad(operation: ir.Pad, context: Context) -> Implementation:
    size, result = operation.output.size, operation.result
    source = ir.Access.whole(result.sizes)
    dtype = operation.output.dtype
    value = operation.value if dtype == "float32" else int(operation.value)
    fill = Call(typed("fill", dtype), (value, operation.output, size))
    loops = nest(operation.layer, source, result)
    copy = Call(typed("strided_copy", dtype), (loops, *operation.inputs, At(operation.output, result.offset)))
    work = {_unit(fill.kernel): size, **moves(copy.kernel, loops)}
    return context.implementation(f"pad with {operation.value:g}", (fill, copy), work)


@implements(ir.Concat)
def _concat(operation: ir.Concat, context: Context) -> Implementation:
    width = sum(operation.blocks)
    calls, offset = [], 0
    for source, block in zip(operation.inputs, operation.blocks, strict=True):
        arguments = (source, At(operation.output, offset), operation.outer, block, width)
        calls.append(Call(typed("copy_blocks", operation.output.dtype), arguments))
        offset += block
    work = {"copy": operation.output.nbytes / 4, "copy.block": operation.outer * len(calls)}
    return context.implementation(f"concatenate {len(calls)}", tuple(calls), work)


def moves(kernel: str, loops: Struct, times: int = 1) -> dict[str, float]:
    """The work of calls of a kernel that follows loops: for each element, and each end of an innermost loop."""
    unit = _unit(kernel)
    ((_, sizes),) = [field for field in loops.fields if field[0] == "size"]
    assert isinstance(sizes, tuple)
    return {unit: times * math.prod(sizes), f"{unit}.row": times * math.prod(sizes[:-1])}


def _unit(kernel: str) -> str:
    """The unit of what a kernel moves: elements of equal sizes cost the same."""
    return kernel.replace("_int32", "").replace("_bool", "_int8").replace("_uint8", "_int8")


def _result(access: ir.Access) -> ir.Access:
    """The result of an operation: all elements in order."""
    return ir.Access.whole(access.sizes)


def nest(layer: str, *accesses: ir.Access) -> Struct:
    """``nest2``, ``nest3`` or ``nest4``: loops over so many arrays of equal sizes, the last of which is written.

    Dimensions that are neighbours in all arrays become one.

    Raises:
        ExportError: there are too many dimensions all the same.
    """
    sizes, strides = merge_dimensions(*accesses)
    fill = MAX_RANK - len(sizes)
    if fill < 0:
        raise ExportError(f"layer {layer!r} moves {len(sizes)} dimensions at once: in C there are up to {MAX_RANK}")
    names = {2: ("x", "y"), 3: ("a", "b", "y"), 4: ("shown", "a", "b", "y")}[len(accesses)]
    fields = (
        ("size", (1,) * fill + sizes),
        *((name, (0,) * fill + steps) for name, steps in zip(names, strides, strict=True)),
    )
    title = f"loops over {' x '.join(map(str, sizes)) or '1'} elements, and strides"
    return Struct(f"nest{len(accesses)}", f"{layer}_loops", title, fields)


def merge_dimensions(*accesses: ir.Access) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The sizes of accesses, and the strides of each one, with as few dimensions as possible."""
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in accesses]
    for d, size in enumerate(accesses[0].sizes):
        if size == 1:
            continue
        steps = [access.strides[d] for access in accesses]
        if sizes and all(stride[-1] == step * size for stride, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for stride, step in zip(strides, steps, strict=True):
                stride[-1] = step
        else:
            sizes.append(size)
            for stride, step in zip(strides, steps, strict=True):
                stride.append(step)
    return tuple(sizes), [tuple(stride) for stride in strides]
