"""Transpose convolutions on tiles: what has equal signs is summed before anything is multiplied.

Those of stride 1 become convolutions where they can (:mod:`~tbn_compiler.backends.c.turn`). The others go pixel by
pixel. Rows of the weight are input channels. With ``x_c`` the channels of one pixel, row ``c`` of signs equal to row
``c mod R`` and scaled by ``alpha_c``, the pixel adds to the outputs under its window, of all channels::

    T^T z,    z_u = sum of alpha_c x_c over the channels c with c mod R = u

1. The channels of a pixel are scaled and summed: ``R`` numbers are left for each group.
2. A kernel for rows of signs multiplies them; each output channel and place in the window is a row.
3. The products are added to the image.
"""

from __future__ import annotations

import numpy as np

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.geometry import window_struct
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.plan import At, Call, Implementation, Index, Struct, Workspace
from tbn_compiler.backends.c.registry import Context, implements
from tbn_compiler.backends.c.tiled_decoding import transposed_tables
from tbn_compiler.backends.c.tiled_rows import (
    choose,
    multiply_arguments,
    piece_instructions,
)
from tbn_compiler.backends.c.tiled_structs import describe, row_alpha, weight_struct
from tbn_compiler.tiling import TiledProduct


@implements(ir.TiledConvTranspose)
def tiled_conv_transpose(operation: ir.TiledConvTranspose, context: Context) -> Implementation:
    """By rows of signs, or one weight at a time, in any layout."""
    layout, groups = operation.layout, operation.groups
    sizes = f"{layout.rows} -> {layout.shape[1] * groups} channels, {' x '.join(map(str, layout.shape[2:]))}"
    several = f", {groups} groups" if groups > 1 else ""
    title = f"tiled transpose conv {sizes}{several}{describe(operation, layout.unique_rows)}"
    ways = (_by_rows(operation, context, title), _one_by_one(operation, context, title))
    return min((way for way in ways if way is not None), key=lambda way: way.cost)


