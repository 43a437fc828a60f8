"""Kernels around the products: number formats of activations, float weights from a tile, repeats of channels."""

from __future__ import annotations

import triton
import triton.language as tl

from tbn_compiler.backends.triton.kernels.epilogue import activate
from tbn_compiler.backends.triton.kernels.weights import load_operand


@triton.jit
def _round_half_even(x):
    """The nearest integer of ``|x| < 2^22``: adding 1.5 * 2^23 leaves no fraction.

    ``x`` is a product that is rounded before: kernels that call this are launched with ``enable_fp_fusion=False``. A
    fused multiply-add would round once, and decide ties by the error of the product.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _highest(magnitude):
    """The largest of a block, infinity if one is NaN: NaN is not ordered."""
    return tl.max(tl.where(magnitude == magnitude, magnitude, float("inf")), 0)


@triton.jit
def _int8_scale(highest, TINY: tl.constexpr):
    """Factor and scale of int8 from the largest magnitude, where infinity spreads as NaN to the whole token."""
    used = highest >= TINY
    factor = tl.where(used, tl.math.div_rn(127.0, tl.where(used, highest, 1.0)), 0.0)
    highest = tl.where(used, tl.where(highest == float("inf"), float("nan"), highest), 0.0)
    return factor, tl.math.div_rn(highest, 127.0)


@triton.jit
def _given_scale(given, nans, TINY: tl.constexpr):
    """Factor and scale of a token from the scale of all, where a NaN spreads to the whole token."""
    value = tl.load(given).to(tl.float32)
    used = (value >= TINY) & (value < float("inf")) & (nans == 0)
    factor = tl.where(used, tl.math.div_rn(1.0, tl.where(used, value, 1.0)), 0.0)
    return factor, tl.where(used, value, float("nan"))


@triton.jit
def _to_int8(value, factor):
    finite = tl.where(tl.abs(value) < float("inf"), value, 0.0)
    return _round_half_even(finite * factor).to(tl.int8)


@triton.jit
def _clipped_int8(value, factor):
    return _round_half_even(tl.minimum(tl.maximum(value * factor, -127.0), 127.0)).to(tl.int8)


@triton.jit
def quantize_tokens(
    x,
    values,
    scale,
    given,
    size,
    x_stride,
    TINY: tl.constexpr,
    FORMAT: tl.constexpr,
    GIVEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a token: ``int8`` values and a float32 scale, as :mod:`tbn_compiler.ops.formats` defines them.

    ``FORMAT``: "int8"; "binary", +1 and -1 with the mean magnitude; "signs", the same packed, eight a byte. With
    ``GIVEN`` the scale is the number at ``given``.
    """
    token = tl.program_id(0).to(tl.int64)
    source = x + token * x_stride
    if FORMAT == "int8" and GIVEN:
        nans = tl.zeros([BLOCK], dtype=tl.int32)
        for first in range(0, size, BLOCK):
            k = first + tl.arange(0, BLOCK)
            value = tl.load(source + k, mask=k < size, other=0).to(tl.float32)
            nans += (value != value).to(tl.int32)
        factor, result = _given_scale(given, tl.sum(nans, 0), TINY)
        tl.store(scale + token, result)
        for first in range(0, size, BLOCK):
            k = first + tl.arange(0, BLOCK)
            value = tl.load(source + k, mask=k < size, other=0).to(tl.float32)
            tl.store(values + token * size + k, _clipped_int8(value, factor), mask=k < size)
    elif FORMAT == "int8":
        largest = tl.zeros([BLOCK], dtype=tl.float32)
        for first in range(0, size, BLOCK):
            k = first + tl.arange(0, BLOCK)
            magnitude = tl.abs(tl.load(source + k, mask=k < size, other=0).to(tl.float32))
            largest = tl.maximum(largest, magnitude, propagate_nan=tl.PropagateNan.ALL)
        factor, result = _int8_scale(_highest(largest), TINY)
        tl.store(scale + token, result)
        for first in range(0, size, BLOCK):
            k = first + tl.arange(0, BLOCK)
            value = tl.load(source + k, mask=k < size, other=0).to(tl.float32)
            tl.store(values + token * size + k, _to_int8(value, factor), mask=k < size)
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
        if GIVEN:
            found = tl.sum(total, 0)
            _, result = _given_scale(given, (found != found).to(tl.int32), TINY)
        else:
            result = tl.math.div_rn(tl.sum(total, 0), tl.full([], size, tl.float32))
        tl.store(scale + token, result)


