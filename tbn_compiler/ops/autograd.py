"""Gradients of the ``tbn::`` operators.

``tbn::tile`` is straight-through (Eq. 6): the gradient of ``B`` reaches ``W`` unchanged, element by element. A
full-precision tile has no sign to step over and gets its true gradient. ``tbn::scale`` is differentiated as
usual; its alpha gradient reaches the source through ``d mean|A| / dA = sign(A) / count``. The inference operators
pass gradients to input, alphas and bias, so that other parts of a network can train around packed layers; the
stored tile is constant.

``torch.func`` sees PyTorch's own operators where it differentiates, which compute the same; forward-mode
differentiation without it is refused by the inference operators, as compiled code would drop what comes of it.
``torch.vmap`` hands operators one sample at a time, but for layers whose input alone is mapped, to which all samples
are one input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from tbn_compiler.ops.calls import OPERATORS, Operator, TiledCall, convolution_gradients
from tbn_compiler.ops.reference import compute, decode, dense_weight, fold_replicas, unpack
from tbn_compiler.ops.schemas import LIBRARY, make_layout
from tbn_compiler.tiling import TileLayout, tile_vector
from tbn_compiler.torch_private import (
    below_autograd,
    compiling_fake_mode,
    forward_mode_is_active,
    functorch_is_active,
    untraced,
)

Grads = tuple[Tensor | None, ...]


# No setup_context: torch.func, which needs one, does not come here, and apply looks its signature up at every call.


class _Tile(torch.autograd.Function):
    """The gradient of ``tbn::tile``."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, p: int, p_in: int, shift: int, batch: int, hadamard: bool, binary: bool
    ) -> Tensor:
        ctx.layout, ctx.binary = make_layout(weight.shape, p, p_in, shift, batch, hadamard), binary
        return _below_autograd("tile", weight, p, p_in=p_in, shift=shift, batch=batch, hadamard=hadamard, binary=binary)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        if not ctx.binary:
            grad = ctx.layout.replicate(ctx.layout.aggregate(grad))
        return grad, None, None, None, None, None, None


class _Scale(torch.autograd.Function):
    """The gradient of ``tbn::scale``."""

    @staticmethod
    def forward(ctx: Any, bits: Tensor, source: Tensor, num_alphas: int, p_in: int) -> Tensor:
        ctx.layout, ctx.num_alphas = make_layout(bits.shape, num_alphas, p_in), num_alphas
        ctx.save_for_backward(bits, source)
        return _below_autograd("scale", bits, source, num_alphas, p_in=p_in)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        bits, source = ctx.saved_tensors
        layout, k = ctx.layout, ctx.num_alphas
        grad_bits = grad_source = None
        if ctx.needs_input_grad[0]:
            grad_bits = layout.scale(grad, layout.alphas(source, k).to(grad.dtype))
        if ctx.needs_input_grad[1]:
            count = source.numel() // k
            grad_alpha = layout.alpha_groups(grad * bits, k).sum((1, 3)).reshape(-1) / count
            grad_source = layout.scale(source.sign(), grad_alpha.to(source.dtype))
        return grad_bits, grad_source, None, None


def _below_autograd(name: str, *args: Any, **options: Any) -> Tensor:
    with below_autograd():
        result: Tensor = getattr(torch.ops.tbn, name).default(*args, **options)
    return result


def _tile(
    weight: Tensor,
    p: int,
    *,
    p_in: int = 1,
    shift: int = 0,
    batch: int = 1,
    hadamard: bool = False,
    binary: bool = True,
) -> Tensor:
    if functorch_is_active() or forward_mode_is_active():
        # torch.func differentiates PyTorch's own operators only. The first two terms are 0, and carry the gradient.
        layout = make_layout(weight.shape, p, p_in, shift, batch, hadamard)
        if not binary:
            return layout.replicate(layout.aggregate(weight))
        fixed = weight.detach()
        return weight - fixed + layout.replicate(tile_vector(fixed, layout))
    if torch.is_grad_enabled() and weight.requires_grad:
        result: Tensor = _Tile.apply(weight, p, p_in, shift, batch, hadamard, binary)  # type: ignore[no-untyped-call]
        return result
    return _below_autograd("tile", weight, p, p_in=p_in, shift=shift, batch=batch, hadamard=hadamard, binary=binary)


