"""Gradients of the ``tbn::`` operators.

``tbn::tile`` is straight-through (Eq. 6): the gradient of ``B`` reaches ``W`` unchanged, element by element. A
full-precision tile has no sign to step over and gets its true gradient. ``tbn::scale`` is differentiated as
usual; its alpha gradient reaches the source through ``d mean|A| / dA = sign(A) / count``. The inference operators
pass gradients to input, alpha and bias, so that other parts of a network can train around packed layers; the
stored tile is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops.reference import decode, dense_weight, fold_replicas
from tbn_compiler.ops.schemas import (
    CONV_OPS,
    CONV_TRANSPOSE_OPS,
    LIBRARY,
    conv_layout,
    conv_transpose_layout,
    linear_layout,
    make_layout,
)
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


def _save_operands(ctx: Any, inputs: tuple[Any, ...], options: dict[str, Any], layout: TileLayout) -> None:
    """Keep what the gradient of an inference operator needs."""
    ctx.formats = tuple(options.get(name, usual) for name, usual in (("activation", "float"), ("epilogue", "none")))
    input, tile, alpha, bias = inputs[:4]
    ctx.layout, ctx.num_inputs = layout, len(inputs)
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(input, tile, alpha, inputs[-1])


def _used_weight(ctx: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The dense weight, and the one that the input sees: with the blocks of a replicated input summed."""
    if ctx.formats != ("float", "none"):
        activation, epilogue = ctx.formats
        raise RuntimeError(
            f"tbn operators have no gradient with activation={activation!r}, epilogue={epilogue!r}: these forms are "
            "for inference; train around the lowered module instead"
        )
    _, tile, alpha, input_alpha = ctx.saved_tensors
    dense = dense_weight(tile, alpha, ctx.layout, dtype)
    return dense, dense if input_alpha is None else fold_replicas(dense, input_alpha)


def _gradients(
    ctx: Any, grad_input: Tensor | None, grad_used: Tensor | None, grad_bias: Tensor | None, dense: Tensor
) -> Grads:
    """All gradients of an inference operator from that of the weight that the input sees."""
    _, tile, alpha, input_alpha = ctx.saved_tensors
    layout = ctx.layout
    grad_alpha = grad_input_alpha = None
    if grad_used is not None:
        grad_dense = grad_used
        if input_alpha is not None:
            blocks = dense.unflatten(1, (input_alpha.numel(), -1)) * grad_used.unsqueeze(1)
            grad_input_alpha = blocks.transpose(0, 1).flatten(1).sum(1).to(input_alpha.dtype)
            scale = input_alpha.to(grad_used.dtype).view(-1, *[1] * (grad_used.dim() - 1))
            grad_dense = (grad_used.unsqueeze(1) * scale).flatten(1, 2)
        # Each alpha scales its elements of B.
        bits = layout.replicate(decode(tile, layout, grad_dense.dtype))
        grad_alpha = layout.alpha_groups(grad_dense * bits, alpha.numel()).sum((1, 3)).reshape(-1).to(alpha.dtype)
    grad_bias = None if grad_bias is None else grad_bias.to(ctx.bias_dtype)
    fixed = (None,) * (ctx.num_inputs - 5)
    return grad_input, None, grad_alpha, grad_bias, *fixed, grad_input_alpha


def _linear_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    input, _, _, _, in_features, out_features, p, input_alpha = inputs
    options = keyword_only_inputs
    layout = linear_layout(input, in_features, out_features, p, input_alpha, options["p_in"], options["shift"])
    _save_operands(ctx, inputs, options, layout)


def _linear_backward(ctx: Any, grad: Tensor) -> Grads:
    input = ctx.saved_tensors[0]
    dense, used = _used_weight(ctx, grad.dtype)
    rows = grad.reshape(-1, ctx.layout.rows)
    need_input, _, need_alpha, need_bias = ctx.needs_input_grad[:4]
    grad_used = None
    if need_alpha or ctx.needs_input_grad[-1]:
        grad_used = rows.t() @ input.reshape(-1, input.shape[-1])
    grad_input = grad @ used if need_input else None
    return _gradients(ctx, grad_input, grad_used, rows.sum(0) if need_bias else None, dense)


def _conv_setup(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor) -> None:
    input, _, _, _, in_channels, out_channels, kernel_size, p, input_alpha = inputs
    ctx.geometry = options = keyword_only_inputs
    layout = conv_layout(
        input,
        in_channels,
        out_channels,
        kernel_size,
        p,
        input_alpha,
        options["p_in"],
        options["shift"],
        options["groups"],
    )
    _save_operands(ctx, inputs, options, layout)


def _conv_backward(ctx: Any, grad: Tensor) -> Grads:
    dense, used = _used_weight(ctx, grad.dtype)
    return _gradients(ctx, *_convolution_backward(ctx, grad, used, ctx.layout.rows, None), dense)


def _convolution_backward(
    ctx: Any, grad: Tensor, weight: Tensor, outputs: int, output_padding: Sequence[int] | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias; ``output_padding`` is that of a transpose convolution."""
    input = ctx.saved_tensors[0]
    d = weight.dim() - 2
    if unbatched := input.dim() == d + 1:
        input, grad = input.unsqueeze(0), grad.unsqueeze(0)
    geometry = ctx.geometry
    need_input, _, need_alpha, need_bias = ctx.needs_input_grad[:4]
    grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
        grad,
        input,
        weight,
        [outputs],
        list(geometry["stride"]),
        list(geometry["padding"]),
        list(geometry["dilation"]),
        output_padding is not None,
        list(output_padding or [0] * d),
        geometry["groups"],
        [need_input, need_alpha or ctx.needs_input_grad[-1], need_bias],
    )
    if unbatched and grad_input is not None:
        grad_input = grad_input.squeeze(0)
    return grad_input, grad_weight, grad_bias


def _conv_transpose_setup(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    input, _, _, _, in_channels, out_channels, kernel_size, p = inputs
    ctx.geometry = options = keyword_only_inputs
    layout = conv_transpose_layout(
        input, in_channels, out_channels, kernel_size, p, options["shift"], options["groups"]
    )
    ctx.out_channels = out_channels
    _save_operands(ctx, (*inputs, None), options, layout)


def _conv_transpose_backward(ctx: Any, grad: Tensor) -> Grads:
    dense, _ = _used_weight(ctx, grad.dtype)
    grads = _convolution_backward(ctx, grad, dense, ctx.out_channels, ctx.geometry["output_padding"])
    return _gradients(ctx, *grads, dense)[:-1]  # there is no input_alpha


def register() -> None:
    """Register the gradient formulas."""
    formulas: dict[str, tuple[Any, Any]] = {
        "tile": (_tile_backward, _tile_setup),
        "scale": (_scale_backward, _scale_setup),
        "linear": (_linear_backward, _linear_setup),
        **dict.fromkeys(CONV_OPS.values(), (_conv_backward, _conv_setup)),
        **dict.fromkeys(CONV_TRANSPOSE_OPS.values(), (_conv_transpose_backward, _conv_transpose_setup)),
    }
    for op, (backward, setup) in formulas.items():
        torch.library.register_autograd(f"tbn::{op}", backward, setup_context=setup, lib=LIBRARY)
