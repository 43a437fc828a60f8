"""Calls of the inference operators: arguments by name, layout of the weight, checks, sizes of the result.

``tbn::linear``, ``tbn::conv1d/2d/3d`` and ``tbn::conv_transpose1d/2d/3d`` have different arguments, and only their
schemas list them: an :class:`Operator` is read from a schema, and a :class:`TiledCall` holds the arguments of one call
by name. Kernels, fakes and gradients take such a call; :mod:`tbn_compiler.graph.calls` makes one from a node.

:func:`make_kernel` turns a function of a call into one with the arguments of the schema, and :func:`register_kernel`
refuses a kernel that lists others.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tbn_compiler.ops.schemas import (
    ACTIVATIONS,
    CONV_OPS,
    CONV_TRANSPOSE_OPS,
    EPILOGUES,
    LIBRARY,
    TRAINING_PREFIX,
    check_stored,
    make_layout,
)
from tbn_compiler.tiling import TiledProduct, TileLayout
from tbn_compiler.torch_private import OpOverload, operator_schema, untraced

_make_product = functools.lru_cache(maxsize=1024)(TiledProduct)


@dataclass(frozen=True, eq=False)
class Operator:
    """One of the inference operators, as its schema describes it.

    Attributes:
        name: ``"linear"``, ``"conv2d"``, ``"conv_transpose2d"``, ...
        overload: the operator itself.
        positional: names of the positional arguments, in order.
        defaults: values of the arguments that may be left out, by name.
        names: names of all arguments, in order.
        dims: spatial dimensions; 0 for the linear layer.
    """

    name: str
    overload: OpOverload
    positional: tuple[str, ...]
    defaults: Mapping[str, Any]
    names: tuple[str, ...]
    dims: int

    @classmethod
    def of(cls, overload: OpOverload) -> Operator:
        """The description of an operator."""
        schema = operator_schema(overload)
        arguments = schema.arguments
        defaults: dict[str, Any] = {a.name: a.default_value for a in arguments if a.has_default_value()}
        return cls(
            name=schema.name.removeprefix("tbn::"),
            overload=overload,
            positional=tuple(argument.name for argument in arguments if not argument.kwarg_only),
            defaults=defaults,
            names=tuple(argument.name for argument in arguments),
            dims=len(defaults.get("stride", ())),
        )

    @cached_property
    def transposed(self) -> bool:
        """Whether this is a transpose convolution: each row of the weight belongs to an *input* channel."""
        return "output_padding" in self.names

    @cached_property
    def outputs_argument(self) -> str:
        """Name of the argument that gives the number of output features or channels."""
        return "out_channels" if self.dims else "out_features"

    @cached_property
    def inputs_argument(self) -> str:
        """Name of the argument that gives the number of input features or channels, those of all replicas."""
        return "in_channels" if self.dims else "in_features"

    @cached_property
    def weight_sizes(self) -> tuple[str, str]:
        """Arguments that give the first two sizes of the weight; the second one is divided by the groups."""
        sizes = (self.outputs_argument, self.inputs_argument)
        return sizes[::-1] if self.transposed else sizes

    def channels(self, shape: Sequence[int], groups: int) -> tuple[int, int]:
        """Input and output features or channels of a layer whose weight has this shape."""
        rows, columns = shape[0], shape[1] * groups
        return (rows, columns) if self.transposed else (columns, rows)

    @cached_property
    def layout_options(self) -> tuple[str, ...]:
        """Arguments of :class:`~tbn_compiler.tiling.TileLayout` that the operator takes, beside shape and ``p``."""
        return tuple(field.name for field in fields(TileLayout)[2:] if field.name in self.names)

    @cached_property
    def sizes(self) -> tuple[str, ...]:
        """Arguments with an integer for each spatial dimension."""
        given = ("kernel_size", "stride", "padding", "output_padding", "dilation")
        return tuple(name for name in given if name in self.names)

    @cached_property
    def kind(self) -> str:
        """Kind of layer: ``"linear"``, ``"conv2d"``, ..."""
        return self.name.removeprefix(TRAINING_PREFIX)

    @cached_property
    def function(self) -> Callable[..., Tensor]:
        """PyTorch's function for this kind of layer."""
        function: Callable[..., Tensor] = getattr(F, self.kind)
        return function

    @cached_property
    def geometry(self) -> tuple[str, ...]:
        """Arguments of :attr:`function` behind the bias, in its order."""
        order = ("output_padding", "groups", "dilation") if self.transposed else ("dilation", "groups")
        return tuple(name for name in ("stride", "padding", *order) if name in self.names)

    @cached_property
    def signature(self) -> inspect.Signature:
        """The schema as a Python signature."""
        return inspect.Signature(
            [
                inspect.Parameter(
                    name,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD
                    if name in self.positional
                    else inspect.Parameter.KEYWORD_ONLY,
                    default=self.defaults.get(name, inspect.Parameter.empty),
                )
                for name in self.names
            ]
        )

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TensorCall:
        """The call with these arguments.

        Raises:
            TypeError: arguments are missing, unknown, or too many.
        """
        arguments = {**self.defaults, **dict(zip(self.positional, args, strict=False)), **kwargs}
        if len(arguments) != len(self.names) or len(args) > len(self.positional):
            self.signature.bind(*args, **kwargs)  # which says what is wrong
        return TensorCall(self, arguments)


