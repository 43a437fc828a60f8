"""``tbn::linear`` with Triton: operands, grids and launches."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
import triton
from torch import Tensor

from tbn_compiler.backends.triton import decline, tuning
from tbn_compiler.backends.triton.kernels import convert
from tbn_compiler.backends.triton.kernels import linear as kernels
from tbn_compiler.backends.triton.plan import INDEX_LIMIT, UnsupportedError, WeightPlan, plan_weight
from tbn_compiler.backends.triton.search import Config, Gpu, linear_candidates, power_of_two
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import OPERATORS, TensorCall, make_kernel
from tbn_compiler.ops.schemas import INT8_TINY

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
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
    """

    x: Tensor
    tile: Tensor
    alpha: Tensor
    bias: Tensor | None
    input_alpha: Tensor | None
    token_scale: Tensor | None
    out: Tensor
    epilogue: str


def compute(call: TensorCall) -> Tensor:
    """``input [..., n] -> [..., m]``, see :mod:`tbn_compiler.ops.schemas`."""
    try:
        plan = plan_call(call)
    except UnsupportedError as reason:
        decline(f"tbn::{call.kind}: {reason}")
        return reference.compute(call)
    out = call.input.new_empty(call.output_shape())
    if out.numel() == 0:
        return out
    with on_device(call.input):
        _run(plan, call, out)
    return out


linear = make_kernel(OPERATORS["linear"], compute)


def on_device(tensor: Tensor) -> Any:
    """Make a tensor's GPU the current one: that is where Triton launches."""
    return torch.cuda.device_of(tensor)


def word_aligned(tile: Tensor) -> bool:
    """Whether a packed tile can be read as 32-bit words."""
    return tile.data_ptr() % 4 == 0 and tile.is_contiguous()


def plan_call(call: TensorCall) -> WeightPlan:
    """How the kernels read the weight of a call.

    Raises:
        UnsupportedError: they do not cover it.
    """
    input, tile = call.input, call.tile
    for name, tensor in (("input", input), ("tile", tile)):
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise UnsupportedError(f"{name} of dtype {tensor.dtype}")
    if input.numel() // max(input.shape[-1], 1) > INDEX_LIMIT:
        raise UnsupportedError(f"{tuple(input.shape[:-1])} tokens exceed 32-bit indices")
    packed = tile.dtype == torch.uint8
    integer = call.activation != "float"
    plan = plan_weight(call.product, packed=packed, word_aligned=packed and word_aligned(tile), integer=integer)
    if not integer and precision(input.dtype, input.device) == "split" and not plan.signs:
        raise UnsupportedError("weights that are not +1 or -1 would be rounded to tf32 on this GPU")
    return plan


def tf32_allowed() -> bool:
    """Whether the user allows tf32 in float32 products; PyTorch's default does not."""
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


def compute_capability(device: torch.device) -> int:
    """90 for an H100; 0 where there is none (AMD, the interpreter)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Arithmetic of the products: true float32 for float32, unless the user allows tf32.

    From compute capability 10 on, Triton 3.7 multiplies in tf32 even where "ieee" is asked for.
    """
    if dtype != torch.float32 or compute_capability(device) < 100:
        return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"
    return "tf32" if tf32_allowed() else "split"


