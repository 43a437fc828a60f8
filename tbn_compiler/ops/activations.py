"""Inputs in a number format while a network trains: what inference computes with, with straight-through gradients.

``tbn::quantize_input`` gives the values that ``activation="int8"`` and ``"binary"`` of the inference operators stand
for (:mod:`~tbn_compiler.ops.schemas` defines them), in floating point: a layer behind it computes what the lowered
layer computes, up to rounding. Where each token has a scale of its own:

* ``"int8"``: the gradient passes unchanged, rounding being the identity to it. Nothing is clipped: the scale is that of
  the largest magnitude.
* ``"binary"``: ``y = beta sign(x)`` with ``beta = mean|x|`` of a token. The sign passes the gradient where
  ``|x| <= REACH beta``, and beta is differentiated as usual. Hubara et al. (arXiv 1602.02830) and XNOR-Net
  (arXiv 1603.05279) let it pass where ``|x| <= 1``, for inputs that a norm before them has brought to unit variance. A
  reach in multiples of beta needs no such norm: the gradient of ``y`` stays the same when ``x`` is scaled.

With one scale ``s`` for all tokens, which is trained (LSQ, Esser et al., arXiv 1902.08153, without its factor):

* ``"int8"``: ``y = s clip(round(v))`` for ``v = x / s``. The gradient ``g`` passes where nothing is clipped. That of
  ``s`` is the sum of ``(round(v) - v) g`` there and of ``+-127 g`` elsewhere.
* ``"binary"``: ``y = s sign(x)``. The sign passes the gradient where ``|x| <= REACH s``; that of ``s`` is the sum of
  ``sign(x) g``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops.formats import binarize, quantize_int8, with_fixed_scale
from tbn_compiler.ops.schemas import ACTIVATIONS, LIBRARY
from tbn_compiler.torch_private import functorch_is_active, untraced

LIBRARY.define("quantize_input(Tensor input, str activation, int dims, Tensor? scale=None) -> Tensor")

REACH = 4.0
"""Up to how many times the scale a binary input passes its gradient: beyond lie outliers of a token only."""

Grads = tuple[Tensor | None, None, None, Tensor | None]


def _values(input: Tensor, activation: str, dims: int, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The values in the format, and their scale, in float32 at least."""
    wide = input if input.dtype == torch.float64 else input.float()
    axes = tuple(range(-dims, 0))
    if scale is not None:
        return with_fixed_scale(wide, activation, scale, axes)
    return (quantize_int8 if activation == "int8" else binarize)(wide, axes)


class _Quantize(torch.autograd.Function):
    """The values of an input in a number format, with the gradient that the module names."""

    @staticmethod
    def forward(input: Tensor, activation: str, dims: int, scale: Tensor | None) -> Tensor:
        values, factor = _values(input, activation, dims, scale)
        return (values * factor).to(input.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, ctx.activation, ctx.dims, scale = inputs
        plain = ctx.activation == "int8" and scale is None
        ctx.save_for_backward(*([] if plain else [input] if scale is None else [input, scale]))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        if len(ctx.saved_tensors) == 2:
            input, scale = ctx.saved_tensors
            through, of_scale = fixed_scale_gradients(grad, input, ctx.activation, scale)
            return through, None, None, of_scale
        if ctx.activation == "int8":
            return grad, None, None, None
        (input,) = ctx.saved_tensors
        return binary_gradient(grad, input, ctx.dims), None, None, None


def binary_gradient(grad: Tensor, input: Tensor, dims: int) -> Tensor:
    """The gradient of ``mean|x| sign(x)``, with one mean for the last ``dims`` dimensions."""
    axes = tuple(range(-dims, 0))
    count = input[(0,) * (input.dim() - dims)].numel() if input.numel() else 1
    sign, scale = binarize(input, axes)
    through = grad * (input.abs() <= REACH * scale)
    return through + (grad * sign).sum(axes, keepdim=True) * input.sign() / count


def fixed_scale_gradients(grad: Tensor, input: Tensor, activation: str, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of an input in a format with a given scale, and of that scale."""
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32  # the sum has as many terms as elements
    x, g, s = input.to(wide), grad.to(wide), scale.to(wide).reshape(())
    if activation == "binary":
        through = grad * (x.abs() <= REACH * s)
        of_scale = torch.where(x > 0, g, -g).sum()
    else:
        v = x * s.reciprocal()
        inside = v.abs() <= 127
        through = grad * inside
        of_scale = (g * torch.where(inside, torch.round(v) - v, v.clamp(-127, 127))).sum()
    return through, of_scale.to(scale.dtype).reshape(scale.shape)


def quantize_input(input: Tensor, activation: str, dims: int, scale: Tensor | None = None) -> Tensor:
    """``input`` in a number format, in floating point, differentiable.

    Args:
        input: floating point, at least ``dims`` dimensions.
        activation: ``"int8"`` or ``"binary"``.
        dims: how many of the last dimensions share a scale.
        scale: one positive floating-point element that all of them share instead.

    Raises:
        ValueError: another format, too few dimensions, or a scale of more than one element.
        TypeError: the input is not floating point.
    """
    if activation not in ACTIVATIONS[1:]:
        raise ValueError(f"tbn::quantize_input: activation={activation!r} is not one of {ACTIVATIONS[1:]}")
    if not 1 <= dims <= input.dim():
        raise ValueError(f"tbn::quantize_input: an input of {input.dim()} dimensions has no last {dims}")
    if not input.is_floating_point():
        raise TypeError(f"tbn::quantize_input: input must be floating point, got {input.dtype}")
    if scale is not None and scale.numel() != 1:
        raise ValueError(f"tbn::quantize_input: scale must have one element, got {tuple(scale.shape)}")
    if input.numel() == 0:
        return input.clone()
    if functorch_is_active():
        return _differentiated_by_parts(input, activation, dims, scale)
    result: Tensor = _Quantize.apply(input, activation, dims, scale)  # type: ignore[no-untyped-call]
    return result


def _differentiated_by_parts(input: Tensor, activation: str, dims: int, scale: Tensor | None) -> Tensor:
    """The same from PyTorch's own operators: torch.func differentiates no others."""
    wide = input if input.dtype == torch.float64 else input.float()  # rounded once, at the end
    given = None if scale is None else scale.reshape(()).to(wide.dtype)
    fixed = wide.detach()
    values, factor = _values(fixed, activation, dims, None if given is None else given.detach())
    moved, none = wide - fixed, torch.zeros_like(fixed)
    if activation == "binary":
        passed = torch.where(fixed.abs() <= REACH * factor, moved, none)
        if given is None:
            spread = wide.abs().mean(tuple(range(-dims, 0)), keepdim=True)
        else:
            spread = factor + (given - given.detach())  # NaN where a token has one
        return (values * spread + passed).to(input.dtype)
    if given is None:
        return (values * factor + moved).to(input.dtype)
    v = fixed * given.detach().reciprocal()
    inside = v.abs() <= 127
    by_scale = torch.where(inside, values - v, values)  # the derivative
    result = values * factor + by_scale * (given - given.detach()) + torch.where(inside, moved, none)
    return result.to(input.dtype)


def register() -> None:
    """Register the operator for every device."""
    LIBRARY.impl("quantize_input", untraced(quantize_input), "CompositeImplicitAutograd")
