"""``tbn::conv1d/2d/3d`` with Triton: an implicit matrix product, or the library's convolution of the different filters.

Either multiplies only the filters that differ. The library's is faster where arithmetic decides; it needs those
filters as floats, and writes each of their channels once more than the implicit product does. Few positions make that
overhead most of the time. Where tuning is on, both are measured.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from tbn_compiler.backends.triton import decline, tuning
from tbn_compiler.backends.triton.kernels import conv as kernels
from tbn_compiler.backends.triton.kernels import convert
from tbn_compiler.backends.triton.launches import on_device, quantize, unpack
from tbn_compiler.backends.triton.linear import gpu_of, plan_call, precision, tf32_allowed
from tbn_compiler.backends.triton.plan import INDEX_LIMIT, UnsupportedError, WeightPlan
from tbn_compiler.backends.triton.search import Config, conv_candidates, power_of_two
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import OPERATORS, TensorCall, make_kernel
from tbn_compiler.ops.schemas import CONV_OPS


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

    @classmethod
    def of(cls, call: TensorCall) -> Geometry:
        """The sizes of a call."""
        return cls(
            kernel=call.kernel_size,
            stride=tuple(map(int, call.arguments["stride"])),
            padding=tuple(map(int, call.arguments["padding"])),
            dilation=tuple(map(int, call.arguments["dilation"])),
            groups=call.groups,
            per_group=call.product.group_rows,
            computed=call.product.rows,
        )


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


def compute(call: TensorCall) -> Tensor:
    """``input [N, C, *sizes] -> [N, M, *sizes]``, or without ``N``, see :mod:`tbn_compiler.ops.schemas`."""
    try:
        plan = _plan(call)
    except UnsupportedError as reason:
        decline(f"tbn::{call.kind}: {reason}")
        return reference.compute(call)
    out = call.input.new_empty(call.output_shape())
    if out.numel():
        unbatched = call.input.dim() == call.dims + 1
        x, images = (tensor.unsqueeze(0) if unbatched else tensor for tensor in (call.input, out))
        with on_device(call.input):
            _run(plan, call, x, images)
    return out


conv1d, conv2d, conv3d = (make_kernel(OPERATORS[name], compute) for name in CONV_OPS.values())


def _plan(call: TensorCall) -> WeightPlan:
    """How the kernels read the filters of a call.

    Raises:
        UnsupportedError: they do not cover it.
    """
    plan = plan_call(call)
    if plan.interleaved > 1:
        raise UnsupportedError(
            "channels that share a weight have scales of their own or are integers, and meet it one by one"
        )
    image = call.input.shape[call.channel_axis :]
    if math.prod(image) > INDEX_LIMIT:
        raise UnsupportedError(f"an image of {tuple(image)} exceeds 32-bit indices")
    if any(size < 1 for size in call.output_sizes()):
        raise UnsupportedError("the kernel does not fit the input")
    return plan


def _run(plan: WeightPlan, call: TensorCall, x: Tensor, out: Tensor) -> None:
    """Compute ``out [N, M, *sizes]`` from ``x [N, C, *sizes]``."""
    tile, bias, input_alpha, geometry = call.tile, call.bias, call.input_alpha, Geometry.of(call)
    if plan.sum_inputs > 1:
        x = x.unflatten(1, (-1, plan.sum_inputs)).sum(2)
    image_scale = None
    if call.activation != "float":
        values, image_scale = quantize(x.reshape(x.shape[0], -1), call.activation)
        x = values.view(x.shape)
    operands = Operands(
        x=x,
        tile=tile.view(torch.int32) if plan.kind == "words" else tile.contiguous(),
        alpha=call.alpha.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        input_alpha=None if input_alpha is None else input_alpha.contiguous(),
        image_scale=image_scale,
        out=out,
        epilogue=call.epilogue,
    )
    positions = out.numel() // out.shape[1]
    candidates = conv_candidates(plan, geometry.computed, geometry.groups, positions, x.dtype, gpu_of(x.device))
    # The names are those of the files that are kept.
    key = (
        f"conv {str(x.dtype)[6:]} {plan.kind} {geometry.computed}x{plan.columns} blocks={plan.replicas} "
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
        REPLICAS=plan.replicas,
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
