"""Kernels of the ``tbn::`` operators in PyTorch: they run on every device and define what the others must equal.

The inference kernels unpack the different rows only, multiply with those, and replicate the results with the
alphas; where no rows repeat (a misaligned tile with one alpha per copy) they use the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tbn_compiler import tiling
from tbn_compiler.ops.formats import apply_epilogue, in_format
from tbn_compiler.ops.schemas import (
    CONV_OPS,
    CONV_TRANSPOSE_OPS,
    LIBRARY,
    check_formats,
    check_tile_operands,
    check_unpack,
    conv_layout,
    conv_transpose_layout,
    linear_layout,
    scale_layout,
    tile_layout,
)
from tbn_compiler.packing import unpack_bits
from tbn_compiler.tiling import TileLayout


def decode(tile: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor:
    """The tile of shape ``[q]`` in ``dtype`` from its stored form (packed ``uint8`` or floating point)."""
    if tile.dtype == torch.uint8:
        return unpack_bits(tile, layout.tile_size, dtype)
    return tile.to(dtype)


def dense_weight(tile: Tensor, alpha: Tensor, layout: TileLayout, dtype: torch.dtype) -> Tensor:
    """The whole weight ``alpha * B`` of ``layout.shape``, for the cases in which no row repeats."""
    return layout.scale(layout.replicate(decode(tile, layout, dtype)), alpha.to(dtype))


def tile(weight: Tensor, p: int, *, p_in: int = 1, shift: int = 0, binary: bool = True) -> Tensor:
    """``B``: the tile of ``weight`` replicated to its shape (Eq. 2-5)."""
    layout = tile_layout(weight, p, p_in, shift)
    return layout.replicate(tiling.tile_vector(weight, layout, binary=binary))


def scale(bits: Tensor, source: Tensor, num_alphas: int, *, p_in: int = 1) -> Tensor:
    """``alpha * B`` with ``alpha`` from ``source`` (Eq. 7, 9), in the dtype of ``bits``.

    ``p_in`` of the alphas lie along the input axis (1: each alpha scales whole rows or a run of elements).
    """
    layout = scale_layout(bits, source, num_alphas, p_in)
    return layout.scale(bits, layout.alphas(source, num_alphas).to(bits.dtype)).contiguous()


def unpack(packed: Tensor, numel: int, *, dtype: torch.dtype) -> Tensor:
    """+1 and -1 from packed bits."""
    check_unpack(packed, numel)
    return unpack_bits(packed, numel, dtype)


def fold_replicas(weight: Tensor, input_alpha: Tensor) -> Tensor:
    """Sum the ``k`` blocks of inputs of ``weight [rows, inputs, ...]``, times the ``k`` input alphas."""
    blocks = weight.unflatten(1, (input_alpha.numel(), -1))
    return (blocks * input_alpha.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))).sum(1)


def _shares(layout: TileLayout, num_alphas: int, groups: int, input_alpha: Tensor | None, integer: bool) -> bool:
    """Whether to compute the unique rows on summed inputs: it is exact, and saves something or keeps integers whole."""
    if layout.inputs_per_row(num_alphas) < layout.row_size:
        # Neighbours that share a weight must lie in the same replica of the input.
        return input_alpha is None or (layout.shape[1] // input_alpha.numel()) % layout.p_in == 0
    if integer and layout.one_alpha_per_row(num_alphas):
        return True  # weights of +1 and -1, and the alphas afterwards
    return layout.rows_per_group(num_alphas, groups) < layout.rows // groups


def _copy_factors(alpha: Tensor, copies: int) -> Tensor:
    """Factors for the copies of the unique rows, shape ``[1]``, ``[copies, 1]`` or ``[copies, R]``.

    Row ``i * R + u`` repeats row ``u``, and has the alpha of the layer, of copy ``i``, or of its own.
    """
    return alpha if alpha.numel() == 1 else alpha.view(copies, -1)


def _row_factors(alpha: Tensor, layout: TileLayout) -> Tensor:
    """The alphas as :func:`_copy_factors` takes them: one for each row where rolled copies have no rows in common."""
    copies = layout.rows // layout.unique_rows
    return alpha if alpha.numel() in (1, copies, layout.rows) else layout.row_alphas(alpha)


def replicate_features(unique: Tensor, alpha: Tensor, copies: int) -> Tensor:
    """``[..., R] -> [..., copies * R]``: the results of the unique rows, times the alphas of all rows."""
    *outer, rows = unique.shape
    scaled = unique.unsqueeze(-2) * _copy_factors(alpha, copies)
    return scaled.expand(*outer, copies, rows).reshape(*outer, copies * rows)


def linear(
    input: Tensor,
    tile: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    p: int,
    input_alpha: Tensor | None = None,
    *,
    p_in: int = 1,
    shift: int = 0,
    activation: str = "float",
    epilogue: str = "none",
) -> Tensor:
    """``input [..., n] -> [..., m]``: R unique rows are multiplied, then replicated with the alphas."""
    layout = linear_layout(input, in_features, out_features, p, input_alpha, p_in, shift)
    check_formats("linear", activation, epilogue)
    check_tile_operands("linear", input, tile, alpha, bias, layout)
    out = in_format(
        lambda input, bias: _linear(input, tile, alpha, bias, layout, input_alpha, activation != "float"),
        input,
        bias,
        activation,
        token_dims=(-1,),
        terms=layout.row_size,
    )
    return apply_epilogue(out, epilogue)


def _linear(
    input: Tensor,
    tile: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    layout: TileLayout,
    input_alpha: Tensor | None,
    integer: bool,
) -> Tensor:
    dtype = input.dtype
    bias = None if bias is None else bias.to(dtype)
    shares = _shares(layout, alpha.numel(), 1, input_alpha, integer)
    if shares:
        weight = layout.unique_weight(decode(tile, layout, dtype))
        input = layout.sum_inputs(input, -1)
    else:
        weight = dense_weight(tile, alpha, layout, dtype)
    if input_alpha is not None:
        weight = fold_replicas(weight, input_alpha)
    if not shares:
        return F.linear(input, weight, bias)
    alpha = _row_factors(alpha.to(dtype), layout)
    out = replicate_features(F.linear(input, weight), alpha, layout.rows // layout.unique_rows)
    return out if bias is None else out + bias


def _conv(
    input: Tensor,
    tile: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    layout: TileLayout,
    input_alpha: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    integer: bool,
) -> Tensor:
    d = len(layout.shape) - 2
    conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[d - 1]
    geometry = (list(stride), list(padding), list(dilation), groups)
    dtype = input.dtype
    bias = None if bias is None else bias.to(dtype)
    if not _shares(layout, alpha.numel(), groups, input_alpha, integer):
        weight = dense_weight(tile, alpha, layout, dtype)
        if input_alpha is not None:
            weight = fold_replicas(weight, input_alpha)
        return conv(input, weight, bias, *geometry).contiguous()
    unique = layout.unique_weight(decode(tile, layout, dtype)).reshape(layout.unique_rows, -1, *layout.shape[2:])
    channel, per_channel = input.dim() - d - 1, (-1,) + (1,) * d
    input = layout.sum_inputs(input, channel)
    if groups == 1:
        filters = unique if input_alpha is None else fold_replicas(unique, input_alpha)
        copies = layout.rows // layout.unique_rows
        factors = _copy_factors(_row_factors(alpha.to(dtype), layout), copies)
        z = conv(input, filters, None, *geometry).unsqueeze(channel) * factors.view(*factors.shape, *[1] * d)
        expanded = (*z.shape[:channel], copies, layout.unique_rows, *z.shape[-d:])
        out = z.expand(expanded).flatten(channel, channel + 1)
    else:
        # Group k holds rows k * per_group + j; its first `computed` rows differ and row j repeats row j % computed.
        per_group, computed = layout.rows // groups, layout.rows_per_group(alpha.numel(), groups)
        first = torch.arange(groups, device=tile.device)[:, None] * per_group
        rows = (first + torch.arange(computed, device=tile.device)) % layout.unique_rows
        z = conv(input, unique[rows.reshape(-1)], None, *geometry).unflatten(channel, (groups, computed))
        source = torch.arange(per_group, device=tile.device) % computed
        out = z.index_select(channel + 1, source).flatten(channel, channel + 1)
        out = out * layout.row_alphas(alpha.to(dtype)).view(per_channel)
    return (out if bias is None else out + bias.view(per_channel)).contiguous()


def _make_conv(d: int) -> Callable[..., Tensor]:
    def conv(
        input: Tensor,
        tile: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        p: int,
        input_alpha: Tensor | None = None,
        *,
        p_in: int = 1,
        shift: int = 0,
        stride: Sequence[int] = (1,) * d,
        padding: Sequence[int] = (0,) * d,
        dilation: Sequence[int] = (1,) * d,
        groups: int = 1,
        activation: str = "float",
        epilogue: str = "none",
    ) -> Tensor:
        layout = conv_layout(input, in_channels, out_channels, kernel_size, p, input_alpha, p_in, shift, groups)
        check_formats(CONV_OPS[d], activation, epilogue)
        check_tile_operands(CONV_OPS[d], input, tile, alpha, bias, layout)
        out = in_format(
            lambda input, bias: _conv(
                input, tile, alpha, bias, layout, input_alpha, stride, padding, dilation, groups, activation != "float"
            ),
            input,
            bias,
            activation,
            token_dims=tuple(range(-d - 1, 0)),
            terms=layout.row_size,
        )
        return apply_epilogue(out, epilogue)

    conv.__name__ = CONV_OPS[d]
    conv.__doc__ = f"``input [N, C, *{d} sizes]``: convolution by the different filters, channels replicated."
    return conv


def _conv_transpose(
    input: Tensor,
    tile: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    layout: TileLayout,
    out_channels: int,
    geometry: tuple[Any, ...],
) -> Tensor:
    """Transpose convolution, whose weight has a row for each *input* channel.

    Input channels with equal rows, ``alpha_i * row``, need one row between them: their values are scaled and summed.
    """
    d = len(layout.shape) - 2
    check_tile_operands(CONV_TRANSPOSE_OPS[d], input, tile, alpha, bias, layout, out_channels)
    conv: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[d - 1]
    dtype = input.dtype
    groups = geometry[3]
    if groups > 1 or layout.distinct_rows(alpha.numel()) == layout.rows:
        weight = dense_weight(tile, alpha, layout, dtype)
    else:
        channel = input.dim() - d - 1
        scaled = input * layout.row_alphas(alpha.to(dtype)).view(-1, *[1] * d)
        input = scaled.unflatten(channel, (-1, layout.unique_rows)).sum(channel)
        weight = layout.unique_weight(decode(tile, layout, dtype)).reshape(-1, *layout.shape[1:])
    return conv(input, weight, None if bias is None else bias.to(dtype), *geometry).contiguous()


def _make_conv_transpose(d: int) -> Callable[..., Tensor]:
    def conv_transpose(
        input: Tensor,
        tile: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        p: int,
        *,
        shift: int = 0,
        stride: Sequence[int] = (1,) * d,
        padding: Sequence[int] = (0,) * d,
        output_padding: Sequence[int] = (0,) * d,
        groups: int = 1,
        dilation: Sequence[int] = (1,) * d,
    ) -> Tensor:
        layout = conv_transpose_layout(input, in_channels, out_channels, kernel_size, p, shift, groups)
        geometry = (list(stride), list(padding), list(output_padding), groups, list(dilation))
        return _conv_transpose(input, tile, alpha, bias, layout, out_channels, geometry)

    conv_transpose.__name__ = CONV_TRANSPOSE_OPS[d]
    conv_transpose.__doc__ = f"``input [N, C, *{d} sizes]``: input channels with equal rows are summed first."
    return conv_transpose


# By operator name.
KERNELS: dict[str, Callable[..., Tensor]] = {
    "tile": tile,
    "scale": scale,
    "unpack": unpack,
    "linear": linear,
    **{name: _make_conv(d) for d, name in CONV_OPS.items()},
    **{name: _make_conv_transpose(d) for d, name in CONV_TRANSPOSE_OPS.items()},
}


def register() -> None:
    """Register the kernels for every device that has no faster one."""
    for name, kernel in KERNELS.items():
        LIBRARY.impl(name, kernel, "CompositeExplicitAutograd")
