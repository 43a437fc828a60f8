"""Launches of the linear kernels: grids, arguments, workspaces; and what is kept from one call to the next.

Plan, candidates and choice of a call depend on shapes, strides, alignments and options alone. :func:`prepared` keeps
what was made of them, so that a further call only makes its operands and launches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from tbn_compiler.backends.triton import decline
from tbn_compiler.backends.triton.kernels import convert, few_tokens, unpacked
from tbn_compiler.backends.triton.kernels import linear as kernels
from tbn_compiler.backends.triton.plan import UnsupportedError, WeightPlan
from tbn_compiler.backends.triton.search import Config, power_of_two
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import Operator, TensorCall, with_signature

KEPT_LAYERS = 4096


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
        kept: compiled kernels of earlier launches with equal sizes, strides and alignments, or ``None`` to keep none.
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


# Of each kernel: what was compiled for a launch, and the constants that stand behind its arguments.
Kept = dict[Any, tuple[Any, tuple[Any, ...]]]


def start(kept: Kept | None, kernel: Any, grid: tuple[int, int, int], *args: Any, **constants: Any) -> None:
    """Launch a kernel; one that was kept is found without looking at the arguments again.

    A layer launches each kernel with one set of constants, so that the kernel alone tells what was kept.

    Args:
        kept: of launches whose arguments differ in the values and places of tensors only.
        kernel: the kernel.
        grid: programs.
        args: all arguments before the first constant.
        constants: the constants by name, all of them, and options of the compiler.
    """
    found = None if kept is None else kept.get(kernel)
    if found is not None:
        compiled, behind = found
        compiled[grid](*args, *behind)
        return
    compiled = kernel[grid](*args, **constants)
    if kept is not None and hasattr(compiled, "launch_metadata"):  # the interpreter compiles nothing
        kept[kernel] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


# What is prepared of a call, given the tensors of another one like it in this order.
Prepared = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
_TENSORS = ("input", "tile", "alpha", "bias", "input_alpha", "input_scale")


_prepared: list[dict[Any, Prepared | str]] = []


def forget() -> None:
    """Drop what was prepared of all calls."""
    for known in _prepared:
        known.clear()


def prepared(operator: Operator, prepare: Callable[[TensorCall], Prepared]) -> Callable[..., Tensor]:
    """A kernel with the arguments of an operator that prepares each kind of call once.

    Args:
        operator: the operator.
        prepare: makes what calls have in common from a checked one; ``UnsupportedError`` leaves them to the reference.
    """
    known: dict[Any, Prepared | str] = {}
    _prepared.append(known)
    places = {name: operator.names.index(name) for name in _TENSORS}

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        key = _key(args, kwargs)
        found = known.get(key)
        if found is None:
            call = operator.bind(args, kwargs).checked()
            try:
                found = prepare(call)
            except UnsupportedError as reason:
                found = f"tbn::{operator.name}: {reason}"
            if len(known) >= KEPT_LAYERS:
                known.clear()
            known[key] = found
        if isinstance(found, str):
            decline(found)
            call = operator.bind(args, kwargs)
            return reference.compute(call).contiguous(memory_format=call.output_format())
        count = len(args)
        tensors: list[Any] = [args[at] if at < count else kwargs.get(name) for name, at in places.items()]
        with on_device(tensors[0]):
            return found(*tensors)

    return with_signature(operator, kernel)


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a prepared call may depend on: everything but the values of tensors and where they lie.

    One flat tuple is not ambiguous: where it has a dtype, five parts belong to a tensor, and names stand before values.
    """
    parts: list[Any] = []
    for value in (*args, *kwargs, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            parts += (value.dtype, value.shape, value.stride(), value.device, value.data_ptr() % 16)
        else:
            parts.append(tuple(value) if type(value) is list else value)
    parts.append(torch.backends.cuda.matmul.fp32_precision)
    return tuple(parts)


_nothing = contextlib.nullcontext()


def on_device(tensor: Tensor) -> Any:
    """Make a tensor's GPU the current one, if it is not: that is where Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _nothing
    return torch.cuda.device_of(tensor)


# Counts of programs that have arrived, zero between launches: one tensor for each stream, since the launches of a
# stream follow one another, and a part of a reserve for each launch in a graph, which may run beside them.
_RESERVE = 2**18
_MEASURED = 2**14
_lock = threading.Lock()
_counts: dict[tuple[int, int], Tensor] = {}
_reserves: dict[int, Tensor] = {}
_reserved: dict[int, int] = {}
_measuring = threading.local()


def _lasting_zeros(index: int, count: int) -> Tensor:
    """Zeros that outlive every graph: made by another thread, whose memory no capture takes for its pool."""

    def make() -> Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", index))
        torch.cuda.current_stream(index).synchronize()  # they are used on any stream
        return zeros

    with ThreadPoolExecutor(1) as other:
        return other.submit(make).result()


def arrival_counts(device: torch.device, blocks: int) -> Tensor:
    """``blocks`` zeros (``int32``) that no other launch uses at the same time, and that the launch leaves as zeros."""
    if device.type != "cuda":
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    blocks = -(-blocks // 4) * 4  # parts begin at 16 bytes: no other kernel has to be compiled during a capture
    own: Tensor | None = getattr(_measuring, "counts", None)
    if own is not None and blocks <= own.numel():
        return own[:blocks]
    index = torch.cuda.current_device() if device.index is None else device.index
    capturing = torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream
    with _lock:
        if capturing:
            used = _reserved.get(index, _RESERVE)  # nothing can be allocated for good during a capture
            if used + blocks <= _RESERVE:
                _reserved[index] = used + blocks
                return _reserves[index][used : used + blocks]
        else:
            if index not in _reserves:
                _reserves[index], _reserved[index] = _lasting_zeros(index, _RESERVE), 0
            counts = _counts.get((index, stream))
            if counts is None or counts.numel() < blocks:
                counts = _counts[index, stream] = _lasting_zeros(index, max(blocks, 1024))
            return counts
    return torch.zeros(blocks, dtype=torch.int32, device=device)  # by each replay of the graph


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[None]:
    """Launches of this thread inside the block follow one another: they share counts of their own."""
    if device.type != "cuda":
        yield
        return
    _measuring.counts = torch.zeros(_MEASURED, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()
    try:
        yield
    finally:
        _measuring.counts = None


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
    x = operands.x
    dtype = torch.int32 if x.dtype == torch.int8 else torch.float32
    size = blocks * config.split_k * config.block_rows * config.block_tokens
    return torch.empty(size, dtype=dtype, device=x.device), arrival_counts(x.device, blocks)


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
    weight = torch.empty((plan.rows, plan.columns), dtype=dtype, device=tile.device)
    block_rows, block_k = 16, 256
    blocks = triton.cdiv(plan.rows, block_rows) * triton.cdiv(plan.columns, block_k)
    start(
        kept, convert.unpack_rows, (blocks, 1, 1),
        tile, alpha, None, weight, plan.rows, plan.rows, plan.rows, plan.rows, plan.columns,
        plan.row_size, plan.tile_size, plan.shift,
        KIND=plan.kind, MIXED=plan.mixed, REPLICAS=plan.replicas, BLOCK_ROWS=block_rows, BLOCK_K=block_k, TAPS=1,
    )  # fmt: skip
    return weight
