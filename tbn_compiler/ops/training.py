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

``weight`` is the latent weight or the tile, and ``source`` holds or gives the alphas: :mod:`tbn_compiler.ops.latents`.

Rows with Hadamard signs differ, and share their products all the same (:mod:`tbn_compiler.ops.mixing`). Where no other
rows repeat, alphas change within a row, or groups of a convolution read different inputs, the whole weight is
multiplied (:mod:`tbn_compiler.ops.whole_weight`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops.calls import TRAINING_OPERATORS, Operator, TiledCall, convolution_gradients
from tbn_compiler.ops.latents import (
    alpha_values,
    alphas_of,
    check_latents,
    source_gradient,
    takes_latent_weight,
    used_weight,
)
from tbn_compiler.ops.mixing import mixed_layer
from tbn_compiler.ops.schemas import LIBRARY
from tbn_compiler.ops.whole_weight import (
    LARGE,
    WholeWeight,
    bias_gradient,
    binary_signs,
    blas_is_faster,
    constant_weight,
    differentiable_gradients,
    dot,
)
from tbn_compiler.tiling import TiledProduct, TileLayout, tile_signs
from tbn_compiler.torch_private import forward_mode_is_active, functorch_is_active, untraced

Grads = tuple[Tensor | None, ...]


def _product(call: TiledCall) -> TiledProduct:
    return TiledProduct(call.layout, call.arguments["num_alphas"], call.groups)


def _mixed(call: TiledCall, input: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
    """A layer whose copies have Hadamard signs."""
    layout, k, binary = call.layout, call.arguments["num_alphas"], call.arguments["binary"]
    # In half precision the gradient of an alpha may overflow before it is divided by the weights that it scales.
    alpha = alphas_of(source.to(torch.promote_types(source.dtype, torch.float32)), layout, k)
    if not takes_latent_weight(weight, layout):
        return mixed_layer(call, input, torch.ops.tbn.tile.default(weight.reshape(-1), 1, binary=binary), alpha, bias)
    if not binary:
        return mixed_layer(call, input, layout.aggregate(weight), alpha, bias)
    return mixed_layer(call, input, tile_signs(layout.aggregate(weight.detach())), alpha, bias, weight)


def multiplied_rows(call: TiledCall) -> TiledProduct | None:
    """The product of a call that multiplies fewer rows than the weight has, or shorter ones; else ``None``."""
    return _saving_product(call.layout, call.arguments["num_alphas"], call.groups, call.transposed)


@functools.lru_cache(maxsize=1024)
def _saving_product(layout: TileLayout, num_alphas: int, groups: int, transposed: bool) -> TiledProduct | None:
    product = TiledProduct(layout, num_alphas, groups)
    if transposed and groups > 1:
        return None  # the rows of a group meet the other groups' outputs
    saves = product.rows < product.group_rows or product.summed > 1
    return product if saves and product.bare and product.group_rows % product.rows == 0 else None


def shares_products(call: TiledCall) -> bool:
    """Whether a call multiplies less than the whole weight: rows repeat, or copies have Hadamard signs."""
    return multiplied_rows(call) is not None or _product(call).mixes > 1


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
    tiles = grad_rows.reshape(-1, layout.tile_size)
    return tiles[0] if len(tiles) == 1 else tiles.sum(0)


def _scaled_tile(s: Tensor, scale: Tensor, binary: bool) -> Tensor:
    """The tile of aggregated values (Eq. 3) times a number, in the dtype of that."""
    return binary_signs(s, scale.dtype).mul_(scale) if binary else s.to(scale.dtype) * scale


@dataclass(frozen=True)
class _Repeats:
    """How the results of rows repeat: values ``[*batch, channels, *positions]``, and views of them by their repeats.

    Everything works in the order that the values have in memory, so that results and gradients keep it.

    Attributes:
        product: what is multiplied.
        dims: positions' dimensions.
        last: whether the channels lie behind the positions in memory.
    """

    product: TiledProduct
    dims: int
    last: bool

    @classmethod
    def of(cls, value: Tensor, product: TiledProduct, dims: int) -> _Repeats:
        """As ``value`` lies in memory."""
        form = _CHANNELS_LAST.get(dims) if value.dim() == dims + 2 else None
        last = form is not None and not value.is_contiguous() and value.is_contiguous(memory_format=form)
        return cls(product, dims, last)

    @property
    def form(self) -> torch.memory_format:
        """The order in memory."""
        return _CHANNELS_LAST[self.dims] if self.last else torch.contiguous_format

    def split(self, value: Tensor) -> Tensor:
        """``[tokens, groups, repeats (or 1), rows, positions]``, a view of a value that is dense."""
        value = value.contiguous(memory_format=self.form)
        if self.last:
            value = value.movedim(1, -1)
        shape, product, behind = value.shape, self.product, 0 if self.last else self.dims
        axis = len(shape) - 1 - behind
        tokens = shape[0] if axis == 1 else math.prod(shape[:axis])
        positions = math.prod(shape[axis + 1 :]) if behind else 1
        repeats = shape[axis] // (product.groups * product.rows)
        return value.view(tokens, product.groups, repeats, product.rows, positions)

    def join(self, parts: Tensor, like: Tensor) -> Tensor:
        """The value, with the other sizes of ``like``, that was split into parts."""
        channels, axis = math.prod(parts.shape[1:4]), like.dim() - 1 - self.dims
        batch, positions = like.shape[:axis], like.shape[axis + 1 :]
        if self.last:
            return parts.reshape(*batch, *positions, channels).movedim(-1, 1)
        return parts.reshape(*batch, channels, *positions)

    def factors(self, alpha: Tensor) -> Tensor:
        """Alphas as they meet parts."""
        product = self.product
        if product.groups == 1 and product.alpha_per_repeat:
            return alpha.view(1, -1, 1, 1)
        return product.layout.row_alphas(alpha).view(product.groups, product.repeats, product.rows, 1)

    def write(self, value: Tensor, alpha: Tensor | None, bias: Tensor | None) -> Tensor:
        """All repeats of a value, with a scale for each, and the bias."""
        product, once, axis = self.product, self.split(value), value.dim() - 1 - self.dims
        shape = (product.groups, product.repeats, product.rows, 1)
        sizes = (*value.shape[:axis], math.prod(shape), *value.shape[axis + 1 :])
        # Memory of its own: autograd lets nobody write to the result of a function if it is a view.
        out = torch.empty(sizes, dtype=value.dtype, device=value.device, memory_format=self.form)
        parts = self.split(out)
        if bias is None:
            parts.copy_(once) if alpha is None else torch.mul(once, self.factors(alpha), out=parts)
        elif alpha is None:
            torch.add(once, bias.view(shape), out=parts)
        else:
            torch.addcmul(bias.view(shape), once, self.factors(alpha).expand(shape), out=parts)
        return out

    def sum(self, value: Tensor, alpha: Tensor | None) -> Tensor:
        """The sum of all repeats, with a scale for each."""
        parts, product = self.split(value), self.product
        size = product.rows * parts.shape[-1]
        if alpha is None and product.groups == 1 < product.repeats and blas_is_faster(parts) and size >= _LONG:
            alpha = value.new_ones(product.repeats)
        if alpha is None:
            total = parts.sum(2, keepdim=True)
        elif product.groups == 1 and len(alpha) == product.repeats and isinstance(size, int) and size >= _LONG:
            total = torch.matmul(alpha.view(1, 1, -1), parts.view(parts.shape[0], product.repeats, size))
            total = total.view(parts.shape[0], 1, 1, product.rows, parts.shape[-1])
        else:
            total = (parts * self.factors(alpha)).sum(2, keepdim=True)
        return self.join(total, value)

    def dot(self, values: Tensor, once: Tensor) -> Tensor:
        """For each alpha, the sum over what it scales of values times those of one repeat; at least in float32."""
        k, product = self.product.num_alphas, self.product
        parts, once = self.split(values), self.split(once)
        if k == 1 and blas_is_faster(parts):
            return dot(parts.view(-1), once.view(-1)).view(1)
        if once.dtype in (torch.float16, torch.bfloat16):
            once = once.float()
        elif product.groups == 1 and product.alpha_per_repeat and blas_is_faster(parts) and parts.numel() >= LARGE:
            tokens, _, repeats, rows, positions = parts.shape
            if (size := rows * positions) >= _LONG // 2:  # the product of both is not written
                return torch.matmul(parts.view(tokens, repeats, size), once.view(tokens, size, 1)).sum(0).view(-1)
        sums: Tensor = (parts * once).sum((0, 4))
        return sums.reshape(k, -1).sum(1)


# A product with the alphas reads repeats once and writes no scaled ones; it is slow for many short ones.
_LONG = 128

_CHANNELS_LAST = {2: torch.channels_last, 3: torch.channels_last_3d}


class _Layer(torch.autograd.Function):
    """A layer on the rows that differ, and its gradients.

    The rows are multiplied with the largest alpha, and what comes of them with the alphas relative to that: results
    stay in the range of a low-precision dtype, and nothing is left to multiply where there is one alpha.
    """

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
        layout, d = call.layout, call.dims
        ctx.call, ctx.product, ctx.dtype = call, product, dtype
        ctx.latent_weight = takes_latent_weight(weight, layout)
        s = layout.aggregate(weight) if ctx.latent_weight else weight.reshape(-1)
        alpha = alpha_values(source, layout, product.num_alphas)
        scale, relative = alpha.view(()) if product.num_alphas == 1 else alpha.amax(), None
        if product.num_alphas > 1:
            scale = torch.where(scale > 0, scale, 1)
            relative = (alpha / scale).to(dtype)
        scale = scale.to(dtype)
        rows = _rows(_scaled_tile(s, scale, call.arguments["binary"]), product)
        added = None if bias is None else bias.to(dtype)
        if call.transposed:  # inputs with equal rows are scaled and summed
            repeats = _Repeats.of(input, product, d)
            once = repeats.sum(input, relative)
            out = call.function(once, rows, added, *call.geometry)
        else:
            once = call.function(_sum_neighbours(input, layout, -1 - d), rows, None, *call.geometry)
            repeats = _Repeats.of(once, product, d)
            out = repeats.write(once, relative, added)
        ctx.repeats = repeats
        keeps = call.transposed or ctx.needs_input_grad[2]
        ctx.save_for_backward(input, weight, source, bias, rows, alpha, scale, relative, once if keeps else None)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Grads:
        input, weight, source, bias, rows, alpha, scale, relative, once = ctx.saved_tensors
        call, product, layout, needs = ctx.call, ctx.product, ctx.call.layout, ctx.needs_input_grad
        if torch.is_grad_enabled():  # the gradients will be differentiated, too
            return (*differentiable_gradients(ctx, grad, (input, weight, source, bias)), None, None, None)
        repeats: _Repeats = ctx.repeats
        dense = needs[1] and ctx.latent_weight and call.arguments["binary"]  # Eq. 6: of all rows
        wants_rows = needs[1] and not dense
        grad_input = grad_rows = grad_alpha = grad_weight = None
        if call.transposed:
            wanted = (needs[0] or needs[2], wants_rows)
            grad_once, grad_rows = _multiply_backward(call, grad, once, rows, wanted, scale)
            if grad_once is not None and needs[0]:
                grad_input = repeats.write(grad_once, relative, None)
            if grad_once is not None and needs[2]:
                grad_alpha = repeats.dot(once if relative is None else input, grad_once)
        elif needs[0] or wants_rows or needs[2]:
            grad_once = repeats.sum(grad, relative)
            if needs[2]:
                grad_alpha = repeats.dot(grad_once if relative is None else grad, once)
            met = _sum_neighbours(input, layout, -1 - call.dims) if wants_rows or call.dims else input
            grad_input, grad_rows = _multiply_backward(call, grad_once, met, rows, (needs[0], wants_rows), scale)
            if grad_input is not None and product.neighbours > 1:
                grad_input = _spread(grad_input, input, -1 - call.dims)
        if grad_rows is not None:
            grad_tile = _tile_gradient(grad_rows, product)
            grad_weight = layout.replicate(grad_tile) if ctx.latent_weight else grad_tile.reshape(weight.shape)
        elif dense:
            row_alphas = layout.row_alphas(alpha.to(ctx.dtype))
            grad_weight = _multiply_backward(call, grad, input, weight, (False, True), row_alphas)[1]
        return (
            grad_input,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_alpha is None else source_gradient(source, layout, _divided(grad_alpha, scale)),
            bias_gradient(grad, call.dims, bias, needs[3]),
            None,
            None,
            None,
        )


def _sum_neighbours(input: Tensor, layout: TileLayout, dim: int) -> Tensor:
    """:meth:`TileLayout.sum_inputs`, in the input's order in memory; for few neighbours several times as fast."""
    if layout.p_in == 1:
        return input
    if layout.p_in > 8:
        return layout.sum_inputs(input, dim)
    first, second, *rest = input.unflatten(dim, (-1, layout.p_in)).unbind(dim % input.dim() + 1)
    total: Tensor = first + second
    for neighbour in rest:
        total += neighbour
    return total


def _spread(grad: Tensor, input: Tensor, dim: int) -> Tensor:
    """The gradient of an input whose neighbours were summed."""
    out = torch.empty_like(input)
    axis = dim % input.dim()
    out.unflatten(axis, (grad.shape[axis], -1)).copy_(grad.unsqueeze(axis + 1))
    return out


def _divided(grad_alpha: Tensor, scale: Tensor) -> Tensor:
    """By a scale that may be 0: it is the mean of magnitudes that are all 0 then, and have no gradient."""
    return grad_alpha / scale.to(grad_alpha.dtype).clamp_min(torch.finfo(grad_alpha.dtype).tiny)


def _multiply_backward(
    call: TiledCall, grad: Tensor, input: Tensor, weight: Tensor, wanted: Sequence[bool], factor: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of input and weight of a linear layer or convolution, those that are wanted.

    ``factor``, a number or one for each row, multiplies the gradient of the weight.
    """
    if not any(wanted):
        return None, None
    if not call.dims:
        grad_input = grad @ weight if wanted[0] else None
        if not wanted[1]:
            return grad_input, None
        grad = grad.reshape(-1, grad.shape[-1])
        tokens = grad.shape[0]
        # Fewer values than the weight has: these are multiplied. Not asked of a symbol: graphs serve every batch.
        few = isinstance(tokens, int) and tokens < input.shape[-1]
        if few:
            grad = grad * factor
        product = grad.t() @ input.reshape(-1, input.shape[-1])
        return grad_input, product if few else product.mul_(factor.view(-1, 1))
    if not wanted[0] and weight.dtype != grad.dtype:
        # Only its shape and memory format count; cuDNN wants all operands in one dtype.
        weight = torch.empty_like(weight, dtype=grad.dtype)
    grad_input, grad_weight, _ = convolution_gradients(call, grad, input, weight, [*wanted, False])
    if grad_weight is not None:
        grad_weight.mul_(factor.view(-1, *[1] * (weight.dim() - 1)))
    return grad_input, grad_weight


@dataclass(frozen=True, eq=False)
class _Plan:
    """How a call is computed: the same for every call with these arguments.

    Attributes:
        call: the call, without its operands.
        product: what is multiplied, if it is less than the whole weight.
        mixed: whether the copies have Hadamard signs and share products.
    """

    call: TiledCall
    product: TiledProduct | None
    mixed: bool

    @classmethod
    @functools.lru_cache(maxsize=1024)
    def of(cls, operator: Operator, further: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> _Plan:
        """The plan for the positional arguments behind the bias, and those by name."""
        positional = dict(zip(operator.positional[4:], further, strict=False))
        call = TiledCall(operator, {**operator.defaults, **positional, **dict(options)})
        return cls(call, multiplied_rows(call), _product(call).mixes > 1)


def train(plan: _Plan, input: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None) -> Tensor:
    """The result of a training layer, differentiable."""
    call = plan.call
    _check(call, input, weight, source, bias)
    if functorch_is_active() or forward_mode_is_active():
        used = used_weight(weight, source, call.layout, call.arguments["num_alphas"], call.arguments["binary"])
        return call.function(input, used, bias, *call.geometry)
    if plan.product is None and plan.mixed:
        return _mixed(call, input, weight, source, bias)
    trains = torch.is_grad_enabled() and (weight.requires_grad or source.requires_grad)
    if plan.product is None and not trains:  # PyTorch's layer keeps no more than it needs
        return call.function(input, constant_weight(call, weight, source), bias, *call.geometry)
    device, dtype = input.device.type, weight.dtype
    # Autocast is not on the meta device.
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        if input.is_floating_point() and input.dtype != torch.float64:
            input = input.to(dtype)
    elif bias is not None and bias.dtype != dtype:
        dtypes = f"{weight.dtype} and {bias.dtype}"
        raise RuntimeError(f"tbn::{call.operator.name}: weight and bias must have the same dtype, got {dtypes}")
    if input.dtype != dtype:
        dtypes = f"{input.dtype} and {weight.dtype}"
        raise RuntimeError(f"tbn::{call.operator.name}: input and weight must have the same dtype, got {dtypes}")
    operands = (input, weight, source, bias)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        result: Tensor
        if plan.product is None:
            result = WholeWeight.apply(*operands, call, dtype)  # type: ignore[no-untyped-call]
        else:
            result = _Layer.apply(*operands, call, plan.product, dtype)  # type: ignore[no-untyped-call]
    return result


def _check(call: TiledCall, input: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None) -> None:
    op = f"tbn::{call.operator.name}"
    check_latents(op, call.layout, call.arguments["num_alphas"], weight, source)
    d, dims, shape = call.dims, input.dim(), tuple(input.shape)
    if dims < d + 1 or (d and dims > d + 2):
        raise RuntimeError(f"{op}: an input of shape {shape} has too {'few' if dims <= d else 'many'} dimensions")
    if shape[-1 - d] != call.inputs:
        what = "input channels" if d else "input features"
        raise RuntimeError(f"{op}: expected {call.inputs} {what}, got an input of shape {shape}")
    if bias is not None and bias.numel() != call.outputs:
        raise ValueError(f"{op}: bias must have shape ({call.outputs},), got {tuple(bias.shape)}")


def _kernel(operator: Operator) -> Callable[..., Tensor]:
    def kernel(
        input: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None, *further: Any, **options: Any
    ) -> Tensor:
        named = tuple((name, _hashable(value)) for name, value in options.items())
        return train(_Plan.of(operator, tuple(map(_hashable, further)), named), input, weight, source, bias)

    return kernel


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def register() -> None:
    """Register the layers for every device; they are made of PyTorch's operators, and differentiated as such."""
    for operator in TRAINING_OPERATORS.values():
        LIBRARY.impl(operator.name, untraced(_kernel(operator)), "CompositeImplicitAutograd")
