"""Kernels around the products: number formats of activations, float weights from a tile, repeats of channels."""

from __future__ import annotations

import triton
import triton.language as tl

from tbn_compiler.backends.triton.kernels.epilogue import activate
from tbn_compiler.backends.triton.kernels.weights import load_operand


@triton.jit
def _round_half_even(x):
    """The nearest integer of ``|x| < 2^22``: adding 1.5 * 2^23 leaves no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def quantize_tokens(x, values, scale, size, x_stride, TINY: tl.constexpr, FORMAT: tl.constexpr, BLOCK: tl.constexpr):
    """One program a token: ``int8`` values and a float32 scale, as :mod:`tbn_compiler.ops.formats` defines them.

    ``FORMAT``: "int8"; "binary", +1 and -1 with the mean magnitude; "signs", the same packed, eight a byte.
    """
    token = tl.program_id(0).to(tl.int64)
    source = x + token * x_stride
    if FORMAT == "int8":
        largest = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, size, BLOCK):
            k = first + tl.arange(0, BLOCK)
            magnitude = tl.abs(tl.load(source + k, mask=k < size, other=0).to(tl.float32))
            largest = tl.maximum(largest, magnitude, propagate_nan=tl.PropagateNan.ALL)
        # NaN is not ordered: it is found on its own, and spreads to the whole token. So does infinity.
        highest = tl.max(tl.where(largest == largest, largest, float("inf")), 0)
        used = highest >= TINY
        factor = tl.where(used, tl.math.div_rn(127.0, tl.where(used, highest, 1.0)), 0.0)
        highest = tl.where(used, tl.where(highest == float("inf"), float("nan"), highest), 0.0)
        tl.store(scale + token, tl.math.div_rn(highest, 127.0))
        for first in range(0, size, BLOCK):
            k = first + tl.arange(0, BLOCK)
            value = tl.load(source + k, mask=k < size, other=0).to(tl.float32)
            finite = tl.where(tl.abs(value) < float("inf"), value, 0.0)
            tl.store(values + token * size + k, _round_half_even(finite * factor).to(tl.int8), mask=k < size)
    else:
        total = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, size, BLOCK):
            k = first + tl.arange(0, BLOCK)
            value = tl.load(source + k, mask=k < size, other=0).to(tl.float32)
            total += tl.abs(value)
            positive = value > 0
            if FORMAT == "signs":
                bits = tl.reshape(positive.to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
                byte = first // 8 + tl.arange(0, BLOCK // 8)
                tl.store(values + token * (size // 8) + byte, tl.sum(bits, 1).to(tl.uint8), mask=byte < size // 8)
            else:
                tl.store(values + token * size + k, tl.where(positive, 1, -1).to(tl.int8), mask=k < size)
        tl.store(scale + token, tl.math.div_rn(tl.sum(total, 0), tl.full([], size, tl.float32)))


@triton.jit
def unpack_rows(
    tile,
    alpha,
    input_alpha,
    out,
    computed,
    per_group,
    period,
    num_rows,
    columns,
    row_size,
    q,
    shift,
    KIND: tl.constexpr,
    MIXED: tl.constexpr,
    REPLICAS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Float weights ``[num_rows, columns]`` for a library's kernel.

    Row ``g * computed + j`` is row ``(g * per_group + j) mod period`` of the layer. Grid: (row blocks * column
    blocks,).
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    target = tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_k = tl.program_id(0) // row_blocks * BLOCK_K
    rows = ((target // computed) * per_group + target % computed) % period
    weight = load_operand(
        tile, alpha, input_alpha, rows, first_k, period, columns, row_size, q, shift,
        KIND, MIXED, REPLICAS, out.dtype.element_ty, BLOCK_ROWS, BLOCK_K,
    )  # fmt: skip
    k = first_k + tl.arange(0, BLOCK_K)
    place = out + target.to(tl.int64)[:, None] * columns + k[None, :]
    tl.store(place, weight, mask=(target < num_rows)[:, None] & (k < columns)[None, :])


@triton.jit
def copy_channels(
    z,
    alpha,
    bias,
    out,
    channels,
    per_group,
    computed,
    positions,
    rows_per_alpha,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``out [N, channels, positions]`` from ``z [N, groups * computed, positions]``: scale, bias, function.

    Channel ``g * per_group + j`` repeats channel ``g * computed + j mod computed``. Grid: (N * channels * position
    blocks,).
    """
    position_blocks = tl.cdiv(positions, BLOCK)
    plane = tl.program_id(0) // position_blocks
    image = plane // channels
    channel = plane % channels
    group = channel // per_group
    source = group * computed + (channel - group * per_group) % computed
    at = tl.program_id(0) % position_blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < positions
    z_channels = channels // per_group * computed
    z_begin = z + (image.to(tl.int64) * z_channels + source) * positions
    value = tl.load(z_begin + at, mask=inside, other=0).to(tl.float32)
    if SCALED:
        value = value * tl.load(alpha + channel // rows_per_alpha).to(tl.float32)
    if HAS_BIAS:
        value = value + tl.load(bias + channel).to(tl.float32)
    value = activate(value, FUNCTION)
    begin = out + plane.to(tl.int64) * positions
    tl.store(begin + at, value.to(out.dtype.element_ty), mask=inside)
