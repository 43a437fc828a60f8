"""What follows the products: sums of several programs, scales, bias, function, and the repeats of each row."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activate(x, FUNCTION: tl.constexpr):
    """The function behind a layer, on float32."""
    if FUNCTION == "relu":
        return tl.where(x < 0, 0.0, x)  # keeps NaN
    elif FUNCTION == "gelu":
        return 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
        # 0.5 (1 + tanh u) is sigmoid(2 u), which loses no digits where tanh is near -1; 2 sqrt(2 / pi) = 1.5957...
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif FUNCTION == "silu":
        return x * tl.sigmoid(x)
    else:
        tl.static_assert(FUNCTION == "none")
        return x


@triton.jit
def store_repeats(
    out,
    products,
    token_scale,
    alpha,
    bias,
    tokens,
    rows,
    num_tokens,
    num_rows,
    repeats,
    rows_per_alpha,
    HAS_TOKEN_SCALE: tl.constexpr,
    MIXED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
):
    """Write ``out[token, i * num_rows + row]`` for each repeat ``i`` from float32 products ``[tokens, rows]``."""
    outputs = num_rows * repeats
    inside = (tokens < num_tokens)[:, None] & (rows < num_rows)[None, :]
    place = out + tokens.to(tl.int64)[:, None] * outputs + rows[None, :]
    for repeat in range(repeats):
        row = repeat * num_rows + rows
        value = products
        if not MIXED:
            value = (
                value * tl.load(alpha + row // rows_per_alpha, mask=rows < num_rows, other=0).to(tl.float32)[None, :]
            )
        if HAS_TOKEN_SCALE:
            scale = tl.load(token_scale + tokens, mask=tokens < num_tokens, other=0)
            value = value * scale[:, None]
        if HAS_BIAS:
            value = value + tl.load(bias + row, mask=rows < num_rows, other=0).to(tl.float32)[None, :]
        value = activate(value, FUNCTION)
        tl.store(place + repeat * num_rows, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_splits(sums, partial, arrived, block, SPLIT_K: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    """Add what the ``SPLIT_K`` programs of a block have summed, ``[HEIGHT, WIDTH]`` each, in their order.

    The program that comes last does so, and leaves the count as it found it. ``partial`` has room for ``SPLIT_K``
    blocks of each ``block``, ``arrived`` a zero for each.

    Returns:
        The sums, and whether this program has them: the others have nothing to store.
    """
    place = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    begin = partial + block.to(tl.int64) * (SPLIT_K * HEIGHT * WIDTH)
    tl.store(begin + tl.program_id(1) * (HEIGHT * WIDTH) + place, sums)
    tl.debug_barrier()  # all threads have stored before one of them counts
    last = tl.atomic_add(arrived + block, 1, sem="acq_rel", scope="gpu") == SPLIT_K - 1
    if last:
        sums = tl.load(begin + place, cache_modifier=".cg")
        for split in range(1, SPLIT_K):
            sums += tl.load(begin + split * (HEIGHT * WIDTH) + place, cache_modifier=".cg")
        tl.store(arrived + block, 0)
    return sums, last
