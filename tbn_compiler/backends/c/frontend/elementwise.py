"""Operators that treat each element alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.registry import Arguments, Converter, converts, converts_results

_aten = torch.ops.aten


def unary(importer: Importer, node: fx.Node, function: str, value: Any, *parameters: Any) -> ir.Unary:
    """A function of each element of ``value``, with finite numbers as further arguments."""
    numbers = tuple(_number(importer, node, parameter) for parameter in parameters)
    return ir.Unary(**importer.head(node, value), function=function, parameters=numbers)


def _number(importer: Importer, node: fx.Node, number: Any) -> float:
    if not isinstance(number, int | float):
        raise importer.unsupported(node, f"{number} is not a number known at export time")
    with np.errstate(over="ignore"):
        result = float(np.float32(number))
    if not math.isfinite(result):
        raise importer.unsupported(node, f"the number {number} is not finite in float32")
    return result


_FUNCTIONS = {
    "relu": _aten.relu.default,
    "silu": _aten.silu.default,
    "sigmoid": _aten.sigmoid.default,
    "tanh": _aten.tanh.default,
    "hardswish": _aten.hardswish.default,
    "hardsigmoid": _aten.hardsigmoid.default,
    "mish": _aten.mish.default,
    "log_sigmoid": _aten.log_sigmoid.default,
    "exp": _aten.exp.default,
    "log": _aten.log.default,
    "sqrt": _aten.sqrt.default,
    "rsqrt": _aten.rsqrt.default,
    "abs": _aten.abs.default,
    "erf": _aten.erf.default,
    "sin": _aten.sin.default,
    "cos": _aten.cos.default,
    "neg": _aten.neg.default,
    "reciprocal": _aten.reciprocal.default,
    "square": _aten.square.default,
}


def _convert_function(function: str) -> Converter:
    return lambda importer, node, args: unary(importer, node, function, args["self"])


for _name, _target in _FUNCTIONS.items():
    converts(_target)(_convert_function(_name))


@converts(_aten.gelu.default)
def _gelu(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return unary(importer, node, "gelu_tanh" if args["approximate"] == "tanh" else "gelu", args["self"])


@converts(_aten.leaky_relu.default)
def _leaky_relu(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return unary(importer, node, "leaky_relu", args["self"], args["negative_slope"])


@converts(_aten.relu6.default)
def _relu6(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return unary(importer, node, "clamp", args["self"], 0, 6)


@converts(_aten.hardtanh.default)
def _hardtanh(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return unary(importer, node, "clamp", args["self"], args["min_val"], args["max_val"])


@converts(_aten.clamp.default, _aten.clamp_min.default, _aten.clamp_max.default)
def _clamp(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    low, high = args.get("min"), args.get("max")
    if low is None:
        return unary(importer, node, "minimum_scalar", args["self"], high)
    if high is None:
        return unary(importer, node, "maximum_scalar", args["self"], low)
    # The upper limit wins where they are in the wrong order.
    return unary(importer, node, "clamp", args["self"], min(low, high), high)


@converts(_aten.elu.default)
def _elu(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    scale, alpha = args["scale"], args["alpha"]
    return unary(importer, node, "elu", args["self"], alpha * scale, scale, args["input_scale"])


@converts(_aten.celu.default)
def _celu(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return unary(importer, node, "elu", args["self"], args["alpha"], 1, 1 / args["alpha"])


@converts(_aten.selu.default)
def _selu(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
    return unary(importer, node, "elu", args["self"], alpha * scale, scale, 1)


@converts(_aten.softplus.default)
def _softplus(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return unary(importer, node, "softplus", args["self"], args["beta"], args["threshold"])


@converts(_aten.pow.Tensor_Scalar)
def _power(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    functions = {2: "square", 0.5: "sqrt", -1: "reciprocal", -0.5: "rsqrt"}
    exponent = args["exponent"]
    if exponent in functions:
        return unary(importer, node, functions[exponent], args["self"])
    return unary(importer, node, "pow_scalar", args["self"], exponent)


def binary(importer: Importer, node: fx.Node, function: str, a: Any, b: Any) -> ir.Binary:
    """A function of the elements of two tensors, which are broadcast."""
    head = importer.head(node, a, b)
    shape = head["output"].shape
    first, second = (broadcast(operand.shape, shape) for operand in head["inputs"])
    return ir.Binary(**head, function=function, accesses=(first, second))


def broadcast(shape: tuple[int, ...], sizes: tuple[int, ...]) -> ir.Access:
    """An array seen with more sizes: dimensions are added in front, and those of size 1 are repeated."""
    aligned = (1,) * (len(sizes) - len(shape)) + shape
    strides = ir.row_major(aligned)
    return ir.Access(sizes, tuple(0 if n == 1 else s for n, s in zip(aligned, strides, strict=True)))


def _arithmetic(
    function: str, with_number: str, number_first: str
) -> Callable[[Importer, fx.Node, Any, Any], ir.Operation]:
    """The converter of an operator on two tensors, or on a tensor and a number in either order."""

    def convert(importer: Importer, node: fx.Node, a: Any, b: Any) -> ir.Operation:
        scalars = [importer.scalar(operand) for operand in (a, b)]
        if scalars[1] is not None:
            return unary(importer, node, with_number, a, scalars[1])
        if scalars[0] is not None:
            return unary(importer, node, number_first, b, scalars[0])
        return binary(importer, node, function, a, b)

    return convert


_add = _arithmetic("add", "add_scalar", "add_scalar")
_subtract = _arithmetic("subtract", "subtract_scalar", "subtract_from_scalar")
_multiply = _arithmetic("multiply", "multiply_scalar", "multiply_scalar")
_divide = _arithmetic("divide", "divide_scalar", "divide_into_scalar")
_maximum = _arithmetic("maximum", "maximum_scalar", "maximum_scalar")
_minimum = _arithmetic("minimum", "minimum_scalar", "minimum_scalar")


@converts(_aten.add.Tensor, _aten.add.Scalar)
def _convert_add(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    return _with_factor(importer, node, _add, args["self"], args["other"], args["alpha"])


@converts(_aten.sub.Tensor, _aten.sub.Scalar)
def _convert_subtract(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    return _with_factor(importer, node, _subtract, args["self"], args["other"], args["alpha"])


@converts(_aten.rsub.Scalar, _aten.rsub.Tensor)
def _convert_reverse_subtract(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    # other - alpha * self
    return _with_factor(importer, node, _subtract, args["other"], args["self"], args["alpha"])


def _with_factor(
    importer: Importer,
    node: fx.Node,
    function: Callable[[Importer, fx.Node, Any, Any], ir.Operation],
    a: Any,
    b: Any,
    factor: Any,
) -> Sequence[ir.Operation]:
    """``function(a, factor * b)``."""
    if factor == 1:
        return (function(importer, node, a, b),)
    if isinstance(b, int | float):
        return (function(importer, node, a, factor * b),)
    head = importer.head(node, b)
    (operand,) = head["inputs"]
    scaled = importer.temporary(node, "scaled", operand.shape)
    scale = ir.Unary(**head | {"output": scaled}, function="multiply_scalar", parameters=(float(factor),))
    return scale, function(importer, node, a, scaled)


@converts(_aten.mul.Tensor, _aten.mul.Scalar)
def _convert_multiply(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return _multiply(importer, node, args["self"], args["other"])


@converts(_aten.div.Tensor, _aten.div.Scalar, _aten.true_divide.Tensor)
def _convert_divide(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return _divide(importer, node, args["self"], args["other"])


@converts(_aten.maximum.default)
def _convert_maximum(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return _maximum(importer, node, args["self"], args["other"])


@converts(_aten.minimum.default)
def _convert_minimum(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return _minimum(importer, node, args["self"], args["other"])


@converts(_aten.prelu.default, _aten._prelu_kernel.default)
def _prelu(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    head = importer.head(node, args["self"])
    slopes = importer.constant(node, args["weight"])
    shape = head["output"].shape
    # One slope, or one for each channel, which is the second dimension.
    channels = (slopes.size, *(1,) * (len(shape) - 2)) if slopes.size > 1 else (1,)
    head["inputs"] += (slopes,)
    accesses = (ir.Access.whole(shape), broadcast(channels, shape))
    return ir.Binary(**head, function="prelu", accesses=accesses)


@converts_results(_aten._native_batch_norm_legit_no_training.default)
def _batch_norm(importer: Importer, node: fx.Node, args: Arguments, index: int) -> ir.Operation:
    def stored(name: str, default: float) -> Tensor:
        constant = importer.optional_constant(node, args[name])
        array = np.array(default) if constant is None else constant.array
        return torch.from_numpy(np.array(array, np.float64))

    mean, variance = stored("running_mean", 0), stored("running_var", 1)
    scale = stored("weight", 1) / torch.sqrt(variance + args["eps"])
    shift = stored("bias", 0) - mean * scale
    head = importer.head(node, args["input"])
    layer = head["layer"]
    return ir.ChannelAffine(
        **head,
        scale=importer.new_constant(f"{layer}.scale", scale.float().numpy()),
        shift=importer.new_constant(f"{layer}.shift", shift.float().numpy()),
        inner=math.prod(head["output"].shape[2:]),
    )
