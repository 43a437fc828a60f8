"""Launches of the linear kernels: grids, arguments, workspaces."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from tbn_compiler.backends.triton.counts import arrival_counts
from tbn_compiler.backends.triton.kernels import convert, few_tokens, unpacked
from tbn_compiler.backends.triton.kernels import linear as kernels
from tbn_compiler.backends.triton.plan import WeightPlan
from tbn_compiler.backends.triton.replay import Kept, room, start
from tbn_compiler.backends.triton.search import Config, power_of_two


@dataclasses.dataclass(slots=True)
class Operands:
    """The tensors of one call, as the kernels take them.

    Attributes:
        x: ``[tokens, columns * interleaved]``, the last axis contiguous; ``int8`` for a quantised input, or ``uint8``
            ``[tokens, columns / 8]`` for packed signs.
        tile: packed (``int32`` words or bytes) or floating point.
        alpha: scales.
        bias: ``[out_features]`` or ``None``.
        input_alpha: scales of the input's replicas, or ``None``.
        token_scale: float32 ``[tokens]`` of a quantised input, or ``None``.
        out: ``[tokens, out_features]``.
        epilogue: function behind the layer.
        precision: arithmetic of float32 products.
        kept: what earlier launches with equal sizes, strides and alignments have left, or ``None`` to keep nothing.
    """

    x: Tensor
    tile: Tensor
    alpha: Tensor
    bias: Tensor | None
    input_alpha: Tensor | None
    token_scale: Tensor | None
    out: Tensor
    epilogue: str
    precision: str
    kept: Kept | None = None


def launch(config: Config, plan: WeightPlan, operands: Operands) -> None:
    """Run a layer in one of its configurations."""
    _LAUNCHES[config.kernel](config, plan, operands)


def _blocks(config: Config, plan: WeightPlan, tokens: int) -> int:
    blocks: int = triton.cdiv(plan.rows, config.block_rows) * triton.cdiv(tokens, config.block_tokens)
    return blocks


def _workspace(config: Config, operands: Operands, blocks: int) -> tuple[Tensor | None, Tensor | None]:
    """Room for the sums of all programs, and the counts of those that have arrived."""
    if config.split_k == 1:
        return None, None
    x, kept = operands.x, operands.kept
    size = blocks * config.split_k * config.block_rows * config.block_tokens
    counts = arrival_counts(x.device, blocks)
    if kept is not None and kept.notes is not None:
        kept.notes.counts(counts, blocks)
    return room(kept, (size,), torch.int32 if x.dtype == torch.int8 else torch.float32, x.device), counts


def _dot(config: Config, plan: WeightPlan, operands: Operands) -> None:
    x, tokens = operands.x, operands.x.shape[0]
    blocks = _blocks(config, plan, tokens)
    start(
        operands.kept, kernels.linear_dot, (blocks, config.split_k, 1),
        x, operands.tile, operands.alpha, operands.input_alpha, operands.bias, operands.token_scale, operands.out,
        *_workspace(config, operands, blocks),
        tokens, plan.rows, plan.columns, plan.repeats, x.stride(0), plan.row_size, plan.tile_size, plan.shift,
        plan.rows_per_alpha,
        KIND=plan.kind,
        MIXED=plan.mixed,
        REPLICAS=plan.replicas,
        INTERLEAVED=plan.interleaved,
        INNER_ALPHA=plan.inner_alphas,
        HAS_TOKEN_SCALE=operands.token_scale is not None,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        PRECISION=operands.precision,
        EVEN_K=plan.columns % config.block_k == 0,
        SPLIT_K=config.split_k,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_ROWS=config.block_rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def _words(config: Config, plan: WeightPlan, operands: Operands) -> None:
    x, tokens = operands.x, operands.x.shape[0]
    blocks = _blocks(config, plan, tokens)
    start(
        operands.kept, kernels.linear_words, (blocks, config.split_k, 1),
        x, operands.tile, operands.alpha, operands.bias, operands.out, *_workspace(config, operands, blocks),
        tokens, plan.rows, plan.columns // 32, plan.repeats, x.stride(0), plan.rows_per_alpha,
        LEFT=config.kernel == "left",
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        EVEN_K=plan.columns % config.block_k == 0,
        SPLIT_K=config.split_k,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_ROWS=config.block_rows,
        BLOCK_WORDS=config.block_k // 32,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def has_dot4(device: torch.device) -> bool:
    """Whether a device has an instruction for products of four bytes; the interpreter has not."""
    return device.type == "cuda" and torch.version.hip is None


def _limbs(config: Config, plan: WeightPlan, operands: Operands) -> None:
    x, tokens = operands.x, operands.x.shape[0]
    start(
        operands.kept, few_tokens.linear_limbs, (_blocks(config, plan, tokens), 1, 1),
        x.view(torch.int64), operands.tile, operands.alpha, operands.bias,
        operands.out, tokens, plan.rows, plan.columns // 32, plan.repeats, x.stride(0) // 4, plan.rows_per_alpha,
        DTYPE=triton.language.bfloat16 if x.dtype == torch.bfloat16 else triton.language.float16,
        DOT4=has_dot4(x.device),
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
        operands.kept, few_tokens.linear_sum, (_blocks(config, plan, tokens), 1, 1),
        x, operands.tile, operands.alpha, operands.bias, operands.out,
        tokens, plan.rows, plan.columns, plan.repeats, x.stride(0), plan.row_size, plan.tile_size, plan.shift,
        plan.rows_per_alpha,
        KIND=plan.kind,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        BLOCK_ROWS=config.block_rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
    )  # fmt: skip


def _popcount(config: Config, plan: WeightPlan, operands: Operands) -> None:
    tokens = operands.x.shape[0]
    block_tokens, block_rows = min(4, power_of_two(tokens)), 16
    blocks = triton.cdiv(plan.rows, block_rows) * triton.cdiv(tokens, block_tokens)
    start(
        operands.kept, few_tokens.linear_popcount, (blocks, 1, 1),
        operands.x.view(torch.int32), operands.tile, operands.alpha, operands.bias, operands.token_scale, operands.out,
        tokens, plan.rows, plan.columns // 32, plan.columns, plan.repeats, plan.rows_per_alpha,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK_WORDS=64,
    )  # fmt: skip


def _unpacked_dot(config: Config, plan: WeightPlan, operands: Operands) -> None:
    weight = unpack(plan, operands.tile, operands.alpha, operands.x.dtype, operands.kept)
    plain = dataclasses.replace(plan, kind="float", row_size=plan.columns, tile_size=weight.numel(), shift=0)
    _dot(config, plain, dataclasses.replace(operands, tile=weight.view(-1)))


def _gemm(config: Config, plan: WeightPlan, operands: Operands) -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    x, tokens = operands.x, operands.x.shape[0]
    weight = unpack(plan, operands.tile, operands.alpha, x.dtype, operands.kept)
    out = operands.out.view(tokens, plan.repeats, plan.rows)
    # One program a multiprocessor, each with every so manieth block.
    programs = min(config.programs, _blocks(config, plan, tokens))
    start(
        operands.kept, unpacked.linear_gemm, (programs, 1, 1),
        TensorDescriptor.from_tensor(x, [config.block_tokens, config.block_k]),
        TensorDescriptor.from_tensor(weight, [config.block_rows, config.block_k]),
        TensorDescriptor.from_tensor(out, [config.block_tokens, 1, config.block_rows]),
        operands.alpha, operands.bias, tokens, plan.rows, plan.columns, plan.repeats, plan.rows_per_alpha, programs,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_ROWS=config.block_rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def _library(config: Config, plan: WeightPlan, operands: Operands) -> None:
    x, tokens = operands.x, operands.x.shape[0]
    weight = unpack(plan, operands.tile, operands.alpha, x.dtype, operands.kept)
    if x.dtype == torch.float32:
        products = x @ weight.t()
    elif x.is_cuda:
        products = torch.mm(x, weight.t(), out_dtype=torch.float32)  # rounded once, behind the scales
    else:
        products = x.float() @ weight.float().t()
    start(
        operands.kept, unpacked.copy_rows, (_blocks(config, plan, tokens), 1, 1),
        products, operands.alpha, operands.bias, operands.out, tokens, plan.rows, plan.repeats, plan.rows_per_alpha,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_ROWS=config.block_rows,
        num_warps=config.num_warps,
    )  # fmt: skip


_LAUNCHES: dict[str, Callable[[Config, WeightPlan, Operands], None]] = {
    "dot": _dot, "left": _words, "right": _words, "limbs": _limbs, "sum": _sum, "popcount": _popcount,
    "unpack": _unpacked_dot, "gemm": _gemm, "library": _library,
}  # fmt: skip


def unpack(plan: WeightPlan, tile: Tensor, alpha: Tensor, dtype: torch.dtype, kept: Kept | None) -> Tensor:
    """The different rows of a weight, floats ``[rows, columns]``."""
    weight = room(kept, (plan.rows, plan.columns), dtype, tile.device)
    block_rows, block_k = 16, 256
    blocks = triton.cdiv(plan.rows, block_rows) * triton.cdiv(plan.columns, block_k)
    start(
        kept, convert.unpack_rows, (blocks, 1, 1),
        tile, alpha, None, weight, plan.rows, plan.rows, plan.rows, plan.rows, plan.columns,
        plan.row_size, plan.tile_size, plan.shift,
        KIND=plan.kind, MIXED=plan.mixed, REPLICAS=plan.replicas, BLOCK_ROWS=block_rows, BLOCK_K=block_k, TAPS=1,
    )  # fmt: skip
    return weight
