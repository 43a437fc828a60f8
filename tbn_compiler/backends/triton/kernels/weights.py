"""How a block of the weight comes into registers: each stored word is loaded once and expanded into its weights.

A *flat index* ``f = row * row_size + k`` numbers the weights of a layer in row-major order. The tile element behind it
is ``f mod q`` (:class:`tbn_compiler.tiling.TileLayout`), or ``(f mod q - (f // q) * shift) mod q`` in a rolled tile.

Kinds of weights, chosen in :mod:`tbn_compiler.backends.triton.plan`:

============  ======================================================================================================
``words``     packed, rows begin at whole 32-bit words; the tile is given as ``int32``
``bytes``     packed, rows begin at whole bytes
``bits``      packed, any row size: rows begin anywhere in the tile and go round at its end
``rolled``    ``bits`` with copies that are rolled
``float``     full-precision tile, rows begin at ``row * row_size``
``indexed``   full-precision tile in any layout
============  ======================================================================================================
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _eight(tile, start, q):
    """The tile's eight bits from element ``start`` on, going round at its end; needs ``q >= 8``."""
    index = start >> 3
    low = tl.load(tile + index).to(tl.int32)
    high = tl.load(tile + tl.minimum(index + 1, (q - 1) >> 3)).to(tl.int32)
    window = (low | (high << 8)) >> (start & 7)
    left = tl.minimum(q - start, 8)  # elements before the end; the others come from the tile's first byte
    return ((window & ((1 << left) - 1)) | (tl.load(tile).to(tl.int32) << left)) & 255


@triton.jit
def _roll(column, copy, q, shift):
    """The tile element at ``column`` of copy number ``copy`` (``int64``)."""
    return ((column - (copy * shift) % q + q) % q).to(tl.int32)


