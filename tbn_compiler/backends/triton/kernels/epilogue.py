"""What follows the products: scales, bias, function, and the repeats of each row."""

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
