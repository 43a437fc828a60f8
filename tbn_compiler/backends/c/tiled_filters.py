"""Convolutions whose groups have few input channels, depthwise ones above all: filters slide over padded images.

What makes other kernels fast is that an input meets many rows of signs. Where a group has few rows, or rows are short,
little is left of that, and each product is an addition of its own. Here it takes as few instructions as it can:

1. The images of a group's channels are copied with zeros around them, so that nothing has to ask for the border.
2. For each output channel the signs become weights once, ``alpha`` and ``-alpha``: with floating-point instructions a
   multiplication takes no longer than an addition. Several positions of a line are summed at once.

Without floating-point instructions the images become integers with one exponent (``templates/tiled_fixed.c``), and
these are added and subtracted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.geometry import window_struct
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.plan import Argument, At, Call, Implementation, Index, Struct, Workspace
from tbn_compiler.backends.c.registry import Context
from tbn_compiler.backends.c.tiled_decoding import decoded_signs
from tbn_compiler.backends.c.tiled_instances import FILTER_COLUMNS, FILTER_STRIDES, WHOLE_FILTERS, filter_name
from tbn_compiler.backends.c.tiled_rows import memory_limit, precision
from tbn_compiler.backends.c.tiled_structs import row_alpha


def filters(operation: ir.TiledConv, context: Context, title: str) -> Implementation | None:
    """A convolution with groups on packed bits, by kernels that slide filters over padded images.

    Returns:
        ``None`` where a filter has several scales, and where the images of a group would take much memory.
    """
    layout, product, window, (source,) = operation.layout, operation.product, operation.window, operation.inputs
    whole = product.scales_results and operation.input_alpha is None
    if not (operation.tile.packed and whole and product.groups > 1):
        return None
    channels, size = layout.shape[1], _plane(window)
    planes = Workspace("planes", channels * math.prod(size), "float32" if context.options.processor.fpu else "int32")
    input_bytes = 4 * operation.input_channels * window.input_size
    fixed = not context.options.processor.fpu
    copied = fixed or size != window.input
    if copied and channels > 1 and planes.nbytes > max(memory_limit(context.options), input_bytes // 4):
        return None
    layer, geometry = _struct(operation, title, size), window_struct(window)
    repeat = operation.samples * product.groups
    images = At(source, stride=channels * window.input_size)
    prepared = "" if product.contiguous else f"filters_{layout.unique_rows}x{layout.row_size}"
    signs = operation.tile
    if prepared:
        rows = decoded_signs(operation)[: layout.unique_rows]
        signs = context.prepare(operation.tile, prepared, lambda: np.packbits(rows, bitorder="little"), rows.tobytes())
    weights = Workspace("weights", layout.row_size, planes.dtype)
    target = At(operation.output, stride=layout.rows // product.groups * window.output_size)
    kernel = _kernel(operation, context.options)
    calls: tuple[Call, ...] = ()
    place: At | Workspace = images
    block: tuple[Argument, ...] = (Workspace("block", 2, "int32"),) if fixed else ()
    if copied:
        arguments: tuple[Argument, ...] = (layer, geometry, Index(), images)
        arguments += (precision(layout.row_size), *block) if fixed else ()
        calls = (Call(f"tiled_{'fixed_' if fixed else ''}planes", (*arguments, planes), repeat=repeat),)
        place = planes
    calls += (Call(kernel, (layer, geometry, signs, place, *block, Index(), weights, target), repeat=repeat),)
    instructions = _instructions(operation, kernel, copied, context.options)
    choice = f"filters slide over {'padded ' if copied else ''}images: about {instructions:,} instructions for a group"
    return Implementation(title, calls, cost=repeat * instructions, choice=choice)


def _plane(window: ir.Window) -> tuple[int, int]:
    """Size of an image with as many zeros around it as windows reach."""
    reach = (
        (output - 1) * stride + (kernel - 1) * dilation + 1
        for output, stride, kernel, dilation in zip(
            window.output, window.stride, window.kernel, window.dilation, strict=True
        )
    )
    height, width = (
        max(padding + size, most) for padding, size, most in zip(window.padding, window.input, reach, strict=True)
    )
    return height, width


def _kernel(operation: ir.TiledConv, options: Options) -> str:
    """The fastest kernel that can compute the layer, or the one of least code."""
    window = operation.window
    if not options.processor.fpu:
        return "tiled_fixed_filter"
    neighbours = window.dilation[1] == 1 or window.kernel[1] == 1
    if options.optimize == "size" or window.stride[1] not in FILTER_STRIDES or not neighbours:
        return filter_name()
    if window.kernel in WHOLE_FILTERS:
        return filter_name(*window.kernel, window.stride[1], operation.layout.shape[1] > 1)
    if window.kernel[1] in FILTER_COLUMNS:
        return filter_name(0, window.kernel[1], window.stride[1])
    return filter_name()


@dataclass(frozen=True)
class _Costs:
    """Executed instructions of the kernels on one kind of processor, fitted to counts.

    Attributes:
        copy: for each element of an image.
        line: for each line of an image or of the output.
        filter: for each output channel, and for each of its weights.
        output: for each output.
    """

    copy: float
    line: float
    filter: tuple[float, float]
    output: float


_COSTS = {
    "cortex-m4": _Costs(3, 12, (40, 12), 6.5),
    "cortex-m3": _Costs(42, 14, (40, 12), 180),
    "cortex-m0plus": _Costs(52, 16, (50, 15), 310),
}


def _instructions(operation: ir.TiledConv, kernel: str, copied: bool, options: Options) -> int:
    """Estimated number for the outputs of one group of one sample."""
    window, layout = operation.window, operation.layout
    costs = _COSTS[options.processor.costs]
    channels, (height, width) = layout.shape[1], window.output
    outputs, lines = layout.rows // operation.groups, channels * window.kernel[0]
    copies = channels * (costs.copy * window.input_size + costs.line * window.input[0]) if copied else 0
    taps, step = channels * window.kernel_size, window.stride[1]
    rows, columns = window.kernel

    def block(size: int) -> float:
        """Instructions for so many positions at once."""
        loads = (size - 1) * step + columns if step < columns else size * columns  # of inputs, for a line of a filter
        if "channels" in kernel:
            return channels * (rows * (columns * (size + 1) + loads) + 8) + 14
        if "columns" in kernel:
            return lines * (columns * (size + 1) + loads + 6) + 12 * channels + 10
        return rows * (columns * size + loads) + 6

    line = 0.0
    if kernel == filter_name() or not options.processor.fpu:
        # Four positions, or one, take as long.
        line += (width // 4 + width % 4) * (17 * taps + 10 * lines + 20)
    else:
        left = width
        for size in (4 if kernel == filter_name(rows, columns, step) else 8, 4, 1):
            line += left // size * block(size)
            left %= size
    each = height * (line + costs.line + costs.output * width) + costs.filter[0] + costs.filter[1] * taps
    return round(copies + outputs * each)


def _struct(operation: ir.TiledConv, title: str, size: tuple[int, int]) -> Struct:
    """``tiled_filter_layer``: the filters, the padded images, and what happens to the results."""
    layout, product = operation.layout, operation.product
    fields = (
        ("groups", product.groups),
        ("channels", layout.shape[1]),
        ("outputs", product.group_rows),
        ("plane_height", size[0]),
        ("plane_width", size[1]),
        ("elements", layout.row_size),
        ("unique_rows", layout.unique_rows),
        ("outputs_per_alpha", product.rows_per_alpha),
        ("alpha", row_alpha(operation)),
        ("bias", operation.bias),
        ("lowest", 0.0 if operation.relu else -math.inf),
    )
    return Struct("tiled_filter_layer", f"{operation.layer}_filters", title, fields)
