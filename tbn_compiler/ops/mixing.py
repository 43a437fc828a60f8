"""Layers on tiles whose copies have Hadamard signs: column groups multiplied apart, and their results mixed.

Copy ``i`` of the weight is the tile ``t [R, n]`` with column group ``j``, the inputs ``c`` with ``c mod p = j``, times
``H[i, j]`` (:class:`~tbn_compiler.tiling.TileLayout`). So the ``p`` results of a tile row come from ``p`` shorter
products, each with ``n / p`` inputs, and additions::

    z_j = t_j x_j                      R n multiply-adds for all groups, where the whole weight has p R n
    y_i = alpha_i sum_j H[i, j] z_j    a Hadamard transform

A transpose convolution has a row for each input channel, and column groups of output channels. It takes the same steps
the other way round::

    u_j = sum_i H[i, j] alpha_i x_i
    y_j = t_j^T u_j

All of it is made of PyTorch's operators, which differentiate it: a trained tile gets its gradient in as many
operations. The paper's gradient of every weight element (straight through, Eq. 6) takes the whole product::

    dL/dW = alpha (dL/dy)^T x

``groups [p, R, n / p, *kernel]`` are the tile by column groups (:meth:`~tbn_compiler.tiling.TileLayout.column_groups`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops.calls import TiledCall, convolution_gradients
from tbn_compiler.tiling import hadamard_matrix

Through = Callable[[Tensor, Tensor], Tensor]
"""Takes the result of a layer on the weight without scales, and its input there; gives the result back."""


def mixed_linear(input: Tensor, groups: Tensor, alpha: Tensor, through: Through | None = None) -> Tensor:
    """A linear layer without bias, ``[..., n] -> [..., p R]``."""
    p, rows, columns = groups.shape
    outer = input.shape[:-1]
    flat = input.reshape(math.prod(outer), columns * p)
    z = flat.unflatten(1, (columns, p)).permute(2, 0, 1) @ groups.mT
    y = mix_rows(z)
    y = y if through is None else through(y, flat)
    return _scale(y, alpha, p).reshape(*outer, p * rows)


def mix_rows(z: Tensor) -> Tensor:
    """Results by column group ``[p, tokens, R]`` as those by copy, ``[tokens, p, R]``."""
    return (hadamard_matrix(z.shape[0], z) @ z.flatten(1)).view(z.shape).transpose(0, 1)


def finish_mixed(y: Tensor, alpha: Tensor, bias: Tensor | None, dims: int = 0) -> Tensor:
    """Results by copy, ``[*batch, p, R, *positions]``, scaled and with the bias, ``[*batch, p R, *positions]``."""
    factors = _factors(alpha.to(y.dtype), y.shape[-2 - dims], dims)
    if bias is None:
        scaled = y * factors
    else:
        scaled = torch.addcmul(bias.to(y.dtype).view(*y.shape[-2 - dims : y.dim() - dims], *[1] * dims), y, factors)
    return scaled.flatten(-2 - dims, -1 - dims)


def mixed_conv(call: TiledCall, input: Tensor, groups: Tensor, alpha: Tensor, through: Through | None = None) -> Tensor:
    """A convolution without bias and with one group."""
    channel, p = call.channel_axis, groups.shape[0]
    z = call.function(split_channels(input, p, channel), groups.flatten(0, 1), None, *_geometry(call, p))
    y = mix_channels(z, p, call.dims)
    y = y if through is None else through(y, input)
    return _scale(y, alpha, p, call.dims).flatten(channel - 1, channel)


def mixed_conv_transpose(
    call: TiledCall, input: Tensor, groups: Tensor, alpha: Tensor, through: Through | None = None
) -> Tensor:
    """A transpose convolution without bias and with one group."""
    channel, p = call.channel_axis, groups.shape[0]
    scaled = _scale(input.unflatten(channel, (p, -1)), alpha, p, call.dims)
    mixed = _mix(scaled, call.dims).flatten(channel - 1, channel)
    y = call.function(mixed, groups.flatten(0, 1), None, *_geometry(call, p))
    y = y.unflatten(channel, (p, -1)).transpose(channel - 1, channel)
    y = y if through is None else through(y, scaled.flatten(channel - 1, channel))
    return y.flatten(channel - 1, channel)


def _scale(value: Tensor, alpha: Tensor, p: int, dims: int = 0) -> Tensor:
    """Scale ``[..., p, R, *positions]``. Gradients of single-precision alphas are summed in single precision."""
    return (value * _factors(alpha, p, dims)).to(value.dtype)


def _factors(alpha: Tensor, p: int, dims: int = 0) -> Tensor:
    """The alphas of copies and their rows, ``[1, 1]``, ``[p, 1]`` or ``[p, R]``, before so many further axes."""
    factors = alpha.view(1, 1) if alpha.numel() == 1 else alpha.view(p, -1)
    return factors.view(*factors.shape, *[1] * dims)


def _geometry(call: TiledCall, p: int) -> list[Any]:
    """The geometry of the call with a convolution group for each column group."""
    return [p if name == "groups" else call.arguments[name] for name in call.operator.geometry]


def split_channels(input: Tensor, p: int, channel: int) -> Tensor:
    """Input channels with those of a column group one behind the other."""
    apart: Tensor = input.unflatten(channel, (-1, p)).transpose(channel - 1, channel)
    return apart.flatten(channel - 1, channel)


def mix_channels(z: Tensor, p: int, dims: int) -> Tensor:
    """Results by column group ``[*batch, p R, *positions]`` as those by copy, ``[*batch, p, R, *positions]``."""
    return _mix(z.unflatten(-1 - dims, (p, -1)), dims)


def _mix(value: Tensor, dims: int) -> Tensor:
    """``[*batch, p, R, *positions]`` transformed along ``p``."""
    sizes = value.shape[-1 - dims :]
    mixed: Tensor = (hadamard_matrix(value.shape[-2 - dims], value) @ value.flatten(-1 - dims)).unflatten(-1, sizes)
    return mixed


# Training


def mixed_layer(
    call: TiledCall, input: Tensor, tile: Tensor, alpha: Tensor, bias: Tensor | None, weight: Tensor | None = None
) -> Tensor:
    """A layer that trains.

    The tile is multiplied with the largest alpha, and the results with the alphas relative to that: results without
    any scale may be beyond half precision.

    Args:
        call: the layer.
        input: its input.
        tile: ``[q]``, as it is multiplied.
        alpha: the alphas.
        bias: its bias.
        weight: the latent weight that takes the gradient of the whole weight, if ``tile`` takes none.
    """
    d, largest = call.dims, alpha.detach().abs().amax()
    largest = torch.where(largest == 0, 1, largest)
    alpha, tile = alpha / largest, tile * largest.to(tile.dtype)
    groups = call.layout.column_groups(tile)
    through = None if weight is None else functools.partial(_straight_through, call, weight, tile, largest)
    if not d:
        out = mixed_linear(input, groups, alpha, through)
    else:
        out = (mixed_conv_transpose if call.transposed else mixed_conv)(call, input, groups, alpha, through)
    return out if bias is None else out + bias.to(out.dtype).view(-1, *[1] * d)


def _straight_through(
    call: TiledCall, weight: Tensor, tile: Tensor, largest: Tensor, out: Tensor, input: Tensor
) -> Tensor:
    result: Tensor = _WholeGradient.apply(out, input, weight, tile, largest, call)  # type: ignore[no-untyped-call]
    return result


class _WholeGradient(torch.autograd.Function):
    """The result of a layer with one alpha as it is; on its way back the gradient of every element of the weight.

    Gradients that will be differentiated are those of the whole weight instead, in which the first ones are straight
    through as well.
    """

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, input: Tensor, weight: Tensor, tile: Tensor, alpha: Tensor, call: TiledCall
    ) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(input, weight, tile, alpha)
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, tile, alpha = ctx.saved_tensors
        call, needs = ctx.call, ctx.needs_input_grad
        alpha = alpha.to(weight.dtype)
        if not torch.is_grad_enabled():
            whole = None
            if needs[2]:
                whole = _weight_gradient(call, _joined(call, grad), input.to(grad.dtype)).to(weight.dtype) * alpha
            return grad, None, whole, None, None, None
        # Aliases: what the input and the weight are made of, each other perhaps, is left to autograd.
        operands = [input.view_as(input), weight.view_as(weight)]
        straight = operands[1] * alpha
        used = straight + (call.layout.replicate(tile) - straight).detach()
        with torch.autocast(input.device.type, enabled=False):
            out = call.function(operands[0].to(grad.dtype), used.to(grad.dtype), None, *call.geometry)
        wanted = [index for index in (0, 1) if needs[index + 1]]
        found = torch.autograd.grad(out, [operands[i] for i in wanted], _joined(call, grad), create_graph=True)
        given = dict(zip(wanted, found, strict=True))
        return None, given.get(0), given.get(1), None, None, None


def _joined(call: TiledCall, grad: Tensor) -> Tensor:
    """A gradient of the two axes that the channels are split into, with these as one."""
    return grad.flatten(-2 - call.dims, -1 - call.dims)


def _weight_gradient(call: TiledCall, grad: Tensor, input: Tensor) -> Tensor:
    """The gradient of the unscaled weight of a layer."""
    if not call.dims:
        return grad.t() @ input
    shaped = input.new_empty(call.layout.shape)
    _, whole, _ = convolution_gradients(call, grad, input, shaped, [False, True, False])
    assert whole is not None
    return whole
