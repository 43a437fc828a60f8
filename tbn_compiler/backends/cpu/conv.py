"""``tbn::conv1d`` and ``tbn::conv2d`` on the CPU by the native kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tbn_compiler.backends.cpu import library, prepare
from tbn_compiler.backends.cpu.declined import decline
from tbn_compiler.backends.cpu.operands import as_vector, expand_replicas, is_vector, reason_against
from tbn_compiler.ops import reference
from tbn_compiler.ops.formats import apply_epilogue
from tbn_compiler.ops.schemas import CONV_OPS, check_formats, check_tile_operands, conv_layout
from tbn_compiler.packing import unpack_bits
from tbn_compiler.tiling import TileLayout

_float32, _get_num_threads = torch.float32, torch.get_num_threads

MIN_FILTERS = {"avx512": 32, "avx2": 64}
"""Fewest different filters of a group for which looking up beats PyTorch's convolution with these filters, measured on
3x3 kernels of 64 to 512 channels. Tables serve all filters, and with fewer they cost too much; levels that are not named
have none."""

MIN_CHANNELS = 4
"""Fewest input channels of a group: tables are made of several channels."""

MAX_WIDTH = 16384
"""Widest padded row: all tables of a row are in memory at once."""


def make_conv(d: int) -> Callable[..., Tensor]:
    """The kernel of ``tbn::conv1d`` (``d`` 1) or ``tbn::conv2d`` (2)."""
    op = CONV_OPS[d]
    fallback = reference.KERNELS[op]

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
        # The short way is for operands that the kernels take as they are. It repeats no check that finding a plan, or
        # the sizes of the output, imply.
        use = (
            library.level(), op, in_channels, out_channels, *kernel_size, p, p_in, shift, *stride, *padding,
            *dilation, groups, alpha.shape[0] if alpha.dim() == 1 else None, activation, epilogue,
        )  # fmt: skip
        if (
            p_in == 1
            and input_alpha is None
            and input.dtype is _float32
            and input.dim() == d + 2
            and input.shape[1] == in_channels
            and input.is_contiguous()
            and is_vector(alpha)
            and (bias is None or (is_vector(bias) and bias.shape[0] == out_channels))
        ):
            plan = prepare.find(tile, use)
            if plan is not None:
                sizes = _output_sizes(input, kernel_size, stride, padding, dilation)
                if min(sizes) >= 1 and input.shape[-1] + 2 * padding[-1] <= MAX_WIDTH:
                    return _run(op, plan, input, alpha, bias, sizes, out_channels, epilogue)
        layout = conv_layout(input, in_channels, out_channels, kernel_size, p, input_alpha, p_in, shift, groups)
        check_formats(op, activation, epilogue)
        check_tile_operands(op, input, tile, alpha, bias, layout)
        sizes = _output_sizes(input, kernel_size, stride, padding, dilation)
        reason = reason_against(input, tile, layout, alpha.numel(), activation, input_alpha) or _reason_against(
            layout, alpha.numel(), groups, min(sizes), input.shape[-1] + 2 * padding[-1]
        )
        if reason is not None:
            decline(op, reason)
            return fallback(
                input, tile, alpha, bias, in_channels, out_channels, kernel_size, p, input_alpha,
                p_in=p_in, shift=shift, stride=stride, padding=padding, dilation=dilation, groups=groups,
                activation=activation, epilogue=epilogue,
            )  # fmt: skip
        x = expand_replicas(input.to(_float32), input_alpha, -d - 1)
        x = layout.sum_inputs(x, -d - 1).contiguous()
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        plan = prepare.find_or_make(
            tile, use, lambda entry: _plan(entry, tile, layout, alpha.numel(), groups, geometry, activation, epilogue)
        )
        bias = None if bias is None else as_vector(bias)
        return _run(op, plan, x, as_vector(alpha), bias, sizes, out_channels, epilogue).to(input.dtype)

    conv.__name__ = op
    conv.__doc__ = f"``input [N, C, *{d} sizes]``; see :mod:`tbn_compiler.ops.reference` for the meaning."
    return conv


def _output_sizes(
    input: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    return [
        (size + 2 * pad - dil * (k - 1) - 1) // step + 1
        for size, k, step, pad, dil in zip(
            input.shape[-len(kernel_size) :], kernel_size, stride, padding, dilation, strict=True
        )
    ]


def _reason_against(layout: TileLayout, num_alphas: int, groups: int, smallest: int, width: int) -> str | None:
    """Why PyTorch computes a convolution that the kernels could otherwise take."""
    if smallest < 1:
        return "the kernel does not fit the input"  # PyTorch raises the error
    if width > MAX_WIDTH:
        return f"rows wider than {MAX_WIDTH}"
    if layout.shape[1] // layout.p_in < MIN_CHANNELS:
        return f"fewer than {MIN_CHANNELS} input channels in a group"
    filters = MIN_FILTERS.get(library.level() or "")
    if filters is None:
        return "PyTorch convolves with the different filters faster than this level"
    if layout.rows_per_group(num_alphas, groups) < filters:
        return f"fewer than {filters} different filters in a group"
    return None


def _run(
    op: str,
    plan: prepare.Plan,
    input: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    sizes: Sequence[int],
    out_channels: int,
    epilogue: str,
) -> Tensor:
    d = len(sizes)
    out = input.new_empty((*input.shape[: -d - 1], out_channels, *sizes))
    failed = plan.call(
        plan.address,
        input.data_ptr(),
        out.data_ptr(),
        input.shape[0] if input.dim() == d + 2 else 1,
        input.shape[-2] if d == 2 else 1,
        input.shape[-1],
        alpha.data_ptr(),
        None if bias is None else bias.data_ptr(),
        _get_num_threads(),
    )
    if failed:
        raise MemoryError(f"tbn::{op}: no memory to work in for an input of shape {tuple(input.shape)}")
    return out if epilogue in ("none", "relu") else apply_epilogue(out, epilogue)


def _filters(tile: Tensor, layout: TileLayout, num_alphas: int, groups: int) -> Tensor:
    """Signs of the different filters of each group, ``[groups, filters, channels, taps]``.

    Group ``k`` holds rows ``k * per_group + j``; its first ``computed`` rows differ and row ``j`` repeats row
    ``j % computed``.
    """
    per_group, computed = layout.rows // groups, layout.rows_per_group(num_alphas, groups)
    unique = layout.unique_weight(unpack_bits(tile, layout.tile_size, torch.int8))
    rows = (torch.arange(groups)[:, None] * per_group + torch.arange(computed)) % layout.unique_rows
    return unique[rows.reshape(-1)].reshape(groups, computed, layout.shape[1] // layout.p_in, -1)


def _pack(tile: Tensor, layout: TileLayout, num_alphas: int, groups: int, *, integer: bool) -> np.ndarray:
    """Prepare the filters of each group with columns in the order ``[channel group][tap][channel]``."""
    lib, _, kernels = prepare.native()
    size = lib.tbn_group(kernels, integer)
    filters = _filters(tile, layout, num_alphas, groups)
    padded = F.pad(filters, (0, 0, 0, -filters.shape[2] % size))
    columns = padded.unflatten(2, (-1, size)).transpose(3, 4).flatten(2).contiguous()
    return prepare.pack(columns, integer=integer)


def _plan(
    entry: prepare.Prepared,
    tile: Tensor,
    layout: TileLayout,
    num_alphas: int,
    groups: int,
    geometry: dict[str, Sequence[int]],
    activation: str,
    epilogue: str,
) -> prepare.Plan:
    lib, level, kernels = prepare.native()
    integer = activation != "float"
    computed = layout.rows_per_group(num_alphas, groups)
    key = (level, layout, groups, computed, integer)
    index = entry.part(key, lambda: _pack(tile, layout, num_alphas, groups, integer=integer))

    def axes(values: Sequence[int], fill: int) -> Any:
        """Height and width; a convolution of one dimension has a height of 1."""
        return (fill, *values)[-2:]

    struct = library.ConvPlan(
        kernels=kernels,
        index=index.ctypes.data,
        groups=groups,
        channels=layout.shape[1] // layout.p_in,
        channels_out=layout.rows // groups,
        rows=computed,
        alpha_rows=layout.rows // num_alphas,
        kernel=axes(layout.shape[2:], 1),
        stride=axes(geometry["stride"], 1),
        padding=axes(geometry["padding"], 0),
        dilation=axes(geometry["dilation"], 1),
        activation=prepare.ACTIVATIONS[activation],
        relu=epilogue == "relu",
    )
    return prepare.Plan(lib.tbn_conv, struct, [index])
