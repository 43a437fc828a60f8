"""Layers that train and multiply their whole weight, in one step of autograd.

``tile -> scale -> layer`` keeps ``B`` and ``alpha * B`` for its backward. This keeps what is trained and the input, and
makes both again. With ``G = (dL/dy)^T x``, the gradient of the weight that the layer uses::

    dL/dx = (dL/dy) (alpha * B)
    dL/dW = alpha * G                   straight-through (Eq. 6); summed over the copies for a trained tile
    dL/dalpha = <G, B>                  over the elements that the alpha scales
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops.calls import TiledCall, convolution_gradients
from tbn_compiler.ops.latents import alpha_values, source_gradient, takes_latent_weight, used_weight
from tbn_compiler.tiling import TileLayout

Grads = tuple[Tensor | None, ...]


class WholeWeight(torch.autograd.Function):
    """A layer on its whole weight, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        source: Tensor,
        bias: Tensor | None,
        call: TiledCall,
        dtype: torch.dtype,
    ) -> Tensor:
        """The result, of an input in ``dtype``."""
        ctx.call, ctx.dtype = call, dtype
        ctx.save_for_backward(input, weight, source, bias)
        used = constant_weight(call, weight, source, dtype)
        return call.function(input, used, bias if bias is None else bias.to(dtype), *call.geometry)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        """The gradients of the operands that want one."""
        input, weight, source, bias = ctx.saved_tensors
        call, dtype, needs = ctx.call, ctx.dtype, ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradients will be differentiated, too
            return (*differentiable_gradients(ctx, grad, (input, weight, source, bias)), None, None)
        layout, k = call.layout, call.arguments["num_alphas"]
        alpha = alpha_values(source, layout, k)
        bits = _bits(call, weight, dtype) if needs[0] or needs[2] else None
        used = _scaled(layout, bits, alpha, dtype) if needs[0] and bits is not None else None
        grad_weight = grad_source = None
        grad_input, whole = _multiply_backward(call, grad, input, used, needs[1] or needs[2])
        if whole is not None and bits is not None and needs[2]:
            grad_source = source_gradient(source, layout, _dot(layout, whole, bits, k))
        if whole is not None and needs[1]:
            # In the weight's own dtype: autocast's may be too short for the product.
            grad_weight = _straight_through(call, weight, whole.to(weight.dtype), alpha)
        return grad_input, grad_weight, grad_source, bias_gradient(grad, call.dims, bias, needs[3]), None, None


def constant_weight(call: TiledCall, weight: Tensor, source: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The whole weight ``alpha * B``, where nobody differentiates it."""
    dtype = weight.dtype if dtype is None else dtype
    alpha = alpha_values(source, call.layout, call.arguments["num_alphas"])
    return _scaled(call.layout, _bits(call, weight, dtype), alpha, dtype)


def _bits(call: TiledCall, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``B`` of a binary layer in ``dtype``, of any other in the dtype of the weight."""
    layout = call.layout
    s = layout.aggregate(weight) if layout.p > 1 and takes_latent_weight(weight, layout) else weight
    if call.arguments["binary"]:
        s = binary_signs(s, dtype)
    return s.reshape(layout.shape) if layout.p == 1 else layout.replicate(s.reshape(-1))


def binary_signs(s: Tensor, dtype: torch.dtype) -> Tensor:
    """:func:`~tbn_compiler.tiling.tile_signs` in a dtype."""
    # torch.where would take ten times as long.
    signs = torch.gt(s, 0, out=torch.empty(s.shape, dtype=dtype, device=s.device))
    return signs.mul_(2).sub_(1)


def _scaled(layout: TileLayout, bits: Tensor, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    alpha = alpha.to(bits.dtype)
    return (bits * alpha if alpha.numel() == 1 else layout.scale(bits, alpha)).to(dtype)


def _straight_through(call: TiledCall, weight: Tensor, whole: Tensor, alpha: Tensor) -> Tensor:
    """The gradient of what is trained from that of the used weight."""
    layout, latent_weight = call.layout, takes_latent_weight(weight, call.layout)
    alpha = alpha.to(whole.dtype)
    grad = whole * alpha if alpha.numel() == 1 else layout.scale(whole, alpha)
    if layout.p == 1 or (latent_weight and call.arguments["binary"]):
        return grad.reshape(weight.shape)
    tile = layout.aggregate(grad)
    return layout.replicate(tile) if latent_weight else tile.view(weight.shape)


def _dot(layout: TileLayout, whole: Tensor, bits: Tensor, k: int) -> Tensor:
    """For each alpha, the sum over what it scales of a gradient times ``B``; at least in float32."""
    if k == 1 and blas_is_faster(whole) and whole.dtype == bits.dtype:
        return dot(whole.reshape(-1), bits.reshape(-1)).view(1)
    dtype = torch.promote_types(whole.dtype, torch.float32)
    product = layout.alpha_groups(whole.to(dtype) * bits, k)
    return product.sum((1, 3)).view(-1)


def blas_is_faster(value: Tensor) -> bool:
    """Whether BLAS sums faster than a product that is written: on a CPU, not in half precision.

    Where a graph is traced, tensors are of another class; a compiler fuses the product into the sum.
    """
    return type(value) is Tensor and value.is_cpu and value.dtype in (torch.float32, torch.float64)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of vectors, piece by piece: BLAS sums in few places, which loses digits of long ones."""
    if len(a) <= LARGE:
        return torch.dot(a, b)
    return torch.stack([torch.dot(x, y) for x, y in zip(a.split(LARGE), b.split(LARGE), strict=True)]).sum()


# Elements that do not stay in a cache.
LARGE = 2**19


def bias_gradient(grad: Tensor, dims: int, bias: Tensor | None, wanted: bool) -> Tensor | None:
    """The gradient of the bias of a layer from that of its result."""
    if bias is None or not wanted:
        return None
    channels = grad.dim() - 1 - dims
    others = [axis for axis in range(grad.dim()) if axis != channels]
    return (grad.sum(others) if others else grad).to(bias.dtype)


def _multiply_backward(
    call: TiledCall, grad: Tensor, input: Tensor, used: Tensor | None, wants_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the input, through the used weight if there is one, and of that weight if it is wanted."""
    if call.dims:
        wanted = [used is not None, wants_weight, False]
        shaped = grad.new_empty(call.layout.shape) if used is None else used
        return convolution_gradients(call, grad, input, shaped, wanted)[:2]
    grad_input = None if used is None else grad @ used
    if not wants_weight:
        return grad_input, None
    return grad_input, grad.reshape(-1, grad.shape[-1]).t() @ input.reshape(-1, input.shape[-1])


def differentiable_gradients(
    ctx: Any, grad: Tensor, operands: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> list[Tensor | None]:
    """The gradients by PyTorch's own operators on the whole weight, so that they can be differentiated again."""
    # Views, so that each is differentiated by itself: one may be another, as the weight its source, or depend on it.
    values = [None if value is None else value.view_as(value) for value in operands]
    input, weight, source, bias = values
    assert input is not None
    assert weight is not None
    assert source is not None
    call, needs = ctx.call, ctx.needs_input_grad[: len(values)]
    wanted = [value for value, needed in zip(values, needs, strict=True) if needed and value is not None]
    with torch.autocast(input.device.type, enabled=False):
        used = used_weight(weight, source, call.layout, call.arguments["num_alphas"], call.arguments["binary"])
        out = call.function(input, used.to(ctx.dtype), None if bias is None else bias.to(ctx.dtype), *call.geometry)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]
