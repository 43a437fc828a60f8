"""The configurations that a shape may be run with: few, each with a reason, the one to use unmeasured first.

Nothing here imports triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tbn_compiler.backends.triton.plan import WeightPlan

SUM_TOKENS = 8  # beyond this many tokens a product per weight and token costs more than filling up a tensor core's 16
UNPACK_TOKENS = 512  # from here on each weight is expanded for so many blocks of tokens that doing it once may pay
LIBRARY_PRODUCTS = 2**26  # multiply-adds: about 1 us of a large GPU's tensor cores at a tenth of their rate


@dataclass(frozen=True)
class Gpu:
    """What bounds a configuration; the defaults are an H200's.

    Attributes:
        processors: multiprocessors.
        shared: bytes of shared memory that one program can have.
    """

    processors: int = 132
    shared: int = 227 * 1024


@dataclass(frozen=True)
class Config:
    """One way to run a layer.

    Attributes:
        kernel: ``sum`` (one pass over the bits, no tensor cores), ``dot`` (tensor cores, weights expanded in
            registers), ``unpack`` (weights expanded once into memory, then ``dot`` on them), ``popcount``; for
            convolutions ``implicit`` (as ``dot``), ``unpacked`` (filters expanded once, then tensor cores on them and
            the image), ``library`` (expanded once, then the library's convolution) or ``library_last`` (the same on a
            copy of the input in the ``channels_last`` format).
        block_tokens: tokens (output positions) of a program.
        block_rows: rows of a program.
        block_k: columns of a step.
        split_k: programs that share the columns of a block.
        num_warps: warps of a program.
        num_stages: steps that are loaded ahead.
    """

    kernel: str
    block_tokens: int = 16
    block_rows: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below ``number``."""
    return 1 << max(number - 1, 0).bit_length()


def bucket(size: int) -> int:
    """The size that stands for ``size`` (tokens, positions) in tuning: the power of two that is not below it.

    Keys *and candidates* are computed from it: what is measured for one size is then a candidate for every size that
    has the same key, in whatever order they come.
    """
    return power_of_two(size)