def _run(plan: WeightPlan, call: TensorCall, out: Tensor) -> None:
    input, tile, bias, input_alpha, activation = call.input, call.tile, call.bias, call.input_alpha, call.activation
    x = input.reshape(-1, input.shape[-1])
    if plan.sum_inputs > 1:
        x = x.unflatten(-1, (-1, plan.sum_inputs)).sum(-1)
    if x.stride(-1) != 1:
        x = x.contiguous()
    tokens = x.shape[0]
    signs = activation == "binary" and plan.kind == "words" and plan.interleaved == 1 and tokens <= POPCOUNT_TOKENS
    token_scale = None
    if activation != "float":
        x, token_scale = quantize(x, "signs" if signs else activation)
    operands = Operands(
        x=x,
        tile=tile.view(torch.int32) if plan.kind == "words" else tile.contiguous(),
        alpha=call.alpha.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        input_alpha=None if input_alpha is None else input_alpha.contiguous(),
        token_scale=token_scale,
        out=out.view(tokens, -1),
        epilogue=call.epilogue,
    )
    if signs:
        _popcount(plan, operands)
        return
    candidates = linear_candidates(plan, tokens, x.dtype, gpu_of(x.device))
    # The names are those of the files that are kept.
    key = (
        f"linear {str(x.dtype)[6:]} {plan.kind} {plan.rows}x{plan.columns} copies={plan.repeats} "
        f"blocks={plan.replicas} interleaved={plan.interleaved} tokens={power_of_two(tokens)}"
    )
    run(tuning.choose(x.device, key, candidates, lambda config: run(config, plan, operands)), plan, operands)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """What bounds configurations on a device; an H200 for the interpreter."""
    if device.type != "cuda":
        return Gpu()
    properties = torch.cuda.get_device_properties(device)
    # The larger limit that a kernel has to ask for, as Triton does; AMD has the one.
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return Gpu(properties.multi_processor_count, shared)


# Below this, comparing 32 signs at a time beats filling up a tensor core's block of 16 tokens.
POPCOUNT_TOKENS = 8


def run(config: Config, plan: WeightPlan, operands: Operands) -> None:
    """Launch the kernels of a configuration."""
    if config.kernel == "unpack":
        plan, operands = _unpacked(plan, operands)
    if config.kernel == "sum":
        _sum(config, plan, operands)
    elif config.split_k > 1:
        partial = operands.x.new_empty(
            (config.split_k, operands.x.shape[0], plan.rows),
            dtype=torch.int32 if operands.x.dtype == torch.int8 else torch.float32,
        )
        _dot(config, plan, operands, partial)
        _finish(config.split_k, plan, operands, partial)
    else:
        _dot(config, plan, operands, operands.out)


