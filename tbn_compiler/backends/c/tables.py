"""Functions of bytes as tables: what a chain of operations makes of each of the 256 numbers that a byte may hold.

The numbers go through PyTorch's own operators in float32, so that a table holds what PyTorch computes, bit for bit.
Operations with constants that differ along one axis, as the normalisation of an image's colours, give a table for each
place of that axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tbn_compiler.backends.c import ir

BYTES = 256
# Tables of 256 bytes that a function may take: colours and a few sensors, not hundreds of features.
_MOST_TABLES = 16


@dataclass(frozen=True)
class Function:
    """What one operation does with each element.

    Attributes:
        apply: from numbers ``[places, 256]``, or ``[1, 256]``, to such.
        axis: along which it differs from place to place; ``None``: it is the same everywhere.
        affine: whether it is a factor and an addend.
    """

    apply: Callable[[Tensor], Tensor]
    axis: ir.Axis | None = None
    affine: bool = False


def function_of(operation: ir.Operation, operand: ir.Operand) -> Function | None:
    """The function of ``operand`` that an operation computes; ``None`` where it is no function of single elements."""
    match operation:
        case ir.Unary(function=name, parameters=parameters) if name in _FUNCTIONS:
            return Function(lambda x: _FUNCTIONS[name](x, *parameters), affine=name in _AFFINE)
        case ir.ChannelAffine(scale=scale, shift=shift, inner=inner):
            axis = ir.Axis(operation.output.size // (scale.size * inner), scale.size, inner)
            factor, addend = (torch.from_numpy(value.array.copy()).reshape(-1, 1) for value in (scale, shift))
            return Function(lambda x: x * factor + addend, axis, affine=True)
        case ir.Binary(function=name) if name in _BINARY:
            return _with_constant(operation, operand, _BINARY[name])
    return None


def _with_constant(
    operation: ir.Binary, operand: ir.Operand, function: Callable[[Tensor, Tensor], Tensor]
) -> Function | None:
    """A function of an element and of a constant that differs along one axis at most."""
    place = operation.inputs.index(operand)
    constant, access = operation.inputs[1 - place], operation.accesses[1 - place]
    own = operation.accesses[place]
    if not isinstance(constant, ir.Constant) or not own.in_order or own.offset:
        return None
    varying = [d for d, (n, step) in enumerate(zip(access.sizes, access.strides, strict=True)) if n > 1 and step]
    if len(varying) > 1 or math.prod(own.sizes) != operation.output.size:
        return None
    axis, sizes, steps = None, [1], [0]
    for d in varying:
        axis = ir.Axis.of(access.sizes, d)
        sizes, steps = [access.sizes[d]], [access.strides[d]]
    stored = torch.from_numpy(constant.array.astype(np.float32)).flatten()
    values = stored.as_strided(sizes, steps, access.offset).reshape(-1, 1)
    if place == 0:
        return Function(lambda x: function(x, values), axis, operation.function in _AFFINE)
    return Function(lambda x: function(values, x), axis, operation.function in _AFFINE - {"divide"})


def numbers_of(source: ir.Operation) -> Tensor | None:
    """The numbers ``[256]`` that bytes stand for behind an operation that makes floats of them, by place in a table."""
    match source:
        case ir.Dequantize(scale=scale):
            return torch.arange(-128, 128, dtype=torch.float32) * scale
        case ir.Convert(inputs=(ir.Value(dtype=dtype),), output=ir.Value(dtype="float32")) if dtype != "int32":
            first = 0 if dtype == "uint8" else -128
            return torch.arange(first, first + BYTES, dtype=torch.float32)
    return None


def common_axis(functions: Sequence[Function]) -> tuple[bool, ir.Axis | None]:
    """Whether all functions differ along the same axis at most, with few enough tables, and that axis."""
    axes = {function.axis for function in functions if function.axis is not None}
    axis = next(iter(axes), None)
    return len(axes) <= 1 and (axis is None or axis.size <= _MOST_TABLES), axis


def dimension_of(axis: ir.Axis, access: ir.Access) -> int | None:
    """The dimension of an access to ``[outer, size, inner]`` that runs over the places of the axis, all of them.

    Every other one has to stay at a place: to run inside ``inner``, or over whole multiples of ``size * inner``.
    """
    found, within, whole = None, access.offset, axis.size * axis.inner
    for dim, (size, step) in enumerate(zip(access.sizes, access.strides, strict=True)):
        if size == 1 or step % whole == 0:
            continue
        if found is None and (size, step) == (axis.size, axis.inner):
            found = dim
        elif 0 < step < axis.inner:
            within += (size - 1) * step
        else:
            return None
    return found if 0 <= within < axis.inner else None


def quantized(numbers: Tensor, functions: Sequence[Function], scale: float, limits: tuple[int, int]) -> np.ndarray:
    """``int8 [places, 256]``: the functions of numbers one after the other, rounded as ``Quantize`` does."""
    values = numbers.reshape(1, BYTES)
    for function in functions:
        values = function.apply(values)
    factor = float(np.float32(1) / np.float32(scale))
    rounded = torch.nan_to_num(torch.round(values * factor)).clamp(*limits)
    return rounded.to(torch.int8).numpy()


_AFFINE = frozenset(
    {"add", "subtract", "multiply", "divide", "neg", "subtract_from_scalar"}
    | {f"{name}_scalar" for name in ("add", "subtract", "multiply", "divide")}
)
_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "relu": torch.relu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky_relu": F.leaky_relu,
    "abs": torch.abs,
    "neg": torch.neg,
    "square": torch.square,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": torch.sqrt,
    "pow_scalar": torch.pow,
    "clamp": torch.clamp,
    "add_scalar": torch.add,
    "subtract_scalar": torch.sub,
    "subtract_from_scalar": torch.rsub,
    "multiply_scalar": torch.mul,
    "divide_scalar": torch.div,
    "divide_into_scalar": lambda x, number: number / x,
    "maximum_scalar": lambda x, number: x.clamp(min=number),
    "minimum_scalar": lambda x, number: x.clamp(max=number),
}
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "subtract": torch.sub,
    "multiply": torch.mul,
    "divide": torch.div,
    "prelu": lambda x, slope: torch.where(x < 0, x * slope, x),
}