@triton.jit
def load_packed(tile, rows, k, row_limit, k_limit, row_size, q, shift, KIND: tl.constexpr):
    """Packed weights at columns ``k``, the first ones of each word (``words``) or byte, as ``int32 [rows, k]``.

    Bits beyond the limits are arbitrary: the input is zero there, or the result is not stored.
    """
    if KIND == "words" or KIND == "bytes":
        PER_LOAD: tl.constexpr = 32 if KIND == "words" else 8
        begin = rows.to(tl.int64) * (row_size // PER_LOAD)
        inside = (rows < row_limit)[:, None] & (k < k_limit)[None, :]
        return tl.load(tile + begin[:, None] + (k // PER_LOAD)[None, :], mask=inside, other=0).to(tl.int32)
    else:
        # The flat index may exceed 31 bits; a row and a tile do not. Clamped reads stay inside the tile.
        flat = tl.minimum(rows, row_limit - 1).to(tl.int64) * row_size
        copy = flat // q
        column = (flat - copy * q).to(tl.int32)[:, None] + tl.minimum(k, k_limit - 1)[None, :]
        further = column // q
        column = column - further * q
        if KIND == "bits":
            return _eight(tile, column, q)
        else:
            tl.static_assert(KIND == "rolled")
            copies = copy[:, None] + further
            # Where this copy ends inside the byte, the next one continues with its own first element.
            left = tl.minimum(q - column, 8)
            here = _eight(tile, _roll(column, copies, q, shift), q)
            following = _eight(tile, _roll(column * 0, copies + 1, q, shift), q)
            return ((here & ((1 << left) - 1)) | (following << left)) & 255


@triton.jit
def _expand(packed, DTYPE: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr):
    """+1 and -1 ``[ROWS, COUNT * BITS]`` from ``int32 [ROWS, COUNT]`` of ``BITS`` weights each.

    Joining doubles the elements inside a thread, so that each shift is a constant and neighbours can be stored as one
    vector. Numbers are made by flipping the sign bit of -1.0: converting integers is several times slower.
    """
    bits = packed
    if BITS == 32:
        bits = tl.join(bits, bits >> 16).reshape(ROWS, COUNT * 2)
        bits = tl.join(bits, bits >> 8).reshape(ROWS, COUNT * 4)
    bits = tl.join(bits, bits >> 4).reshape(ROWS, COUNT * (BITS // 4))
    bits = tl.join(bits, bits >> 2).reshape(ROWS, COUNT * (BITS // 2))
    bits = tl.join(bits, bits >> 1).reshape(ROWS, COUNT * BITS) & 1
    if tl.bfloat16 == DTYPE:
        return ((bits << 15) ^ 0xBF80).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    elif tl.float16 == DTYPE:
        return ((bits << 15) ^ 0xBC00).to(tl.uint16).to(tl.float16, bitcast=True)
    elif tl.float32 == DTYPE:
        return ((bits.to(tl.uint32) << 31) ^ 0xBF800000).to(tl.float32, bitcast=True)
    else:
        tl.static_assert(tl.int8 == DTYPE)
        return (2 * bits - 1).to(tl.int8)


@triton.jit
def _even_and_odd(word):
    """The even bits of each word in its lower half, the odd ones in its upper half, both in order."""
    moved = (word ^ (word >> 1)) & 0x22222222
    word = word ^ moved ^ (moved << 1)
    moved = (word ^ (word >> 2)) & 0x0C0C0C0C
    word = word ^ moved ^ (moved << 2)
    moved = (word ^ (word >> 4)) & 0x00F000F0
    word = word ^ moved ^ (moved << 4)
    moved = (word ^ (word >> 8)) & 0x0000FF00
    return word ^ moved ^ (moved << 8)


@triton.jit
def expand_pairs(words, DTYPE: tl.constexpr, ROWS: tl.constexpr, COUNT: tl.constexpr):
    """+1 and -1 ``[ROWS, COUNT * 32]`` in a 16-bit float from ``int32 [ROWS, COUNT]``.

    Neighbours lie in the two halves of a register, and a shift and a mask make both of them.
    """
    bits = _even_and_odd(words)
    bits = tl.join(bits, bits >> 8).reshape(ROWS, COUNT * 2)
    bits = tl.join(bits, bits >> 4).reshape(ROWS, COUNT * 4)
    bits = tl.join(bits, bits >> 2).reshape(ROWS, COUNT * 8)
    bits = tl.join(bits, bits >> 1).reshape(ROWS, COUNT * 16)
    MINUS_ONES: tl.constexpr = 0x3F803F80 if tl.bfloat16 == DTYPE else 0x3C003C00
    # A set bit leaves no sign.
    pairs = (((bits << 15) & -0x7FFF8000) ^ -0x7FFF8000) | MINUS_ONES
    low, high = (pairs & 0xFFFF).to(tl.int16), (pairs >> 16).to(tl.int16)
    return tl.join(low, high).reshape(ROWS, COUNT * 32).to(DTYPE, bitcast=True)


@triton.jit
def load_weight(
    tile,
    alpha,
    rows,
    first_k,
    row_limit,
    k_limit,
    row_size,
    q,
    shift,
    KIND: tl.constexpr,
    MIXED: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Weights ``[ROWS, COLUMNS]`` in ``DTYPE`` from column ``first_k`` on, a multiple of 32 (``words``) or 8.

    ``MIXED`` multiplies each weight with the alpha of its copy, for rows that mix them.
    """
    VALUE: tl.constexpr = tl.float32 if MIXED else DTYPE
    k = first_k + tl.arange(0, COLUMNS)
    if KIND == "float" or KIND == "indexed":
        index = rows.to(tl.int64)[:, None] * row_size + k[None, :]
        if KIND == "indexed":
            index = _roll(index % q, index // q, q, shift)
        inside = (rows < row_limit)[:, None] & (k < k_limit)[None, :]
        weight = tl.load(tile + index, mask=inside, other=0).to(VALUE)
    else:
        BITS: tl.constexpr = 32 if KIND == "words" else 8
        first = first_k + BITS * tl.arange(0, COLUMNS // BITS)
        packed = load_packed(tile, rows, first, row_limit, k_limit, row_size, q, shift, KIND)
        weight = _expand(packed, VALUE, ROWS, COLUMNS // BITS, BITS)
    if MIXED:
        flat = tl.minimum(rows, row_limit - 1).to(tl.int64)[:, None] * row_size + tl.minimum(k, k_limit - 1)[None, :]
        weight = (weight * tl.load(alpha + flat // q).to(tl.float32)).to(DTYPE)
    return weight


@triton.jit
def load_operand(
    tile,
    alpha,
    input_alpha,
    rows,
    first_k,
    num_rows,
    columns,
    row_size,
    q,
    shift,
    KIND: tl.constexpr,
    MIXED: tl.constexpr,
    REPLICAS: tl.constexpr,
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """:func:`load_weight`, or the sum of ``REPLICAS`` runs of ``columns`` weights times their ``input_alpha``."""
    if REPLICAS == 1:
        weight = load_weight(
            tile, alpha, rows, first_k, num_rows, columns, row_size, q, shift, KIND, MIXED, DTYPE, ROWS, COLUMNS
        )
    else:
        folded = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
        for block in range(REPLICAS):
            begin = block * columns
            folded += tl.load(input_alpha + block).to(tl.float32) * load_weight(
                tile, alpha, rows, begin + first_k, num_rows, begin + columns, row_size, q, shift,
                KIND, MIXED, tl.float32, ROWS, COLUMNS,
            )  # fmt: skip
        weight = folded.to(DTYPE)
    return weight
