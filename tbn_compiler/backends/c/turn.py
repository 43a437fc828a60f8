"""Transpose convolutions of stride 1 as convolutions: a rewrite of the graph.

With stride 1, a transpose convolution is the convolution with inputs and outputs of the weight exchanged and the window
turned by half a circle, ``W'[o, c, i] = W[c, o, K - 1 - i]``, and with ``dilation * (K - 1) - padding`` rows and
columns of padding. Where rows of ``W``, which belong to input channels, have equal signs, channels are scaled and
summed first. What follows is a convolution of fewer channels on a tile that holds whole rows, for which there are the
fastest kernels.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.tiled_decoding import transposed_tables
from tbn_compiler.packing import pack_bits
from tbn_compiler.tiling import TiledProduct, TileLayout


def turned(operation: ir.TiledConvTranspose) -> tuple[ir.Operation, ...] | None:
    """The operations that a transpose convolution becomes.

    Returns:
        ``None`` where it has a stride, crops more than the window reaches, has scales inside rows, a full-precision
        tile, or so many different rows that they are more than the tile.
    """
    window, layout, groups = operation.window, operation.layout, operation.groups
    product = TiledProduct(layout, operation.alpha.size, groups)
    reach = [d * (k - 1) - p for d, k, p in zip(window.dilation, window.kernel, window.padding, strict=True)]
    if window.stride != (1, 1) or min(reach) < 0 or not (operation.tile.packed and product.scales_results):
        return None
    tables = transposed_tables(operation, product)  # by place in the window
    if tables.size > layout.tile_size:
        return None
    count, channels, outputs = len(tables), product.rows, layout.shape[1]
    by_place = tables.reshape(count, window.kernel_size, outputs, channels)
    weight = by_place[:, ::-1].transpose(0, 2, 3, 1).astype(np.float32)
    size = layout.shape[2:]
    shape = (groups * outputs, channels, *size)
    bits = pack_bits(torch.from_numpy(np.ascontiguousarray(weight)) - 0.5).numpy()
    bits.flags.writeable = False
    (source,), one = operation.inputs, np.ones(1, np.float32)
    one.flags.writeable = False
    alone = channels == product.group_rows and operation.alpha.size == 1
    samples = operation.output.size // (groups * outputs * window.input_size)
    sums = ir.Value(f"{operation.name}_sums", (samples, groups * channels, *window.output))
    convolution = ir.TiledConv(
        operation.name,
        operation.layer,
        (source if alone else sums,),
        operation.output,
        tile=ir.Constant(f"{operation.tile.name}_turned", bits, packed=True),
        alpha=operation.alpha if alone else ir.Constant(f"{operation.layer}.one", one),
        bias=operation.bias,
        input_alpha=None,
        layout=TileLayout(shape, groups // count),
        window=replace(window, input=window.output, output=window.input, padding=(reach[0], reach[1])),
        groups=groups,
    )
    if alone:
        return (convolution,)
    head = (sums.name, operation.layer, operation.inputs, sums)
    alpha = None if operation.alpha.size == 1 and operation.alpha.array[0] == 1 else operation.alpha
    copies = ir.SumCopies(
        *head,
        alpha=alpha,
        channels=product.group_rows,
        different=channels,
        inner=window.output_size,
    )
    return copies, convolution