def _divide_up(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _split(blocks: int, steps: int, processors: int) -> int:
    """How many programs share one block's columns, so that every processor has work: at least four steps each."""
    split = 1
    while split < 8 and blocks * split * 2 <= processors and steps // (split * 2) >= 4:
        split *= 2
    return split


def _dot(plan: WeightPlan, tokens: int, itemsize: int, gpu: Gpu) -> Iterator[Config]:
    """Blocks for tensor cores: the largest for arithmetic, smaller ones where few blocks would leave cores idle."""
    # 128 bytes of a row of the input make one swizzled line of shared memory.
    wide_k = 128 // itemsize
    if itemsize == 4 or not plan.direct:
        # Registers bound the block: for arithmetic without tensor cores, or for finding and scaling the weights.
        shapes = [(64, 64, 32, 4, 3), (32, 64, 32, 4, 3), (32, 32, 64, 4, 3)]
    # 128 rows and 8 warps give both warp groups of a Hopper core their own 64 rows. With one group, or in short steps,
    # its assembler does not let the products overlap (triton 3.6, split columns).
    elif tokens <= 32:
        # The tile is most of what is read: longer rows of it at a time.
        shapes = [(32, 128, 2 * wide_k, 8, 3), (32, 64, 4 * wide_k, 4, 2)]
    else:
        shapes = [(128, 128, 2 * wide_k, 8, 3), (64, 128, 2 * wide_k, 8, 3), (128, 128, wide_k, 8, 3)]
    seen = set()
    for block_tokens, block_rows, block_k, num_warps, num_stages in shapes:
        block_tokens = min(block_tokens, max(16, power_of_two(tokens)))
        # The input's blocks of all stages, and one of the expanded weight.
        if (num_stages * block_tokens + block_rows) * block_k * itemsize > gpu.shared:
            continue
        blocks = _divide_up(tokens, block_tokens) * _divide_up(plan.rows, block_rows)
        split = _split(blocks, _divide_up(plan.columns, block_k), gpu.processors)
        config = Config("dot", block_tokens, block_rows, block_k, split, num_warps, num_stages)
        if config not in seen:
            seen.add(config)
            yield config


def _fill(configs: list[Config], plan: WeightPlan, tokens: int, processors: int) -> list[Config]:
    """Order by rounds of the processors times work of a block: the one expected to be fastest first."""

    def cost(config: Config) -> int:
        blocks = _divide_up(tokens, config.block_tokens) * _divide_up(plan.rows, config.block_rows) * config.split_k
        steps = _divide_up(_divide_up(plan.columns, config.block_k), config.split_k)
        return _divide_up(blocks, processors) * steps * config.block_k * config.block_tokens * config.block_rows

    return sorted(configs, key=cost)


def linear_candidates(plan: WeightPlan, tokens: int, dtype: torch.dtype, gpu: Gpu) -> list[Config]:
    """Configurations for a linear layer; the first is used where nothing is measured.

    Args:
        plan: how the weight is read.
        tokens: rows of the input, at least 1.
        dtype: dtype of the input, ``int8`` included.
        gpu: what bounds them.
    """
    found = _fill(list(_dot(plan, tokens, dtype.itemsize, gpu)), plan, tokens, gpu.processors)
    plain = not (plan.mixed or plan.inner_alphas) and plan.replicas == plan.interleaved == 1
    if plain and dtype != torch.int8 and tokens <= SUM_TOKENS:
        block_tokens = min(4, power_of_two(tokens))
        # Sums in registers: 32 to 64 a thread.
        few, many = (4, 8) if block_tokens > 1 else (8, 16)
        sums = [Config("sum", block_tokens, rows, 256, 1, 4, 3) for rows in (few, many)]
        sums.append(Config("sum", block_tokens, few, 512, 1, 8, 3))
        found = sums + found
    if plain and plan.packed and dtype.itemsize == 2 and tokens >= UNPACK_TOKENS:
        found += [replace(config, kernel="unpack") for config in found if config.block_k * dtype.itemsize == 128]
    return found


def conv_candidates(
    plan: WeightPlan,
    computed: int,
    groups: int,
    group_channels: int,
    positions: int,
    dtype: torch.dtype,
    gpu: Gpu,
    *,
    channels_last: bool | None = None,
) -> list[Config]:
    """Configurations for a convolution; the first is used where nothing is measured.

    Args:
        plan: how the filters are read.
        computed: different filters of a group.
        groups: convolution groups.
        group_channels: input channels of a group.
        positions: output positions of all images, at least 1; its bucket counts.
        dtype: dtype of the input, ``int8`` included.
        gpu: what bounds them.
        channels_last: whether input and output are in that memory format; ``None`` where there is none.
    """
    positions = bucket(positions)
    # A library's half-precision sums would round integers, and its float32 ones need not be plain sums (Winograd).
    library = [] if dtype == torch.int8 else [Config("library")]
    if channels_last is False and dtype.itemsize == 2:
        library.append(Config("library_last"))
    processors = max(gpu.processors // groups, 1)
    unpacked = _unpacked(plan, computed, group_channels, positions, dtype, gpu, processors)
    if not channels_last:  # addresses of the output would fill the registers
        unpacked = [config for config in unpacked if config.block_tokens * config.block_rows < 128 * 128]
    large = library + unpacked
    implicit = _implicit(plan, positions, dtype, processors)
    # A product this small is over before two more launches have begun.
    small = positions * computed * groups * plan.columns <= LIBRARY_PRODUCTS
    return implicit + large if small else large + implicit


def _implicit(plan: WeightPlan, positions: int, dtype: torch.dtype, processors: int) -> list[Config]:
    # All are compiled without spilling by Triton 3.6 and 3.7: addresses of the image take most registers.
    if dtype.itemsize < 4 and plan.direct and plan.packed:
        shapes = [(64, 64, 64, 8), (64, 64, 32, 8), (32, 64, 64, 4)]
    else:
        shapes = [(64, 64, 32, 8), (32, 32, 32, 4)]
    configs = []
    for block_positions, block_rows, block_k, num_warps in shapes:
        size = min(block_positions, max(16, positions))
        configs.append(Config("implicit", size, block_rows, block_k, 1, num_warps, 3))
    return _fill(list(dict.fromkeys(configs)), plan, positions, processors)


def _unpacked(
    plan: WeightPlan, computed: int, group_channels: int, positions: int, dtype: torch.dtype, gpu: Gpu, processors: int
) -> list[Config]:
    """Blocks of positions as the left operand; none where the channels of a tap are not read in whole vectors."""
    if dtype.itemsize > 2 or group_channels % 16:
        return []
    block_k = max(min(128 // dtype.itemsize, power_of_two(group_channels)), 32)
    rows = max(power_of_two(computed), 16)
    configs = []
    for block_positions, block_rows, num_warps in ((128, 128, 8), (128, 64, 8), (64, 64, 4)):
        size = min(block_positions, max(16, positions))
        config = Config("unpacked", size, min(block_rows, rows), block_k, 1, num_warps, 3)
        if 3 * (config.block_tokens + config.block_rows) * block_k * dtype.itemsize <= gpu.shared:
            configs.append(config)
    return _fill(list(dict.fromkeys(configs)), plan, positions, processors)
