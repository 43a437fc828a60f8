"""Kernels of the ``tbn::`` operators in PyTorch: they run on every device and define what the others must equal.

The inference kernels unpack the different rows only, multiply with those, and replicate the results with the
alphas. Copies with Hadamard signs have their column groups multiplied apart, and the results mixed. Where there is
neither (a misaligned tile with one alpha per copy, say) they use the whole weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tbn_compiler import tiling
from tbn_compiler.ops.calls import OPERATORS, TensorCall, make_kernel, register_kernel
from tbn_compiler.ops.formats import apply_epilogue, in_format
from tbn_compiler.ops.mixing import mixed_conv, mixed_conv_transpose, mixed_linear
from tbn_compiler.ops.schemas import LIBRARY, check_unpack_bits, scale_layout, tile_layout, unpack_layout
from tbn_compiler.packing import unpack_bits
from tbn_compiler.tiling import TiledProduct, TileLayout
from tbn_compiler.torch_private import untraced


def decode(tile: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor:
    """The tile of shape ``[q]`` in ``dtype`` from its stored form (packed ``uint8`` or floating point)."""
    if tile.dtype == torch.uint8:
        return unpack_bits(tile, layout.tile_size, dtype)
    return tile.to(dtype)


def dense_weight(tile: Tensor, alpha: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor:
    """The whole weight ``alpha * B`` of ``layout.shape``, for the cases in which no row repeats."""
    return layout.scale(layout.replicate(decode(tile, layout, dtype)), alpha.to(dtype))


def tile(
    weight: Tensor,
    p: int,
    *,
    p_in: int = 1,
    shift: int = 0,
    batch: int = 1,
    hadamard: bool = False,
    binary: bool = True,
) -> Tensor:
    """``B``: the tile of ``weight`` replicated to its shape (Eq. 2-5)."""
    layout = tile_layout(weight, p, p_in, shift, batch, hadamard)
    return layout.replicate(tiling.tile_vector(weight, layout, binary=binary))


def scale(bits: Tensor, source: Tensor, num_alphas: int, *, p_in: int = 1) -> Tensor:
    """``alpha * B`` with ``alpha`` from ``source`` (Eq. 7, 9), in the dtype of ``bits``.

    ``p_in`` of the alphas lie along the input axis (1: each alpha scales whole rows or a run of elements).
    """
    layout = scale_layout(bits, source, num_alphas, p_in)
    return layout.scale(bits, layout.alphas(source, num_alphas).to(bits.dtype)).contiguous()


def unpack(
    tile: Tensor,
    alpha: Tensor,
    shape: Sequence[int],
    p: int,
    *,
    p_in: int = 1,
    shift: int = 0,
    batch: int = 1,
    hadamard: bool = False,
) -> Tensor:
    """The weight ``alpha * B`` that a stored tile stands for, in the dtype of ``alpha``."""
    layout = unpack_layout(tile, alpha, shape, p, p_in, shift, batch, hadamard)
    return dense_weight(tile, alpha, layout, alpha.dtype)


def _unpack_bits(packed: Tensor, numel: int, *, dtype: torch.dtype) -> Tensor:
    """+1 and -1 from packed bits."""
    check_unpack_bits(packed, numel)
    return unpack_bits(packed, numel, dtype)


def fold_replicas(weight: Tensor, input_alpha: Tensor) -> Tensor:
    """Sum the ``k`` blocks of inputs of ``weight [rows, inputs, ...]``, times the ``k`` input alphas."""
    blocks: Tensor = weight.unflatten(1, (input_alpha.numel(), -1))
    return (blocks * input_alpha.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))).sum(1)


def replicate_features(unique: Tensor, alpha: Tensor, repeats: int) -> Tensor:
    """``[..., R] -> [..., repeats * R]``: the results of the unique rows, times the alphas of all rows."""
    *outer, rows = unique.shape
    scaled = unique.unsqueeze(-2) * _repeat_factors(alpha, repeats)
    return scaled.expand(*outer, repeats, rows).reshape(*outer, repeats * rows)


def _repeat_factors(alpha: Tensor, repeats: int) -> Tensor:
    """Factors for the repeats of the unique rows, shape ``[1]``, ``[repeats, 1]`` or ``[repeats, R]``.

    Row ``i * R + u`` repeats row ``u``, and has the alpha of the layer, of repeat ``i``, or of its own.
    """
    return alpha if alpha.numel() == 1 else alpha.view(repeats, -1)


def _shares(call: TensorCall) -> bool:
    """Whether to compute the unique rows on summed inputs: it is exact, and saves something or keeps integers whole."""
    product = call.product
    saves = product.summed > 1 or product.rows < product.group_rows
    # Integers meet weights of +1 and -1, and the alphas afterwards.
    return product.bare and (saves or call.activation != "float")


def whole_weight(call: TensorCall, dtype: torch.dtype) -> Tensor:
    """The dense weight that the input of a call meets: with the blocks of its replicas summed."""
    weight = dense_weight(call.tile, call.alpha, call.layout, dtype)
    return weight if call.input_alpha is None else fold_replicas(weight, call.input_alpha)


def _unique_weight(call: TensorCall, dtype: torch.dtype) -> Tensor:
    """The unique rows without scales, for summed inputs: ``[R, inputs / p_in, *kernel]``, those of replicas summed."""
    layout = call.layout
    rows = layout.unique_weight(decode(call.tile, layout, dtype))
    rows = rows.reshape(layout.unique_rows, -1, *layout.shape[2:])
    return rows if call.input_alpha is None else fold_replicas(rows, call.input_alpha)


def _result_alphas(product: TiledProduct, alpha: Tensor) -> Tensor:
    """The alphas as :func:`_repeat_factors` takes them: one for each row where those of copies are none of repeats."""
    return alpha if product.alphas != "copy" or product.alpha_per_repeat else product.layout.row_alphas(alpha)


def _mixed_linear(call: TensorCall, input: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer whose copies have Hadamard signs."""
    groups = _column_groups(call, input.dtype)
    out = mixed_linear(input, groups, call.alpha.to(input.dtype))
    return out if bias is None else out + bias


