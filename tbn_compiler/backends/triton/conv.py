"""``tbn::conv1d/2d/3d`` with Triton: an implicit matrix product, or the library's convolution with the different filters.

Either multiplies only the filters that differ. The library's is faster where arithmetic decides; it needs those
filters as floats, and writes each of their channels once more than the implicit product does. Few positions make that
overhead most of the time. Where tuning is on, both are measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from tbn_compiler.backends.triton import decline, tuning
from tbn_compiler.backends.triton.kernels import conv as kernels
from tbn_compiler.backends.triton.kernels import convert
from tbn_compiler.backends.triton.linear import (
    check_device,
    gpu_of,
    on_device,
    plan_call,
    precision,
    quantize,
    tf32_allowed,
    unpack,
)
from tbn_compiler.backends.triton.plan import INDEX_LIMIT, Unsupported, WeightPlan
from tbn_compiler.backends.triton.search import Config, conv_candidates, power_of_two
from tbn_compiler.ops import reference
from tbn_compiler.ops.schemas import CONV_OPS, check_formats, check_tile_operands, conv_layout
from tbn_compiler.tiling import TileLayout


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Sizes of a convolution, in its own number of dimensions.

    Attributes:
        kernel: kernel sizes.
        stride: strides.
        padding: padding on both sides.
        dilation: dilations.
        groups: groups.
        per_group: output channels of a group.
        computed: different ones among them.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    per_group: int
    computed: int

    def output_size(self, size: Sequence[int]) -> list[int]:
        """Sizes of the output for an input of ``size``."""
        return [
            (length + 2 * pad - dil * (k - 1) - 1) // step + 1
            for length, k, step, pad, dil in zip(
                size, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]


@dataclasses.dataclass(frozen=True)
class Operands:
    """The tensors of one call: ``x [N, C, *sizes]``, ``out [N, M, *sizes]``, the others as for a linear layer."""

    x: Tensor
    tile: Tensor
    alpha: Tensor
    bias: Tensor | None
    input_alpha: Tensor | None
    image_scale: Tensor | None
    out: Tensor
    epilogue: str


def _make_conv(d: int) -> Callable[..., Tensor]:
    op = CONV_OPS[d]

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
        check_formats(op, activation, epilogue)
        check_tile_operands(op, input, tile, alpha, bias, layout)
        check_device(input, input_alpha)
        geometry = Geometry(
            kernel=tuple(map(int, kernel_size)),
            stride=tuple(map(int, stride)),
            padding=tuple(map(int, padding)),
            dilation=tuple(map(int, dilation)),
            groups=groups,
            per_group=layout.rows // groups,
            computed=layout.rows_per_group(alpha.numel(), groups),
        )
        try:
            plan = _plan(input, tile, alpha, input_alpha, layout, activation, geometry)
        except Unsupported as reason:
            decline(f"tbn::{op}: {reason}")
            return reference.KERNELS[op](
                input, tile, alpha, bias, in_channels, out_channels, kernel_size, p, input_alpha,
                p_in=p_in, shift=shift, stride=stride, padding=padding, dilation=dilation, groups=groups,
                activation=activation, epilogue=epilogue,
            )  # fmt: skip
        unbatched = input.dim() == d + 1
        x = input.unsqueeze(0) if unbatched else input
        out = x.new_empty((x.shape[0], layout.rows, *geometry.output_size(x.shape[2:])))
        if out.numel():
            with on_device(input):
                _run(plan, geometry, x, tile, alpha, bias, input_alpha, out, activation, epilogue)
        return out.squeeze(0) if unbatched else out

    conv.__name__ = op
    conv.__doc__ = f"``input [N, C, *{d} sizes]``, see :mod:`tbn_compiler.ops.schemas`."
    return conv


conv1d, conv2d, conv3d = map(_make_conv, CONV_OPS)


def _plan(
    input: Tensor,
    tile: Tensor,
    alpha: Tensor,
    input_alpha: Tensor | None,
    layout: TileLayout,
    activation: str,
    geometry: Geometry,
) -> WeightPlan:
    """How the kernels read the filters of a call.

    Raises:
        Unsupported: they do not cover it.
    """
    d = len(geometry.kernel)
    plan = plan_call(input, tile, alpha, input_alpha, layout, activation)
    if plan.interleaved > 1:
        raise Unsupported(
            "channels that share a weight have scales of their own or are integers, and meet it one by one"
        )
    if math.prod(input.shape[-d - 1 :]) > INDEX_LIMIT:
        raise Unsupported(f"an image of {tuple(input.shape[-d - 1 :])} exceeds 32-bit indices")
    if any(size < 1 for size in geometry.output_size(input.shape[-d:])):
        raise Unsupported("the kernel does not fit the input")
    return plan


def _run(
    plan: WeightPlan,
    geometry: Geometry,
    x: Tensor,
    tile: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    input_alpha: Tensor | None,
    out: Tensor,
    activation: str,
    epilogue: str,
) -> None:
    if plan.sum_inputs > 1:
        x = x.unflatten(1, (-1, plan.sum_inputs)).sum(2)
    image_scale = None
    if activation != "float":
        values, image_scale = quantize(x.reshape(x.shape[0], -1), activation)
        x = values.view(x.shape)
    operands = Operands(
        x=x,
        tile=tile.view(torch.int32) if plan.kind == "words" else tile.contiguous(),
        alpha=alpha.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        input_alpha=None if input_alpha is None else input_alpha.contiguous(),
        image_scale=image_scale,
        out=out,
        epilogue=epilogue,
    )
    positions = out.numel() // out.shape[1]
    candidates = conv_candidates(plan, geometry.computed, geometry.groups, positions, x.dtype, gpu_of(x.device))
    key = (
        f"conv {str(x.dtype)[6:]} {plan.kind} {geometry.computed}x{plan.columns} blocks={plan.blocks} "
        f"of={geometry.per_group} groups={geometry.groups} kernel={geometry.kernel} stride={geometry.stride} "
        f"dilation={geometry.dilation} positions={power_of_two(positions)}"
    )
    choice = tuning.choose(x.device, key, candidates, lambda config: run(config, plan, geometry, operands))
    run(choice, plan, geometry, operands)


def run(config: Config, plan: WeightPlan, geometry: Geometry, operands: Operands) -> None:
    """Launch the kernels of a configuration."""
    if config.kernel == "library":
        _library(plan, geometry, operands)
    else:
        _implicit(config, plan, geometry, operands)


def _three(sizes: Sequence[int], fill: int) -> list[int]:
    """Sizes of three dimensions, the missing first ones filled."""
    return [fill] * (3 - len(sizes)) + [int(size) for size in sizes]


def _implicit(config: Config, plan: WeightPlan, geometry: Geometry, operands: Operands) -> None:
    x, out = operands.x, operands.out
    positions = out.numel() // out.shape[1]
    blocks = triton.cdiv(geometry.computed, config.block_rows) * triton.cdiv(positions, config.block_tokens)
    named: dict[str, Any] = {}
    for name, sizes, fill in (
        ("KERNEL", geometry.kernel, 1),
        ("STEP", geometry.stride, 1),
        ("PAD", geometry.padding, 0),
        ("DILATION", geometry.dilation, 1),
    ):
        named |= {f"{name}_{axis}": size for axis, size in zip("DHW", _three(sizes, fill), strict=True)}
    kernels.conv_dot[blocks, geometry.groups](
        x,
        operands.tile,
        operands.alpha,
        operands.input_alpha,
        operands.bias,
        operands.image_scale,
        out,
        positions,
        geometry.per_group,
        geometry.computed,
        plan.rows,
        plan.columns,
        x.shape[1] // geometry.groups,
        plan.row_size,
        plan.tile_size,
        plan.shift,
        plan.rows_per_alpha,
        *_three(x.shape[2:], 1),
        *_three(out.shape[2:], 1),
        *x.stride()[:2],
        *_three(x.stride()[2:], 0),
        **named,
        KIND=plan.kind,
        MIXED=plan.mixed,
        BLOCKS=plan.blocks,
        HAS_SCALE=operands.image_scale is not None,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        PRECISION=precision(x.dtype, x.device),
        BLOCK_POSITIONS=config.block_tokens,
        BLOCK_ROWS=config.block_rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


@contextlib.contextmanager
def _float32_as_asked() -> Iterator[None]:
    """True float32 in the library's convolution, unless the user allows tf32: cuDNN's own default allows it."""
    setting: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = setting.fp32_precision
    setting.fp32_precision = "tf32" if tf32_allowed() else "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before


def _library(plan: WeightPlan, geometry: Geometry, operands: Operands) -> None:
    x, out, kernel = operands.x, operands.out, geometry.kernel
    weight = unpack(
        plan, operands.tile, operands.alpha, operands.input_alpha, x.dtype,
        geometry.groups, geometry.computed, geometry.per_group,
    )  # fmt: skip
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    filters = weight.view(weight.shape[0], -1, *kernel)
    exact = x.dtype == torch.float32 and x.is_cuda
    with _float32_as_asked() if exact else contextlib.nullcontext():
        z = conv(x, filters, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    z = z.contiguous()
    positions = z[0, 0].numel()
    block = min(1024, max(32, power_of_two(positions)))
    images, channels = out.shape[:2]
    convert.copy_channels[(images * channels * triton.cdiv(positions, block),)](
        z, operands.alpha, operands.bias, out, channels, geometry.per_group, geometry.computed, positions,
        plan.rows_per_alpha,
        SCALED=not plan.mixed, HAS_BIAS=operands.bias is not None, FUNCTION=operands.epilogue, BLOCK=block,
    )  # fmt: skip
