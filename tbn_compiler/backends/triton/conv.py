"""``tbn::conv1d/2d/3d`` with Triton: an implicit matrix product, or the library's convolution of the different filters.

Either multiplies only the filters that differ, and the result has the memory format of the input. The library's is
faster where arithmetic decides; it needs those filters as floats, and writes each of their channels once more than a
product here does. Few positions make that overhead most of the time. Where tuning is on, all are measured.

A convolution of single positions in the ``channels_last`` format is a linear layer, and left to that. One whose copies
have Hadamard signs is a convolution with a group for each column group, whose results are mixed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from tbn_compiler.backends.triton import hadamard, tuning
from tbn_compiler.backends.triton.kernels import conv as kernels
from tbn_compiler.backends.triton.kernels import convert
from tbn_compiler.backends.triton.linear import gpu_of, plan_call, precision, tf32_allowed
from tbn_compiler.backends.triton.linear import prepare as prepare_linear
from tbn_compiler.backends.triton.plan import INDEX_LIMIT, UnsupportedError, WeightPlan
from tbn_compiler.backends.triton.prepared import Prepared, prepared
from tbn_compiler.backends.triton.quantize import quantize
from tbn_compiler.backends.triton.replay import Kept, Repeats, room, start
from tbn_compiler.backends.triton.search import Config, bucket, conv_candidates, power_of_two
from tbn_compiler.ops.calls import OPERATORS, TensorCall, channels_last
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


@dataclasses.dataclass(slots=True)
class Operands:
    """The tensors of one call: ``x [N, C, *sizes]``, ``out [N, M, *sizes]``, the others as for a linear layer.

    ``kept`` is what earlier launches with equal sizes, strides and alignments have left, or ``None``.
    """

    x: Tensor
    tile: Tensor
    alpha: Tensor
    bias: Tensor | None
    input_alpha: Tensor | None
    image_scale: Tensor | None
    out: Tensor
    epilogue: str
    kept: Kept | None = None


@dataclasses.dataclass
class Layer:
    """What all calls with equal shapes, strides and options have in common.

    Attributes:
        plan: how the filters are read.
        geometry: sizes.
        shape: of the result.
        memory_format: of the result.
        activation: number format of the input in the product.
        epilogue: function behind the layer.
        config: how it is run, once that is chosen for good.
        repeats: what such calls have left to further ones.
    """

    plan: WeightPlan
    geometry: Geometry
    shape: tuple[int, ...]
    memory_format: torch.memory_format
    activation: str
    epilogue: str
    config: Config | None = None
    repeats: Repeats = dataclasses.field(default_factory=Repeats)

    def __call__(
        self,
        input: Tensor,
        tile: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        input_alpha: Tensor | None,
        input_scale: Tensor | None,
    ) -> Tensor:
        """``input [N, C, *sizes] -> [N, M, *sizes]``, or without ``N``."""
        tensors = (input, tile, alpha, bias, input_alpha, input_scale)
        if self.repeats.replay is not None:
            return self.repeats.replay(*tensors)
        result = torch.empty(self.shape, dtype=input.dtype, device=input.device, memory_format=self.memory_format)
        if result.numel() == 0:
            return result
        unbatched = input.dim() == len(self.geometry.kernel) + 1
        x, out = (tensor.unsqueeze(0) if unbatched else tensor for tensor in (input, result))
        plan = self.plan
        if plan.sum_inputs > 1:
            x = x.unflatten(1, (-1, plan.sum_inputs)).sum(2)
        kept = None if self.config is None else self.repeats.begin(tensors, result)
        image_scale = None
        if self.activation != "float":
            x, image_scale = quantize_images(x, self.activation, input_scale, kept)
        operands = Operands(
            x=x,
            tile=tile.view(torch.int32) if plan.kind == "words" else tile.contiguous(),
            alpha=alpha.contiguous(),
            bias=None if bias is None else bias.contiguous(),
            input_alpha=None if input_alpha is None else input_alpha.contiguous(),
            image_scale=image_scale,
            out=out,
            epilogue=self.epilogue,
            kept=kept,
        )
        run(self.config or self._choose(operands), plan, self.geometry, operands)
        if kept is not None:
            self.repeats.end(kept, self.memory_format)
        return result

    def _choose(self, operands: Operands) -> Config:
        x, out, plan, geometry = operands.x, operands.out, self.plan, self.geometry
        positions = out.numel() // out.shape[1]
        format_of_x = format_name(x)
        candidates = conv_candidates(
            plan, geometry.computed, geometry.groups, x.shape[1] // geometry.groups, positions, x.dtype,
            gpu_of(x.device), channels_last=format_of_x == "last" if len(geometry.kernel) > 1 else None,
        )  # fmt: skip
        signed = "" if plan.mixes == 1 else f" signed={plan.mixes}"
        # The names are those of the files that are kept.
        key = (
            f"conv {str(x.dtype)[6:]} {plan.kind} {geometry.computed}x{plan.columns} blocks={plan.replicas} "
            f"of={geometry.per_group} groups={geometry.groups} kernel={geometry.kernel} stride={geometry.stride} "
            f"padding={geometry.padding} dilation={geometry.dilation} format={format_of_x}-{format_name(out)} "
            f"positions={bucket(positions)} mixed={int(plan.mixed)} function={self.epilogue} "
            f"precision={precision(x.dtype, x.device)}{signed}"
        )
        config = tuning.choose(x.device, key, candidates, lambda config: run(config, plan, geometry, operands))
        if tuning.settled(x.device, key, candidates):
            self.config = config
        return config


def prepare(call: TensorCall) -> Prepared:
    """What a checked call has in common with others like it.

    Raises:
        UnsupportedError: no kernel covers it.
    """
    if _is_linear(call):
        return _as_linear(call)
    plan, geometry = _plan(call), Geometry.of(call)
    if plan.mixes > 1:
        geometry = dataclasses.replace(geometry, groups=plan.mixes, per_group=plan.rows, computed=plan.rows)
    return Layer(plan, geometry, call.output_shape(), call.output_format(), call.activation, call.epilogue)


conv1d, conv2d, conv3d = (prepared(OPERATORS[name], prepare) for name in CONV_OPS.values())


def _is_linear(call: TensorCall) -> bool:
    """Whether each position is a token of a linear layer, and its channels lie side by side.

    Not with integers: a token has its own scale there, where all positions of an image share one.
    """
    arguments = call.arguments
    ones = (*call.kernel_size, *arguments["stride"])
    return (
        call.output_format() != torch.contiguous_format
        and call.groups == 1
        and call.activation == "float"
        and all(size == 1 for size in ones)
        and not any(arguments["padding"])
    )


def _as_linear(call: TensorCall) -> Prepared:
    """``[N, C, *sizes] -> [N, M, *sizes]`` as ``[N, *sizes, C] -> [N, *sizes, M]``, without moving anything."""
    operator = OPERATORS["linear"]
    arguments = {name: call.arguments[name] for name in operator.names if name in call.arguments}
    arguments |= {
        "input": call.input.movedim(1, -1),
        operator.inputs_argument: call.inputs,
        operator.outputs_argument: call.outputs,
    }
    layer = prepare_linear(TensorCall(operator, arguments))

    def compute(input: Tensor, *operands: Any) -> Tensor:
        return layer(input.movedim(1, -1), *operands).movedim(-1, 1)

    return compute


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
    sizes, image = call.output_sizes(), call.input.shape[call.channel_axis :]
    if any(size < 1 for size in sizes):
        raise UnsupportedError("the kernel does not fit the input")
    for positions in (sizes, image[1:]):
        if math.prod(positions) > INDEX_LIMIT:
            raise UnsupportedError(f"an image of {tuple(positions)} positions exceeds 32-bit indices")
    if call.activation != "float" and math.prod(image) > INDEX_LIMIT:
        raise UnsupportedError(f"an image of {tuple(image)} exceeds 32-bit indices, and has to become integers")
    if call.groups > GROUP_LIMIT:
        raise UnsupportedError(f"{call.groups} groups exceed the grid of a kernel")
    return plan


GROUP_LIMIT = 65535  # the second size of a grid


def format_name(x: Tensor) -> str:
    """How ``x [N, C, *sizes]`` lies in memory: "first" or "last" for its channels, otherwise by its strides."""
    if x.is_contiguous():
        return "first"
    return "last" if x.movedim(1, -1).is_contiguous() else "x".join(map(str, x.stride()))


def quantize_images(
    x: Tensor, number_format: str, given: Tensor | None = None, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """``x [N, C, *sizes]`` as ``int8``, in the same memory format, and the float32 scales ``[N]`` of the images."""
    last = x.movedim(1, -1)
    keeps_last = last.is_contiguous() and not x.is_contiguous()
    image = last if keeps_last else x
    flat = image.reshape(x.shape[0], -1)
    values, scale = quantize(flat if flat.stride(1) == 1 else flat.contiguous(), number_format, given, kept)
    values = values.view(image.shape)
    return (values.movedim(-1, 1) if keeps_last else values), scale


def run(config: Config, plan: WeightPlan, geometry: Geometry, operands: Operands) -> None:
    """Launch the kernels of a configuration."""
    if plan.mixes > 1:
        _mixed(config, plan, geometry, operands)
    elif config.kernel in ("library", "library_last"):
        _library(plan, geometry, operands, copied=config.kernel == "library_last")
    elif config.kernel == "unpacked":
        _unpacked(config, plan, geometry, operands)
    else:
        _implicit(config, plan, geometry, operands)


def _three(sizes: Sequence[int], fill: int) -> list[int]:
    """Sizes of three dimensions, the missing first ones filled."""
    return [fill] * (3 - len(sizes)) + [int(size) for size in sizes]


def _flat_strides(tensor: Tensor) -> tuple[int, int, int] | None:
    """Strides of ``[N, C, *sizes]`` as ``[N, C, positions]``, or ``None`` where that is no view."""
    step = following = None
    for size, stride in zip(reversed(tensor.shape[2:]), reversed(tensor.stride()[2:]), strict=True):
        if size > 1:
            if following not in (None, stride):
                return None
            step, following = stride if step is None else step, stride * size
    return tensor.stride(0), tensor.stride(1), 1 if step is None else step


def _constants(config: Config, geometry: Geometry, operands: Operands) -> dict[str, Any]:
    """What products on the image are compiled for."""
    x = operands.x
    named: dict[str, Any] = {}
    for name, sizes, fill in (
        ("KERNEL", geometry.kernel, 1),
        ("STEP", geometry.stride, 1),
        ("PAD", geometry.padding, 0),
        ("DILATION", geometry.dilation, 1),
    ):
        named |= {f"{name}_{axis}": size for axis, size in zip("DHW", _three(sizes, fill), strict=True)}
    return named | {
        "HAS_SCALE": operands.image_scale is not None,
        "HAS_BIAS": operands.bias is not None,
        "FUNCTION": operands.epilogue,
        "WIDE": span(x.shape[1:], x.stride()[1:], geometry.padding) > INDEX_LIMIT,
        "BLOCK_POSITIONS": config.block_tokens,
        "BLOCK_ROWS": config.block_rows,
        "BLOCK_K": config.block_k,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }


def span(image: Sequence[int], strides: Sequence[int], padding: Sequence[int]) -> int:
    """The largest offset inside an image ``[C, *sizes]`` that a kernel computes, those of the padding included."""
    return sum((size - 1 + 2 * pad) * stride for size, stride, pad in zip(image, strides, (0, *padding), strict=True))


def _blocks(config: Config, geometry: Geometry, positions: int) -> tuple[int, int]:
    """The grid of a product: blocks of rows and positions, and groups."""
    rows = triton.cdiv(geometry.computed, config.block_rows)
    return rows * triton.cdiv(positions, config.block_tokens), geometry.groups


def _implicit(config: Config, plan: WeightPlan, geometry: Geometry, operands: Operands) -> None:
    x, out = operands.x, operands.out
    positions = out.numel() // out.shape[1]
    strides = _flat_strides(out)
    assert strides is not None
    start(
        operands.kept,
        kernels.conv_dot,
        (*_blocks(config, geometry, positions), 1),
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
        *strides,
        KIND=plan.kind,
        MIXED=plan.mixed,
        REPLICAS=plan.replicas,
        PRECISION=precision(x.dtype, x.device),
        **_constants(config, geometry, operands),
    )


def _unpacked(config: Config, plan: WeightPlan, geometry: Geometry, operands: Operands) -> None:
    out = operands.out
    positions = out.numel() // out.shape[1]
    filters = unpack(plan, geometry, operands, last=True)
    if operands.x.stride(1) != 1:
        operands = dataclasses.replace(operands, x=operands.x.movedim(1, -1).contiguous().movedim(-1, 1))
    x, strides = operands.x, _flat_strides(out)
    assert strides is not None
    group_channels = x.shape[1] // geometry.groups
    start(
        operands.kept,
        kernels.conv_unpacked,
        (*_blocks(config, geometry, positions), 1),
        x,
        filters,
        operands.alpha,
        operands.bias,
        operands.image_scale,
        out,
        positions,
        geometry.per_group,
        geometry.computed,
        group_channels,
        plan.rows_per_alpha,
        *_three(x.shape[2:], 1),
        *_three(out.shape[2:], 1),
        x.stride(0),
        *_three(x.stride()[2:], 0),
        *strides,
        SCALED=not plan.mixed,
        EVEN_K=group_channels % config.block_k == 0,
        **_constants(config, geometry, operands),
    )


def unpack(plan: WeightPlan, geometry: Geometry, operands: Operands, *, last: bool) -> Tensor:
    """The filters to multiply in the dtype of the input: ``[groups * computed, channels, *kernel]``.

    Args:
        plan: how the tile is read.
        geometry: sizes.
        operands: tensors.
        last: their channels lie innermost.
    """
    rows, taps = geometry.groups * geometry.computed, math.prod(geometry.kernel)
    if plan.mixes > 1:
        filters = hadamard.unpack(
            plan, operands.tile, operands.input_alpha, operands.x.dtype, operands.kept, taps=taps, last=last
        )
    else:
        filters = room(operands.kept, (rows, plan.columns), operands.x.dtype, operands.x.device)
        block_rows, block_k = 16, 256
        start(
            operands.kept, convert.unpack_rows,
            (triton.cdiv(rows, block_rows) * triton.cdiv(plan.columns, block_k), 1, 1),
            operands.tile, operands.alpha, operands.input_alpha, filters, geometry.computed, geometry.per_group,
            plan.rows, rows, plan.columns, plan.row_size, plan.tile_size, plan.shift,
            KIND=plan.kind, MIXED=plan.mixed, REPLICAS=plan.replicas, BLOCK_ROWS=block_rows, BLOCK_K=block_k,
            TAPS=taps if last else 1,
        )  # fmt: skip
    if last:
        return filters.view(rows, *geometry.kernel, -1).movedim(-1, 1)
    return filters.view(rows, -1, *geometry.kernel)


def _convolve(x: Tensor, filters: Tensor, geometry: Geometry) -> Tensor:
    """The library's convolution; true float32 unless the user allows tf32: cuDNN's own default allows it."""
    cudnn = torch.backends.cudnn
    result: Tensor = torch.ops.aten._convolution.default(
        x, filters, None, geometry.stride, geometry.padding, geometry.dilation, False,
        [0] * len(geometry.kernel), geometry.groups,
        cudnn.benchmark, cudnn.deterministic or torch.are_deterministic_algorithms_enabled(), cudnn.enabled,
        tf32_allowed(),
    )  # fmt: skip
    return result


def _library(plan: WeightPlan, geometry: Geometry, operands: Operands, *, copied: bool) -> None:
    """The library's convolution, in the format of the input or of a copy, and a kernel that writes the repeats."""
    x, last = operands.x, channels_last(len(geometry.kernel))
    if copied and last is not None:
        x = x.contiguous(memory_format=last)
    # The library takes filters in the format of the input; it would copy others.
    filters = unpack(plan, geometry, operands, last=last is not None and format_name(x) == "last")
    z = _convolve(x, filters, geometry)
    copy_channels(plan, geometry, z, operands)