OPERATORS: dict[str, Operator] = {
    name: Operator.of(getattr(torch.ops.tbn, name).default)
    for name in ("linear", *CONV_OPS.values(), *CONV_TRANSPOSE_OPS.values())
}
"""The inference operators by name, which is also the kind of layer that each one computes."""

TRAINING_OPERATORS: dict[str, Operator] = {
    kind: Operator.of(getattr(torch.ops.tbn, TRAINING_PREFIX + kind).default) for kind in OPERATORS
}
"""The layers that train, by kind."""


@dataclass(frozen=True, eq=False)
class TiledCall:
    """One call of an inference operator, on tensors or in a graph.

    Attributes:
        operator: the operator.
        arguments: all arguments by their name in the schema, defaults included.
    """

    operator: Operator
    arguments: Mapping[str, Any]

    @property
    def kind(self) -> str:
        """Kind of layer: ``"linear"``, ``"conv2d"``, ``"conv_transpose2d"``, ..."""
        return self.operator.kind

    @property
    def dims(self) -> int:
        """Spatial dimensions; 0 for a linear layer."""
        return self.operator.dims

    @property
    def transposed(self) -> bool:
        """Whether this is a transpose convolution: each row of the weight belongs to an *input* channel."""
        return self.operator.transposed

    @property
    def takes_activation(self) -> bool:
        """Whether the operator can bring its input into another number format."""
        return "activation" in self.operator.names

    @property
    def takes_epilogue(self) -> bool:
        """Whether the operator can apply a function to its result."""
        return "epilogue" in self.operator.names

    @property
    def takes_input_alpha(self) -> bool:
        """Whether the input can stand for scaled copies of itself."""
        return "input_alpha" in self.operator.names

    @property
    def activation(self) -> str:
        """Number format of the input."""
        return str(self.arguments.get("activation", "float"))

    @property
    def epilogue(self) -> str:
        """Function applied to the result."""
        return str(self.arguments.get("epilogue", "none"))

    @property
    def outputs(self) -> int:
        """Output features or channels."""
        number: int = self.arguments[self.operator.outputs_argument]
        return number

    @property
    def inputs(self) -> int:
        """Input features or channels, those of all replicas."""
        number: int = self.arguments[self.operator.inputs_argument]
        return number

    @property
    def groups(self) -> int:
        """Convolution groups; 1 for a linear layer."""
        number: int = self.arguments.get("groups", 1)
        return number

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel sizes; none for a linear layer."""
        return tuple(int(size) for size in self.arguments.get("kernel_size", ()))

    @property
    def channel_axis(self) -> int:
        """Axis of the features or channels, counted from the end, where a batch dimension makes no difference."""
        return -1 - self.dims

    @property
    def token_dims(self) -> tuple[int, ...]:
        """Dimensions of the input that share the scale of a number format: a vector, or a sample."""
        return tuple(range(-1 - self.dims, 0))

    @cached_property
    def layout(self) -> TileLayout:
        """Layout of the weight.

        Its shape is ``[out_features, in_features]``, ``[out_channels, in_channels / groups, *kernel_size]``, or, of a
        transpose convolution, ``[in_channels, out_channels / groups, *kernel_size]``.
        """
        arguments, operator = self.arguments, self.operator
        rows, columns = (arguments[name] for name in operator.weight_sizes)
        options = {name: arguments[name] for name in operator.layout_options}
        shape = (rows, columns // arguments.get("groups", 1), *arguments.get("kernel_size", ()))
        return make_layout(shape, arguments["p"], **options)

    @property
    def function(self) -> Callable[..., Tensor]:
        """PyTorch's function for this kind of layer: ``function(input, weight, bias, *geometry)``."""
        return self.operator.function

    @property
    def geometry(self) -> list[Any]:
        """Arguments of :attr:`function` behind the bias."""
        return [self.arguments[name] for name in self.operator.geometry]

    def without_tensors(self) -> TiledCall:
        """The call without its operands, which keeps no tensor alive."""
        kept = {name: value for name, value in self.arguments.items() if not isinstance(value, Tensor)}
        return TiledCall(self.operator, kept)


