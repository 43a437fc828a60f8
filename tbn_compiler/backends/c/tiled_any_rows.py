"""Kernels for rows of signs, for layers whose tile is not simply the rows of the weight: see :mod:`tiled_decoding`.

1. A convolution gathers the inputs of one output position, those of all groups one behind the other.
2. A kernel for rows of signs computes the products of each piece of them with its table.
3. The products are scaled, added up where an output has several, and stored.

Different rows are stored whole, which can be more than the tile: a plan says so.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.geometry import window_struct
from tbn_compiler.backends.c.plan import Argument, At, Call, Implementation, Index, Struct, Workspace
from tbn_compiler.backends.c.registry import Context
from tbn_compiler.backends.c.tiled_decoding import Decoded, decode
from tbn_compiler.backends.c.tiled_instances import patch_name
from tbn_compiler.backends.c.tiled_rows import (
    RowsKernel,
    choose,
    combine_instructions,
    finish_rows_instructions,
    multiply_arguments,
    patch_instructions,
    piece_instructions,
    regroup_instructions,
)
from tbn_compiler.backends.c.tiled_structs import row_alpha

# Numbers of products are stored in 16 bits.
_MOST_PRODUCTS = 1 << 16


def any_rows(operation: ir.TiledLinear | ir.TiledConv, context: Context, title: str) -> Implementation | None:
    """A layer on packed bits in any layout, by kernels for rows of signs.

    Returns:
        ``None`` where a layer does not decompose into rows, and, if code and constants shall be small, where the rows
        are larger than the tile.
    """
    options, layout = context.options, operation.layout
    if not operation.tile.packed or (decoded := decode(operation)) is None:
        return None
    rows, inputs = decoded.rows, decoded.inputs
    kernel, reason = choose(rows, inputs, options)
    stride = -(-rows // kernel.granule) * kernel.granule
    tables, before = len(decoded.tables), operation.tile.array.nbytes
    stored = tables * kernel.table_bytes + _factor_bytes(decoded)
    too_large = options.optimize == "size" and stored > before * 9 // 8 + 4
    if decoded.pieces * stride > _MOST_PRODUCTS or too_large:
        return None
    stem = kernel.kernel.removeprefix("tiled_")
    table = context.prepare(
        operation.tile,
        f"{stem}_{rows}x{inputs}" + (f"_by_{tables}" if tables > 1 else ""),
        lambda: np.concatenate([kernel.make_table(signs) for signs in decoded.tables]),
        key=decoded.tables.tobytes(),
    )
    repeat = operation.output.size // layout.rows
    positions = operation.window.output_size if isinstance(operation, ir.TiledConv) else 1
    place, calls, instructions = _inputs(operation, context, repeat)
    products: At | Workspace = Workspace("products", decoded.pieces * stride)
    if decoded.pieces == 1 and decoded.factor is None and positions == 1 and stride == layout.rows:
        products = At(operation.output, stride=layout.rows)
    calls += (_multiply(decoded, kernel, table, place, products, stride, repeat),)
    instructions += decoded.pieces * (kernel.instructions + piece_instructions(decoded.pieces))
    if decoded.factor is None:
        layer = _finish_struct(operation, decoded, title, stride, positions)
        finish = "tiled_finish_rows"
        instructions += finish_rows_instructions(layout.rows, options)
    else:
        layer = _combine_struct(operation, decoded, decoded.factor, context, title, stride, positions)
        finish = "tiled_combine"
        instructions += combine_instructions(layout.rows, decoded.factor.size + len(decoded.corrections), options)
    calls += (Call(finish, (layer, products, Index(), operation.output), repeat=repeat),)
    # Signs that only fill up a table are not worth a word.
    more = tables * rows * inputs + 8 * _factor_bytes(decoded) > layout.tile_size
    why = [*_why(operation, decoded, (stored, before) if more else None), reason, *_aligned(operation, decoded)]
    return Implementation(title, calls, cost=repeat * instructions, choice="; ".join(why))


def _inputs(
    operation: ir.TiledLinear | ir.TiledConv, context: Context, repeat: int
) -> tuple[At, tuple[Call, ...], int]:
    """Where the inputs of a vector lie piece by piece, the calls that bring them there, and their instructions."""
    (source,), layout, product, options = operation.inputs, operation.layout, operation.product, context.options
    neighbours = product.neighbours if product.alphas == "input" else 1
    size = product.groups * layout.row_size // operation.replicas
    if isinstance(operation, ir.TiledConv):
        window, patch = operation.window, Workspace("patch", size)
        width = 0 if options.optimize == "size" else window.kernel[1]
        numbers = (operation.input_channels, *((neighbours,) if neighbours > 1 else ()))
        arguments = (window_struct(window), *numbers, source, Index(), patch)
        gather = Call(patch_name(width, window.dilation[1], neighbours > 1), arguments, repeat=repeat)
        return At(patch), (gather,), patch_instructions(size, options)
    if neighbours > 1:
        grouped = Workspace("grouped", size)
        regroup = Call("tiled_regroup", (At(source, stride=size), size, neighbours, grouped), repeat=repeat)
        return At(grouped), (regroup,), regroup_instructions(size, options)
    return At(source, stride=size), (), 0


def _multiply(
    decoded: Decoded,
    kernel: RowsKernel,
    table: ir.Constant,
    place: At,
    products: At | Workspace,
    stride: int,
    repeat: int,
) -> Call:
    """The kernel, called for each piece of the inputs."""
    pieces, tables = decoded.pieces, len(decoded.tables)
    first: Argument = table
    if pieces > 1:
        place = replace(place, inner_stride=decoded.inputs)
        assert isinstance(products, Workspace)
        products = At(products, inner_stride=stride)
        if tables > 1:
            step = table.array.size // tables
            first = At(table, inner_stride=step, inner_period=tables if tables < pieces else 0)
    arguments = multiply_arguments(kernel, decoded.rows, decoded.inputs)
    return Call(kernel.kernel, (first, place, *arguments, products), repeat=repeat, inner=pieces)


def _finish_struct(
    operation: ir.TiledLinear | ir.TiledConv, decoded: Decoded, title: str, stride: int, positions: int
) -> Struct:
    """``tiled_finish_rows_layer``: what happens to the products of groups."""
    layout, groups = operation.layout, decoded.pieces
    fields = (
        ("groups", groups),
        ("outputs", layout.rows // groups),
        ("rows", operation.product.rows),
        ("stride", stride),
        ("positions", positions),
        ("outputs_per_alpha", operation.product.rows_per_alpha),
        ("alpha", row_alpha(operation)),
        ("bias", operation.bias),
        ("relu", int(operation.relu)),
    )
    return Struct("tiled_finish_rows_layer", f"{operation.layer}_finish", title, fields)


def _factor_bytes(decoded: Decoded) -> int:
    """Bytes of what says which products an output is the sum of."""
    return 0 if decoded.factor is None else 6 * decoded.factor.size + 8 * len(decoded.corrections)


def _combine_struct(
    operation: ir.TiledLinear | ir.TiledConv,
    decoded: Decoded,
    factor: np.ndarray,
    context: Context,
    title: str,
    stride: int,
    positions: int,
) -> Struct:
    """``tiled_combine_layer``: which products an output is the sum of."""
    found = decoded.corrections

    def stored(name: str, numbers: np.ndarray) -> ir.Constant:
        return context.prepare(operation.tile, name, lambda: numbers, key=numbers.tobytes())

    def corrections(name: str, numbers: list[int] | list[float], dtype: str) -> ir.Constant | None:
        return stored(name, np.array(numbers, dtype)) if found else None

    products = [correction.piece * stride + correction.row for correction in found]
    fields = (
        ("outputs", operation.layout.rows),
        ("positions", positions),
        ("terms", factor.shape[1]),
        ("product", stored("products", (decoded.piece * stride + decoded.row).astype(np.uint16))),
        ("factor", stored("factors", factor)),
        ("corrections", len(found)),
        ("corrected", corrections("corrected", [correction.output for correction in found], "uint16")),
        ("correcting_product", corrections("correcting_products", products, "uint16")),
        ("correcting_factor", corrections("correcting_factors", [c.factor for c in found], "float32")),
        ("bias", operation.bias),
        ("relu", int(operation.relu)),
    )
    return Struct("tiled_combine_layer", f"{operation.layer}_combine", title, fields)


def _why(operation: ir.TiledLinear | ir.TiledConv, decoded: Decoded, larger: tuple[int, int] | None) -> list[str]:
    """What is special about the layout; ``larger`` has the bytes of rows and of the tile, if the rows are more."""
    product, layout, tables = operation.product, operation.layout, len(decoded.tables)
    found = []
    if product.groups > 1:
        share = "one table" if tables == 1 else f"{tables} tables"
        found.append(f"{product.groups} groups with {share} of rows")
    causes = []
    if layout.kind == "staggered":
        causes.append("copies are rolled")
    elif layout.kind == "hadamard":
        causes.append("column groups are not mixed")
    elif product.alphas == "input":
        causes.append("neighbouring inputs have different scales")
    elif not layout.aligned:
        causes.append("rows begin inside the tile")
    if rows := len({one.output for one in decoded.corrections}):
        causes.append(f"scales change inside {rows} row{'s' if rows > 1 else ''}")
    reason = " and ".join(causes)
    if larger is not None:
        stored, before = larger
        whole = "are stored whole" if decoded.factor is None else "and the factors of their products are stored"
        reason += f"{': ' if reason else ''}{decoded.rows * tables} different rows {whole}, "
        reason += f"{stored:,} bytes in place of {before:,}"
    return [*found, *([reason] if reason else [])]


def _aligned(operation: ir.TiledLinear | ir.TiledConv, decoded: Decoded) -> list[str]:
    """The nearest number of outputs with which rows would begin with the tile, if fewer rows would differ then."""
    layout, product = operation.layout, operation.product
    if layout.aligned or product.groups > 1 or layout.kind != "flat":
        return []
    width = max(1, round(layout.rows / layout.p)) * layout.p
    if width // layout.p * operation.replicas >= decoded.rows:
        return []
    return [f"slower than {width} outputs, a multiple of p = {layout.p}, whose different rows are {width // layout.p}"]
