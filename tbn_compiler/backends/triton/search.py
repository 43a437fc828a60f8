"""The configurations that a shape may be run with: few, each with a reason, the one to use unmeasured first.

Nothing here imports triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from tbn_compiler.backends.triton.plan import MOST_GROUPS, WeightPlan

POPCOUNT_TOKENS = 8  # up to here, comparing 32 signs at a time beats filling up a tensor core's block of 16 tokens
LIMBS_TOKENS = 4  # beyond, a product for each weight and token costs more than filling up a tensor core's 16 tokens
SUM_TOKENS = 8  # the same where limbs do not serve
LEFT_TOKENS = 32  # up to here the weight is a tensor core's left operand, which has more rows than there are tokens
GROUPS_TOKENS = 2048  # from here on the library's products of column groups are tried before a program's own
UNPACK_TOKENS = 256  # from here on each weight is expanded for so many blocks of tokens that doing it once may pay
GEMM_TOKENS = 2048  # from here on a kernel that writes the copies itself is tried before the library's product
LIBRARY_PRODUCTS = 2**24  # multiply-adds: fewer are over before two more launches have begun


@dataclass(frozen=True)
class Gpu:
    """What bounds a configuration; the defaults are an H200's.

    Attributes:
        processors: multiprocessors.
        shared: bytes of shared memory that one program can have.
        capability: 90 for an H200; 0 for AMD.
    """

    processors: int = 132
    shared: int = 227 * 1024
    capability: int = 90


@dataclass(frozen=True)
class Config:
    """One way to run a layer.

    Attributes:
        kernel: without tensor cores, one pass over the bits: ``limbs`` (integer instructions of four weights), ``sum``
            (float32), ``popcount``. On tensor cores: ``left`` and ``right`` (whole words, expanded as that operand),
            ``dot`` (any weight, as the left operand). With weights expanded once into memory: ``unpack`` (then
            ``dot``), ``gemm`` (then bulk copies into and out of a product that writes the copies), ``library`` (then
            the library's product or convolution). For convolutions also ``implicit`` (as ``dot``), ``unpacked``
            (filters expanded once, then tensor cores on them and the image) and ``library_last`` (``library`` on a
            copy of the input in the ``channels_last`` format). For copies with Hadamard signs of these ``limbs``,
            ``sum``, ``library``, ``library_last`` and ``unpacked``, and ``groups``, with weights expanded by column
            groups, whose products a program mixes.
        block_tokens: tokens (output positions) of a program.
        block_rows: rows of a program.
        block_k: columns of a step.
        split_k: programs that share the columns of a block.
        num_warps: warps of a program.
        num_stages: steps that are loaded ahead.
        programs: programs of ``gemm``, which share all blocks.
    """

    kernel: str
    block_tokens: int = 16
    block_rows: int = 64
    block_k: int = 64
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 3
    programs: int = 0


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


def _split(blocks: int, steps: int, processors: int, least: int = 4) -> int:
    """How many programs share one block's columns, so that every processor has work: at least so many steps each."""
    split = 1
    while split < 8 and blocks * split * 2 <= processors and steps // (split * 2) >= least:
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
    for shape in shapes:
        yield from _blocked("dot", plan, tokens, itemsize, gpu, shape)


def _words(plan: WeightPlan, tokens: int, gpu: Gpu) -> Iterator[Config]:
    """Blocks of whole words, for few and for more tokens."""
    if tokens <= LEFT_TOKENS:
        for shape in ((16, 64, 256, 4, 3), (16, 128, 256, 8, 3), (16, 64, 128, 4, 4)):
            size = max(16, power_of_two(tokens))
            yield from _blocked("left", plan, tokens, 2, gpu, (size, *shape[1:]), programs=2 * gpu.processors, least=2)
    else:
        for shape in ((64, 64, 128, 4, 3), (64, 64, 256, 4, 2), (128, 64, 128, 4, 3), (128, 128, 64, 8, 4)):
            yield from _blocked("right", plan, tokens, 2, gpu, shape, programs=2 * gpu.processors)


def _blocked(
    kernel: str,
    plan: WeightPlan,
    tokens: int,
    itemsize: int,
    gpu: Gpu,
    shape: tuple[int, int, int, int, int],
    programs: int = 0,
    least: int = 4,
) -> Iterator[Config]:
    """One shape of block with as many programs as fill the GPU, if its shared memory holds it."""
    block_tokens, block_rows, block_k, num_warps, num_stages = shape
    block_tokens = min(block_tokens, max(16, power_of_two(tokens)))
    # The input's blocks of all stages, and one of the expanded weight.
    if (num_stages * block_tokens + block_rows) * block_k * itemsize > gpu.shared:
        return
    blocks = _divide_up(tokens, block_tokens) * _divide_up(plan.rows, block_rows)
    split = _split(blocks, _divide_up(plan.columns, block_k), programs or gpu.processors, least)
    yield Config(kernel, block_tokens, block_rows, block_k, split, num_warps, num_stages)


def _fill(configs: list[Config], plan: WeightPlan, tokens: int, processors: int) -> list[Config]:
    """Order by rounds of the processors times work of a block: the one expected to be fastest first."""

    def cost(config: Config) -> int:
        blocks = _divide_up(tokens, config.block_tokens) * _divide_up(plan.rows, config.block_rows) * config.split_k
        steps = _divide_up(_divide_up(plan.columns, config.block_k), config.split_k)
        return _divide_up(blocks, processors) * steps * config.block_k * config.block_tokens * config.block_rows

    return sorted(dict.fromkeys(configs), key=cost)


def _few(plan: WeightPlan, tokens: int, dtype: torch.dtype, gpu: Gpu, aligned: bool) -> Iterator[Config]:
    """Without tensor cores: 8 rows a program, more where there are so many that every processor has several."""
    rows = (16, 8) if plan.rows >= 16 * 2 * gpu.processors else (8, 4)
    # Integers of 16 bits lose more of large and small inputs side by side than a result in float16 does.
    limbs = plan.whole_words and dtype == torch.bfloat16 and aligned and gpu.capability > 0
    if limbs and tokens <= LIMBS_TOKENS:
        size = power_of_two(tokens)
        for count in rows:
            if size * count <= 32:  # sums of a thread
                yield Config("limbs", size, count, 4096, 1, 4, 1)
    if tokens <= (1 if limbs else SUM_TOKENS):
        loads = {"words": 64 * 32, "float": 256, "indexed": 256}.get(plan.kind, 128 * 8)
        for count in (8, 4):
            yield Config("sum", 1, count, loads, 1, 4, 1)


def linear_candidates(
    plan: WeightPlan, tokens: int, dtype: torch.dtype, gpu: Gpu, function: str = "none", *, aligned: bool = True
) -> list[Config]:
    """Configurations for a linear layer; the first is used where nothing is measured.

    Args:
        plan: how the weight is read.
        tokens: rows of the input, at least 1.
        dtype: dtype of the input, ``int8`` included.
        gpu: what bounds them.
        function: behind the layer.
        aligned: rows of the input begin at multiples of 16 bytes.
    """
    if plan.mixes > 1:
        return _mixes(plan, tokens, dtype, gpu, function, aligned)
    dots = _fill(list(_dot(plan, tokens, dtype.itemsize, gpu)), plan, tokens, gpu.processors)
    plain = not (plan.mixed or plan.inner_alphas) and plan.replicas == plan.interleaved == 1
    if not plain or dtype == torch.int8:
        return dots
    half = dtype.itemsize == 2
    few = list(_few(plan, tokens, dtype, gpu, aligned))
    words = list(_words(plan, tokens, gpu)) if plan.whole_words and half else []
    many = list(_many(plan, tokens, dtype, gpu, function, aligned)) if tokens >= UNPACK_TOKENS else []
    if tokens > 2 * UNPACK_TOKENS:
        # The words are expanded too often: one form of each of the others is left, for memory that is short.
        return [*many, *words[:1], *dots[:1]]
    if not words:  # float32 and odd rows: what takes no further memory first
        return [*few, *dots, *many][:8]
    return [*few, *words, *many, *dots[:1]][:8]


def _mixes(plan: WeightPlan, tokens: int, dtype: torch.dtype, gpu: Gpu, function: str, aligned: bool) -> list[Config]:
    """For copies with Hadamard signs: a program sums all column groups, up to 64 numbers a thread.

    Making integers of the inputs pays for 4 rows or more; a program with 16 column groups has registers for fewer.
    """
    p = plan.mixes
    bits = 32 if plan.kind == "words" else 8
    limbs, sums = [], []
    if plan.whole_words and dtype == torch.bfloat16 and aligned and gpu.capability > 0 and tokens <= LIMBS_TOKENS:
        size = min(power_of_two(tokens), 2)  # more take long to compile
        limbs = [Config("limbs", size, rows, 4096, 1, 4, 1) for rows in (8, 4) if size * rows * p <= 64 and p <= 8]
    if plan.signs and dtype != torch.int8 and p <= bits:
        # The last one is there for any number of tokens, as it takes no memory.
        loads = 64 if bits == 32 else 128
        sums = [Config("sum", 1, rows, loads * bits, 1, 4, 1) for rows in (8, 4, 2) if rows * loads * p <= 64 * 128]
    library = [Config("library")] if dtype != torch.int8 else []
    groups = (
        list(_groups(plan, tokens, gpu, dtype.itemsize, function)) if dtype.itemsize <= 2 and p <= MOST_GROUPS else []
    )
    many = library + groups if tokens >= GROUPS_TOKENS else groups + library
    if tokens <= (1 if limbs else SUM_TOKENS):
        return [*limbs, *sums[:2], *many][:8]
    return [*limbs, *many, *sums[-1:]][:8]


def _groups(plan: WeightPlan, tokens: int, gpu: Gpu, itemsize: int, function: str) -> Iterator[Config]:
    """Blocks whose sums of all column groups fit the registers: at most 128 of a thread, 64 before a long function."""
    p = plan.mixes
    k = min(128 // itemsize, max(32, power_of_two(plan.columns // p)))
    if tokens <= LEFT_TOKENS:
        size = max(16, power_of_two(tokens))
        shapes = [(size, rows, 4) for rows in (64, 32, 16) if size * rows * p <= 64 * 128][:2]
    else:
        tiles = ((128, 128), (128, 64), (64, 64), (64, 32), (32, 32))
        most = (128 if function in ("none", "relu") else 64) * 256
        fits = [(size, rows) for size, rows in tiles if size <= power_of_two(tokens) and size * rows * p <= most]
        shapes = [(size, rows, 8 if size * rows * p > 64 * 128 else 4) for size, rows in fits[:2]]
    configs = []
    for size, rows, num_warps in shapes:
        if 3 * (size + rows) * k * itemsize <= gpu.shared:
            configs.append(Config("groups", size, rows, k, 1, num_warps, 3))
    yield from _fill(configs, plan, tokens, gpu.processors)


def _many(
    plan: WeightPlan, tokens: int, dtype: torch.dtype, gpu: Gpu, function: str, aligned: bool
) -> Iterator[Config]:
    """With weights that are expanded once: for all packed ones, since a full-precision tile lies in memory already."""
    if not plan.packed:
        return
    library = Config("library", 8, min(256, max(16, power_of_two(plan.rows))), 0, 1, 4, 1)
    bulk = dtype.itemsize == 2 and gpu.capability >= 90 and aligned and plan.rows % 8 == plan.columns % 8 == 0
    gemms = []
    if bulk and tokens > 2 * UNPACK_TOKENS:
        # Functions of many registers leave none for the larger block's sums.
        for rows, stages in ((256, 3), (128, 4)) if function in ("none", "relu") else ((128, 4),):
            shared = stages * (128 + rows) * 64 * 2
            if shared <= gpu.shared:
                gemms.append(Config("gemm", 128, rows, 64, 1, 8, stages, gpu.processors))
        gemms = _fill(gemms, plan, tokens, gpu.processors)
    yield from [*gemms, library] if tokens >= GEMM_TOKENS else [library, *gemms]
    if dtype.itemsize == 2 and not bulk:
        for config in _dot(plan, tokens, dtype.itemsize, gpu):
            if config.block_k * dtype.itemsize == 128:
                yield replace(config, kernel="unpack")


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
    # A library's half-precision sums would round integers, and its float32 ones need not be plain sums (Winograd). Its
    # results without the scales may be too large for float16.
    library = [] if dtype in (torch.int8, torch.float16) else [Config("library")]
    if channels_last is False and dtype == torch.bfloat16:
        library.append(Config("library_last"))
    processors = max(gpu.processors // groups, 1)
    unpacked = _unpacked(plan, computed, group_channels, positions, dtype, gpu, processors)
    if plan.mixes > 1:  # results of column groups: float32 in the format of their input, which is copied by groups
        return library + unpacked
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
    if dtype.itemsize > 2 or (group_channels % 16 and plan.mixes == 1):
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
