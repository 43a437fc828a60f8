"""Kernels of the tiled linear layer: only different rows are multiplied, and their results repeated."""

from __future__ import annotations

import triton
import triton.language as tl

from tbn_compiler.backends.triton.kernels.epilogue import add_splits, store_repeats
from tbn_compiler.backends.triton.kernels.products import multiply
from tbn_compiler.backends.triton.kernels.weights import expand_pairs, load_operand


@triton.jit(do_not_specialize=["num_tokens"])
def linear_dot(
    x,
    tile,
    alpha,
    input_alpha,
    bias,
    token_scale,
    out,
    partial,
    arrived,
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
    them its alpha. Grid: (row blocks * token blocks, SPLIT_K); ``partial`` (float32, or int32 for int8) and ``arrived``
    are those of :func:`add_splits`.
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
    mine = True
    if SPLIT_K > 1:
        accumulator, mine = add_splits(
            accumulator, partial, arrived, tl.program_id(0), SPLIT_K, BLOCK_ROWS, BLOCK_TOKENS
        )
    if mine:
        store_repeats(
            out, tl.trans(accumulator).to(tl.float32), token_scale, alpha, bias, tokens, rows, num_tokens, num_rows,
            repeats, rows_per_alpha, HAS_TOKEN_SCALE, MIXED or INNER_ALPHA, HAS_BIAS, FUNCTION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def linear_words(
    x,
    tile,
    alpha,
    bias,
    out,
    partial,
    arrived,
    num_tokens,
    num_rows,
    words,
    repeats,
    x_stride,
    rows_per_alpha,
    LEFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """16-bit floats times rows of whole words: each program takes a run of the columns.

    ``LEFT``: the weight is the left operand, for fewer tokens than a tensor core's left operand has rows. Otherwise the
    right one, which is expanded into shared memory once for all tokens of the block. Blocks of eight token blocks are
    worked through row block by row block, so that their inputs stay in the cache. Grid and workspace as for
    :func:`linear_dot`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    BLOCK_K: tl.constexpr = BLOCK_WORDS * 32
    block = tl.program_id(0)
    token_blocks, row_blocks = tl.cdiv(num_tokens, BLOCK_TOKENS), tl.cdiv(num_rows, BLOCK_ROWS)
    first = block // (8 * row_blocks) * 8
    height = tl.minimum(token_blocks - first, 8)
    inside = block % (8 * row_blocks)
    tokens = (first + inside % height) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows = inside // height * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_K)
    word = tl.arange(0, BLOCK_WORDS)
    token_begin = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * x_stride + k[None, :]
    row_begin = tile + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * words + word[None, :]
    steps = tl.cdiv(words, BLOCK_WORDS)
    share = tl.cdiv(steps, SPLIT_K)
    begin = tl.program_id(1) * share
    if LEFT:
        sums = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=tl.float32)
    else:
        sums = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], dtype=tl.float32)
    for step in range(begin, tl.minimum(begin + share, steps)):
        if EVEN_K:
            packed = tl.load(row_begin + step * BLOCK_WORDS)
            value = tl.load(token_begin + step * BLOCK_K)
        else:
            left = words - step * BLOCK_WORDS
            packed = tl.load(row_begin + step * BLOCK_WORDS, mask=(word < left)[None, :], other=0)
            value = tl.load(token_begin + step * BLOCK_K, mask=(k < left * 32)[None, :], other=0)
        weight = expand_pairs(packed, DTYPE, BLOCK_ROWS, BLOCK_WORDS)
        if LEFT:  # noqa: SIM108 (Triton compiles only the branch that a constant chooses)
            sums = tl.dot(weight, tl.trans(value), sums)
        else:
            sums = tl.dot(value, tl.trans(weight), sums)
    mine = True
    if SPLIT_K > 1:
        sums, mine = add_splits(sums, partial, arrived, block, SPLIT_K, sums.shape[0], sums.shape[1])
    if mine:
        store_repeats(
            out, tl.trans(sums) if LEFT else sums, None, alpha, bias, tokens, rows, num_tokens, num_rows, repeats,
            rows_per_alpha, False, False, HAS_BIAS, FUNCTION,
        )  # fmt: skip
