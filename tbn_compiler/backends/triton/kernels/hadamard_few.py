"""Copies with Hadamard signs for a few tokens: one pass over the bits, as in :mod:`.few_tokens`.

The column group of an input is the lower part of its place in a word, so that a thread sums each group by itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tbn_compiler.backends.triton.kernels.epilogue import activate
from tbn_compiler.backends.triton.kernels.few_tokens import (
    LARGEST,
    ROUNDER,
    ROUNDER_BITS,
    SMALLEST,
    one_of_four,
    stacked,
)
from tbn_compiler.backends.triton.kernels.hadamard import mix_last
from tbn_compiler.backends.triton.kernels.weights import load_packed


@triton.jit
def _dot2(integers, bits, accumulator, UPPER: tl.constexpr, DOT: tl.constexpr):
    """``accumulator`` plus the products of two signed 16-bit integers and two bytes of ``bits``, the upper or lower."""
    if DOT:
        INSTRUCTION: tl.constexpr = "dp2a.hi.s32.u32 $0, $1, $2, $3;" if UPPER else "dp2a.lo.s32.u32 $0, $1, $2, $3;"
        return tl.inline_asm_elementwise(
            INSTRUCTION, "=r,r,r,r", [integers, bits, accumulator], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        two = (bits >> 16) if UPPER else bits
        return accumulator + ((integers << 16) >> 16) * (two & 255) + (integers >> 16) * ((two >> 8) & 255)


@triton.jit
def _integers(x, word, inside, DTYPE: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr):
    """The 32 inputs of each word as 16-bit integers times a scale, by pairs of one column group.

    Pair ``j`` and pair ``8 + j`` are the inputs of the lower and the upper two bytes of a word that is shifted by ``j``
    and masked with ``0x01010101``.

    Returns:
        16 pairs ``int32 [SIZE]``; the sums of the integers of each group; the scale, NaN where integers do not do, as
        in :mod:`.few_tokens`.
    """
    floats = ()
    largest = tl.zeros([SIZE], dtype=tl.float32)
    for quarter in tl.static_range(8):
        four = tl.load(x + word * 8 + quarter, mask=inside, other=0)
        for place in tl.static_range(4):
            value = one_of_four(four, place, DTYPE)
            floats = floats + (value,)  # noqa: RUF005 (Triton's tuples)
            largest = tl.maximum(largest, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
    inverse = LARGEST / tl.maximum(largest, SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.where((largest > 0) & (largest < SMALLEST), float("nan"), (largest - largest) + 1.0 / inverse)
    integers = ()
    for i in tl.static_range(32):
        integer = (floats[i] * inverse + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS
        integers = integers + (integer,)  # noqa: RUF005
    totals = ()
    for group in tl.static_range(P):
        total = integers[group]
        for i in tl.static_range(group + P, 32, P):
            total += integers[i]
        totals = totals + (total,)  # noqa: RUF005
    lower = ()
    upper = ()
    for j in tl.static_range(8):
        lower = lower + ((integers[j] & 0xFFFF) | (integers[j + 8] << 16),)  # noqa: RUF005
        upper = upper + ((integers[j + 16] & 0xFFFF) | (integers[j + 24] << 16),)  # noqa: RUF005
    return lower + upper, totals, scale


@triton.jit
def _group_sum(pairs, word, start, GROUP: tl.constexpr, P: tl.constexpr, DOT: tl.constexpr):
    """``start`` plus the integers of one column group whose bits are set."""
    value = start
    for j in tl.static_range(GROUP, 8, P):
        bits = (word >> j) & 0x01010101
        value = _dot2(pairs[j], bits, value, False, DOT)
        value = _dot2(pairs[8 + j], bits, value, True, DOT)
    return value


@triton.jit
def _float_sums(x, tile, row, words, lane, DTYPE: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr):
    """The products ``[P]`` of one row and one token by column groups in float32, where integers do not do."""
    sums = ()
    for _ in tl.static_range(P):
        sums = sums + (tl.zeros([SIZE], dtype=tl.float32),)  # noqa: RUF005
    for first in range(0, words, SIZE):
        word = first + lane
        inside = word < words
        packed = tl.load(tile + row * words + word, mask=inside, other=0)
        added = ()
        for group in tl.static_range(P):
            total = sums[group]
            for i in tl.static_range(group, 32, P):
                four = tl.load(x + word * 8 + i // 4, mask=inside, other=0)
                value = one_of_four(four, i % 4, DTYPE)
                total += tl.where(((packed >> i) & 1) == 1, value, -value)
            added = added + (total,)  # noqa: RUF005
        sums = added
    return tl.sum(stacked(sums, P, SIZE), 0)


@triton.jit
def _store_copies(
    out,
    copies,
    alpha,
    bias,
    tokens,
    rows,
    num_tokens,
    num_rows,
    rows_per_alpha,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    P: tl.constexpr,
):
    """Write ``out[token, i * num_rows + row]`` from float32 results of copies ``[tokens, rows, P]``."""
    row = tl.arange(0, P)[None, :] * num_rows + rows[:, None]
    used = (rows < num_rows)[:, None]
    value = copies * tl.load(alpha + row // rows_per_alpha, mask=used, other=0).to(tl.float32)[None, :, :]
    if HAS_BIAS:
        value = value + tl.load(bias + row, mask=used, other=0).to(tl.float32)[None, :, :]
    place = out + tokens.to(tl.int64)[:, None, None] * (num_rows * P) + row[None, :, :]
    stored = (tokens < num_tokens)[:, None, None] & used[None, :, :]
    tl.store(place, activate(value, FUNCTION).to(out.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_tokens"])
def hadamard_limbs(
    x,
    tile,
    alpha,
    bias,
    out,
    num_tokens,
    num_rows,
    words,
    x_stride,
    rows_per_alpha,
    DTYPE: tl.constexpr,
    P: tl.constexpr,
    DOT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """16-bit floats times whole words, two weights an instruction; at most 8 column groups.

    As :func:`.few_tokens.linear_limbs`, with whole 16-bit integers in place of two limbs: the sums of a group need no
    putting together. ``sum(+-x) = 2 sum(bit x) - sum(x)`` is ``2 (sum(bit x) - sum(x) // 2)`` less the last bit of
    ``sum(x)``, which all rows have in common. Grid: (row blocks * token blocks,).
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    first_row = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    first_token = (tl.program_id(0) // row_blocks) * BLOCK_TOKENS
    lane = tl.arange(0, BLOCK_WORDS)
    COUNT: tl.constexpr = BLOCK_TOKENS * BLOCK_ROWS
    sums = ()
    for _ in tl.static_range(COUNT * P):
        sums = sums + (tl.zeros([BLOCK_WORDS], dtype=tl.float32),)  # noqa: RUF005
    odd = ()
    for _ in tl.static_range(BLOCK_TOKENS * P):
        odd = odd + (tl.zeros([BLOCK_WORDS], dtype=tl.float32),)  # noqa: RUF005
    for first in range(0, words, BLOCK_WORDS):
        word = first + lane
        inside = word < words
        rows = ()
        for r in tl.static_range(BLOCK_ROWS):
            row = tl.minimum(first_row + r, num_rows - 1).to(tl.int64)
            rows = rows + (tl.load(tile + row * words + word, mask=inside, other=0),)  # noqa: RUF005
        added = ()
        left = ()
        for t in tl.static_range(BLOCK_TOKENS):
            token = tl.minimum(first_token + t, num_tokens - 1).to(tl.int64)
            pairs, totals, scale = _integers(x + token * x_stride, word, inside, DTYPE, P, BLOCK_WORDS)
            twice = scale * 2.0
            starts = ()
            for group in tl.static_range(P):
                starts = starts + (ROUNDER_BITS - (totals[group] >> 1),)  # noqa: RUF005
                left = left + (odd[t * P + group] + (totals[group] & 1).to(tl.float32) * scale,)  # noqa: RUF005
            for r in tl.static_range(BLOCK_ROWS):
                for group in tl.static_range(P):
                    integer = _group_sum(pairs, rows[r], starts[group], group, P, DOT)
                    value = integer.to(tl.float32, bitcast=True) - ROUNDER
                    added = added + (sums[(t * BLOCK_ROWS + r) * P + group] + value * twice,)  # noqa: RUF005
        sums = added
        odd = left
    products = tl.sum(stacked(sums, COUNT * P, BLOCK_WORDS), 0).reshape(BLOCK_TOKENS, BLOCK_ROWS, P)
    common = tl.sum(stacked(odd, BLOCK_TOKENS * P, BLOCK_WORDS), 0).reshape(BLOCK_TOKENS, 1, P)
    products = (products - common).reshape(COUNT, P)
    if tl.max((products != products).to(tl.int32).reshape(COUNT * P), 0) > 0:
        number = tl.arange(0, COUNT)
        for t in tl.static_range(BLOCK_TOKENS):
            token = tl.minimum(first_token + t, num_tokens - 1).to(tl.int64)
            for r in range(BLOCK_ROWS):
                row = tl.minimum(first_row + r, num_rows - 1).to(tl.int64)
                value = _float_sums(x + token * x_stride, tile, row, words, lane, DTYPE, P, BLOCK_WORDS)
                again = (number == t * BLOCK_ROWS + r)[:, None] & (products != products)
                products = tl.where(again, value[None, :], products)
    copies = mix_last(products, COUNT, P, P).reshape(BLOCK_TOKENS, BLOCK_ROWS, P)
    _store_copies(
        out, copies, alpha, bias, first_token + tl.arange(0, BLOCK_TOKENS), first_row + tl.arange(0, BLOCK_ROWS),
        num_tokens, num_rows, rows_per_alpha, HAS_BIAS, FUNCTION, P,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def hadamard_sum(
    x,
    tile,
    alpha,
    bias,
    out,
    num_tokens,
    num_rows,
    columns,
    x_stride,
    row_size,
    q,
    rows_per_alpha,
    KIND: tl.constexpr,
    P: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Floats of any dtype, float32 arithmetic, one token a program; as many column groups as a word or byte has bits.

    Grid: (row blocks * tokens,).
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(0) // row_blocks
    x += token.to(tl.int64) * x_stride
    BITS: tl.constexpr = 32 if KIND == "words" else 8
    LOADS: tl.constexpr = BLOCK_K // BITS
    negated = tl.zeros([BLOCK_ROWS, LOADS, P], dtype=tl.float32)
    for first_k in range(0, columns, BLOCK_K):
        first = first_k + BITS * tl.arange(0, LOADS)
        bits = load_packed(tile, rows, first, num_rows, columns, row_size, q, 0, KIND)
        k = first[:, None] + tl.arange(0, BITS)[None, :]
        value = tl.load(x + k, mask=k < columns, other=0).to(tl.float32)
        if BITS == 32:
            bits = tl.join(bits, bits >> 16)
            bits = tl.join(bits, bits >> 8)
        bits = tl.join(bits, bits >> 4)
        bits = tl.join(bits, bits >> 2)
        bits = tl.join(bits, bits >> 1).reshape(BLOCK_ROWS, LOADS, BITS)
        # A weight of +1 is a set bit, and flips the sign of its value.
        flipped = (bits.to(tl.uint32, bitcast=True) << 31) ^ value.to(tl.uint32, bitcast=True)[None, :, :]
        flipped = flipped.to(tl.float32, bitcast=True).reshape(BLOCK_ROWS, LOADS, BITS // P, P)
        negated += tl.sum(flipped, 2)
    copies = mix_last(-tl.sum(negated, 1), BLOCK_ROWS, P, P)
    _store_copies(
        out, copies[None, :, :], alpha, bias, token + tl.arange(0, 1), rows, num_tokens, num_rows,
        rows_per_alpha, HAS_BIAS, FUNCTION, P,
    )  # fmt: skip
