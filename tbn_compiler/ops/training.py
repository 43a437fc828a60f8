"""Layers that train on the tile: forward and backward on the rows that differ.

``tbn::train_linear`` and ``tbn::train_conv*`` compute what a layer on ``scale(tile(weight), source)`` computes, with
its gradients, and multiply the unique rows only. Write ``T [R, n]`` for the unique rows of the tile (+1 and -1) and
``alpha_i`` for the scale of repeat ``i``. Then, with ``g_i`` the part of the result's gradient that belongs to repeat
``i``::

    z = x T^T               y_i = alpha_i z + bias_i                                (1)
    g = sum_i alpha_i g_i   dL/dx = g T         dL/dalpha_i = <g_i, z>              (2)
    dL/dT = g^T x                               of the tile, R rows                 (3)
    dL/dW_i = alpha_i g_i^T x                   straight-through (Eq. 6), all rows  (4)

The products of (1) and (2) have ``R`` rows instead of ``m``. So has (3), where the *tile* is the parameter; the paper's
gradient (4) of every weight element takes the whole product. The sum of (4) over the copies is (3).

``weight`` is the latent weight ``W`` of the layout's shape, whose aggregated signs are the tile (Eq. 2, 3), or the
aggregated tile ``s`` itself, ``q`` elements in any shape. ``source`` is ``A`` (or ``W``) of the weight's shape, whose
mean magnitudes are the alphas (Eq. 7, 9), or one element for each alpha: then the alpha is its magnitude, and its
gradient is divided by the ``N / k`` weights that each alpha scales. That is what one element of ``A`` gets, so that
gradient descent moves the alpha as it moves the mean of ``A`` (until an element of ``A`` changes its sign).

Where no rows repeat, alphas change within a row, or groups of a convolution read different inputs, the whole weight is
multiplied.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops.calls import TRAINING_OPERATORS, Operator, TiledCall
from tbn_compiler.ops.schemas import LIBRARY, TRAINING_PREFIX, make_layout
from tbn_compiler.tiling import TiledProduct, TileLayout, tile_signs
from tbn_compiler.torch_private import functorch_is_active, untraced

Grads = tuple[Tensor | None, ...]


def takes_latent_weight(weight: Tensor, layout: TileLayout) -> bool:
    """Whether ``weight`` is ``W``, not the aggregated tile; they are the same if there is one copy."""
    return tuple(weight.shape) == layout.shape


def alphas_of(source: Tensor, layout: TileLayout, num_alphas: int) -> Tensor:
    """The alphas, ``[num_alphas]``, from ``A`` (Eq. 7, 9) or from one element for each."""
    if source.numel() != num_alphas:
        return layout.alphas(source, num_alphas)
    count = layout.numel // num_alphas
    magnitude = source.reshape(-1).abs()
    return magnitude.detach() + (magnitude - magnitude.detach()) / count  # the second term is 0


def used_weight(weight: Tensor, source: Tensor, layout: TileLayout, k: int, binary: bool) -> Tensor:
    """The whole weight ``alpha * B`` of ``layout.shape``, differentiable as ``tbn::tile`` and ``tbn::scale`` are."""
    if takes_latent_weight(weight, layout):
        options = {"p_in": layout.p_in, "shift": layout.shift, "batch": layout.batch, "binary": binary}
        bits = torch.ops.tbn.tile.default(weight, layout.p, **options)
    else:
        tile = torch.ops.tbn.tile.default(weight.reshape(-1), 1, binary=binary)
        bits = layout.replicate(tile)
    if source.numel() != k:
        used: Tensor = torch.ops.tbn.scale.default(bits, source, k, p_in=layout.alphas_in(k))
        return used
    return layout.scale(bits, alphas_of(source, layout, k).to(bits.dtype))


def _whole_weight(call: TiledCall, weight: Tensor, source: Tensor) -> Tensor:
    return used_weight(weight, source, call.layout, call.arguments["num_alphas"], call.arguments["binary"])


def multiplied_rows(call: TiledCall) -> TiledProduct | None:
    """The product of a call that multiplies fewer rows than the weight has, or shorter ones; else ``None``."""
    product = TiledProduct(call.layout, call.arguments["num_alphas"], call.groups)
    if call.transposed and call.groups > 1:
        return None  # the rows of a group meet the other groups' outputs
    saves = product.rows < product.group_rows or product.summed > 1
    return product if saves and product.bare and product.group_rows % product.rows == 0 else None


def _rows(tile: Tensor, product: TiledProduct) -> Tensor:
    """The rows to multiply with, ``[groups * rows, columns, *kernel]``, from a tile ``[q]``."""
    layout = product.layout
    rows = layout.unique_weight(tile).reshape(layout.unique_rows, -1, *layout.shape[2:])
    return rows if product.groups == 1 else rows[product.computed_rows(rows.device).reshape(-1)]


def _tile_gradient(grad_rows: Tensor, product: TiledProduct) -> Tensor:
    """The gradient of the tile, ``[q]``, from that of :func:`_rows`."""
    layout = product.layout
    if product.groups > 1:
        index = product.computed_rows(grad_rows.device).reshape(-1)
        zeros = grad_rows.new_zeros((layout.unique_rows, *grad_rows.shape[1:]))
        grad_rows = zeros.index_add_(0, index, grad_rows)
    return grad_rows.reshape(-1, layout.tile_size).sum(0)


def _factors(alpha: Tensor, product: TiledProduct, dims: int) -> Tensor:
    """The alphas as they meet values that :func:`_split` has split, ``[groups, repeats, rows, *positions]``."""
    if alpha.numel() == 1:
        shape = [1, 1, 1]
    elif product.groups == 1 and product.alpha_per_repeat:
        shape = [1, -1, 1]
    else:
        alpha, shape = product.layout.row_alphas(alpha), [product.groups, product.repeats, product.rows]
    return alpha.reshape(*shape, *[1] * dims)


def _split(value: Tensor, product: TiledProduct, dims: int) -> Tensor:
    """``[*batch, channels, *positions]`` as ``[*batch, groups, repeats (or 1), rows, *positions]``."""
    split: Tensor = value.unflatten(-1 - dims, (product.groups, -1, product.rows))
    return split


def _join(value: Tensor, dims: int) -> Tensor:
    """What :func:`_split` has split, with its channels one behind the other."""
    return value.flatten(-3 - dims, -1 - dims)


def _alpha_gradient(products: Tensor, product: TiledProduct, dims: int) -> Tensor:
    """The gradient of the alphas from split products of scaled values and their gradients."""
    axis = products.dim() - dims - 3
    others = [*range(axis), *range(axis + 3, products.dim())]
    sums = products.sum(others) if others else products
    return sums.reshape(product.num_alphas, -1).sum(1)


class _Layer(torch.autograd.Function):
    """A layer on the rows that differ, and its gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        source: Tensor,
        bias: Tensor | None,
        call: TiledCall,
        product: TiledProduct,
        dtype: torch.dtype,
    ) -> Tensor:
        layout, d, binary = call.layout, call.dims, call.arguments["binary"]
        ctx.call, ctx.product, ctx.dtype = call, product, dtype
        ctx.latent_weight = takes_latent_weight(weight, layout)
        s = layout.aggregate(weight) if ctx.latent_weight else weight.reshape(-1)
        rows = _rows((tile_signs(s) if binary else s).to(dtype), product)
        alpha = alphas_of(source, layout, product.num_alphas).to(dtype)
        factors = _factors(alpha, product, d)
        added = None if bias is None else bias.to(dtype)
        if call.transposed:  # inputs with equal rows are scaled and summed
            scaled = _join((_split(input, product, d) * factors).sum(-2 - d, keepdim=True), d)
            out = call.function(scaled, rows, added, *call.geometry)
        else:
            scaled = call.function(layout.sum_inputs(input, -1 - d), rows, None, *call.geometry)
            unique = _split(scaled, product, d)
            shape = (product.groups, product.repeats, product.rows, *[1] * d)
            scales = factors.expand(shape)
            out = _join(unique * scales if added is None else torch.addcmul(added.view(shape), unique, scales), d)
        ctx.save_for_backward(input, weight, source, bias, rows, alpha, scaled)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        input, weight, source, bias, rows, alpha, scaled = ctx.saved_tensors
        call, product, layout, needs = ctx.call, ctx.product, ctx.call.layout, ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradients will be differentiated, too
            return (*_differentiable_gradients(ctx, grad, (input, weight, source, bias)), None, None, None)
        wants_rows = needs[1] and not (ctx.latent_weight and call.arguments["binary"])
        gradients = _transposed_gradients if call.transposed else _plain_gradients
        grad_input, grad_rows, products = gradients(
            call, product, grad, input, rows, alpha, scaled, (needs[0], wants_rows, needs[2])
        )
        grad_weight = grad_source = grad_bias = None
        if grad_rows is not None:
            grad_tile = _tile_gradient(grad_rows, product)
            grad_weight = layout.replicate(grad_tile) if ctx.latent_weight else grad_tile.reshape(weight.shape)
        elif needs[1]:
            _, grad_dense = _multiply_backward(call, grad, input, weight, (False, True))
            assert grad_dense is not None
            grad_weight = layout.scale(grad_dense, alpha)
        if products is not None:
            grad_source = _source_gradient(source, layout, _alpha_gradient(products, product, call.dims))
        if needs[3]:
            grad_bias = _bias_gradient(grad, call.dims).to(bias.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_input, grad_weight, grad_source, grad_bias, None, None, None


_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _plain_gradients(
    call: TiledCall,
    product: TiledProduct,
    grad: Tensor,
    input: Tensor,
    rows: Tensor,
    alpha: Tensor,
    unique: Tensor,
    wanted: tuple[bool, bool, bool],
) -> _Gradients:
    """Those of the gradients of input, rows and alphas (before they are summed up) that are wanted.

    ``unique`` are the results of the rows, without scale.
    """
    d, factors = call.dims, _factors(alpha, product, call.dims)
    repeats = _split(grad, product, d)
    if alpha.numel() == 1:
        repeats = repeats.sum(-2 - d, keepdim=True)
        grad_unique = repeats * factors
    else:
        grad_unique = (repeats * factors).sum(-2 - d, keepdim=True)
    met = call.layout.sum_inputs(input, -1 - d)
    grad_met, grad_rows = _multiply_backward(call, _join(grad_unique, d), met, rows, wanted[:2])
    if grad_met is not None and product.neighbours > 1:
        grad_met = grad_met.repeat_interleave(product.neighbours, -1 - d)
    return grad_met, grad_rows, _split(unique, product, d) * repeats if wanted[2] else None


def _transposed_gradients(
    call: TiledCall,
    product: TiledProduct,
    grad: Tensor,
    input: Tensor,
    rows: Tensor,
    alpha: Tensor,
    summed: Tensor,
    wanted: tuple[bool, bool, bool],
) -> _Gradients:
    """The same for a transpose convolution; ``summed`` are its inputs with equal rows, scaled and summed."""
    d, factors = call.dims, _factors(alpha, product, call.dims)
    grad_summed, grad_rows = _multiply_backward(call, grad, summed, rows, (wanted[0] or wanted[2], wanted[1]))
    if grad_summed is None:
        return None, grad_rows, None
    values, repeats = _split(input, product, d), _split(grad_summed, product, d)
    grad_input = _join((repeats * factors).expand_as(values), d) if wanted[0] else None
    return grad_input, grad_rows, values * repeats if wanted[2] else None


def _bias_gradient(grad: Tensor, dims: int) -> Tensor:
    others = [axis for axis in range(grad.dim()) if axis != grad.dim() - 1 - dims]
    return grad.sum(others) if others else grad


def _source_gradient(source: Tensor, layout: TileLayout, grad_alpha: Tensor) -> Tensor:
    """The gradient of ``A``, or of one element for each alpha, from that of the alphas."""
    k = grad_alpha.numel()
    grad_alpha = grad_alpha.to(source.dtype) / (layout.numel // k)
    if source.numel() == k:
        return (source.reshape(-1).sign() * grad_alpha).reshape(source.shape)
    return layout.scale(source.sign(), grad_alpha)


def _differentiable_gradients(
    ctx: Any, grad: Tensor, operands: tuple[Tensor, Tensor, Tensor, Tensor | None]
) -> list[Tensor | None]:
    """The gradients by PyTorch's own operators on the whole weight, so that they can be differentiated again."""
    input, weight, source, bias = operands
    needs = ctx.needs_input_grad[: len(operands)]
    wanted = [value for value, needed in zip(operands, needs, strict=True) if needed and value is not None]
    with torch.autocast(input.device.type, enabled=False):
        used = _whole_weight(ctx.call, weight, source).to(ctx.dtype)
        out = ctx.call.function(input, used, None if bias is None else bias.to(ctx.dtype), *ctx.call.geometry)
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in needs]


def _multiply_backward(
    call: TiledCall, grad: Tensor, input: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and weight of a linear layer or convolution, those that are wanted."""
    if not any(wanted):
        return None, None
    if not call.dims:
        return (
            grad @ weight if wanted[0] else None,
            grad.reshape(-1, grad.shape[-1]).t() @ input.reshape(-1, input.shape[-1]) if wanted[1] else None,
        )
    if unbatched := input.dim() == call.dims + 1:
        input, grad = input.unsqueeze(0), grad.unsqueeze(0)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad,
        input,
        weight,
        None,
        *(list(call.arguments[name]) for name in ("stride", "padding", "dilation")),
        call.transposed,
        list(call.arguments.get("output_padding", [0] * call.dims)),
        call.groups,
        [*wanted, False],
    )
    return (grad_input.squeeze(0) if unbatched and grad_input is not None else grad_input), grad_weight


def train(call: TiledCall, input: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
    """The result of a training layer, differentiable."""
    _check(call, input, weight, source)
    product = None if functorch_is_active() else multiplied_rows(call)
    if product is None:
        return call.function(input, _whole_weight(call, weight, source), bias, *call.geometry)
    device, dtype = input.device.type, weight.dtype
    autocast = torch.amp.is_autocast_available(device)  # not on the meta device
    if autocast and torch.is_autocast_enabled(device) and dtype != torch.float64 != input.dtype:
        dtype = torch.get_autocast_dtype(device)
        input = input.to(dtype)
    if input.dtype != dtype:
        dtypes = f"{input.dtype} and {weight.dtype}"
        raise RuntimeError(f"tbn::{call.operator.name}: input and weight must have the same dtype, got {dtypes}")
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        operands = (input, weight, source, bias)
        result: Tensor = _Layer.apply(*operands, call, product, dtype)  # type: ignore[no-untyped-call]
    return result


def _check(call: TiledCall, input: Tensor, weight: Tensor, source: Tensor) -> None:
    op = f"tbn::{call.operator.name}"
    _check_weight(op, call.layout, call.arguments["num_alphas"], weight, source)
    size, d = input.shape[-1 - call.dims], call.dims
    if size != call.inputs:
        what = "input channels" if d else "input features"
        raise RuntimeError(f"{op}: expected {call.inputs} {what}, got an input of shape {tuple(input.shape)}")


def _check_weight(op: str, layout: TileLayout, k: int, weight: Tensor, source: Tensor) -> None:
    if weight.numel() not in (layout.numel, layout.tile_size):
        raise ValueError(
            f"{op}: weight must have {layout.numel} elements, or the {layout.tile_size} of the tile, got shape "
            f"{tuple(weight.shape)}"
        )
    if not layout.allows_alphas(k) or source.numel() not in (layout.numel, k):
        raise ValueError(f"{op}: {k} alphas from a source of shape {tuple(source.shape)} of a weight {layout.shape}")


def train_weight(
    weight: Tensor,
    source: Tensor,
    shape: Sequence[int],
    p: int,
    num_alphas: int,
    *,
    p_in: int = 1,
    shift: int = 0,
    batch: int = 1,
    binary: bool = True,
) -> Tensor:
    """The whole weight ``alpha * B`` of a latent weight or tile, for what multiplies it in its own way."""
    layout = make_layout(shape, p, p_in, shift, batch)
    _check_weight(f"tbn::{TRAINING_PREFIX}weight", layout, num_alphas, weight, source)
    return used_weight(weight, source, layout, num_alphas, binary)


def _kernel(operator: Operator) -> Callable[..., Tensor]:
    def kernel(
        input: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None, *further: Any, **options: Any
    ) -> Tensor:
        arguments = {**operator.defaults, **dict(zip(operator.positional[4:], further, strict=False)), **options}
        return train(TiledCall(operator, arguments), input, weight, source, bias)

    return kernel


def register() -> None:
    """Register the layers for every device; they are made of PyTorch's operators, and differentiated as such."""
    LIBRARY.impl(f"{TRAINING_PREFIX}weight", untraced(train_weight), "CompositeImplicitAutograd")
    for operator in TRAINING_OPERATORS.values():
        LIBRARY.impl(operator.name, untraced(_kernel(operator)), "CompositeImplicitAutograd")