@dataclass(frozen=True, eq=False)
class TensorCall(TiledCall):
    """One call on tensors."""

    @property
    def input(self) -> Tensor:
        """The input."""
        value: Tensor = self.arguments["input"]
        return value

    @property
    def tile(self) -> Tensor:
        """The stored tile: packed bits ``uint8 [ceil(q / 8)]``, or floating point ``[q]``."""
        value: Tensor = self.arguments["tile"]
        return value

    @property
    def alpha(self) -> Tensor:
        """The alphas, a vector."""
        value: Tensor = self.arguments["alpha"]
        return value

    @property
    def bias(self) -> Tensor | None:
        """The bias, a vector."""
        value: Tensor | None = self.arguments["bias"]
        return value

    @property
    def input_alpha(self) -> Tensor | None:
        """Scales of the replicas that the input stands for, a vector."""
        value: Tensor | None = self.arguments.get("input_alpha")
        return value

    @property
    def input_scale(self) -> Tensor | None:
        """The scale of the input's number format, one element; ``None`` where each token has its own."""
        value: Tensor | None = self.arguments.get("input_scale")
        return value

    @cached_property
    def product(self) -> TiledProduct:
        """What the call multiplies; the operands must be those that :meth:`checked` lets pass."""
        replicas = 1 if self.input_alpha is None else int(self.input_alpha.numel())
        return _make_product(self.layout, int(self.alpha.numel()), self.groups, replicas)

    def replaced(self, **changes: Any) -> TensorCall:
        """The same call with other arguments."""
        return TensorCall(self.operator, {**self.arguments, **changes})

    def checked(self) -> TensorCall:
        """This call, after a check of its operands.

        Raises:
            RuntimeError: the input does not fit the layer. As the float layer raises it: code may catch it.
            ValueError: other operands do not fit.
            TypeError: an operand has a dtype that is not supported.
        """
        op, d, input = f"tbn::{self.kind}", self.dims, self.input
        if d == 0 and input.dim() == 0:
            raise RuntimeError(f"{op}: input must have at least one dimension")
        if d and input.dim() not in (d + 1, d + 2):
            raise RuntimeError(f"{op}: input must have {d + 1} (unbatched) or {d + 2} dimensions, got {input.dim()}")
        self._check_inputs(op)
        if d:
            self._check_geometry(op)
        for name, choices in (("activation", ACTIVATIONS), ("epilogue", EPILOGUES)):
            if (value := self.arguments.get(name, choices[0])) not in choices:
                raise ValueError(f"{op}: {name}={value!r} is not one of {', '.join(map(repr, choices))}")
        if not input.is_floating_point():
            raise TypeError(f"{op}: input must be floating point, got {input.dtype}")
        self.check_operands()
        device = input.device
        for name in ("tile", "alpha", "bias", "input_alpha", "input_scale"):
            operand = self.arguments.get(name)
            if operand is not None and operand.device != device:
                raise ValueError(f"{op}: {name} is on {operand.device}, input on {device}")
        return self

    def check_operands(self) -> None:
        """Check tile, alphas, bias and scale, without the input.

        Raises:
            ValueError: one does not fit the layer.
            TypeError: the tile has a dtype that is not supported.
        """
        check_stored(self.kind, self.tile, self.alpha, self.layout)
        if self.bias is not None and tuple(self.bias.shape) != (self.outputs,):
            shape = tuple(self.bias.shape)
            raise ValueError(f"tbn::{self.kind}: bias must have shape ({self.outputs},), got {shape}")
        scale = self.input_scale
        if scale is not None:
            if self.activation == "float":
                raise ValueError(f"tbn::{self.kind}: input_scale needs activation='int8' or 'binary'")
            if scale.numel() != 1 or not scale.is_floating_point():
                raise ValueError(
                    f"tbn::{self.kind}: input_scale must be one floating-point number, got {scale.dtype} "
                    f"{tuple(scale.shape)}"
                )

    def _check_inputs(self, op: str) -> None:
        """Check the number of features or channels of the input, ``1 / k`` of the layer's for ``k`` replicas."""
        size, expected, input_alpha = self.input.shape[self.channel_axis], self.inputs, self.input_alpha
        what = "input channels" if self.dims else "input features"
        if input_alpha is not None:
            if input_alpha.dim() != 1 or expected % input_alpha.numel():
                raise ValueError(
                    f"{op}: input_alpha {tuple(input_alpha.shape)} must be a vector that divides {expected} {what}"
                )
            expected //= input_alpha.numel()
        # The one size here that may be symbolic; for a number there is no need of torch._check, which takes 1 us.
        if not isinstance(size, int) or size != expected:
            torch._check(size == expected, lambda: f"{op}: expected {expected} {what}, got an input with {size}")

    def _check_geometry(self, op: str) -> None:
        d, groups, inputs, outputs = self.dims, self.groups, self.inputs, self.outputs
        if groups < 1 or inputs % groups or outputs % groups:
            raise ValueError(f"{op}: groups={groups} must divide {inputs} input and {outputs} output channels")
        if groups > 1 and self.input_alpha is not None:
            raise ValueError(f"{op}: input_alpha needs groups=1, got groups={groups}: the groups read different copies")
        if len(self.arguments["kernel_size"]) != d:
            self._check_sizes()
        for name, least in (("stride", 1), ("padding", 0), ("dilation", 1)):
            if any(value < least for value in self.arguments.get(name, ())):
                raise ValueError(f"{op}: {name} must be at least {least}, got {list(self.arguments[name])}")

    def _check_sizes(self) -> None:
        """Check that all sizes of the geometry have as many elements as there are dimensions."""
        for name in self.operator.sizes:
            if len(value := self.arguments[name]) != self.dims:
                raise ValueError(f"tbn::{self.kind}: {name} must have {self.dims} elements, got {list(value)}")

    def output_sizes(self) -> list[int]:
        """Spatial sizes of the result; below 1 where a kernel does not fit the input.

        Raises:
            ValueError: a stride, padding or dilation does not have as many elements as there are dimensions.
        """
        self._check_sizes()
        image = self.input.shape[self.input.dim() - self.dims :]
        values = [self.arguments[name] for name in self.operator.sizes]
        if not self.transposed:
            return conv_sizes(image, *values) if values else []
        return [
            (size - 1) * step - 2 * pad + dil * (k - 1) + extra + 1
            for size, k, step, pad, extra, dil in zip(image, *values, strict=True)
        ]

    def output_shape(self) -> tuple[int, ...]:
        """Shape of the result."""
        return (*self.input.shape[: self.channel_axis], self.outputs, *self.output_sizes())

    @property
    def keeps_format(self) -> bool:
        """Whether the result has the memory format of the input: that of a convolution on a CPU or GPU has."""
        return self.dims > 1 and not self.transposed and self.input.device.type in ("cpu", "cuda")

    def output_format(self) -> torch.memory_format:
        """The memory format of the result: ``channels_last`` for an input in it, where a kernel keeps it."""
        input = self.input
        if self.keeps_format and input.dim() == self.dims + 2 and not input.is_contiguous():
            last = channels_last(self.dims)
            if last is not None and input.is_contiguous(memory_format=last):
                return last
        return torch.contiguous_format

    def new_output(self) -> Tensor:
        """An empty result, in its memory format."""
        shape, memory_format = self.output_shape(), self.output_format()
        if memory_format == torch.contiguous_format:
            return self.input.new_empty(shape)
        return torch.empty(shape, dtype=self.input.dtype, device=self.input.device, memory_format=memory_format)


