"""Matrix products of weights and inputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _upper(x):
    """The first 8 significant bits of float32, as bfloat16: cut, not rounded, so that nothing overflows."""
    return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def multiply(weight, value, accumulator, PRECISION: tl.constexpr):
    """``accumulator + weight @ value``.

    ``PRECISION`` "ieee" or "tf32" says how float32 is multiplied. "split" takes weights of +1 and -1 in bfloat16 and
    float32 values in three parts of 8 significant bits, which are the value exactly, with exact products: true
    float32, on tensor cores.
    """
    if PRECISION == "split":
        upper = _upper(value)
        rest = value - upper.to(tl.float32)
        rest = tl.where(rest == rest, rest, 0.0)  # infinity less itself; NaN stays in the upper part
        middle = _upper(rest)
        lower = _upper(rest - middle.to(tl.float32))
        accumulator = tl.dot(weight, lower, accumulator)
        accumulator = tl.dot(weight, middle, accumulator)
        return tl.dot(weight, upper, accumulator)
    else:
        return tl.dot(weight, value, accumulator, input_precision=PRECISION, out_dtype=accumulator.dtype)