def _column_groups(call: TensorCall, dtype: torch.dtype) -> Tensor:
    """The tile by column groups, ``[p, R, inputs / p, *kernel]``, with the blocks of replicas summed."""
    layout = call.layout
    groups = layout.column_groups(decode(call.tile, layout, dtype))
    if call.input_alpha is None:
        return groups
    folded = fold_replicas(groups.flatten(0, 1), call.input_alpha)
    return folded.reshape(*groups.shape[:2], *folded.shape[1:])


def _linear(call: TensorCall, input: Tensor, bias: Tensor | None) -> Tensor:
    dtype, product = input.dtype, call.product
    bias = None if bias is None else bias.to(dtype)
    if call.product.mixes > 1:
        return _mixed_linear(call, input, bias)
    if not _shares(call):
        return F.linear(input, whole_weight(call, dtype), bias)
    unique = F.linear(call.layout.sum_inputs(input, -1), _unique_weight(call, dtype))
    out = replicate_features(unique, _result_alphas(product, call.alpha.to(dtype)), product.repeats)
    return out if bias is None else out + bias


def _conv(call: TensorCall, input: Tensor, bias: Tensor | None) -> Tensor:
    dtype, layout, product, d = input.dtype, call.layout, call.product, call.dims
    bias = None if bias is None else bias.to(dtype)
    if product.mixes > 1:
        out = mixed_conv(call, input, _column_groups(call, dtype), call.alpha.to(dtype))
        return (out if bias is None else out + bias.view(-1, *[1] * d)).contiguous()
    if not _shares(call):
        return call.function(input, whole_weight(call, dtype), bias, *call.geometry).contiguous()
    unique = _unique_weight(call, dtype)
    alpha = call.alpha.to(dtype)
    channel, per_channel = input.dim() - d - 1, (-1,) + (1,) * d
    input = layout.sum_inputs(input, channel)
    if call.groups == 1:
        factors = _repeat_factors(_result_alphas(product, alpha), product.repeats)
        z = call.function(input, unique, None, *call.geometry).unsqueeze(channel)
        z = z * factors.view(*factors.shape, *[1] * d)
        out = z.expand(*z.shape[:channel], product.repeats, product.rows, *z.shape[-d:]).flatten(channel, channel + 1)
    else:
        filters = unique[product.computed_rows(unique.device).reshape(-1)]
        z = call.function(input, filters, None, *call.geometry)
        # Row j of a group repeats its row j mod rows.
        source = torch.arange(product.group_rows, device=unique.device) % product.rows
        out = z.unflatten(channel, (call.groups, product.rows)).index_select(channel + 1, source)
        out = out.flatten(channel, channel + 1) * layout.row_alphas(alpha).view(per_channel)
    return (out if bias is None else out + bias.view(per_channel)).contiguous()


def _conv_transpose(call: TensorCall, input: Tensor, bias: Tensor | None) -> Tensor:
    """Transpose convolution, whose weight has a row for each *input* channel.

    Input channels with equal rows, ``alpha_i * row``, need one row between them: their values are scaled and summed.
    """
    dtype, product = input.dtype, call.product
    bias = None if bias is None else bias.to(dtype)
    if product.mixes > 1:
        groups = _column_groups(call, dtype)
        out = mixed_conv_transpose(call, input, groups, call.alpha.to(dtype))
        return (out if bias is None else out + bias.view(-1, *[1] * call.dims)).contiguous()
    if call.groups > 1 or not _shares(call):
        return call.function(input, whole_weight(call, dtype), bias, *call.geometry).contiguous()
    channel = input.dim() - call.dims - 1
    scaled = input * call.layout.row_alphas(call.alpha.to(dtype)).view(-1, *[1] * call.dims)
    summed = scaled.unflatten(channel, (-1, product.rows)).sum(channel)
    return call.function(summed, _unique_weight(call, dtype), bias, *call.geometry).contiguous()


def compute(call: TensorCall) -> Tensor:
    """The result of a call that has been checked.

    The different rows (filters) are multiplied and their results replicated (or mixed); of a transpose convolution,
    input channels with equal rows are summed (or mixed) first.
    """
    layer = _conv_transpose if call.transposed else _conv if call.dims else _linear
    out = in_format(
        functools.partial(layer, call),
        call.input,
        call.bias,
        call.activation,
        token_dims=call.token_dims,
        terms=call.layout.row_size,
        input_scale=call.input_scale,
    )
    return apply_epilogue(out, call.epilogue)


# By operator name.
KERNELS: dict[str, Callable[..., Tensor]] = {
    "tile": tile,
    "scale": scale,
    "unpack": unpack,
    "unpack_bits": _unpack_bits,
    **{name: make_kernel(operator, compute) for name, operator in OPERATORS.items()},
}
linear = KERNELS["linear"]


def register() -> None:
    """Register the kernels for every device that has no faster one."""
    for name, kernel in KERNELS.items():
        if name in OPERATORS:
            register_kernel(OPERATORS[name], kernel, "CompositeExplicitAutograd")
        else:
            LIBRARY.impl(name, untraced(kernel), "CompositeExplicitAutograd")