def _dot(config: Config, plan: WeightPlan, operands: Operands, out: Tensor) -> None:
    tokens = operands.x.shape[0]
    blocks = triton.cdiv(plan.rows, config.block_rows) * triton.cdiv(tokens, config.block_tokens)
    kernels.linear_dot[blocks, config.split_k](
        operands.x,
        operands.tile,
        operands.alpha,
        operands.input_alpha,
        operands.bias,
        operands.token_scale,
        out,
        tokens,
        plan.rows,
        plan.columns,
        plan.repeats,
        operands.x.stride(0),
        plan.row_size,
        plan.tile_size,
        plan.shift,
        plan.rows_per_alpha,
        KIND=plan.kind,
        MIXED=plan.mixed,
        REPLICAS=plan.replicas,
        INTERLEAVED=plan.interleaved,
        INNER_ALPHA=plan.inner_alphas,
        HAS_TOKEN_SCALE=operands.token_scale is not None,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        PRECISION=precision(operands.x.dtype, operands.x.device),
        EVEN_K=plan.columns % config.block_k == 0,
        SPLIT_K=config.split_k,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_ROWS=config.block_rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _sum(config: Config, plan: WeightPlan, operands: Operands) -> None:
    tokens = operands.x.shape[0]
    blocks = triton.cdiv(plan.rows, config.block_rows) * triton.cdiv(tokens, config.block_tokens)
    kernels.linear_sum[(blocks,)](
        operands.x,
        operands.tile,
        operands.alpha,
        operands.bias,
        operands.out,
        tokens,
        plan.rows,
        plan.columns,
        plan.repeats,
        operands.x.stride(0),
        plan.row_size,
        plan.tile_size,
        plan.shift,
        plan.rows_per_alpha,
        KIND=plan.kind,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        EVEN_K=plan.columns % config.block_k == 0,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_ROWS=config.block_rows,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _finish(splits: int, plan: WeightPlan, operands: Operands, partial: Tensor) -> None:
    tokens = operands.x.shape[0]
    block_tokens, block_rows = min(8, power_of_two(tokens)), 128
    blocks = triton.cdiv(plan.rows, block_rows) * triton.cdiv(tokens, block_tokens)
    kernels.linear_finish[(blocks,)](
        partial,
        operands.alpha,
        operands.bias,
        operands.token_scale,
        operands.out,
        tokens,
        plan.rows,
        plan.repeats,
        plan.rows_per_alpha,
        splits,
        MIXED=plan.mixed or plan.inner_alphas,
        HAS_TOKEN_SCALE=operands.token_scale is not None,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
    )


def _popcount(plan: WeightPlan, operands: Operands) -> None:
    tokens = operands.x.shape[0]
    block_tokens, block_rows = min(4, power_of_two(tokens)), 16
    blocks = triton.cdiv(plan.rows, block_rows) * triton.cdiv(tokens, block_tokens)
    kernels.linear_popcount[(blocks,)](
        operands.x.view(torch.int32),
        operands.tile,
        operands.alpha,
        operands.bias,
        operands.token_scale,
        operands.out,
        tokens,
        plan.rows,
        plan.columns // 32,
        plan.columns,
        plan.repeats,
        plan.rows_per_alpha,
        HAS_BIAS=operands.bias is not None,
        FUNCTION=operands.epilogue,
        BLOCK_TOKENS=block_tokens,
        BLOCK_ROWS=block_rows,
        BLOCK_WORDS=64,
    )


def quantize(x: Tensor, number_format: str) -> tuple[Tensor, Tensor]:
    """An input in another number format, one scale a token.

    Args:
        x: ``[tokens, size]``, the last axis contiguous.
        number_format: "int8"; "binary", +1 and -1; "signs", the same as packed bits.

    Returns:
        ``int8 [tokens, size]`` (``uint8 [tokens, size / 8]`` for "signs") and float32 ``[tokens]``.
    """
    tokens, size = x.shape
    signs = number_format == "signs"
    values = x.new_empty((tokens, size // 8 if signs else size), dtype=torch.uint8 if signs else torch.int8)
    scale = x.new_empty((tokens,), dtype=torch.float32)
    convert.quantize_tokens[(tokens,)](
        x, values, scale, size, x.stride(0),
        TINY=INT8_TINY, FORMAT=number_format, BLOCK=min(2048, max(32, power_of_two(size))),
    )  # fmt: skip
    return values, scale


def unpack(
    plan: WeightPlan,
    tile: Tensor,
    alpha: Tensor,
    input_alpha: Tensor | None,
    dtype: torch.dtype,
    groups: int = 1,
    computed: int | None = None,
    per_group: int | None = None,
) -> Tensor:
    """The weights to multiply, floats ``[groups * computed, columns]``: the first ``computed`` rows of each group."""
    computed = plan.rows if computed is None else computed
    per_group = plan.rows if per_group is None else per_group
    weight = torch.empty((groups * computed, plan.columns), dtype=dtype, device=tile.device)
    block_rows, block_k = 16, 256
    blocks = triton.cdiv(groups * computed, block_rows) * triton.cdiv(plan.columns, block_k)
    convert.unpack_rows[(blocks,)](
        tile, alpha, input_alpha, weight, computed, per_group, plan.rows, groups * computed, plan.columns,
        plan.row_size, plan.tile_size, plan.shift,
        KIND=plan.kind, MIXED=plan.mixed, REPLICAS=plan.replicas, BLOCK_ROWS=block_rows, BLOCK_K=block_k,
    )  # fmt: skip
    return weight


def _unpacked(plan: WeightPlan, operands: Operands) -> tuple[WeightPlan, Operands]:
    """The same call on the different rows as floats."""
    weight = unpack(plan, operands.tile, operands.alpha, None, operands.x.dtype)
    plain = dataclasses.replace(plan, kind="float", row_size=plan.columns, tile_size=weight.numel(), shift=0)
    return plain, dataclasses.replace(operands, tile=weight.view(-1))
