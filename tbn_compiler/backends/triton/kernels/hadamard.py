"""Copies with Hadamard signs: the results of column groups, mixed into those of the copies.

Input ``c`` belongs to column group ``c mod P``, and copy ``i`` takes group ``j`` times ``H[i, j] = (-1) ** popcount(i &
j)``. A row of the tile has a result ``z_j`` for each group; its copies have ``y_i = sum_j H[i, j] z_j``, which takes
``log2(P)`` additions each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tbn_compiler.backends.triton.kernels.epilogue import activate
from tbn_compiler.backends.triton.kernels.weights import load_operand


@triton.jit
def mix(parts, P: tl.constexpr):
    """Results of ``P`` copies from those of ``P`` column groups, a tuple of blocks each."""
    half: tl.constexpr = P // 2
    if P == 1:
        return parts
    else:
        sums = ()
        differences = ()
        for i in tl.static_range(half):
            sums = sums + (parts[i] + parts[i + half],)  # noqa: RUF005 (Triton's tuples)
            differences = differences + (parts[i] - parts[i + half],)  # noqa: RUF005
        return mix(sums, half) + mix(differences, half)


@triton.jit
def mix_last(z, COUNT: tl.constexpr, P: tl.constexpr, LEFT: tl.constexpr):
    """The same along the last axis of ``[COUNT, P]``; ``LEFT`` is ``P`` outside.

    Each step adds and subtracts the halves of the axis and lets their bit of the index become the lowest: after all
    steps the bits are in their order again.
    """
    half: tl.constexpr = P // 2
    rest: tl.constexpr = LEFT // 2
    if LEFT == 1:
        return z
    else:
        first, second = tl.split(tl.permute(tl.reshape(z, [COUNT, 2, half]), [0, 2, 1]))
        return mix_last(tl.reshape(tl.join(first + second, first - second), [COUNT, P]), COUNT, P, rest)


@triton.jit
def unpack_groups(
    tile,
    input_alpha,
    out,
    num_rows,
    columns,
    row_size,
    q,
    KIND: tl.constexpr,
    REPLICAS: tl.constexpr,
    LAST: tl.constexpr,
    TAPS: tl.constexpr,
    P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The rows of a tile as numbers by column groups, ``[P, num_rows, columns / P]``, for a library's kernel.

    Column ``k`` is tap ``k mod TAPS`` of channel ``k // TAPS``. Channels lie innermost with ``LAST``, otherwise taps.
    Grid: (row blocks * column blocks,).
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    rows = tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    first_k = tl.program_id(0) // row_blocks * BLOCK_K
    weight = load_operand(
        tile, tile, input_alpha, rows, first_k, num_rows, columns, row_size, q, 0,
        KIND, False, REPLICAS, out.dtype.element_ty, BLOCK_ROWS, BLOCK_K,
    )  # fmt: skip
    k = first_k + tl.arange(0, BLOCK_K)
    channel, tap = k // TAPS, k % TAPS
    in_group = channel // P
    place = tap * (columns // TAPS // P) + in_group if LAST else in_group * TAPS + tap
    group = (channel % P).to(tl.int64) * num_rows
    begin = (group[None, :] + rows[:, None]) * (columns // P)
    tl.store(out + begin + place[None, :], weight, mask=(rows < num_rows)[:, None] & (k < columns)[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def linear_groups(
    x,
    weight,
    alpha,
    bias,
    token_scale,
    out,
    num_tokens,
    num_rows,
    columns,
    group_stride,
    rows_per_alpha,
    P: tl.constexpr,
    LEFT: tl.constexpr,
    HAS_TOKEN_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Products of all column groups on tensor cores, mixed in registers, every copy stored.

    ``x [P, num_tokens, columns]`` and ``weight [P, num_rows, columns]`` are 16-bit floats or ``int8``, whose sums are
    exact until the scales come in. ``group_stride`` is that of ``x``. ``LEFT``: the weight is the left operand, for few
    tokens. Blocks of eight token blocks go through the row blocks together. Grid: (row blocks * token blocks,).
    """
    ACCUMULATOR: tl.constexpr = tl.int32 if tl.int8 == x.dtype.element_ty else tl.float32
    block = tl.program_id(0)
    token_blocks, row_blocks = tl.cdiv(num_tokens, BLOCK_TOKENS), tl.cdiv(num_rows, BLOCK_ROWS)
    first = block // (8 * row_blocks) * 8
    height = tl.minimum(token_blocks - first, 8)
    inside = block % (8 * row_blocks)
    tokens = (first + inside % height) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows = inside // height * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    k = tl.arange(0, BLOCK_K)
    token_begin = x + tl.minimum(tokens, num_tokens - 1).to(tl.int64)[:, None] * columns + k[None, :]
    row_begin = weight + tl.minimum(rows, num_rows - 1).to(tl.int64)[:, None] * columns + k[None, :]
    groups = ()
    for group in tl.static_range(P):
        token_group = token_begin + tl.cast(group_stride, tl.int64) * group
        row_group = row_begin + tl.cast(num_rows, tl.int64) * columns * group
        if LEFT:
            sums = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], dtype=ACCUMULATOR)
        else:
            sums = tl.zeros([BLOCK_TOKENS, BLOCK_ROWS], dtype=ACCUMULATOR)
        for first_k in range(0, columns, BLOCK_K):
            if EVEN_K:
                value = tl.load(token_group + first_k)
                used = tl.load(row_group + first_k)
            else:
                left = (k < columns - first_k)[None, :]
                value = tl.load(token_group + first_k, mask=left, other=0)
                used = tl.load(row_group + first_k, mask=left, other=0)
            if LEFT:
                sums = tl.dot(used, tl.trans(value), sums, out_dtype=ACCUMULATOR)
            else:
                sums = tl.dot(value, tl.trans(used), sums, out_dtype=ACCUMULATOR)
        groups = groups + (sums,)  # noqa: RUF005
    copies = mix(groups, P)
    stored = (tokens < num_tokens)[:, None] & (rows < num_rows)[None, :]
    place = out + tokens.to(tl.int64)[:, None] * (num_rows * P) + rows[None, :]
    for copy in tl.static_range(P):
        row = copy * num_rows + rows
        value = (tl.trans(copies[copy]) if LEFT else copies[copy]).to(tl.float32)
        value = value * tl.load(alpha + row // rows_per_alpha, mask=rows < num_rows, other=0).to(tl.float32)[None, :]
        if HAS_TOKEN_SCALE:
            value = value * tl.load(token_scale + tokens, mask=tokens < num_tokens, other=0)[:, None]
        if HAS_BIAS:
            value = value + tl.load(bias + row, mask=rows < num_rows, other=0).to(tl.float32)[None, :]
        tl.store(place + copy * num_rows, activate(value, FUNCTION).to(out.dtype.element_ty), mask=stored)


@triton.jit
def mix_channels(
    z,
    alpha,
    bias,
    out,
    num_rows,
    positions,
    rows_per_alpha,
    z_image_stride,
    z_group_stride,
    z_channel_stride,
    z_position_stride,
    out_image_stride,
    out_channel_stride,
    out_position_stride,
    P: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FUNCTION: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """``out [N, P * num_rows, positions]`` from the results of column groups ``z [N, P, num_rows, positions]``.

    Both have any strides. The tokens of a linear layer are the positions of one image. Grid: (row blocks * position
    blocks * N,).
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_ROWS)
    position_blocks = tl.cdiv(positions, BLOCK_POSITIONS)
    rows = tl.program_id(0) % row_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    block = tl.program_id(0) // row_blocks
    image = (block // position_blocks).to(tl.int64)
    at = (block % position_blocks).to(tl.int64) * BLOCK_POSITIONS + tl.arange(0, BLOCK_POSITIONS)
    inside = (at < positions)[:, None] & (rows < num_rows)[None, :]
    source = z + image * z_image_stride + (at * z_position_stride)[:, None]
    source += (rows.to(tl.int64) * z_channel_stride)[None, :]
    groups = ()
    for group in tl.static_range(P):
        part = tl.load(source + tl.cast(z_group_stride, tl.int64) * group, mask=inside, other=0)
        groups = groups + (part.to(tl.float32),)  # noqa: RUF005
    copies = mix(groups, P)
    target = out + image * out_image_stride + (at * out_position_stride)[:, None]
    for copy in tl.static_range(P):
        channel = copy * num_rows + rows
        value = copies[copy]
        value = value * tl.load(alpha + channel // rows_per_alpha, mask=rows < num_rows, other=0).to(tl.float32)[None]
        if HAS_BIAS:
            value = value + tl.load(bias + channel, mask=rows < num_rows, other=0).to(tl.float32)[None]
        place = target + (channel.to(tl.int64) * out_channel_stride)[None, :]
        tl.store(place, activate(value, FUNCTION).to(out.dtype.element_ty), mask=inside)
