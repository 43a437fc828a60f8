"""Inputs in a number format while a network trains: what inference computes with, with straight-through gradients.

``tbn::quantize_input`` gives the values that ``activation="int8"`` and ``"binary"`` of the inference operators stand
for (:mod:`~tbn_compiler.ops.schemas` defines them), in floating point: a layer behind it computes what the lowered
layer computes, up to rounding.

* ``"int8"``: the gradient passes unchanged, rounding being the identity to it. Nothing is clipped: the scale is that of
  the largest magnitude.
* ``"binary"``: ``y = beta sign(x)`` with ``beta = mean|x|`` of a token. The sign passes the gradient where
  ``|x| <= 1`` (Hubara et al., arXiv 1602.02830; XNOR-Net, arXiv 1603.05279), and beta is differentiated as usual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops.formats import binarize, quantize_int8
from tbn_compiler.ops.schemas import ACTIVATIONS, LIBRARY
from tbn_compiler.torch_private import functorch_is_active, untraced

LIBRARY.define("quantize_input(Tensor input, str activation, int dims) -> Tensor")

Grads = tuple[Tensor | None, None, None]


def _values(input: Tensor, activation: str, dims: int) -> tuple[Tensor, Tensor]:
    """The values in the format, and their scale, in float32 at least."""
    wide = input if input.dtype == torch.float64 else input.float()
    return (quantize_int8 if activation == "int8" else binarize)(wide, tuple(range(-dims, 0)))


class _Quantize(torch.autograd.Function):
    """The values of an input in a number format, with the gradient that the module names."""

    @staticmethod
    def forward(input: Tensor, activation: str, dims: int) -> Tensor:
        values, scale = _values(input, activation, dims)
        return (values * scale).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.activation, ctx.dims = inputs
        ctx.save_for_backward(*([input] if ctx.activation == "binary" else []))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        if ctx.activation == "int8":
            return grad, None, None
        (input,) = ctx.saved_tensors
        return binary_gradient(grad, input, ctx.dims), None, None


def binary_gradient(grad: Tensor, input: Tensor, dims: int) -> Tensor:
    """The gradient of ``mean|x| sign(x)``, with one mean for the last ``dims`` dimensions."""
    axes = tuple(range(-dims, 0))
    count = input[(0,) * (input.dim() - dims)].numel() if input.numel() else 1
    sign, scale = binarize(input, axes)
    through = grad * scale * (input.abs() <= 1)
    return through + (grad * sign).sum(axes, keepdim=True) * input.sign() / count


def quantize_input(input: Tensor, activation: str, dims: int) -> Tensor:
    """``input`` in a number format, in floating point, differentiable.

    Args:
        input: floating point, at least ``dims`` dimensions.
        activation: ``"int8"`` or ``"binary"``.
        dims: how many of the last dimensions share a scale.

    Raises:
        ValueError: another format, or too few dimensions.
        TypeError: the input is not floating point.
    """
    if activation not in ACTIVATIONS[1:]:
        raise ValueError(f"tbn::quantize_input: activation={activation!r} is not one of {ACTIVATIONS[1:]}")
    if not 1 <= dims <= input.dim():
        raise ValueError(f"tbn::quantize_input: an input of {input.dim()} dimensions has no last {dims}")
    if not input.is_floating_point():
        raise TypeError(f"tbn::quantize_input: input must be floating point, got {input.dtype}")
    if input.numel() == 0:
        return input.clone()
    if functorch_is_active():
        # torch.func differentiates PyTorch's own operators only.
        fixed = input.detach()
        values, scale = _values(fixed, activation, dims)
        if activation == "int8":
            return (values * scale).to(input.dtype) + (input - fixed)
        through = torch.where(fixed.abs() <= 1, input - fixed, torch.zeros_like(fixed))
        spread = input.abs().mean(tuple(range(-dims, 0)), keepdim=True)
        return values.to(input.dtype) * spread + through * scale.to(input.dtype)
    result: Tensor = _Quantize.apply(input, activation, dims)  # type: ignore[no-untyped-call]
    return result


def register() -> None:
    """Register the operator for every device."""
    LIBRARY.impl("quantize_input", untraced(quantize_input), "CompositeImplicitAutograd")