@implements(ir.SumCopies)
def sum_copies(operation: ir.SumCopies, context: Context) -> Implementation:
    """What a transpose convolution that is a convolution does before."""
    (source,), alpha = operation.inputs, operation.alpha
    groups = operation.output.size // (operation.different * operation.inner)
    samples = operation.output.shape[0]
    channels = groups // samples * operation.channels  # of a sample
    numbers = (
        channels // (1 if alpha is None else alpha.size),
        operation.channels,
        operation.different,
        operation.inner,
    )
    size = channels * operation.inner
    pointers = (At(source, stride=size), At(operation.output, stride=operation.output.size // samples))
    call = Call("tiled_sum_copies", (alpha, *numbers, *pointers, groups // samples), repeat=samples)
    title = f"sum channels with equal signs, {channels} -> {groups // samples * operation.different}"
    per_element = _SUM[context.options.processor.costs]
    return Implementation(title, (call,), cost=samples * per_element * size)


def _by_rows(operation: ir.TiledConvTranspose, context: Context, title: str) -> Implementation | None:
    """By a kernel for rows of signs.

    Returns:
        ``None`` for full-precision tiles, where scales change inside rows, and where the rows would be larger than the
        tile and must not.
    """
    layout, window, groups, options = operation.layout, operation.window, operation.groups, context.options
    product = TiledProduct(layout, operation.alpha.size, groups)
    if not operation.tile.packed or not product.scales_results:
        return None
    tables = transposed_tables(operation, product)
    _, rows, inputs = tables.shape
    kernel, reason = choose(rows, inputs, options)
    stored, before = len(tables) * kernel.table_bytes, operation.tile.array.nbytes
    if options.optimize == "size" and stored > before * 9 // 8 + 4:
        return None
    stem = kernel.kernel.removeprefix("tiled_")
    table = context.prepare(
        operation.tile,
        f"{stem}_{rows}x{inputs}" + (f"_by_{len(tables)}" if len(tables) > 1 else ""),
        lambda: np.concatenate([kernel.make_table(signs) for signs in tables]),
        key=tables.tobytes(),
    )
    (source,), outputs, size = operation.inputs, layout.shape[1] * groups, window.kernel_size
    samples = operation.output.size // (outputs * window.input_size)
    repeat, stride = samples * window.output_size, -(-rows // kernel.granule) * kernel.granule
    sums, products = Workspace("sums_of_copies", groups * inputs), Workspace("products", groups * stride)
    layer = Struct(
        "tiled_transpose_layer",
        f"{operation.layer}_layer",
        title,
        (
            ("groups", groups),
            ("inputs", product.group_rows),
            ("unique_inputs", inputs),
            ("outputs", layout.shape[1]),
            ("stride", stride),
            ("inputs_per_alpha", product.rows_per_alpha),
            ("alpha", row_alpha(operation)),
        ),
    )
    geometry = window_struct(window)
    image = At(operation.output, stride=outputs * window.input_size)
    period = len(tables) if 1 < len(tables) < groups else 0
    rows_table = At(table, inner_stride=table.array.size // len(tables), inner_period=period)
    multiply = (
        rows_table if len(tables) > 1 else table,
        At(sums, inner_stride=inputs) if groups > 1 else sums,
        *multiply_arguments(kernel, rows, inputs),
        At(products, inner_stride=stride) if groups > 1 else products,
    )
    calls = (
        Call("conv_transpose_start", (geometry, operation.bias, outputs, image), repeat=samples),
        Call("tiled_transpose_sums", (layer, geometry, source, Index(), sums), repeat=repeat),
        Call(kernel.kernel, multiply, repeat=repeat, inner=groups),
        Call("tiled_transpose_spread", (layer, geometry, products, Index(), operation.output), repeat=repeat),
    )
    each = groups * (kernel.instructions + piece_instructions(groups))
    each += _instructions(layout.rows, outputs * size, options)
    choice = reason
    if tables.size > layout.tile_size:
        why = "all rows of the tile differ in the weight" if product.contiguous else "rows of the weight differ"
        choice = f"{why}: they are stored whole, {stored:,} bytes in place of {before:,}; {reason}"
    cost = repeat * each + 5 * operation.output.size
    return Implementation(title, calls, cost=cost, choice=choice)


# Executed instructions for each element that is scaled and summed.
_SUM = {"cortex-m4": 5, "cortex-m3": 100, "cortex-m0plus": 150}
# Executed instructions for each input channel and each product of a pixel, fitted to counts.
_COSTS = {"cortex-m4": (8, 12), "cortex-m3": (110, 45), "cortex-m0plus": (170, 60)}


def _instructions(channels: int, products: int, options: Options) -> int:
    """Estimated number for summing the channels of a pixel, and for adding its products to the image."""
    channel, spread = _COSTS[options.processor.costs]
    return channel * channels + spread * products


def _one_by_one(operation: ir.TiledConvTranspose, context: Context, title: str) -> Implementation:
    """One weight at a time, in any layout."""
    window, layout, (source,) = operation.window, operation.layout, operation.inputs
    outputs = layout.shape[1] * operation.groups
    layer = Struct(
        "tiled_conv_transpose",
        f"{operation.layer}_layer",
        title,
        (
            ("in_channels", layout.rows),
            ("out_channels", outputs),
            ("groups", operation.groups),
            ("rows_per_alpha", operation.product.rows_per_alpha),
            ("alpha", row_alpha(operation)),
            ("bias", operation.bias),
        ),
    )
    samples = operation.output.size // (outputs * window.input_size)
    pointers = (
        At(source, stride=layout.rows * window.output_size),
        At(operation.output, stride=outputs * window.input_size),
    )
    arguments = (layer, weight_struct(operation, title), window_struct(window), operation.tile, *pointers)
    kernel = f"conv_transpose_{'bits' if operation.tile.packed else 'float'}"
    weights = samples * layout.rows * layout.row_size
    work = {
        kernel: weights * window.output_size,
        f"{kernel}.weight": weights,
        "conv_transpose.result": operation.output.size,
    }
    reason = "full-precision tile"
    if operation.tile.packed:
        scaled = operation.product.scales_results
        reason = "rows of signs would take more flash or instructions" if scaled else "scales change inside rows"
    return context.implementation(title, (Call(kernel, arguments, repeat=samples),), work, reason)