def channels_last(dims: int) -> torch.memory_format | None:
    """The memory format with the channels of an image innermost, ``None`` for less than two spatial dimensions."""
    return {2: torch.channels_last, 3: torch.channels_last_3d}.get(dims)


def conv_sizes(
    image: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Sizes of what a convolution makes of an image; below 1 where the kernel does not fit."""
    return [
        (size + 2 * pad - dil * (k - 1) - 1) // step + 1
        for size, k, step, pad, dil in zip(image, kernel_size, stride, padding, dilation, strict=True)
    ]


def make_kernel(operator: Operator, function: Callable[[TensorCall], Tensor], doc: str = "") -> Callable[..., Tensor]:
    """A kernel with the arguments of an operator, from a function of a call that has been checked."""

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        return function(operator.bind(args, kwargs).checked())

    return with_signature(operator, kernel, doc or function.__doc__)


def with_signature(operator: Operator, kernel: Callable[..., Tensor], doc: str | None = None) -> Callable[..., Tensor]:
    """``kernel``, which takes anything, as one with the name and the arguments of an operator."""
    kernel.__name__ = kernel.__qualname__ = operator.name
    kernel.__doc__ = doc
    kernel.__signature__ = operator.signature  # type: ignore[attr-defined]
    return kernel


def register_kernel(operator: Operator, kernel: Callable[..., Tensor], key: str) -> None:
    """Register a kernel for a dispatch key.

    Raises:
        TypeError: the kernel has other arguments than the operator's schema, or in another order.
    """
    check_signature(operator, kernel)
    LIBRARY.impl(operator.name, untraced(kernel), key)


def check_signature(operator: Operator, kernel: Callable[..., Tensor]) -> None:
    """Check that a kernel takes the arguments of an operator: names, order, kinds and defaults.

    Raises:
        TypeError: it does not.
    """

    def described(signature: inspect.Signature) -> list[tuple[str, Any, Any]]:
        return [
            (name, parameter.kind, tuple(value) if isinstance(value := parameter.default, list) else value)
            for name, parameter in signature.parameters.items()
        ]

    found = inspect.signature(kernel)
    if described(found) != described(operator.signature):
        raise TypeError(
            f"a kernel of tbn::{operator.name} takes {found.replace(return_annotation=inspect.Signature.empty)}, "
            f"its schema has {operator.signature}"
        )


def convolution_gradients(
    call: TiledCall, grad: Tensor, input: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of the gradients of input, weight and bias of a convolution that are wanted.

    Args:
        call: the convolution, of which only the geometry is read.
        grad: the gradient of its result.
        input: its input, batched or not.
        weight: its weight; only its shape matters where no gradient of the input is wanted.
        wanted: whether input, weight and bias need one.
    """
    if unbatched := input.dim() == call.dims + 1:
        input, grad = input.unsqueeze(0), grad.unsqueeze(0)
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad,
        input,
        weight,
        [call.outputs] if wanted[2] else None,
        *(list(call.arguments[name]) for name in ("stride", "padding", "dilation")),
        call.transposed,
        list(call.arguments.get("output_padding", [0] * call.dims)),
        call.groups,
        list(wanted),
    )
    return (grad_input.squeeze(0) if unbatched and wanted[0] else grad_input), grad_weight, grad_bias


def _fake(call: TensorCall) -> Tensor:
    """An empty result."""
    shape = call.output_shape()
    torch._check(
        call.transposed or all(size >= 1 for size in shape[call.input.dim() - call.dims :]),
        lambda: f"tbn::{call.kind}: kernel {list(call.kernel_size)} does not fit the input {list(call.input.shape)}",
    )
    return call.new_output()


def register_fakes() -> None:
    """Register the fakes: a bad call fails in them, while tracing."""
    for operator in OPERATORS.values():
        torch.library.register_fake(f"tbn::{operator.name}", make_kernel(operator, _fake), lib=LIBRARY)
