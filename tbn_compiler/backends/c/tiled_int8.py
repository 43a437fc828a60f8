"""Layers on tiles whose inputs are int8: sums of integers with signs, scaled once.

::

    sum_r = sum_j s[r, j] x[j]                               exact, in 32 bits
    y     = alpha s_x sum + bias                             as float, or
    y     = clamp((sum 2^u M / 2^32 + B) / 2^shift)          as int8, with alpha s_x / s_y and bias / s_y in M and B

Two positions of a convolution, or two vectors, are computed at a time: as ``x0 + 65536 * x1``, since whatever adds and
subtracts such numbers does so with both. Their sums come apart again as long as the first one fits 16 bits, which it
does for up to 258 inputs; longer rows are summed in parts.

Rows are stored whole in any layout: those of the tile where it holds whole rows, else all rows that differ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.geometry import window_struct
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.plan import Argument, At, Call, Implementation, Index, Struct, Workspace
from tbn_compiler.backends.c.registry import Context
from tbn_compiler.backends.c.tiled_decoding import decoded_signs
from tbn_compiler.backends.c.tiled_instances import (
    PAIR_STRIDES,
    Arithmetic,
    Finish,
    depthwise_name,
    finish_name,
    pair_patch_name,
)
from tbn_compiler.backends.c.tiled_rows import RowsKernel, integer_candidates, integer_instructions, memory_limit
from tbn_compiler.backends.c.tiled_structs import describe

# Inputs whose sum fits 16 bits.
_PAIR_INPUTS = (2**15 - 1) // ir.INT8_LIMIT


def why_float(operation: ir.Tiled) -> str | None:
    """Why a layer on integer inputs is computed in floating point all the same; ``None``: it is not."""
    if isinstance(operation, ir.TiledConvTranspose):
        return "transpose convolutions take floats"
    if not operation.tile.packed:
        return "full-precision tile"
    if operation.input_alpha is not None:
        return "its input stands for scaled copies"
    if not operation.product.scales_results:
        return "scales change inside rows"
    if _is_depthwise(operation) and operation.layout.row_size > _PAIR_INPUTS:
        return f"the windows of a channel hold more than {_PAIR_INPUTS} elements"
    if ir.INT8_LIMIT * operation.layout.row_size >= 2**31:
        return "its sums need more than 32 bits"
    return None


def _is_depthwise(operation: ir.Tiled) -> bool:
    """Whether each filter reads one channel."""
    return isinstance(operation, ir.TiledConv) and operation.groups > 1 and operation.layout.shape[1] == 1


def integer_layer(operation: ir.TiledLinear | ir.TiledConv, context: Context) -> Implementation:
    """Sums of two positions or vectors at a time, of one if there is only one, and what follows them."""
    title = _title(operation)
    if isinstance(operation, ir.TiledConv) and _is_depthwise(operation):
        return _depthwise(operation, context, title)
    layout, options = operation.layout, context.options
    geometry = _Geometry.of(operation)
    pair = _in_pairs(operation, geometry)
    repeat = geometry.pairs if pair else 1
    groups = operation.groups if isinstance(operation, ir.TiledConv) else 1
    calls: list[Call] = []
    instructions, reason = 0, ""
    tables = set()
    signs = decoded_signs(operation).reshape(groups, -1, layout.row_size)
    for group in range(groups):
        found, instructions, reason, stored = _group_calls(operation, context, title, geometry, group, signs[group])
        calls += [replace(call, repeat=repeat) for call in found]
        tables.update(stored)
    each = groups * instructions
    each += integer_instructions("finish", layout.rows, options) * (2 if pair else 1)
    each += integer_instructions("patch", layout.row_size * groups, options) if pair else 0
    size = sum(table.array.nbytes for table in tables)
    if size > operation.tile.array.nbytes * 5 // 4 + 4:
        different = f"{operation.product.rows * groups} different rows"
        reason = f"{different} are stored whole, {size:,} bytes for a tile of {operation.tile.array.nbytes:,}; {reason}"
    return Implementation(title, tuple(calls), cost=repeat * each, choice=reason)


def _in_pairs(operation: ir.TiledLinear | ir.TiledConv, geometry: _Geometry) -> bool:
    """Whether inputs are gathered for two results; a single result may read them where they are."""
    if geometry.positions > 1:
        return True
    if isinstance(operation, ir.TiledLinear):
        return False
    window = operation.window
    return window.kernel != window.input or window.padding != (0, 0)


def _group_calls(
    operation: ir.TiledLinear | ir.TiledConv,
    context: Context,
    title: str,
    geometry: _Geometry,
    group: int,
    signs: np.ndarray,
) -> tuple[list[Call], int, str, list[ir.Constant]]:
    """The calls for one group's outputs, whose rows have these signs, instructions of the sums and why, and tables."""
    layout, rows = operation.layout, operation.product.rows
    groups = operation.groups if isinstance(operation, ir.TiledConv) else 1
    if operation.product.group_rows % rows:
        rows = operation.product.group_rows  # the last repeat is not whole
    pair = _in_pairs(operation, geometry)
    parts = _parts(layout.row_size) if pair else [(0, layout.row_size)]
    arithmetic: Arithmetic = "pair" if pair else "int8"
    kernels, reason = _choose(rows, [end - start for start, end in parts], arithmetic, context.options)
    place: At | Workspace = At(operation.inputs[0], group * layout.row_size)
    calls: list[Call] = []
    if pair:
        place = Workspace("patch", layout.row_size, "int32")
        calls.append(_gather(operation, group, place))
    part_sums = -(-rows // kernels[0].granule) * kernels[0].granule
    sums = Workspace("sums", part_sums * len(parts), "int32")
    tables = []
    for index, (kernel, (start, end)) in enumerate(zip(kernels, parts, strict=True)):
        order = kernel.kernel.removeprefix("tiled_")
        table = context.constant(f"{operation.tile.name}_{order}", kernel.make_table(signs[:rows, start:end]))
        at = replace(place, offset=place.offset + start) if isinstance(place, At) else At(place, start)
        arguments: list[Argument] = [table, at, end - start, kernel.size]
        if kernel.memory:
            arguments.append(Workspace("memory", kernel.memory, "int32"))
        calls.append(Call(kernel.kernel, (*arguments, At(sums, index * part_sums))))
        tables.append(table)
    part = slice(group * layout.rows // groups, (group + 1) * layout.rows // groups)
    struct = _finish_struct(operation, context, title, geometry, rows, part, (len(parts), part_sums))
    both = (Index(), Workspace("apart", 2 * rows, "int32")) if pair else ()
    output = At(operation.output, part.start * geometry.output_stride)
    calls.append(Call(finish_name(pair, _result(operation)), (struct, sums, *both, output)))
    return calls, sum(kernel.instructions for kernel in kernels), reason, tables


def _depthwise(operation: ir.TiledConv, context: Context, title: str) -> Implementation:
    """Each channel by itself: its few signs become factors, which serve all positions."""
    layout, window, (source,) = operation.layout, operation.window, operation.inputs
    rows = operation.product.distinct_rows
    signs = np.packbits(decoded_signs(operation)[:rows], bitorder="little")
    table = context.constant(f"{operation.tile.name}_filters", signs)
    geometry = _Geometry.of(operation)
    struct = _finish_struct(operation, context, title, geometry, rows, slice(0, layout.rows), (1, rows))
    kind = (window.kernel[1], window.dilation[1], window.stride[1], _result(operation))
    padded, few = _padded_bytes(window), window.output[1] < 3
    # The kernel loads words that begin anywhere.
    limit = memory_limit(context.options) if context.options.processor.unaligned_loads else 0
    by4 = (window.kernel, window.dilation) == ((3, 3), (1, 1)) and window.stride[1] in PAIR_STRIDES
    by4 = by4 and not few and padded <= limit
    kernel = depthwise_name(*kind, by4=by4)
    call = Call(
        kernel,
        (
            *(window_struct(window), struct, layout.rows // operation.groups, table),
            Workspace("taps", window.kernel_size, "int32"),
            *([Workspace("padded", padded, "uint8")] if by4 else []),
            At(source, stride=operation.input_channels * window.input_size),
            At(operation.output, stride=layout.rows * window.output_size),
        ),
        repeat=operation.samples,
    )
    instructions = integer_instructions("depthwise by 4" if by4 else "depthwise", window.kernel_size, context.options)
    instructions += integer_instructions("finish", 1, context.options)
    reason = "a filter for each channel" + (", four positions at a time" if by4 else "")
    return Implementation(title, (call,), cost=operation.output.size * instructions, choice=reason)


def _padded_bytes(window: ir.Window) -> int:
    """Memory for an image of bytes with zeros around it, read four positions at a time (``int8_depthwise_by4.c``)."""
    pitch = -(-window.output[1] // 4) * 4 * window.stride[1] + 4
    return ((window.output[0] - 1) * window.stride[0] + window.kernel[0]) * pitch


def _title(operation: ir.TiledLinear | ir.TiledConv) -> str:
    layout, rows = operation.layout, operation.product.rows
    what = f"tiled linear {layout.row_size} -> {layout.rows}"
    if isinstance(operation, ir.TiledConv):
        kernel = " x ".join(map(str, layout.shape[2:]))
        groups = f", {operation.groups} groups" if operation.groups > 1 else ""
        what = f"tiled conv {operation.input_channels} -> {layout.rows} channels, {kernel}{groups}"
        rows *= operation.groups
    return f"{what} in int8{describe(operation, rows)}"


@dataclass(frozen=True)
class _Geometry:
    """Where the results of positions stand; pairs of them lie in one line.

    Attributes:
        samples, lines, width: positions by sample, line and place in it.
        sample_stride, line_stride, position_stride, output_stride: elements between them in the result.
    """

    samples: int
    lines: int
    width: int
    sample_stride: int
    line_stride: int
    position_stride: int
    output_stride: int

    @classmethod
    def of(cls, operation: ir.TiledLinear | ir.TiledConv) -> _Geometry:
        outputs = operation.layout.rows
        if isinstance(operation, ir.TiledLinear):
            return cls(1, 1, operation.output.size // outputs, 0, 0, outputs, 1)
        (lines, width), size = _flat(operation.window).output, operation.window.output_size
        return cls(operation.samples, lines, width, outputs * size, width, 1, size)

    @property
    def positions(self) -> int:
        return self.samples * self.lines * self.width

    @property
    def pairs(self) -> int:
        return self.samples * self.lines * (-(-self.width // 2))


def _flat(window: ir.Window) -> ir.Window:
    """The window of a convolution of single pixels as one line, so that pairs may lie anywhere."""
    if window.kernel == (1, 1) and window.stride == (1, 1) and window.input == window.output:
        one = (1, window.input_size)
        return replace(window, input=one, output=one)
    return window


def _gather(operation: ir.TiledLinear | ir.TiledConv, group: int, patch: Workspace) -> Call:
    (source,) = operation.inputs
    if isinstance(operation, ir.TiledLinear):
        n = operation.layout.row_size
        return Call("int8_pair_vectors", (source, n, operation.output.size // operation.layout.rows, Index(), patch))
    window = _flat(operation.window)
    kernel = pair_patch_name(window.kernel[1], window.dilation[1], window.stride[1])
    channels = operation.layout.shape[1]
    place = At(source, group * channels * window.input_size)
    return Call(kernel, (window_struct(window), channels, operation.input_channels, place, Index(), patch))


def _parts(inputs: int) -> list[tuple[int, int]]:
    """Inputs in equal parts whose sums fit 16 bits; a multiple of 4 each but the last one, as lookups take them."""
    count = -(-inputs // (_PAIR_INPUTS // 4 * 4))
    size = -(-inputs // (4 * count)) * 4 if count > 1 else inputs
    return [(start, min(start + size, inputs)) for start in range(0, inputs, size)]


def _choose(rows: int, inputs: list[int], arithmetic: Arithmetic, options: Options) -> tuple[list[RowsKernel], str]:
    """The same kind of kernel for every part of the inputs: the one with the fewest instructions in all, and why."""
    found: dict[str, list[RowsKernel]] = {}
    for count in inputs:
        for kernel in integer_candidates(rows, count, arithmetic, options):
            found.setdefault(kernel.kernel.replace("_any", ""), []).append(kernel)
    complete = [kernels for kernels in found.values() if len(kernels) == len(inputs)]
    costs = sorted(((sum(k.instructions for k in kernels), kernels) for kernels in complete), key=lambda cost: cost[0])
    (instructions, best), *others = costs
    if options.optimize == "size":
        return best, "least code"
    what = "two positions" if arithmetic == "pair" else "a vector"
    reason = f"about {instructions:,} instructions for {what}"
    return best, reason + (f"; {others[0][1][0].kernel} takes {others[0][0]:,}" if others else "")


def fixed_point(ratios: np.ndarray, addends: np.ndarray, largest_sum: int) -> tuple[int, np.ndarray, np.ndarray, int]:
    """Numbers with which integers compute ``round(ratio * sum + addend)``.

    The result is ``(sum * factor * multiplier / 2^32 + offset) / 2^shift``, with both quotients rounded down and every
    product but the first quotient's within 32 bits.

    Args:
        ratios: what sums are scaled by.
        addends: what is added then, in steps of the result; those that no sum brings back into the range count as
            just so large.
        largest_sum: bound of the magnitude of sums, below ``2**31``.

    Returns:
        ``factor``, a power of two; the multipliers and offsets, ``int32``; and ``shift``, from 1 to 22.
    """
    up = 31 - largest_sum.bit_length()
    largest = float(np.abs(ratios).max(initial=0.0))
    # Products, and offsets that matter, are below 2^30 each: no larger offset can be made up for by a product.
    shift = math.floor(math.log2(2**30 / (largest_sum * largest + ir.INT8_LIMIT + 1)))
    if largest > 0:
        shift = min(shift, math.floor(math.log2((2**31 - 1) / largest)) - 32 + up)
    shift = max(shift, 1)
    exponent = 32 - up + shift
    multipliers = np.clip(np.rint(np.ldexp(ratios.astype(np.float64), exponent)), -(2**31 - 1), 2**31 - 1)
    offsets = np.clip(np.rint(np.ldexp(addends.astype(np.float64), shift)) + 2 ** (shift - 1), -(2**30), 2**30)
    return 2**up, multipliers.astype(np.int32), offsets.astype(np.int32), shift


def _alphas(operation: ir.TiledLinear | ir.TiledConv, rows: int, part: slice) -> tuple[np.ndarray, str]:
    """The alphas of some outputs: one of the ``layer``, one for each ``repeat`` of the rows, or for each ``row``."""
    by_output = operation.alpha.array.reshape(-1).repeat(operation.product.rows_per_alpha)[part]
    if (by_output == by_output[0]).all():
        return by_output[:1], "layer"
    repeats = by_output.reshape(-1, rows)
    if (repeats == repeats[:, :1]).all():
        return repeats[:, 0], "repeat"
    return by_output, "row"


def _finish_struct(
    operation: ir.TiledLinear | ir.TiledConv,
    context: Context,
    title: str,
    geometry: _Geometry,
    rows: int,
    part: slice,
    parts: tuple[int, int],
) -> Struct:
    """``tiled_int8_layer`` or ``tiled_int8_result``: what happens to the sums of different rows.

    ``rows`` of them serve the outputs ``part``; ``parts`` is the number of parts of the inputs, and of sums of each.
    """
    assert operation.input_scale is not None
    alpha, place = _alphas(operation, rows, part)
    places: tuple[tuple[str, Argument], ...] = (
        ("rows", rows),
        ("parts", parts[0]),
        ("part_sums", parts[1]),
        ("repeats", (part.stop - part.start) // rows),
        ("width", geometry.width),
        ("lines", geometry.lines),
        ("sample_stride", geometry.sample_stride),
        ("line_stride", geometry.line_stride),
        ("position_stride", geometry.position_stride),
        ("output_stride", geometry.output_stride),
        ("scale_per_row", int(place == "row")),
        ("scale_per_repeat", {"layer": 0, "repeat": 1, "row": rows}[place]),
    )
    name, scale = operation.alpha.name, np.float32(operation.input_scale)
    bias = None if operation.bias is None else operation.bias.array.reshape(-1)[part]
    if operation.output_scale is None:
        scales = context.constant(f"{name}_scale", (alpha * scale).astype(np.float32))
        stored = None if bias is None else context.constant(_bias_name(operation), bias)
        fields = (*places, ("scale", scales), ("bias", stored), ("relu", int(operation.relu)))
        return Struct("tiled_int8_result", f"{operation.layer}_result", title, fields)
    ratios = alpha.astype(np.float64) * float(scale) / operation.output_scale
    addends = np.zeros(1) if bias is None else bias.astype(np.float64) / operation.output_scale
    factor, multipliers, offsets, shift = fixed_point(ratios, addends, ir.INT8_LIMIT * operation.layout.row_size)
    fields = (
        *places,
        ("multiplier", context.constant(f"{name}_multiplier", multipliers)),
        ("offset", None if bias is None else context.constant(f"{_bias_name(operation)}_offset", offsets)),
        ("half", 2 ** (shift - 1)),
        ("factor", factor),
        ("shift", shift),
        ("low", operation.limits[0]),
        ("high", operation.limits[1]),
    )
    return Struct("tiled_int8_layer", f"{operation.layer}_layer", title, fields)


def _bias_name(operation: ir.Tiled) -> str:
    assert operation.bias is not None
    return operation.bias.name


def _result(operation: ir.TiledLinear | ir.TiledConv) -> Finish:
    if operation.output_scale is None:
        return "float"
    return "relu" if operation.limits == (0, ir.INT8_LIMIT) else "int8"
