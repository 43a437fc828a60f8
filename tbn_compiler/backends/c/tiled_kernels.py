"""The choice of kernels for layers on tiles, and their cost."""

from __future__ import annotations

from dataclasses import fields, replace

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.geometry import inside, window_struct
from tbn_compiler.backends.c.plan import At, Call, Implementation, Index, Struct, Workspace
from tbn_compiler.backends.c.registry import Context, implements
from tbn_compiler.backends.c.tiled_any_rows import any_rows
from tbn_compiler.backends.c.tiled_decoding import tile_bits
from tbn_compiler.backends.c.tiled_filters import filters
from tbn_compiler.backends.c.tiled_instances import patch_name
from tbn_compiler.backends.c.tiled_int8 import integer_layer
from tbn_compiler.backends.c.tiled_mixing import mixed_layer
from tbn_compiler.backends.c.tiled_rows import (
    choose,
    finish_instructions,
    multiply_arguments,
    patch_instructions,
)
from tbn_compiler.backends.c.tiled_structs import (
    describe,
    finish_struct,
    linear_struct,
    row_alpha,
    runs_struct,
    weight_struct,
)


@implements(ir.TiledLinear)
def tiled_linear(operation: ir.TiledLinear, context: Context) -> Implementation:
    """Eight inputs are taken at a time, or else the inputs go run by run.

    Eight are where every row begins and the tile ends on a whole byte, copies follow one another unrolled, and one
    scale holds for a whole row.
    """
    layout, rows, (source,) = operation.layout, operation.product.rows, operation.inputs
    if operation.input_scale is not None:
        return integer_layer(operation, context)
    if layout.kind == "hadamard":
        return _signed_linear(operation, context)
    input_size, vectors = layout.row_size // operation.replicas, operation.output.size // layout.rows
    title = f"tiled linear {layout.row_size} -> {layout.rows}{describe(operation, rows)}"
    if whole_rows(operation):
        return _linear_rows(operation, context, title)
    pointers = (At(source, stride=input_size), At(operation.output, stride=layout.rows))
    layer = linear_struct(operation, title)
    kernel, choice = _choose_linear(operation)
    runs = () if kernel == "tiled_linear_bytes" else (runs_struct(operation, title),)
    call = Call(kernel, (layer, *runs, operation.tile, *pointers), repeat=vectors)
    results = vectors * rows
    work = {kernel: results * layout.row_size, f"{kernel}.row": results, "tiled_store": operation.output.size}
    one_by_one = context.implementation(title, (call,), work, choice)
    return _fastest(any_rows(operation, context, title), one_by_one)


def _fastest(*ways: Implementation | None) -> Implementation:
    """The way with the fewest estimated instructions, of those that there are."""
    return min((way for way in ways if way is not None), key=lambda way: way.cost)


def _signed_linear(operation: ir.TiledLinear, context: Context) -> Implementation:
    """Column groups apart; where those do not lie alike in all replicas, all rows, or a convolution of one position."""
    layout = operation.layout
    title = f"tiled linear {layout.row_size} -> {layout.rows}{describe(operation, operation.product.rows)}"
    if operation.product.mixes > 1:
        return mixed_layer(operation, context, title)
    if (found := any_rows(operation, context, title)) is not None:
        return found
    one = (1, 1)
    same = {field.name: getattr(operation, field.name) for field in fields(operation)}
    same["layout"] = replace(layout, shape=(*layout.shape, *one))
    return tiled_conv(ir.TiledConv(**same, window=ir.Window(one, one, one)), context)


def _choose_linear(operation: ir.TiledLinear) -> tuple[str, str]:
    layout, product = operation.layout, operation.product
    if not operation.tile.packed:
        return "tiled_linear_float", "full-precision tile"
    if product.neighbours > 1 or layout.roll or operation.input_alpha or not product.scales_results:
        return "tiled_linear_bits", "scales or copies change inside rows"
    if product.alignment % 8:
        return "tiled_linear_bits", "rows or tile do not end on whole bytes"
    return "tiled_linear_bytes", "rows of whole bytes"