def _mixed(config: Config, plan: WeightPlan, geometry: Geometry, operands: Operands) -> None:
    """Copies with Hadamard signs: column groups as groups of their own, and a kernel that mixes their results."""
    x, out = operands.x, operands.out
    if config.kernel == "unpacked":
        # float32: results without the scales may be beyond half precision.
        z = x.new_empty((out.shape[0], *out.shape[2:], out.shape[1]), dtype=torch.float32).movedim(-1, 1)
        apart = hadamard.regroup(x, plan.mixes, last=True)
        unscaled = dataclasses.replace(plan, mixed=True)
        groups = dataclasses.replace(operands, x=apart, out=z, bias=None, epilogue="none")
        _unpacked(config, unscaled, geometry, groups)
    else:
        last = channels_last(len(geometry.kernel)) is not None
        last = last and (config.kernel == "library_last" or format_name(x) == "last")
        apart = hadamard.regroup(x, plan.mixes, last=last)
        z = _convolve(apart, unpack(plan, geometry, operands, last=last), geometry)
    if (source := _flat_strides(z)) is None:
        z = z.contiguous()
        source = _flat_strides(z)
    target = _flat_strides(out)
    assert source is not None
    assert target is not None
    images, positions = z.shape[0], out[0, 0].numel()
    if all(strides[0] == positions * strides[2] for strides in (source, target)):
        images, positions = 1, images * positions  # one long image: its positions need not begin anew
    # The library decides how its result lies in memory: nothing is kept for it.
    hadamard.mix(
        plan, z, (source[0], source[1] * plan.rows, *source[1:]), out, target, images, positions,
        operands.alpha, operands.bias, operands.epilogue, operands.kept if config.kernel == "unpacked" else None,
    )  # fmt: skip


