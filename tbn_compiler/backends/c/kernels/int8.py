"""Operations on int8 activations, and the ways in and out."""

from __future__ import annotations

import math

import numpy as np

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.element_instances import lookup_name
from tbn_compiler.backends.c.kernels.elementwise import moves, nest
from tbn_compiler.backends.c.plan import At, Call, Implementation
from tbn_compiler.backends.c.registry import Context, implements
from tbn_compiler.backends.c.tables import BYTES
from tbn_compiler.backends.c.tiled_int8 import fixed_point

_FACTOR_BITS = 22  # of the larger factor in a sum: two products of it with 127, and a half, stay within 31 bits


@implements(ir.Quantize)
def _quantize(operation: ir.Quantize, context: Context) -> Implementation:
    factor = float(np.float32(1) / np.float32(operation.scale))
    size = operation.output.size
    call = Call("quantize", (*operation.inputs, factor, *operation.limits, operation.output, size))
    return context.implementation(f"to int8, steps of {operation.scale:.3g}", (call,), {"quantize": size})


@implements(ir.Dequantize)
def _dequantize(operation: ir.Dequantize, context: Context) -> Implementation:
    size = operation.output.size
    call = Call("dequantize", (*operation.inputs, float(np.float32(operation.scale)), operation.output, size))
    return context.implementation(f"to float, steps of {operation.scale:.3g}", (call,), {"dequantize": size})


@implements(ir.Lookup)
def _lookup(operation: ir.Lookup, context: Context) -> Implementation:
    (source,), table, output, access = operation.inputs, operation.table, operation.output, operation.access
    assert isinstance(source, ir.Value)
    dim, places = operation.dim, table.shape[0]
    axis = ir.Axis.of(access.sizes, dim) if dim is not None else ir.Axis(1, 1, output.size)
    work: dict[str, float] = {"int8_lookup": output.size}
    tables_by_place = At(table, inner_stride=BYTES)
    if operation.whole and axis.inner > 1:
        x, y = (At(value, stride=places * axis.inner, inner_stride=axis.inner) for value in (source, output))
        kernel = lookup_name(source.dtype, strided=False)
        call = Call(kernel, (x, tables_by_place, y, axis.inner), repeat=axis.outer, inner=places)
    else:
        made = ir.Access.whole(access.sizes)
        loops = nest(operation.layer, _one_place(access, dim), _one_place(made, dim))
        steps = (0, 0) if dim is None else (access.strides[dim], made.strides[dim])
        x, y = At(source, access.offset, inner_stride=steps[0]), At(output, inner_stride=steps[1])
        call = Call(lookup_name(source.dtype, strided=True), (loops, x, tables_by_place, y), inner=places)
        work |= moves("strided_copy_int8", loops, places)
    return context.implementation(f"{operation.title} by table", (call,), work)


def _one_place(access: ir.Access, dim: int | None) -> ir.Access:
    """What an access reads at one place of a dimension."""
    kept = [d for d in range(len(access.sizes)) if d != dim]
    return ir.Access(tuple(access.sizes[d] for d in kept), tuple(access.strides[d] for d in kept))


@implements(ir.RescaledSum)
def _rescaled_sum(operation: ir.RescaledSum, context: Context) -> Implementation:
    size = operation.output.size
    ratios = [scale / operation.output_scale for scale in operation.scales]
    shift = max(min(_FACTOR_BITS - 1 - math.floor(math.log2(max(ratios))), 30), 0)
    factors = [min(round(ratio * 2**shift), 2**_FACTOR_BITS) for ratio in ratios]
    numbers = (*factors, shift, *operation.limits)
    call = Call("int8_sum", (*operation.inputs, *numbers, operation.output, size))
    return context.implementation("add in int8", (call,), {"int8_sum": size})


@implements(ir.IntegerProduct)
def _integer_product(operation: ir.IntegerProduct, context: Context) -> Implementation:
    outer, inner = operation.output.size // operation.inner, operation.inner
    ratio = np.array([operation.scale / operation.output_scale])
    factor, multipliers, _, shift = fixed_point(ratio, np.zeros(1), ir.INT8_LIMIT**2)
    numbers = (factor, int(multipliers[0]), shift, *operation.limits)
    call = Call("int8_product", (*operation.inputs, *numbers, operation.output, outer, inner))
    work = {"int8_product": operation.output.size, "int8_product.number": outer}
    return context.implementation("multiply in int8", (call,), work)


@implements(ir.IntegerMean)
def _integer_mean(operation: ir.IntegerMean, context: Context) -> Implementation:
    axis = operation.axis
    sizes = (axis.outer, axis.size, axis.inner)
    title = f"mean of {axis.size} in int8"
    pointers = (*operation.inputs,)
    if operation.output_scale is None:
        scale = float(np.float32(operation.scale / axis.size))
        call = Call("int8_mean", (*pointers, scale, operation.output, *sizes))
        return context.implementation(title, (call,), _work("int8_mean", axis))
    ratio = np.array([operation.scale / (operation.output_scale * axis.size)])
    factor, multipliers, _, shift = fixed_point(ratio, np.zeros(1), ir.INT8_LIMIT * axis.size)
    numbers = (factor, int(multipliers[0]), shift, *operation.limits)
    call = Call("int8_mean_int8", (*pointers, *numbers, operation.output, *sizes))
    return context.implementation(title, (call,), _work("int8_mean_int8", axis))


def _work(kernel: str, axis: ir.Axis) -> dict[str, float]:
    return {kernel: axis.outer * axis.size * axis.inner, f"{kernel}.result": axis.outer * axis.inner}