@triton.jit
def measure_parts(
    x, partial, size, x_stride, parts, part_size, FORMAT: tl.constexpr, GIVEN: tl.constexpr, BLOCK: tl.constexpr
):
    """``partial [tokens, parts]``: the largest magnitude ("int8"), or the sum of magnitudes, of each part of a token.

    Infinity stands for NaN. With ``GIVEN`` it is the number of NaN. Grid: (tokens * parts,).
    """
    token = (tl.program_id(0) // parts).to(tl.int64)
    begin = tl.program_id(0) % parts * part_size
    end = begin + tl.minimum(part_size, size - begin)  # their sum may not fit an int32
    found = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(begin, end, BLOCK):
        k = first + tl.arange(0, BLOCK)
        magnitude = tl.abs(tl.load(x + token * x_stride + k, mask=k < end, other=0).to(tl.float32))
        if GIVEN:
            found += (magnitude != magnitude).to(tl.float32)
        elif FORMAT == "int8":
            found = tl.maximum(found, magnitude, propagate_nan=tl.PropagateNan.ALL)
        else:
            found += magnitude
    tl.store(partial + tl.program_id(0), _highest(found) if FORMAT == "int8" and not GIVEN else tl.sum(found, 0))


@triton.jit
def quantize_parts(
    x,
    values,
    scale,
    given,
    partial,
    size,
    x_stride,
    parts,
    part_size,
    TINY: tl.constexpr,
    FORMAT: tl.constexpr,
    GIVEN: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As :func:`quantize_tokens`, one program a part, from what :func:`measure_parts` has found. Grid: as there."""
    token = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    each = tl.arange(0, PARTS)
    found = tl.load(partial + token * parts + each, mask=each < parts, other=0)
    factor = 0.0
    if GIVEN:
        factor, result = _given_scale(given, (tl.sum(found, 0) > 0).to(tl.int32), TINY)
    elif FORMAT == "int8":
        factor, result = _int8_scale(tl.max(found, 0), TINY)
    else:
        result = tl.math.div_rn(tl.sum(found, 0), tl.full([], size, tl.float32))
    tl.store(scale + token, result, mask=part == 0)
    begin = part * part_size
    end = begin + tl.minimum(part_size, size - begin)  # their sum may not fit an int32
    for first in range(begin, end, BLOCK):
        k = first + tl.arange(0, BLOCK)
        value = tl.load(x + token * x_stride + k, mask=k < end, other=0).to(tl.float32)
        if FORMAT != "int8":
            integer = tl.where(value > 0, 1, -1).to(tl.int8)
        elif GIVEN:
            integer = _clipped_int8(value, factor)
        else:
            integer = _to_int8(value, factor)
        tl.store(values + token * size + k, integer, mask=k < end)


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
    TAPS: tl.constexpr = 1,
):
    """Weights ``[num_rows, columns]`` as numbers, for a library's kernel.

    Row ``g * computed + j`` is row ``(g * per_group + j) mod period`` of the layer. With ``TAPS``, the sizes of a
    filter multiplied, its channels lie innermost, as in the ``channels_last`` format: ``[num_rows, taps, channels]``.
    Grid: (row blocks * column blocks,).
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
    place = k if TAPS == 1 else k % TAPS * (columns // TAPS) + k // TAPS
    target_begin = out + target.to(tl.int64)[:, None] * columns
    tl.store(target_begin + place[None, :], weight, mask=(target < num_rows)[:, None] & (k < columns)[None, :])


@triton.jit
def copy_channels(
    z,
    alpha,
    bias,
    out,
    per_group,
    computed,
    positions,
    rows_per_alpha,
    z_image_stride,
    z_channel_stride,
    z_position_stride,
    out_image_stride,
    out_channel_stride,
    out_position_stride,
    SCALED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Channels of ``out`` from the different ones ``z``, both ``[N, channels, positions]`` with any strides.

    Channel ``g * per_group + j`` is channel ``g * computed + j mod computed`` of ``z``, with scale, bias and function.
    Each number of ``z`` is read once. Grid: (row blocks * position blocks * N, groups).
    """
    row_blocks = tl.cdiv(computed, BLOCK_ROWS)
    position_blocks = tl.cdiv(positions, BLOCK_POSITIONS)
    group = tl.program_id(1)
    in_group = tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    block = tl.program_id(0) // row_blocks
    image = (block // position_blocks).to(tl.int64)
    at = (block % position_blocks).to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    inside = (at < positions)[:, None] & (in_group < computed)[None, :]
    source = (group * computed + in_group).to(tl.int64) * z_channel_stride
    z_begin = z + image * z_image_stride + (at * z_position_stride)[:, None]
    unique = tl.load(z_begin + source[None, :], mask=inside, other=0).to(tl.float32)
    out_begin = out + image * out_image_stride + (at * out_position_stride)[:, None]
    for copy in range(tl.cdiv(per_group, computed)):
        local = copy * computed + in_group
        stored = (in_group < computed) & (local < per_group)
        channel = group * per_group + local
        value = unique
        if SCALED:
            value = value * tl.load(alpha + channel // rows_per_alpha, mask=stored, other=0).to(tl.float32)[None, :]
        if HAS_BIAS:
            value = value + tl.load(bias + channel, mask=stored, other=0).to(tl.float32)[None, :]
        value = activate(value, FUNCTION).to(out.dtype.element_ty)
        place = out_begin + (channel.to(tl.int64) * out_channel_stride)[None, :]
        tl.store(place, value, mask=(at < positions)[:, None] & stored[None, :])
