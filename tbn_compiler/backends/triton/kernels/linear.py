"""Kernels of the tiled linear layer: only different rows are multiplied, and their results repeated."""

from __future__ import annotations

import triton
import triton.language as tl

from tbn_compiler.backends.triton.kernels.epilogue import store_repeats
from tbn_compiler.backends.triton.kernels.products import multiply
from tbn_compiler.backends.triton.kernels.weights import load_operand, load_weight


@triton.jit(do_not_specialize=["num_tokens"])
def linear_dot(
    x,
    tile,
    alpha,
    input_alpha,
    bias,
    token_scale,
    out,
    num_tokens,
    num_rows,
    columns,
    repeats,
    x_stride,
    row_size,
    q,
    shift,
    rows_per_alpha,
    KIND: tl.constexpr,
    MIXED: tl.constexpr,
    REPLICAS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    INNER_ALPHA: tl.constexpr,
    HAS_TOKEN_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Matrix product on tensor cores where the dtype has them (true float32: on the float32 units).

    The weight is the left operand, so that the expanded bits can stay in registers. ``x`` holds ``columns *
    INTERLEAVED`` values a token; ``REPLICAS`` runs of ``columns`` weights of a row share the input, each with its own
    ``input_alpha``. With ``INTERLEAVED``, that many neighbouring inputs share a weight; ``INNER_ALPHA`` gives each of
    them its alpha. Grid: (row blocks * token blocks, SPLIT_K). With ``SPLIT_K > 1``, ``out`` is the workspace
    ``[SPLIT_K, num_tokens, num_rows]`` of unscaled sums (float32 or int32).
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    WEIGHT: tl.constexpr = tl.bfloat16 if PRECISION == "split" else DTYPE
    ACCUMULATOR: tl.constexpr = tl.int32 if tl.int8 == DTYPE else tl.float32
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = (tl.program_id(0) // row_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    split = tl.program_id(1)
    token_begin = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * x_stride
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=ACCUMULATOR)
    for step in range(split, tl.cdiv(columns, BLOCK_K), SPLIT_K):
        first_k = step * BLOCK_K
        k = first_k + tl.arange(0, BLOCK_K)
        weight = load_operand(
            tile, alpha, input_alpha, rows, first_k, num_rows, columns, row_size, q, shift,
            KIND, MIXED, REPLICAS, WEIGHT, BLOCK_ROWS, BLOCK_K,
        )  # fmt: skip
        for inner in tl.static_range(INTERLEAVED):
            place = token_begin + (k * INTERLEAVED + inner)[None, :]
            if EVEN_K:  # noqa: SIM108 (Triton compiles only the branch that a constant chooses)
                value = tl.load(place)
            else:
                value = tl.load(place, mask=(k < columns)[None, :], other=0)
            used = weight
            if INNER_ALPHA:
                at = (tl.minimum(rows, num_rows - 1) // rows_per_alpha) * INTERLEAVED + inner
                used = (weight * tl.load(alpha + at).to(tl.float32)[:, None]).to(DTYPE)
            accumulator = multiply(used, tl.trans(value), accumulator, PRECISION)
    products = tl.trans(accumulator)
    if SPLIT_K == 1:
        store_repeats(
            out, products.to(tl.float32), token_scale, alpha, bias, tokens, rows, num_tokens, num_rows, repeats,
            rows_per_alpha, HAS_TOKEN_SCALE, MIXED or INNER_ALPHA, HAS_BIAS, FUNCTION,
        )  # fmt: skip
    else:
        place = out + (split * num_tokens + tokens).to(tl.int64)[:, None] * num_rows + rows[None, :]
        tl.store(place, products, mask=(tokens < num_tokens)[:, None] & (rows < num_rows)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def linear_sum(
    x,
    tile,
    alpha,
    bias,
    out,
    num_tokens,
    num_rows,
    columns,
    repeats,
    x_stride,
    row_size,
    q,
    shift,
    rows_per_alpha,
    KIND: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Product for a few tokens, where reading the tile is what takes time: no tensor cores, one pass over the bits.

    Grid: (row blocks * token blocks,). Sums stay apart for each column of a block until the end, so that the loop
    holds no reduction.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = (tl.program_id(0) // row_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    token_begin = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * x_stride
    sums = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS, BLOCK_K], dtype=tl.float32)
    for step in range(tl.cdiv(columns, BLOCK_K)):
        first_k = step * BLOCK_K
        k = first_k + tl.arange(0, BLOCK_K)
        weight = load_weight(
            tile, alpha, rows, first_k, num_rows, columns, row_size, q, shift,
            KIND, False, tl.float32, BLOCK_ROWS, BLOCK_K,
        )  # fmt: skip
        place = token_begin + k[None, :]
        if EVEN_K:  # noqa: SIM108 (Triton compiles only the branch that a constant chooses)
            value = tl.load(place)
        else:
            value = tl.load(place, mask=(k < columns)[None, :], other=0)
        sums += value.to(tl.float32)[:, None, :] * weight[None, :, :]
    store_repeats(
        out, tl.sum(sums, 2), None, alpha, bias, tokens, rows, num_tokens, num_rows, repeats,
        rows_per_alpha, False, False, HAS_BIAS, FUNCTION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def linear_finish(
    partial,
    alpha,
    bias,
    token_scale,
    out,
    num_tokens,
    num_rows,
    repeats,
    rows_per_alpha,
    splits,
    MIXED: tl.constexpr,
    HAS_TOKEN_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Add the partial sums ``[splits, num_tokens, num_rows]`` in a fixed order, and write the results."""
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = (tl.program_id(0) // row_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    inside = (tokens < num_tokens)[:, None] & (rows < num_rows)[None, :]
    products = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], dtype=partial.dtype.element_ty)
    for split in range(splits):
        place = partial + (split * num_tokens + tokens).to(tl.int64)[:, None] * num_rows + rows[None, :]
        products += tl.load(place, mask=inside, other=0)
    store_repeats(
        out, products.to(tl.float32), token_scale, alpha, bias, tokens, rows, num_tokens, num_rows, repeats,
        rows_per_alpha, HAS_TOKEN_SCALE, MIXED, HAS_BIAS, FUNCTION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def linear_popcount(
    x,
    tile,
    alpha,
    bias,
    token_scale,
    out,
    num_tokens,
    num_rows,
    words,
    columns,
    repeats,
    rows_per_alpha,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """Binary activations: ``x`` ``[tokens, words]`` and ``tile`` ``[rows, words]`` are ``int32`` words of 32 signs.

    Signs that differ give -1, so a product is ``columns - 2 popcount(x xor w)``.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = (tl.program_id(0) // row_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    row_begin = tile + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * words
    token_begin = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * words
    differ = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS, BLOCK_WORDS], dtype=tl.int32)
    for first in range(0, words, BLOCK_WORDS):
        word = first + tl.arange(0, BLOCK_WORDS)
        inside = (word < words)[None, :]
        left = tl.load(token_begin + word[None, :], mask=inside, other=0)
        right = tl.load(row_begin + word[None, :], mask=inside, other=0)
        differ += _popcount((left[:, None, :] ^ right[None, :, :]).to(tl.uint32, bitcast=True)).to(tl.int32)
    products = (columns - 2 * tl.sum(differ, 2)).to(tl.float32)
    store_repeats(
        out, products, token_scale, alpha, bias, tokens, rows, num_tokens, num_rows, repeats,
        rows_per_alpha, True, False, HAS_BIAS, FUNCTION,
    )  # fmt: skip


@triton.jit
def _popcount(v):
    """Set bits of ``uint32``, in the form that LLVM turns into one instruction."""
    v = v - ((v >> 1) & 0x55555555)
    v = (v & 0x33333333) + ((v >> 2) & 0x33333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F
    return (v * 0x01010101) >> 24
