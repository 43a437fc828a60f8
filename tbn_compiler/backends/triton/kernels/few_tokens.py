"""Products for a few tokens, where reading the tile is what takes time: no tensor cores, one pass over the bits.

Each thread keeps whole words, and adds up what their weights meet by itself: no step of the loop has a barrier.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tbn_compiler.backends.triton.kernels.epilogue import store_repeats
from tbn_compiler.backends.triton.kernels.weights import load_packed, load_weight

# Two limbs of 8 bits: the largest input of a word becomes 126 * 256.
LARGEST: tl.constexpr = tl.constexpr(32256.0)
SMALLEST: tl.constexpr = tl.constexpr(1e-33)
# Adding it leaves the nearest integer in the lower bits of a float32.
ROUNDER: tl.constexpr = tl.constexpr(12582912.0)
ROUNDER_BITS: tl.constexpr = tl.constexpr(0x4B400000)


@triton.jit
def _dot4(bits, values, accumulator, DOT4: tl.constexpr):
    """``accumulator`` plus the products of four unsigned and four signed bytes."""
    if DOT4:
        return tl.inline_asm_elementwise(
            "dp4a.u32.s32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [bits, values, accumulator],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        for byte in tl.static_range(4):
            accumulator += ((bits >> (8 * byte)) & 255) * ((values << (24 - 8 * byte)) >> 24)
        return accumulator


@triton.jit
def one_of_four(values, PLACE: tl.constexpr, DTYPE: tl.constexpr):
    """The number at a place of ``int64`` values that hold four 16-bit floats each, as float32."""
    half = ((values >> (16 * PLACE)) & 0xFFFF).to(tl.uint16)
    return half.to(DTYPE, bitcast=True).to(tl.float32)


@triton.jit
def _bytes(a, b, c, d):
    """Four integers' lower bytes as one."""
    return (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | (d << 24)


@triton.jit
def stacked(parts, COUNT: tl.constexpr, SIZE: tl.constexpr):
    """``[SIZE, COUNT]`` of ``COUNT`` vectors, a power of two."""
    half: tl.constexpr = COUNT // 2
    if COUNT == 1:
        return parts[0].reshape(SIZE, 1)
    else:
        joined = ()
        for i in tl.static_range(half):
            joined = joined + (tl.join(parts[i], parts[i + half]),)  # noqa: RUF005 (Triton's tuples)
        return stacked(joined, half, SIZE * 2).reshape(SIZE, COUNT)


@triton.jit
def _limbs(x, word, inside, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    """The 32 inputs of each word as integers times a scale.

    Byte ``b`` of element ``j`` of the results is input ``8 b + j``: where the bits of a word, shifted by ``j`` and
    masked with ``0x01010101``, have its weight.

    Returns:
        The lower and the upper bytes, ``int32 [SIZE]`` each, eight of both; the sum of the integers; the scale, NaN
        where integers do not do: an input is not finite, or all of them are next to nothing.
    """
    floats = ()
    largest = tl.zeros([SIZE], dtype=tl.float32)
    for quarter in tl.static_range(8):
        four = tl.load(x + word * 8 + quarter, mask=inside, other=0)
        for place in tl.static_range(4):
            value = one_of_four(four, place, DTYPE)
            floats = floats + (value,)  # noqa: RUF005
            largest = tl.maximum(largest, tl.abs(value), propagate_nan=tl.PropagateNan.ALL)
    inverse = LARGEST / tl.maximum(largest, SMALLEST, propagate_nan=tl.PropagateNan.ALL)
    # Inputs so small that the quotient would overflow are left to floats, as are those that are not finite.
    scale = tl.where((largest > 0) & (largest < SMALLEST), float("nan"), (largest - largest) + 1.0 / inverse)
    total = tl.zeros([SIZE], dtype=tl.int32)
    integers = ()
    for i in tl.static_range(32):
        integer = (floats[i] * inverse + ROUNDER).to(tl.int32, bitcast=True) - ROUNDER_BITS
        total += integer
        integers = integers + (integer,)  # noqa: RUF005
    low = ()
    high = ()
    for j in tl.static_range(8):
        a, b, c, d = integers[j], integers[j + 8], integers[j + 16], integers[j + 24]
        low = low + (_bytes(a, b, c, d),)  # noqa: RUF005
        # What the lower byte, read as a signed one, leaves.
        high = high + (_bytes((a + 128) >> 8, (b + 128) >> 8, (c + 128) >> 8, (d + 128) >> 8),)  # noqa: RUF005
    return low, high, total, scale


@triton.jit
def _float_sums(x, tile, row, words, lane, DTYPE: tl.constexpr, SIZE: tl.constexpr):
    """The product of one row and one token in float32, where integers do not do."""
    sums = tl.zeros([SIZE], dtype=tl.float32)
    for first in range(0, words, SIZE):
        word = first + lane
        inside = word < words
        packed = tl.load(tile + row * words + word, mask=inside, other=0)
        for quarter in tl.static_range(8):
            four = tl.load(x + word * 8 + quarter, mask=inside, other=0)
            for place in tl.static_range(4):
                value = one_of_four(four, place, DTYPE)
                sums += tl.where(((packed >> (4 * quarter + place)) & 1) == 1, value, -value)
    return tl.sum(sums, 0)


@triton.jit(do_not_specialize=["num_tokens"])
def linear_limbs(
    x,
    tile,
    alpha,
    bias,
    out,
    num_tokens,
    num_rows,
    words,
    repeats,
    x_stride,
    rows_per_alpha,
    DTYPE: tl.constexpr,
    DOT4: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WORDS: tl.constexpr,
):
    """16-bit floats times whole words, four weights an instruction.

    The inputs of each word become integers of 16 bits with a scale of their own, an error of at most 2^-16 of the
    largest of them, and these two limbs of 8 bits: ``sum(+-x) = 2 sum(bit x) - sum(x)``, exactly. Where
    they do not do (:func:`_limbs`), floats do. ``x`` are ``int64 [tokens, columns / 4]``, ``x_stride`` in
    those. Grid: (row blocks * token blocks,).
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    first_row = (tl.program_id(0) % row_blocks) * BLOCK_ROWS
    first_token = (tl.program_id(0) // row_blocks) * BLOCK_TOKENS
    lane = tl.arange(0, BLOCK_WORDS)
    sums = ()
    for _ in tl.static_range(BLOCK_TOKENS * BLOCK_ROWS):
        sums = sums + (tl.zeros([BLOCK_WORDS], dtype=tl.float32),)  # noqa: RUF005
    for first in range(0, words, BLOCK_WORDS):
        word = first + lane
        inside = word < words
        rows = ()
        for r in tl.static_range(BLOCK_ROWS):
            row = tl.minimum(first_row + r, num_rows - 1).to(tl.int64)
            rows = rows + (tl.load(tile + row * words + word, mask=inside, other=0),)  # noqa: RUF005
        added = ()
        for t in tl.static_range(BLOCK_TOKENS):
            token = tl.minimum(first_token + t, num_tokens - 1).to(tl.int64)
            low, high, total, scale = _limbs(x + token * x_stride, word, inside, DTYPE, BLOCK_WORDS)
            for r in tl.static_range(BLOCK_ROWS):
                lower = tl.zeros([BLOCK_WORDS], dtype=tl.int32)
                upper = tl.zeros([BLOCK_WORDS], dtype=tl.int32)
                for j in tl.static_range(8):
                    bits = (rows[r] >> j) & 0x01010101
                    lower = _dot4(bits, low[j], lower, DOT4)
                    upper = _dot4(bits, high[j], upper, DOT4)
                integer = upper * 512 + (lower * 2 - total)
                added = added + (sums[t * BLOCK_ROWS + r] + integer.to(tl.float32) * scale,)  # noqa: RUF005
        sums = added
    products = tl.sum(stacked(sums, BLOCK_TOKENS * BLOCK_ROWS, BLOCK_WORDS), 0)
    COUNT: tl.constexpr = BLOCK_TOKENS * BLOCK_ROWS
    if tl.max((products != products).to(tl.int32), 0) > 0:
        number = tl.arange(0, COUNT)
        for t in tl.static_range(BLOCK_TOKENS):
            token = tl.minimum(first_token + t, num_tokens - 1).to(tl.int64)
            for r in range(BLOCK_ROWS):
                row = tl.minimum(first_row + r, num_rows - 1).to(tl.int64)
                value = _float_sums(x + token * x_stride, tile, row, words, lane, DTYPE, BLOCK_WORDS)
                products = tl.where((number == t * BLOCK_ROWS + r) & (products != products), value, products)
    tokens = first_token + tl.arange(0, BLOCK_TOKENS)
    store_repeats(
        out, products.reshape(BLOCK_TOKENS, BLOCK_ROWS), None, alpha, bias, tokens,
        first_row + tl.arange(0, BLOCK_ROWS), num_tokens, num_rows, repeats,
        rows_per_alpha, False, False, HAS_BIAS, FUNCTION,
    )  # fmt: skip


@triton.jit
def _negated_sums(values, packed, BITS: tl.constexpr, ROWS: tl.constexpr, LOADS: tl.constexpr):
    """Sums ``[ROWS, LOADS]`` of float32 ``values [LOADS, BITS]``, of opposite signs to those that ``packed`` holds.

    ``packed`` is ``int32 [ROWS, LOADS]``. A weight of +1 is a set bit, and flips the sign of its value.
    """
    bits = packed
    if BITS == 32:
        bits = tl.join(bits, bits >> 16)
        bits = tl.join(bits, bits >> 8)
    bits = tl.join(bits, bits >> 4)
    bits = tl.join(bits, bits >> 2)
    bits = tl.join(bits, bits >> 1).reshape(ROWS, LOADS, BITS)
    flipped = (bits.to(tl.uint32, bitcast=True) << 31) ^ values.to(tl.uint32, bitcast=True)[None, :, :]
    return tl.sum(flipped.to(tl.float32, bitcast=True), 2)


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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Floats of any dtype, float32 arithmetic, one token a program. Grid: (row blocks * tokens,)."""
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    token = tl.program_id(0) // row_blocks
    x += token.to(tl.int64) * x_stride
    if KIND == "float" or KIND == "indexed":
        sums = tl.zeros([BLOCK_ROWS, BLOCK_K], dtype=tl.float32)
        for first_k in range(0, columns, BLOCK_K):
            k = first_k + tl.arange(0, BLOCK_K)
            weight = load_weight(
                tile, alpha, rows, first_k, num_rows, columns, row_size, q, shift,
                KIND, False, tl.float32, BLOCK_ROWS, BLOCK_K,
            )  # fmt: skip
            sums += tl.load(x + k, mask=k < columns, other=0).to(tl.float32)[None, :] * weight
        products = tl.sum(sums, 1)
    else:
        BITS: tl.constexpr = 32 if KIND == "words" else 8
        LOADS: tl.constexpr = BLOCK_K // BITS
        negated = tl.zeros([BLOCK_ROWS, LOADS], dtype=tl.float32)
        for first_k in range(0, columns, BLOCK_K):
            first = first_k + BITS * tl.arange(0, LOADS)
            packed = load_packed(tile, rows, first, num_rows, columns, row_size, q, shift, KIND)
            k = first[:, None] + tl.arange(0, BITS)[None, :]
            value = tl.load(x + k, mask=k < columns, other=0).to(tl.float32)
            negated += _negated_sums(value, packed, BITS, BLOCK_ROWS, LOADS)
        products = -tl.sum(negated, 1)
    store_repeats(
        out, products[None, :], None, alpha, bias, token + tl.arange(0, 1), rows, num_tokens, num_rows, repeats,
        rows_per_alpha, False, False, HAS_BIAS, FUNCTION,
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
