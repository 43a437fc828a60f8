"""Products for many tokens with weights that were unpacked before, once for all of them."""

from __future__ import annotations

import triton
import triton.language as tl

from tbn_compiler.backends.triton.kernels.epilogue import activate, store_repeats


@triton.jit(do_not_specialize=["num_tokens"])
def linear_gemm(
    x,
    weight,
    out,
    alpha,
    bias,
    num_tokens,
    num_rows,
    columns,
    repeats,
    rows_per_alpha,
    programs,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Different rows times tokens, every copy stored with its scale while the next block is loaded.

    All operands are tensor descriptors: ``x [num_tokens, columns]``, ``weight [num_rows, columns]``, ``out [num_tokens,
    repeats, num_rows]``. Each of the ``programs`` takes every so manieth block; eight token blocks at a time go through
    the row blocks together, so that their inputs stay in the cache.
    """
    token_blocks, row_blocks = tl.cdiv(num_tokens, BLOCK_TOKENS), tl.cdiv(num_rows, BLOCK_ROWS)
    for block in tl.range(tl.program_id(0), token_blocks * row_blocks, programs, flatten=True):
        first = block // (8 * row_blocks) * 8
        height = tl.minimum(token_blocks - first, 8)
        inside = block % (8 * row_blocks)
        token = (first + inside % height) * BLOCK_TOKENS
        row = inside // height * BLOCK_ROWS
        sums = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], dtype=tl.float32)
        for step in range(tl.cdiv(columns, BLOCK_K)):
            sums = tl.dot(x.load([token, step * BLOCK_K]), weight.load([row, step * BLOCK_K]).T, sums)
        rows = row + tl.arange(0, BLOCK_ROWS)
        for repeat in range(repeats):
            place = repeat * num_rows + rows
            scale = tl.load(alpha + place // rows_per_alpha, mask=rows < num_rows, other=0).to(tl.float32)
            value = sums * scale[None, :]
            if HAS_BIAS:
                value = value + tl.load(bias + place, mask=rows < num_rows, other=0).to(tl.float32)[None, :]
            value = activate(value, FUNCTION).to(out.dtype).reshape(BLOCK_TOKENS, 1, BLOCK_ROWS)
            out.store([token, repeat, row], value)


@triton.jit(do_not_specialize=["num_tokens"])
def copy_rows(
    products,
    alpha,
    bias,
    out,
    num_tokens,
    num_rows,
    repeats,
    rows_per_alpha,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """``out [num_tokens, repeats * num_rows]`` from ``products [num_tokens, num_rows]``: scale, bias, function.

    Grid: (row blocks * token blocks,).
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    tokens = (tl.program_id(0) // row_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    inside = (tokens < num_tokens)[:, None] & (rows < num_rows)[None, :]
    place = products + tokens.to(tl.int64)[:, None] * num_rows + rows[None, :]
    store_repeats(
        out, tl.load(place, mask=inside, other=0).to(tl.float32), None, alpha, bias, tokens, rows, num_tokens,
        num_rows, repeats, rows_per_alpha, False, False, HAS_BIAS, FUNCTION,
    )  # fmt: skip
