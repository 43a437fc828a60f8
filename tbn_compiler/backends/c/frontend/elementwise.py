"""Operators that treat each element alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.element_instances import BINARY, UNARY, typed
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.registry import Arguments, Converter, converts, converts_results

_aten = torch.ops.aten


def unary(importer: Importer, node: fx.Node, function: str, value: Any, *parameters: Any) -> ir.Unary:
    """A function of each element of ``value``, with numbers as further arguments, in the type of the result."""
    dtype = arithmetic_type(importer, node)
    if typed(function, dtype) not in UNARY:
        raise importer.unsupported(node, f"{function} of {dtype} has no kernel")
    numbers = tuple(_number(importer, node, parameter, dtype) for parameter in parameters)
    return ir.Unary(**importer.typed_head(node, dtype, value), function=function, parameters=numbers)


def arithmetic_type(importer: Importer, node: fx.Node) -> ir.DType:
    """What a node computes with: the type of its result, which must not wrap around at limits of its own."""
    dtype, found = importer.value_of(node).dtype, node.meta["val"].dtype
    if dtype == "int32" and found not in (torch.int32, torch.int64):
        raise importer.unsupported(node, f"it computes in {found}, which C does with more bits")
    return dtype


def _number(importer: Importer, node: fx.Node, number: Any, dtype: ir.DType) -> float:
    if not isinstance(number, int | float):
        raise importer.unsupported(node, f"{number} is not a number known at export time")
    if dtype != "float32":
        if not -(2**31) <= number < 2**31:
            raise importer.unsupported(node, f"the number {number} is beyond int32")
        return int(number)
    with np.errstate(over="ignore"):
        result = float(np.float32(number))
    if math.isinf(result) and not math.isinf(number):
        raise importer.unsupported(node, f"the number {number} is not finite in float32")
    return result


_FUNCTIONS = (
    *("relu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "mish", "log_sigmoid"),
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "erf", "erfc"),
    *("sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"),
    *("abs", "neg", "sign", "reciprocal", "square", "floor", "ceil", "trunc", "round"),
)


def _convert_function(function: str) -> Converter:
    return lambda importer, node, args: unary(importer, node, function, args["self"])


for _name in _FUNCTIONS:
    converts(getattr(_aten, _name).default)(_convert_function(_name))


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
    value, low, high = args["self"], args.get("min"), args.get("max")
    if importer.value_of(node).dtype != "float32" and None not in (low, high):
        value, low = importer.add_before(_renamed(importer, node, "low", _maximum(importer, node, value, low))), None
    if low is None:
        return unary(importer, node, "minimum_scalar", value, high)
    if high is None:
        return unary(importer, node, "maximum_scalar", value, low)
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
    if importer.value_of(node).dtype != "float32" and exponent == 2:
        return binary(importer, node, "multiply", args["self"], args["self"])
    if exponent in functions:
        return unary(importer, node, functions[exponent], args["self"])
    return unary(importer, node, "pow_scalar", args["self"], exponent)


def binary(
    importer: Importer, node: fx.Node, function: str, a: Any, b: Any, dtype: ir.DType | None = None
) -> ir.Binary:
    """A function of the elements of two tensors or numbers, which are broadcast, in a type: usually the result's."""
    dtype = dtype or arithmetic_type(importer, node)
    if dtype == "bool":
        function = _OF_BOOLEANS.get(function, function)
    if typed(function, dtype) not in BINARY:
        raise importer.unsupported(node, f"{function} of {dtype} has no kernel")
    head = importer.typed_head(node, dtype, a, b)
    accesses = tuple(ir.Access.broadcast(operand.shape, head["output"].shape) for operand in head["inputs"])
    return ir.Binary(**head, accesses=accesses, function=function)


# What arithmetic does with booleans.
_OF_BOOLEANS = {
    "add": "logical_or",
    "maximum": "logical_or",
    "multiply": "logical_and",
    "minimum": "logical_and",
}


def with_number(
    importer: Importer, node: fx.Node, functions: tuple[str, str, str], a: Any, b: Any, dtype: ir.DType
) -> ir.Operation:
    """A function of two tensors, or of a tensor and a number in either order, by the kernel that there is.

    Args:
        importer: what converts the program.
        node: the node.
        functions: of two tensors; of a tensor and a number behind it; of a tensor and a number before it.
        a: the first argument.
        b: the second one.
        dtype: what they are brought to.
    """
    for scalar, tensor, function in ((importer.scalar(b), a, functions[1]), (importer.scalar(a), b, functions[2])):
        if scalar is not None and typed(function, dtype) in UNARY:
            number = _number(importer, node, scalar, dtype)
            return ir.Unary(**importer.typed_head(node, dtype, tensor), function=function, parameters=(number,))
    return binary(importer, node, functions[0], a, b, dtype)


