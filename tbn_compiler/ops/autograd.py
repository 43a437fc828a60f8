"""Gradients of the ``tbn::`` operators.

``tbn::tile`` is straight-through (Eq. 6): the gradient of ``B`` reaches ``W`` unchanged, element by element. A
full-precision tile has no sign to step over and gets its true gradient. ``tbn::scale`` is differentiated as
usual; its alpha gradient reaches the source through ``d mean|A| / dA = sign(A) / count``. The inference operators
pass gradients to input, alpha and bias, so that other parts of a network can train around packed layers; the
stored tile is constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops.reference import decode, dense_weight
from tbn_compiler.ops.schemas import CONV_OPS, LIBRARY, conv_layout, linear_layout, make_layout
from tbn_compiler.tiling import TileLayout

Grads = tuple[Tensor | None, ...]


def _tile_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    weight, p = inputs
    options = keyword_only_inputs
    ctx.layout = make_layout(weight.shape, p, options["p_in"], options["shift"])
    ctx.binary = options["binary"]


def _tile_backward(ctx: Any, grad: Tensor) -> Grads:
    if ctx.binary:
        return grad, None
    return ctx.layout.replicate(ctx.layout.aggregate(grad)), None


def _scale_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    bits, source, ctx.num_alphas = inputs
    ctx.layout = make_layout(bits.shape, ctx.num_alphas, keyword_only_inputs["p_in"])
    ctx.save_for_backward(bits, source)


def _scale_backward(ctx: Any, grad: Tensor) -> Grads:
    bits, source = ctx.saved_tensors
    layout, k = ctx.layout, ctx.num_alphas
    grad_bits = grad_source = None
    if ctx.needs_input_grad[0]:
        grad_bits = layout.scale(grad, layout.alphas(source, k).to(grad.dtype))
    if ctx.needs_input_grad[1]:
        count = source.numel() // k
        grad_alpha = layout.alpha_groups(grad * bits, k).sum((1, 3)).reshape(-1) / count
        grad_source = layout.scale(source.sign(), grad_alpha.to(source.dtype))
    return grad_bits, grad_source, None


def _weight_to_alpha(grad_weight: Tensor, tile: Tensor, alpha: Tensor, layout: TileLayout) -> Tensor:
    """Gradient of alpha from the gradient of ``alpha * B``: the sum over the elements that alpha scales."""
    bits = layout.replicate(decode(tile, layout, grad_weight.dtype))
    return layout.alpha_groups(grad_weight * bits, alpha.numel()).sum((1, 3)).reshape(-1).to(alpha.dtype)


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    input, tile, alpha, bias, out_features, p = inputs
    ctx.layout = linear_layout(input, out_features, p, **keyword_only_inputs)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(input, tile, alpha)


def _linear_backward(ctx: Any, grad: Tensor) -> Grads:
    input, tile, alpha = ctx.saved_tensors
    grad_input = grad_alpha = grad_bias = None
    rows = grad.reshape(-1, ctx.layout.rows)
    if ctx.needs_input_grad[0]:
        grad_input = grad @ dense_weight(tile, alpha, ctx.layout, grad.dtype)
    if ctx.needs_input_grad[2]:
        grad_weight = rows.t() @ input.reshape(rows.shape[0], -1)
        grad_alpha = _weight_to_alpha(grad_weight, tile, alpha, ctx.layout)
    if ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_input, None, grad_alpha, grad_bias, None, None


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    input, tile, alpha, bias, out_channels, kernel_size, p = inputs
    ctx.geometry = options = keyword_only_inputs
    ctx.layout = conv_layout(input, out_channels, kernel_size, p, options["p_in"], options["shift"], options["groups"])
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(input, tile, alpha)


def _conv_backward(ctx: Any, grad: Tensor) -> Grads:
    input, tile, alpha = ctx.saved_tensors
    d = len(ctx.layout.shape) - 2
    if unbatched := input.dim() == d + 1:
        input, grad = input.unsqueeze(0), grad.unsqueeze(0)
    geometry = ctx.geometry
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad,
        input,
        dense_weight(tile, alpha, ctx.layout, grad.dtype),
        [ctx.layout.rows],
        list(geometry["stride"]),
        list(geometry["padding"]),
        list(geometry["dilation"]),
        False,
        [0] * d,
        geometry["groups"],
        [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]],
    )
    if unbatched and grad_input is not None:
        grad_input = grad_input.squeeze(0)
    grad_alpha = None if grad_weight is None else _weight_to_alpha(grad_weight, tile, alpha, ctx.layout)
    grad_bias = None if grad_bias is None else grad_bias.to(ctx.bias_dtype)
    return grad_input, None, grad_alpha, grad_bias, None, None, None


def register() -> None:
    """Register the gradient formulas."""
    formulas: dict[str, tuple[Any, Any]] = {
        "tile": (_tile_backward, _tile_setup),
        "scale": (_scale_backward, _scale_setup),
        "linear": (_linear_backward, _linear_setup),
        **dict.fromkeys(CONV_OPS.values(), (_conv_backward, _conv_setup)),
    }
    for op, (backward, setup) in formulas.items():
        torch.library.register_autograd(f"tbn::{op}", backward, setup_context=setup, lib=LIBRARY)
