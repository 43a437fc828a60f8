"""Tiled convolution as a matrix product with one operand read from the image (implicit GEMM)."""

from __future__ import annotations

import triton
import triton.language as tl

from tbn_compiler.backends.triton.kernels.epilogue import activate
from tbn_compiler.backends.triton.kernels.products import multiply
from tbn_compiler.backends.triton.kernels.weights import load_operand


@triton.jit
def conv_dot(
    x,
    tile,
    alpha,
    input_alpha,
    bias,
    image_scale,
    out,
    num_positions,
    per_group,
    computed,
    period,
    columns,
    group_channels,
    row_size,
    q,
    shift,
    rows_per_alpha,
    depth,
    height,
    width,
    out_depth,
    out_height,
    out_width,
    image_stride,
    channel_stride,
    depth_stride,
    height_stride,
    width_stride,
    out_image_stride,
    out_channel_stride,
    out_position_stride,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STEP_D: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    KIND: tl.constexpr,
    MIXED: tl.constexpr,
    REPLICAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``x [N, groups * group_channels, depth, height, width]`` to ``out [N, channels, positions]``, any strides.

    Lower dimensions are ones. Group ``g`` has the channels ``g * per_group + i * computed + j``: repeats ``i`` of the
    ``computed`` different rows ``j``. ``WIDE``: offsets inside an image need 64 bits. Grid: (row blocks * position
    blocks, groups).
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    WEIGHT: tl.constexpr = tl.bfloat16 if PRECISION == "split" else DTYPE
    ACCUMULATOR: tl.constexpr = tl.int32 if tl.int8 == DTYPE else tl.float32
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    row_blocks = tl.cdiv(computed, BLOCK_ROWS)
    in_group = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1)
    # Rows past the group's end repeat others and are not stored.
    rows = (group * per_group + in_group) % period
    positions = (tl.program_id(0) // row_blocks).to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    used = positions < num_positions
    out_size = out_depth * out_height * out_width
    image = positions // out_size
    at = (positions - image * out_size).to(tl.int32)
    first_d = at // (out_height * out_width) * STEP_D - PAD_D
    first_h = at // out_width % out_height * STEP_H - PAD_H
    first_w = at % out_width * STEP_W - PAD_W
    if WIDE:
        channel_step, depth_step = tl.cast(channel_stride, tl.int64), tl.cast(depth_stride, tl.int64)
        height_step, width_step = tl.cast(height_stride, tl.int64), tl.cast(width_stride, tl.int64)
    else:
        channel_step, depth_step, height_step, width_step = channel_stride, depth_stride, height_stride, width_stride
    base = x + image * image_stride + (group * group_channels).to(tl.int64) * channel_stride
    inner = first_d * depth_step + first_h * height_step + first_w * width_step
    accumulator = tl.zeros([BLOCK_ROWS, BLOCK_POSITIONS], dtype=ACCUMULATOR)
    for first_k in range(0, columns, BLOCK_K):
        weight = load_operand(
            tile, alpha, input_alpha, rows, first_k, period, columns, row_size, q, shift,
            KIND, MIXED, REPLICAS, WEIGHT, BLOCK_ROWS, BLOCK_K,
        )  # fmt: skip
        k = first_k + tl.arange(0, BLOCK_K)
        tap = k % TAPS
        tap_d = tap // (KERNEL_H * KERNEL_W) * DILATION_D
        tap_h = tap // KERNEL_W % KERNEL_H * DILATION_H
        tap_w = tap % KERNEL_W * DILATION_W
        offset = k // TAPS * channel_step + tap_d * depth_step + tap_h * height_step + tap_w * width_step
        inside = (k < columns)[:, None] & used[None, :]
        if KERNEL_D > 1 or PAD_D > 0:
            d = tap_d[:, None] + first_d[None, :]
            inside = inside & (d >= 0) & (d < depth)
        if KERNEL_H > 1 or PAD_H > 0:
            h = tap_h[:, None] + first_h[None, :]
            inside = inside & (h >= 0) & (h < height)
        if KERNEL_W > 1 or PAD_W > 0:
            w = tap_w[:, None] + first_w[None, :]
            inside = inside & (w >= 0) & (w < width)
        value = tl.load(base[None, :] + (offset[:, None] + inner[None, :]), mask=inside, other=0)
        accumulator = multiply(weight, value, accumulator, PRECISION)
    products = accumulator.to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(image_scale + image, mask=used, other=0)
    begin = out + image * out_image_stride + at.to(tl.int64) * out_position_stride
    for copy in range(tl.cdiv(per_group, computed)):
        local = copy * computed + in_group
        stored = (in_group < computed) & (local < per_group)
        channel = group * per_group + local
        value = products
        if not MIXED:
            value = value * tl.load(alpha + channel // rows_per_alpha, mask=stored, other=0).to(tl.float32)[:, None]
        if HAS_SCALE:
            value = value * scale[None, :]
        if HAS_BIAS:
            value = value + tl.load(bias + channel, mask=stored, other=0).to(tl.float32)[:, None]
        value = activate(value, FUNCTION).to(out.dtype.element_ty)
        place = begin[None, :] + (channel.to(tl.int64) * out_channel_stride)[:, None]
        tl.store(place, value, mask=stored[:, None] & used[None, :])


@triton.jit
def conv_unpacked(
    x,
    filters,
    alpha,
    bias,
    image_scale,
    out,
    num_positions,
    per_group,
    computed,
    group_channels,
    rows_per_alpha,
    depth,
    height,
    width,
    out_depth,
    out_height,
    out_width,
    image_stride,
    depth_stride,
    height_stride,
    width_stride,
    out_image_stride,
    out_channel_stride,
    out_position_stride,
    KERNEL_D: tl.constexpr,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STEP_D: tl.constexpr,
    STEP_H: tl.constexpr,
    STEP_W: tl.constexpr,
    PAD_D: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    WIDE: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """As :func:`conv_dot`, for ``filters [groups * computed, taps, group_channels]``.

    The channels of ``x`` are neighbours in memory. Each step takes ``BLOCK_K`` channels of one tap, so that both
    operands are read in whole lines. Grid: (row blocks * position blocks, groups).
    """
    ACCUMULATOR: tl.constexpr = tl.int32 if tl.int8 == x.dtype.element_ty else tl.float32
    TAPS: tl.constexpr = KERNEL_D * KERNEL_H * KERNEL_W
    row_blocks = tl.cdiv(computed, BLOCK_ROWS)
    in_group = (tl.program_id(0) % row_blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = tl.program_id(1)
    positions = (tl.program_id(0) // row_blocks).to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    used = positions < num_positions
    out_size = out_depth * out_height * out_width
    image = positions // out_size
    at = (positions - image * out_size).to(tl.int32)
    first_d = at // (out_height * out_width) * STEP_D - PAD_D
    first_h = at // out_width % out_height * STEP_H - PAD_H
    first_w = at % out_width * STEP_W - PAD_W
    if WIDE:
        depth_step, height_step = tl.cast(depth_stride, tl.int64), tl.cast(height_stride, tl.int64)
        width_step = tl.cast(width_stride, tl.int64)
    else:
        depth_step, height_step, width_step = depth_stride, height_stride, width_stride
    base = x + image * image_stride + group * group_channels
    base += first_d * depth_step + first_h * height_step + first_w * width_step
    row_begin = filters + (group * computed + in_group).to(tl.int64) * (TAPS * group_channels)
    channel_blocks = tl.cdiv(group_channels, BLOCK_K)
    accumulator = tl.zeros([BLOCK_POSITIONS, BLOCK_ROWS], dtype=ACCUMULATOR)
    for step in range(TAPS * channel_blocks):
        tap = step // channel_blocks
        c = step % channel_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        tap_d = tap // (KERNEL_H * KERNEL_W) * DILATION_D
        tap_h = tap // KERNEL_W % KERNEL_H * DILATION_H
        tap_w = tap % KERNEL_W * DILATION_W
        inside = used
        if KERNEL_D > 1 or PAD_D > 0:
            inside = inside & (first_d + tap_d >= 0) & (first_d + tap_d < depth)
        if KERNEL_H > 1 or PAD_H > 0:
            inside = inside & (first_h + tap_h >= 0) & (first_h + tap_h < height)
        if KERNEL_W > 1 or PAD_W > 0:
            inside = inside & (first_w + tap_w >= 0) & (first_w + tap_w < width)
        offset = tap_d * depth_step + tap_h * height_step + tap_w * width_step
        value_mask = inside[:, None]
        row_mask = (in_group < computed)[:, None]
        if not EVEN_K:
            value_mask = value_mask & (c < group_channels)[None, :]
            row_mask = row_mask & (c < group_channels)[None, :]
        value = tl.load((base + offset)[:, None] + c[None, :], mask=value_mask, other=0)
        weight = tl.load(row_begin[:, None] + (tap * group_channels + c)[None, :], mask=row_mask, other=0)
        accumulator = tl.dot(value, tl.trans(weight), accumulator, out_dtype=ACCUMULATOR)
    products = accumulator.to(tl.float32)
    if HAS_SCALE:
        scale = tl.load(image_scale + image, mask=used, other=0)
    begin = out + image * out_image_stride + at.to(tl.int64) * out_position_stride
    for copy in range(tl.cdiv(per_group, computed)):
        local = copy * computed + in_group
        stored = (in_group < computed) & (local < per_group)
        channel = group * per_group + local
        result = products
        if SCALED:
            result = result * tl.load(alpha + channel // rows_per_alpha, mask=stored, other=0).to(tl.float32)[None, :]
        if HAS_SCALE:
            result = result * scale[:, None]
        if HAS_BIAS:
            result = result + tl.load(bias + channel, mask=stored, other=0).to(tl.float32)[None, :]
        result = activate(result, FUNCTION).to(out.dtype.element_ty)
        place = begin[:, None] + (channel.to(tl.int64) * out_channel_stride)[None, :]
        tl.store(place, result, mask=used[:, None] & stored[None, :])