def copy_channels(plan: WeightPlan, geometry: Geometry, z: Tensor, operands: Operands) -> None:
    """Write the result from the different channels ``z [N, groups * computed, *sizes]``, both in any memory format."""
    out, images = operands.out, z.shape[0]
    if (source := _flat_strides(z)) is None:
        z = z.contiguous()
        source = _flat_strides(z)
    target = _flat_strides(out)
    assert source is not None
    assert target is not None
    positions = out[0, 0].numel()
    if all(strides[0] == positions * strides[2] for strides in (source, target)):
        images, positions = 1, images * positions  # one long image: its positions need not begin anew
    rows = power_of_two(geometry.computed)
    if target[1] == 1:
        block_rows = min(rows, 256)
        block_positions = 2048 // block_rows
    else:
        # Blocks of both sizes turn one format into the other.
        block_positions = min(max(32, power_of_two(positions)), 1024 if source[2] == 1 else 64)
        block_rows = min(rows, 2048 // block_positions)
    blocks = triton.cdiv(geometry.computed, block_rows) * triton.cdiv(positions, block_positions) * images
    # The library decides how its result lies in memory: nothing is kept for it.
    if operands.kept is not None and operands.kept.notes is not None:
        operands.kept.notes.stop()
    convert.copy_channels[blocks, geometry.groups](
        z, operands.alpha, operands.bias, out, geometry.per_group, geometry.computed, positions, plan.rows_per_alpha,
        *source, *target,
        SCALED=not plan.mixed, HAS_BIAS=operands.bias is not None, FUNCTION=operands.epilogue,
        BLOCK_POSITIONS=block_positions, BLOCK_ROWS=block_rows,
    )  # fmt: skip