def _scale(bits: Tensor, source: Tensor, num_alphas: int, *, p_in: int = 1) -> Tensor:
    if functorch_is_active() or forward_mode_is_active():
        layout = make_layout(bits.shape, num_alphas, p_in)
        return layout.scale(bits, layout.alphas(source, num_alphas).to(bits.dtype))
    if torch.is_grad_enabled() and (bits.requires_grad or source.requires_grad):
        result: Tensor = _Scale.apply(bits, source, num_alphas, p_in)  # type: ignore[no-untyped-call]
        return result
    return _below_autograd("scale", bits, source, num_alphas, p_in=p_in)


def _each(name: str) -> Callable[..., tuple[Tensor, int]]:
    """A rule of ``torch.vmap`` for any operator: one sample after the other, as weights are few.

    A list among the arguments has a list of dimensions.
    """

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any, **options: Any) -> tuple[Tensor, int]:
        calls = (
            [value.select(d, index) if isinstance(d, int) else value for value, d in zip(args, in_dims, strict=True)]
            for index in range(info.batch_size)
        )
        op = getattr(torch.ops.tbn, name).default
        return torch.stack([op(*call, **options) for call in calls]), 0

    return rule


class _Unpack(torch.autograd.Function):
    """The gradient of ``tbn::unpack``."""

    @staticmethod
    def forward(ctx: Any, options: dict[str, Any], tile: Tensor, alpha: Tensor, shape: list[int], p: int) -> Tensor:
        ctx.layout = make_layout(shape, p, **options)
        ctx.save_for_backward(tile, alpha)
        return _below_autograd("unpack", tile, alpha, shape, p, **options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        tile, alpha = ctx.saved_tensors
        return None, None, _alpha_gradient(ctx.layout, grad, tile, alpha), None, None


def _unpack(tile: Tensor, alpha: Tensor, shape: list[int], p: int, **options: Any) -> Tensor:
    if functorch_is_active() or forward_mode_is_active():
        return unpack(tile.detach(), alpha, shape, p, **options)
    if torch.is_grad_enabled() and alpha.requires_grad:
        result: Tensor = _Unpack.apply(options, tile, alpha, shape, p)  # type: ignore[no-untyped-call]
        return result
    return _below_autograd("unpack", tile, alpha, shape, p, **options)


def _alpha_gradient(layout: TileLayout, grad_dense: Tensor, tile: Tensor, alpha: Tensor) -> Tensor:
    """The gradient of the stored alphas, each of which scales its elements of ``B``, from that of the weight."""
    bits = layout.replicate(decode(tile, layout, grad_dense.dtype))
    return layout.alpha_groups(grad_dense * bits, alpha.numel()).sum((1, 3)).reshape(-1).to(alpha.dtype)


class _Inference(torch.autograd.Function):
    """The gradient of an inference operator."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, options: dict[str, Any], *inputs: Any) -> Tensor:
        call = operator.bind(inputs, options)
        ctx.call = call.without_tensors()
        ctx.bias_dtype = None if call.bias is None else call.bias.dtype
        ctx.save_for_backward(call.input, call.tile, call.alpha, call.input_alpha)
        return _below_autograd(operator.name, *inputs, **options)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        call: TiledCall = ctx.call
        if call.activation != "float" or call.epilogue != "none":
            raise RuntimeError(_NO_GRADIENT.format(call.activation, call.epilogue))
        input, tile, alpha, input_alpha = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]  # without those left out
        needs = dict(zip(call.operator.positional, needed, strict=False))
        dense = dense_weight(tile, alpha, call.layout, grad.dtype)
        used = dense if input_alpha is None else fold_replicas(dense, input_alpha)  # the weight that the input sees
        wanted = (needs["input"], needs["alpha"] or needs.get("input_alpha", False), needs["bias"])
        layer = convolution_gradients if call.dims else _linear_backward
        grad_input, grad_used, grad_bias = layer(call, grad, input, used, wanted)
        grads = {"input": grad_input, "bias": None if grad_bias is None else grad_bias.to(ctx.bias_dtype)}
        if grad_used is not None:
            grad_dense = grad_used
            if input_alpha is not None:
                blocks = dense.unflatten(1, (input_alpha.numel(), -1)) * grad_used.unsqueeze(1)
                grads["input_alpha"] = (
                    blocks.transpose(0, 1).reshape(input_alpha.numel(), -1).sum(1).to(input_alpha.dtype)
                )
                scale = input_alpha.to(grad_used.dtype).view(-1, *[1] * (grad_used.dim() - 1))
                grad_dense = (grad_used.unsqueeze(1) * scale).reshape(dense.shape)
            grads["alpha"] = _alpha_gradient(call.layout, grad_dense, tile, alpha)
        return (None, None, *(grads.get(name) for name, _ in zip(call.operator.positional, needed, strict=False)))


_NO_GRADIENT = (
    "tbn operators have no gradient with activation={!r}, epilogue={!r}: these forms are for inference; train around "
    "the lowered module instead"
)


def _inference(operator: Operator) -> Callable[..., Tensor]:
    """The kernel that records the gradient of an inference operator."""

    def kernel(*args: Any, **options: Any) -> Tensor:
        tensors = [value for value in args if isinstance(value, Tensor)]
        recorded = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
        forward = forward_mode_is_active() and any(unpack_dual(value).tangent is not None for value in tensors)
        if functorch_is_active():
            # What Dynamo traces does not say whether a transform differentiates it.
            differentiated = recorded or forward
            if differentiated or compiling_fake_mode() is not None:
                call = operator.bind(args, options)
                if call.activation == "float":
                    return compute(call.checked().replaced(tile=call.tile.detach()))
                if differentiated:
                    raise RuntimeError(_NO_GRADIENT.format(call.activation, call.epilogue))
        elif forward:
            raise NotImplementedError(
                f"tbn::{operator.name} has no forward derivative but in torch.func (jvp, jacfwd): use these"
            )
        elif recorded:
            result: Tensor = _Inference.apply(operator, options, *args)  # type: ignore[no-untyped-call]
            return result
        return _below_autograd(operator.name, *args, **options)

    return kernel


def _mapped(operator: Operator) -> Callable[..., tuple[Tensor, int]]:
    """The rule of ``torch.vmap`` for an inference operator: inputs of one layer become one input of more samples.

    Where an operand other than the input is mapped, too, the samples are computed one after the other.
    """
    each = _each(operator.name)

    def rule(info: Any, in_dims: tuple[Any, ...], input: Tensor, *args: Any, **options: Any) -> tuple[Tensor, int]:
        outer = input.dim() - 1 - operator.dims
        fits = outer in (1, 2) if operator.dims else outer > 0  # if not, the operator says what is wrong
        if in_dims[0] is None or any(isinstance(dim, int) for dim in in_dims[1:]) or not fits:
            return each(info, in_dims, input, *args, **options)
        inputs = input.movedim(in_dims[0], 0)
        if not operator.dims or outer == 1:
            return operator.overload(inputs, *args, **options), 0
        out = operator.overload(inputs.flatten(0, 1), *args, **options)
        size = (inputs.shape[0], inputs.shape[1], *out.shape[1:])
        if compiling_fake_mode() is None:
            return out.reshape(size), 0
        # A view that divides the samples again leaves Inductor without their number where that is symbolic.
        return out.as_strided(size, (inputs.shape[1] * out.stride(0), *out.stride())), 0

    return rule


def _linear_backward(
    call: TiledCall, grad: Tensor, input: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of the gradients of input, weight and bias that are wanted."""
    rows = grad.reshape(-1, call.outputs)
    return (
        grad @ weight if wanted[0] else None,
        rows.t() @ input.reshape(-1, input.shape[-1]) if wanted[1] else None,
        rows.sum(0) if wanted[2] else None,
    )


def register() -> None:
    """Register the gradient formulas, and the rules of ``torch.vmap``."""
    for name, kernel in (("tile", _tile), ("scale", _scale), ("unpack", _unpack)):
        LIBRARY.impl(name, untraced(kernel), "Autograd")
        torch.library.register_vmap(f"tbn::{name}", _each(name), lib=LIBRARY)
    for name, operator in OPERATORS.items():
        LIBRARY.impl(name, untraced(_inference(operator)), "Autograd")
        torch.library.register_vmap(f"tbn::{name}", _mapped(operator), lib=LIBRARY)
