"""The choice of kernels for layers on tiles, the structures that describe them, and their cost."""

from __future__ import annotations

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.registry import Context, implements
from tbn_compiler.backends.c.geometry import window_struct
from tbn_compiler.backends.c.plan import At, Call, Implementation, Struct
from tbn_compiler.tiling import TileLayout


@implements(ir.TiledLinear)
def tiled_linear(operation: ir.TiledLinear, context: Context) -> Implementation:
    """Eight inputs are taken at a time where every row begins and the tile ends on a whole byte, copies follow one
    another unrolled, and one scale holds for a whole row. Everything else goes run by run.
    """
    layout, (source,) = operation.layout, operation.inputs
    rows = layout.distinct_rows(operation.alpha.size)
    input_size, vectors = layout.row_size // operation.replicas, operation.output.size // layout.rows
    title = f"tiled linear {layout.row_size} -> {layout.rows}{describe(operation, rows)}"
    pointers = (At(source, stride=input_size), At(operation.output, stride=layout.rows))
    layer = linear_struct(operation, title)
    kernel, choice = _choose_linear(operation)
    runs = () if kernel == "tiled_linear_bytes" else (_runs_struct(operation, title),)
    call = Call(kernel, (layer, *runs, operation.tile, *pointers), repeat=vectors)
    return Implementation(title, (call,), cost=vectors * rows * layout.row_size, choice=choice)


def _choose_linear(operation: ir.TiledLinear) -> tuple[str, str]:
    layout = operation.layout
    if not operation.tile.packed:
        return "tiled_linear_float", "full-precision tile"
    if layout.row_size % 8 or layout.tile_size % 8:
        return "tiled_linear_bits", "rows or tile do not end on whole bytes"
    if layout.p_in > 1 or shift(layout) or operation.input_alpha or not rows_per_alpha(operation):
        return "tiled_linear_bits", "scales or copies change inside rows"
    return "tiled_linear_bytes", "rows of whole bytes"


@implements(ir.TiledConv)
def tiled_conv(operation: ir.TiledConv, context: Context) -> Implementation:
    """The reference: one weight at a time, in any layout; only rows that differ are computed."""
    layout, window, (source,) = operation.layout, operation.window, operation.inputs
    rows = layout.rows_per_group(operation.alpha.size, operation.groups)
    kernel = "tiled_conv_bits" if operation.tile.packed else "tiled_conv_float"
    sizes = f"{operation.groups * layout.shape[1]} -> {layout.rows} channels, {' x '.join(map(str, layout.shape[2:]))}"
    groups = f", {operation.groups} groups" if operation.groups > 1 else ""
    title = f"tiled conv {sizes}{groups}{describe(operation, rows * operation.groups)}"
    layer = Struct(
        "tiled_conv",
        f"{operation.layer}_layer",
        title,
        (
            ("in_channels", operation.input_channels),
            ("out_channels", layout.rows),
            ("groups", operation.groups),
            ("unique_rows", rows),
            ("rows_per_alpha", rows_per_alpha(operation)),
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
    cost = operation.samples * window.output_size * operation.groups * rows * layout.row_size
    return Implementation(title, (call,), cost=cost, choice="reference")


def linear_struct(operation: ir.TiledLinear, title: str) -> Struct:
    """``tiled_linear``: what every kernel for a tiled linear layer reads."""
    layout = operation.layout
    fields = (
        ("in_features", layout.row_size),
        ("out_features", layout.rows),
        ("unique_rows", layout.distinct_rows(operation.alpha.size)),
        ("tile_size", layout.tile_size),
        ("rows_per_alpha", rows_per_alpha(operation)),
        ("alpha", row_alpha(operation)),
        ("bias", operation.bias),
        ("relu", int(operation.relu)),
    )
    return Struct("tiled_linear", f"{operation.layer}_layer", title, fields)


def _runs_struct(operation: ir.TiledLinear, title: str) -> Struct:
    """``tiled_runs``: what the kernels read that follow a row through any layout."""
    layout = operation.layout
    fields = (
        ("p_in", layout.p_in),
        ("shift", shift(layout)),
        ("input_size", layout.row_size // operation.replicas),
        ("copy_alpha", copy_alpha(operation)),
        ("input_alpha", operation.input_alpha),
    )
    return Struct("tiled_runs", f"{operation.layer}_runs", title, fields)


def weight_struct(operation: ir.Tiled, title: str) -> Struct:
    """``tiled_weight``: how a tile in any layout fills the weight of a convolution."""
    layout = operation.layout
    kernel = layout.row_size // layout.shape[1]
    fields = (
        ("row_size", layout.row_size),
        ("kernel_size", kernel),
        ("tile_size", layout.tile_size),
        ("tile_rows", layout.rows // layout.p_out if layout.p_in > 1 else 0),
        ("p_in", layout.p_in),
        ("shift", shift(layout)),
        ("copy_alpha", copy_alpha(operation)),
        ("input_alpha", operation.input_alpha),
    )
    return Struct("tiled_weight", f"{operation.layer}_weight_layout", title, fields)


def shift(layout: TileLayout) -> int:
    """Elements by which each further copy is rolled; a single copy is not."""
    return layout.shift % layout.tile_size if layout.p > 1 else 0


def rows_per_alpha(operation: ir.Tiled) -> int:
    """Row ``r`` is scaled by ``alpha[r // rows_per_alpha]``; 0 where alphas change inside a row.

    That is the case where a copy with an alpha of its own ends inside a row, and where neighbouring inputs have
    different alphas.
    """
    layout, num_alphas = operation.layout, operation.alpha.size
    if layout.alphas_in(num_alphas) > 1 or layout.rows % num_alphas:
        return 0
    return layout.rows // num_alphas


def row_alpha(operation: ir.Tiled) -> ir.Constant | None:
    """The alphas that scale whole rows; ``None`` where there are none to apply: a single 1, or alphas inside rows."""
    if not rows_per_alpha(operation) or (operation.alpha.array == 1).all():
        return None
    return operation.alpha


def copy_alpha(operation: ir.Tiled) -> ir.Constant | None:
    """The alphas that change inside rows: copy ``i`` at neighbour ``j`` has ``alpha[i * p_in + j]``."""
    return None if rows_per_alpha(operation) else operation.alpha


def describe(operation: ir.Tiled, unique_rows: int) -> str:
    """What a title says about a tile."""
    layout, num_alphas = operation.layout, operation.alpha.size
    axes = f" ({layout.p_out} x {layout.p_in})" if layout.p_in > 1 else ""
    rolled = f", rolled by {shift(layout)}" if shift(layout) else ""
    alphas = f"{num_alphas} alpha{'s' if num_alphas > 1 else ''}"
    replicas = f", input as {operation.replicas} scaled copies" if operation.input_alpha else ""
    flags = f"{', bias' if operation.bias else ''}{', ReLU' if operation.relu else ''}"
    return f", p={layout.p}{axes}{rolled}, {unique_rows} unique rows, {alphas}{replicas}{flags}"