@implements(ir.TiledConv)
def tiled_conv(operation: ir.TiledConv, context: Context) -> Implementation:
    """The fastest way. One weight at a time is the reference: it takes any layout, and computes rows that differ."""
    if operation.input_scale is not None:
        return integer_layer(operation, context)
    layout, window, (source,) = operation.layout, operation.window, operation.inputs
    rows = operation.product.rows
    kernel = "tiled_conv_bits" if operation.tile.packed else "tiled_conv_float"
    sizes = f"{operation.groups * layout.shape[1]} -> {layout.rows} channels, {' x '.join(map(str, layout.shape[2:]))}"
    groups = f", {operation.groups} groups" if operation.groups > 1 else ""
    title = f"tiled conv {sizes}{groups}{describe(operation, rows * operation.groups)}"
    if operation.product.mixes > 1:
        return mixed_layer(operation, context, title)
    if operation.groups == 1 and whole_rows(operation):
        return _conv_rows(operation, context, title)
    layer = Struct(
        "tiled_conv",
        f"{operation.layer}_layer",
        title,
        (
            ("in_channels", operation.input_channels),
            ("out_channels", layout.rows),
            ("groups", operation.groups),
            ("unique_rows", rows),
            ("rows_per_alpha", operation.product.rows_per_alpha),
            ("alpha", row_alpha(operation)),
            ("bias", operation.bias),
            ("relu", int(operation.relu)),
        ),
    )
    arguments = (layer, weight_struct(operation, title), window_struct(window), operation.tile)
    pointers = (
        At(source, stride=operation.input_channels * window.input_size),
        At(operation.output, stride=layout.rows * window.output_size),
    )
    call = Call(kernel, (*arguments, *pointers), repeat=operation.samples)
    weights = operation.samples * operation.groups * rows * layout.row_size
    work = {
        kernel: weights * window.output_size,
        f"{kernel}.product": weights // window.kernel_size * sum(inside(window, 0)) * sum(inside(window, 1)),
        "tiled_store": operation.output.size,
    }
    one_by_one = context.implementation(title, (call,), work, _why_no_rows(operation))
    return _fastest(filters(operation, context, title), any_rows(operation, context, title), one_by_one)


def _why_no_rows(operation: ir.TiledConv) -> str:
    """Why a convolution takes the kernel that follows any layout element by element."""
    if not operation.tile.packed:
        return "full-precision tile"
    return "different rows would take more flash than the tile, or fall into many pieces of different scales"


def whole_rows(operation: ir.TiledLinear | ir.TiledConv) -> bool:
    """Whether the tile is bits and holds nothing but whole rows, each with one scale."""
    product = operation.product
    return operation.tile.packed and product.contiguous and product.neighbours == 1 and product.scales_results


def _linear_rows(operation: ir.TiledLinear, context: Context, title: str) -> Implementation:
    layout, (source,) = operation.layout, operation.inputs
    vectors = operation.output.size // layout.rows
    return _rows(operation, context, title, (), At(source, stride=layout.row_size // operation.replicas), vectors, 1)


def _conv_rows(operation: ir.TiledConv, context: Context, title: str) -> Implementation:
    """Gather the inputs of one output position, then treat it as a linear layer."""
    layout, window, (source,) = operation.layout, operation.window, operation.inputs
    patch = Workspace("patch", layout.row_size // operation.replicas)
    positions = operation.samples * window.output_size
    arguments = (window_struct(window), operation.input_channels, source, Index(), patch)
    small = context.options.optimize == "size"
    gather = Call(
        "tiled_patch" if small else patch_name(window.kernel[1], window.dilation[1]), arguments, repeat=positions
    )
    return _rows(operation, context, title, (gather,), patch, positions, window.output_size)


def _rows(
    operation: ir.TiledLinear | ir.TiledConv,
    context: Context,
    title: str,
    before: tuple[Call, ...],
    x: At | Workspace,
    repeat: int,
    positions: int,
) -> Implementation:
    """Products with the rows of the tile, then scales, bias and activation; as often as there are input vectors.

    Replicas of the input are columns side by side: each replica's part of a row is a row of its own for the kernel.
    """
    layout, product, replicas = operation.layout, operation.product, operation.replicas
    inputs = product.columns // replicas
    rows = product.rows * replicas
    kernel, choice = choose(rows, inputs, context.options)
    order = f"{kernel.kernel.removeprefix('tiled_')}_{rows}x{inputs}"
    table = context.prepare(operation.tile, order, lambda: kernel.make_table(tile_bits(operation).reshape(rows, -1)))
    finish = row_alpha(operation) is not None or operation.bias is not None
    finish |= operation.input_alpha is not None or product.repeats > 1
    in_place = replicas == 1 and positions == 1 and rows % kernel.granule == 0
    products: At | Workspace = At(operation.output, stride=layout.rows)
    if not in_place:
        products = Workspace("products", -(-rows // kernel.granule) * kernel.granule)
    arguments = (table, x, *multiply_arguments(kernel, rows, inputs), products)
    calls = [*before, Call(kernel.kernel, arguments, repeat=repeat)]
    if finish or not in_place:
        layer = finish_struct(operation, title, positions)
        calls.append(Call("tiled_finish", (layer, products, Index(), operation.output), repeat=repeat))
    elif operation.relu:
        calls.append(Call("relu", (operation.output, operation.output, operation.output.size)))
    each = kernel.instructions + (finish_instructions(layout.rows, context.options) if finish or not in_place else 0)
    each += patch_instructions(inputs, context.options) if before else 0
    return Implementation(title, tuple(calls), cost=repeat * each, choice=choice)
