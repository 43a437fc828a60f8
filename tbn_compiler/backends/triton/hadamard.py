"""Copies with Hadamard signs: launches of what multiplies by column groups and mixes the results.

Rows of the tile are few, and each meets every input once. What is no single pass over the bits takes four steps: the
inputs by column groups, the rows as numbers by column groups, their products, and a kernel that mixes these and writes
the copies with their scales, bias and function.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from tbn_compiler.backends.triton.kernels import hadamard as kernels
from tbn_compiler.backends.triton.kernels import hadamard_few
from tbn_compiler.backends.triton.launches import Operands, has_dot4
from tbn_compiler.backends.triton.plan import WeightPlan
from tbn_compiler.backends.triton.replay import Kept, room, start
from tbn_compiler.backends.triton.search import LEFT_TOKENS, Config, power_of_two
from tbn_compiler.ops.mixing import split_channels


def launch(config: Config, plan: WeightPlan, operands: Operands) -> None:
    """Run a linear layer in one of its configurations."""
    _LAUNCHES[config.kernel](config, plan, operands)


def _blocks(config: Config, plan: WeightPlan, tokens: int) -> tuple[int, int, int]:
    return triton.cdiv(plan.rows, config.block_rows) * triton.cdiv(tokens, config.block_tokens), 1, 1


def _limbs(config: Config, plan: WeightPlan, operands: Operands) -> None:
    x, tokens = operands.x, operands.x.shape[0]
    start(
        operands.kept, hadamard_few.hadamard_limbs, _blocks(config, plan, tokens),
        x.view(torch.int64), operands.tile, operands.alpha, operands.bias, operands.out,
        tokens, plan.rows, plan.columns // 32, x.stride(0) // 4, plan.rows_per_alpha,
        DTYPE=triton.language.bfloat16,
        P=plan.mixes,
        DOT=has_dot4(x.device),
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_ROWS=config.block_rows,
        BLOCK_WORDS=config.block_k // 32,
        num_warps=config.num_warps,
    )  # fmt: skip


def _sum(config: Config, plan: WeightPlan, operands: Operands) -> None:
    x, tokens = operands.x, operands.x.shape[0]
    start(
        operands.kept, hadamard_few.hadamard_sum, _blocks(config, plan, tokens),
        x, operands.tile, operands.alpha, operands.bias, operands.out,
        tokens, plan.rows, plan.columns, x.stride(0), plan.row_size, plan.tile_size, plan.rows_per_alpha,
        KIND=plan.kind,
        P=plan.mixes,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        BLOCK_ROWS=config.block_rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )  # fmt: skip


def _by_groups(plan: WeightPlan, operands: Operands) -> tuple[Tensor, Tensor]:
    """Inputs ``[p, tokens, columns / p]`` and rows of the tile ``[p, rows, columns / p]``."""
    x, p = operands.x, plan.mixes
    apart = x.unflatten(1, (-1, p)).permute(2, 0, 1).contiguous()
    weight = unpack(plan, operands.tile, operands.input_alpha, x.dtype, operands.kept)
    return apart, weight.view(p, plan.rows, -1)


def _groups(config: Config, plan: WeightPlan, operands: Operands) -> None:
    apart, weight = _by_groups(plan, operands)
    p, tokens, columns = apart.shape
    start(
        operands.kept, kernels.linear_groups, _blocks(config, plan, tokens),
        apart, weight, operands.alpha, operands.bias, operands.token_scale, operands.out,
        tokens, plan.rows, columns, apart.stride(0), plan.rows_per_alpha,
        P=p,
        LEFT=config.block_tokens <= LEFT_TOKENS and config.block_rows >= config.block_tokens,
        HAS_TOKEN_SCALE=operands.token_scale is not None,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        EVEN_K=columns % config.block_k == 0,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_ROWS=config.block_rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def _library(config: Config, plan: WeightPlan, operands: Operands) -> None:
    apart, weight = _by_groups(plan, operands)
    if apart.dtype == torch.float32:
        z = apart @ weight.mT
    elif apart.is_cuda:
        z = torch.bmm(apart, weight.mT, out_dtype=torch.float32)  # rounded once, behind the sums and scales
    else:
        z = apart.float() @ weight.float().mT
    tokens = z.shape[1]
    mix(
        plan, z, (0, z.stride(0), z.stride(2), z.stride(1)), operands.out, (0, 1, operands.out.stride(0)),
        1, tokens, operands.alpha, operands.bias, operands.epilogue, operands.kept,
    )  # fmt: skip


_LAUNCHES: dict[str, Callable[[Config, WeightPlan, Operands], None]] = {
    "limbs": _limbs, "sum": _sum, "groups": _groups, "library": _library,
}  # fmt: skip


def unpack(
    plan: WeightPlan,
    tile: Tensor,
    input_alpha: Tensor | None,
    dtype: torch.dtype,
    kept: Kept | None,
    *,
    taps: int = 1,
    last: bool = False,
) -> Tensor:
    """The rows of a tile by column groups, ``[p * rows, columns / p]``.

    Args:
        plan: how the tile is read.
        tile: the tile.
        input_alpha: scales of replicas of the input, which are summed.
        dtype: of the result.
        kept: what earlier calls of the same layer have left.
        taps: positions of a convolution's kernel.
        last: columns are ``[taps, channels / p]``, otherwise ``[channels / p, taps]``.
    """
    weight = room(kept, (plan.mixes * plan.rows, plan.columns // plan.mixes), dtype, tile.device)
    block_rows, block_k = 16, 256
    blocks = triton.cdiv(plan.rows, block_rows) * triton.cdiv(plan.columns, block_k)
    start(
        kept, kernels.unpack_groups, (blocks, 1, 1),
        tile, input_alpha, weight, plan.rows, plan.columns, plan.row_size, plan.tile_size,
        KIND=plan.kind, REPLICAS=plan.replicas, LAST=last, TAPS=taps, P=plan.mixes,
        BLOCK_ROWS=block_rows, BLOCK_K=block_k,
    )  # fmt: skip
    return weight


def mix(
    plan: WeightPlan,
    z: Tensor,
    source: tuple[int, int, int, int],
    out: Tensor,
    target: tuple[int, int, int],
    images: int,
    positions: int,
    alpha: Tensor,
    bias: Tensor | None,
    function: str,
    kept: Kept | None,
) -> None:
    """Write the copies of all rows from the results of column groups.

    Args:
        plan: of the weight.
        z: results.
        source: strides of its images, column groups, rows and positions.
        out: the layer's result.
        target: strides of its images, rows and positions.
        images: how many.
        positions: of an image.
        alpha: scales.
        bias: or ``None``.
        function: behind the layer.
        kept: what launches with equal strides have left.
    """
    # A thread has 32 sums; two or more of a column group.
    size = max(4096 // plan.mixes, 256)
    rows = power_of_two(plan.rows)
    if target[1] == 1:
        block_rows = min(rows, size)
        block_positions = max(size // block_rows, 1)
    else:
        block_positions = min(max(16, power_of_two(positions)), size if source[3] == 1 else 32)
        block_rows = max(min(rows, size // block_positions), 1)
    blocks = triton.cdiv(plan.rows, block_rows) * triton.cdiv(positions, block_positions) * images
    start(
        kept, kernels.mix_channels, (blocks, 1, 1),
        z, alpha, bias, out, plan.rows, positions, plan.rows_per_alpha, *source, *target,
        P=plan.mixes, HAS_BIAS=bias is not None, FUNCTION=function,
        BLOCK_POSITIONS=block_positions, BLOCK_ROWS=block_rows,
    )  # fmt: skip


def regroup(x: Tensor, p: int, *, last: bool) -> Tensor:
    """``x [N, C, *sizes]`` with the channels of a column group one behind the other.

    Args:
        x: input of a convolution.
        p: column groups.
        last: in the ``channels_last`` format; otherwise contiguous.
    """
    if last:
        return split_channels(x.movedim(1, -1), p, -1).contiguous().movedim(-1, 1)
    return split_channels(x, p, 1 - x.dim()).contiguous()
