"""The structures that describe layers on tiles to their kernels, and what titles say about a tile."""

from __future__ import annotations

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.plan import Struct


def finish_struct(operation: ir.TiledLinear | ir.TiledConv, title: str, positions: int) -> Struct:
    """``tiled_finish_layer``: what happens to the products of the different rows."""
    layout, rows, per_alpha = operation.layout, operation.product.rows, operation.product.rows_per_alpha
    fields = (
        ("rows", rows),
        ("copies", operation.replicas),
        ("outputs", layout.rows),
        ("positions", positions),
        ("alpha_per_row", int(per_alpha == 1)),
        # One alpha serves everything, a repeat of all different rows, or a row.
        ("alpha_per_repeat", 0 if per_alpha == layout.rows else rows // per_alpha),
        ("input_alpha", operation.input_alpha),
        ("alpha", row_alpha(operation)),
        ("bias", operation.bias),
        ("relu", int(operation.relu)),
    )
    return Struct("tiled_finish_layer", f"{operation.layer}_finish", title, fields)


def linear_struct(operation: ir.TiledLinear, title: str) -> Struct:
    """``tiled_linear``: what every kernel for a tiled linear layer reads."""
    layout = operation.layout
    fields = (
        ("in_features", layout.row_size),
        ("out_features", layout.rows),
        ("unique_rows", operation.product.rows),
        ("tile_size", layout.tile_size),
        ("rows_per_alpha", operation.product.rows_per_alpha),
        ("alpha", row_alpha(operation)),
        ("bias", operation.bias),
        ("relu", int(operation.relu)),
    )
    return Struct("tiled_linear", f"{operation.layer}_layer", title, fields)


def runs_struct(operation: ir.TiledLinear, title: str) -> Struct:
    """``tiled_runs``: what the kernels read that follow a row through any layout."""
    layout = operation.layout
    fields = (
        ("p_in", layout.p_in),
        ("shift", layout.roll),
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
        ("shift", layout.roll),
        ("hadamard", int(layout.kind == "hadamard")),
        ("copy_alpha", copy_alpha(operation)),
        ("input_alpha", operation.input_alpha),
    )
    return Struct("tiled_weight", f"{operation.layer}_weight_layout", title, fields)


def row_alpha(operation: ir.Tiled) -> ir.Constant | None:
    """The alphas that scale whole rows; ``None`` where there are none to apply: a single 1, or alphas inside rows."""
    if not operation.product.scales_results or (operation.alpha.array == 1).all():
        return None
    return operation.alpha


def copy_alpha(operation: ir.Tiled) -> ir.Constant | None:
    """The alphas that change inside rows: copy ``i`` at neighbour ``j`` has ``alpha[i * p_in + j]``."""
    return None if operation.product.scales_results else operation.alpha


def describe(operation: ir.Tiled, unique_rows: int) -> str:
    """What a title says about a tile."""
    layout, num_alphas = operation.layout, operation.alpha.size
    axes = f" ({layout.p_out} x {layout.p_in})" if layout.p_in > 1 else ""
    rolled = f", rolled by {layout.roll}" if layout.roll else ""
    signs = ", Hadamard signs" if layout.kind == "hadamard" else ""
    alphas = f"{num_alphas} alpha{'s' if num_alphas > 1 else ''}"
    replicas = f", input as {operation.replicas} scaled copies" if operation.input_alpha else ""
    flags = f"{', bias' if operation.bias else ''}{', ReLU' if operation.relu else ''}"
    return f", p={layout.p}{axes}{rolled}{signs}, {unique_rows} unique rows, {alphas}{replicas}{flags}"