def _arithmetic(
    function: str, behind: str = "", before: str = ""
) -> Callable[[Importer, fx.Node, Any, Any], ir.Operation]:
    """The converter of an operator on two tensors, or on a tensor and a number in either order."""

    def convert(importer: Importer, node: fx.Node, a: Any, b: Any) -> ir.Operation:
        return with_number(importer, node, (function, behind, before), a, b, arithmetic_type(importer, node))

    return convert


_add = _arithmetic("add", "add_scalar", "add_scalar")
_subtract = _arithmetic("subtract", "subtract_scalar", "subtract_from_scalar")
_multiply = _arithmetic("multiply", "multiply_scalar", "multiply_scalar")
_divide = _arithmetic("divide", "divide_scalar", "divide_into_scalar")
_maximum = _arithmetic("maximum", "maximum_scalar", "maximum_scalar")
_minimum = _arithmetic("minimum", "minimum_scalar", "minimum_scalar")
_floor_divide = _arithmetic("floor_divide", "floor_divide_scalar")
_remainder = _arithmetic("remainder", "remainder_scalar")


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
    scaled = importer.add_before(_renamed(importer, node, "scaled", _multiply(importer, node, b, factor)))
    return (function(importer, node, a, scaled),)


def _renamed(importer: Importer, node: fx.Node, name: str, operation: ir.Operation) -> ir.Operation:
    """An operation of elements of its input, as one that runs before what the node becomes."""
    output = importer.temporary(node, name, operation.inputs[0].shape, operation.output.dtype)
    return replace(operation, name=output.name, output=output)


@converts(_aten.mul.Tensor, _aten.mul.Scalar)
def _convert_multiply(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return _multiply(importer, node, args["self"], args["other"])


@converts(_aten.div.Tensor, _aten.div.Scalar, _aten.true_divide.Tensor)
def _convert_divide(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return _divide(importer, node, args["self"], args["other"])


@converts(_aten.div.Tensor_mode, _aten.div.Scalar_mode)
def _convert_rounded_divide(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    a, b, mode = args["self"], args["other"], args["rounding_mode"]
    if mode == "floor":
        return _floor_divide(importer, node, a, b)
    quotient = _divide(importer, node, a, b)
    if mode is None or quotient.output.dtype == "int32":
        return quotient
    exact = importer.temporary(node, "quotient", quotient.output.shape)
    importer.add_before(replace(quotient, name=exact.name, output=exact))
    return unary(importer, node, "trunc", exact)


def _on_two(
    convert: Callable[[Importer, fx.Node, Any, Any], ir.Operation], first: str = "self", second: str = "other"
) -> Converter:
    """The converter of an operator with these two arguments."""
    return lambda importer, node, args: convert(importer, node, args[first], args[second])


converts(_aten.maximum.default)(_on_two(_maximum))
converts(_aten.minimum.default)(_on_two(_minimum))
converts(_aten.floor_divide.default)(_on_two(_floor_divide))
converts(_aten.remainder.Tensor, _aten.remainder.Scalar, _aten.remainder.Scalar_Tensor)(_on_two(_remainder))
converts(_aten.fmod.Tensor, _aten.fmod.Scalar)(_on_two(_arithmetic("fmod")))
converts(_aten.atan2.default)(_on_two(_arithmetic("atan2")))
converts(_aten.hypot.default)(_on_two(_arithmetic("hypot")))
converts(_aten.fmax.default)(_on_two(_arithmetic("fmax")))
converts(_aten.fmin.default)(_on_two(_arithmetic("fmin")))
converts(_aten.pow.Tensor_Tensor, _aten.pow.Scalar)(_on_two(_arithmetic("power"), second="exponent"))


@converts(_aten.clamp.Tensor)
def _clamp_between_tensors(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    value, low, high = args["self"], args["min"], args["max"]
    if high is None:
        return _maximum(importer, node, value, low)
    if low is not None:
        raised = _maximum(importer, node, value, low)
        value = importer.temporary(node, "raised", raised.output.shape, raised.output.dtype)
        importer.add_before(replace(raised, name=value.name, output=value))
    return _minimum(importer, node, value, high)


@converts(_aten.prelu.default, _aten._prelu_kernel.default)
def _prelu(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    head = importer.head(node, args["self"])
    slopes = importer.constant(node, args["weight"])
    shape = head["output"].shape
    # One slope, or one for each channel, which is the second dimension.
    channels = (slopes.size, *(1,) * (len(shape) - 2)) if slopes.size > 1 else (1,)
    head["inputs"] += (slopes,)
    accesses = (ir.Access.whole(shape), ir.Access.broadcast(channels, shape))
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
