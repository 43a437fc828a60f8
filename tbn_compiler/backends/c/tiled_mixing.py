"""Layers whose copies have Hadamard signs: the products of each column group, and then their mixing.

Copy ``i`` of the tile ``t`` takes column group ``j``, the inputs ``c`` with ``c mod p = j``, times ``H[i, j]``
(:class:`~tbn_compiler.tiling.TileLayout`)::

    z_j = t_j x_j                                 each column group by itself, R n additions in all
    y_i = alpha_i sum_j H[i, j] z_j + bias_i      a butterfly of log2(p) additions for each output

1. A convolution gathers its inputs in the order of column groups. A linear layer's stay where they are; its groups
   alternate, so that the kernels take every ``p``-th one.
2. A kernel for tiles of whole rows computes the products of each group. The tile is stored by column group.
3. The products of a row are mixed, scaled and stored, ``p`` outputs at a time.

Without floating-point instructions all inputs of a vector become integers with one exponent, as in a layer with plain
copies. What is mixed are sums of integers, exactly: an output is a sum of all inputs with signs, which fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.costs import instructions
from tbn_compiler.backends.c.geometry import window_struct
from tbn_compiler.backends.c.plan import Argument, At, Call, Implementation, Index, Struct, Workspace
from tbn_compiler.backends.c.registry import Context
from tbn_compiler.backends.c.tiled_decoding import tile_bits
from tbn_compiler.backends.c.tiled_instances import MIXES_WITH_MEMORY, mix_name, patch_name
from tbn_compiler.backends.c.tiled_rows import (
    RowsKernel,
    choose_mixed,
    mix_instructions,
    patch_instructions,
    precision,
    regroup_instructions,
    scan_instructions,
)
from tbn_compiler.backends.c.tiled_structs import row_alpha
from tbn_compiler.tiling import TileLayout


def mixed_layer(operation: ir.TiledLinear | ir.TiledConv, context: Context, title: str) -> Implementation:
    """A layer whose column groups are computed apart: ``operation.product.mixes`` is their number."""
    layout, groups, options = operation.layout, operation.product.mixes, context.options
    rows, positions = layout.rows // groups, _positions(operation)
    products = _products(operation, context)
    repeat = operation.output.size // layout.rows
    inputs = _gather(operation, context, title, repeat)
    floats = products.block is None
    dtype = "float32" if floats else "int32"
    # Each row's products lie where the outputs made of them go.
    in_place = floats and products.stride == rows and positions == 1
    own = Workspace("products", products.stride * groups, dtype)
    place: ir.Value | Workspace = operation.output if in_place else own
    start = layout.rows if in_place else 0
    each_call = groups // products.calls  # column groups
    calls, each = inputs.calls, inputs.instructions + products.instructions
    if products.block is not None:
        n = layout.row_size
        calls += (Call("tiled_common_block", (inputs.place, n, precision(n), products.block), repeat=repeat),)
        each += scan_instructions(n, options)
    multiply = Call(
        products.kernel,
        (
            At(products.table, inner_stride=products.table.size // products.calls),
            *products.before,
            replace(inputs.place, inner_stride=each_call * (1 if _strided(operation) else layout.row_size // groups)),
            *products.behind,
            At(place, stride=start, inner_stride=each_call * products.stride),
        ),
        repeat=repeat,
        inner=products.calls,
    )
    kernel = mix_name(groups, "float" if floats else "block", small=options.optimize == "size")
    arguments: list[Argument] = [_mix_struct(operation, title, products.stride, positions), At(place, stride=start)]
    arguments += [] if products.block is None else [products.block]
    arguments += [Workspace("mixed", groups, dtype)] if kernel in MIXES_WITH_MEMORY else []
    mix = Call(kernel, (*arguments, Index(), operation.output), repeat=repeat)
    each += mix_instructions(layout.rows, groups, options)
    return Implementation(title, (*calls, multiply, mix), cost=repeat * each, choice=products.choice)


@dataclass(frozen=True)
class _Products:
    """How the products of all column groups with the rows of the tile are computed.

    Attributes:
        kernel, table: what computes them, and the tile as it reads it, by column group.
        calls: how often it is called for a vector; each time it goes on in the table, the inputs and the products.
        before, behind: arguments before the inputs, and behind them.
        block: memory for the exponent of the integers that all inputs become; ``None`` if products are floats.
        stride: elements from the products of a column group to those of the next one.
        instructions: estimated number for a vector.
        choice: why this kernel.
    """

    kernel: str
    table: ir.Constant
    calls: int
    before: tuple[Argument, ...]
    behind: tuple[Argument, ...]
    block: Workspace | None
    stride: int
    instructions: int
    choice: str


def _products(operation: ir.TiledLinear | ir.TiledConv, context: Context) -> _Products:
    layout, groups, tile = operation.layout, operation.product.mixes, operation.tile
    rows, inputs = layout.rows // groups, layout.row_size // groups
    order = f"{rows}x{inputs}_by_{groups}"
    if not tile.packed:
        work = {"linear": rows * layout.row_size, "linear.result": layout.rows, "call": groups}
        return _Products(
            kernel="linear",
            table=context.prepare(tile, order, lambda: _by_group(layout, tile.array)),
            calls=groups,
            before=(None, inputs, rows, 0),
            behind=(),
            block=None,
            stride=rows,
            instructions=instructions(work, context.options.processor.costs),
            choice=f"full-precision tile in {groups} column groups",
        )
    strided = _strided(operation)
    kernel, choice = choose_mixed(rows, inputs, groups, context.options, strided)
    block = None if kernel.arithmetic == "float" else Workspace("block", 3, "int32")
    behind: list[Argument] = [inputs, *([groups] if strided else []), kernel.size, *([block] if block else [])]
    if kernel.memory:
        behind.append(Workspace("memory", kernel.memory, "int32" if block else "float32"))
    calls, stem = groups // kernel.groups, kernel.kernel.removeprefix("tiled_").removesuffix("_strided")
    return _Products(
        kernel=kernel.kernel,
        table=context.prepare(tile, f"{stem}_{order}", lambda: _table(operation, kernel)),
        calls=calls,
        before=(),
        behind=tuple(behind),
        block=block,
        stride=-(-rows // kernel.granule) * kernel.granule,
        instructions=kernel.instructions * calls,
        choice=choice,
    )


def _by_group(layout: TileLayout, tile: np.ndarray) -> np.ndarray:
    """A tile ``[q]`` as ``[p, R, n / p]``: the columns of each group one behind the other."""
    apart = tile.reshape(layout.rows // layout.p, layout.shape[1] // layout.p, layout.p, -1)
    return apart.transpose(2, 0, 1, 3).reshape(layout.p, layout.rows // layout.p, -1)


def _table(operation: ir.TiledLinear | ir.TiledConv, kernel: RowsKernel) -> np.ndarray:
    """The tables of all calls, one behind the other."""
    p, rows, inputs = (signs := _by_group(operation.layout, tile_bits(operation))).shape
    of_calls = signs.reshape(p // kernel.groups, kernel.groups, rows, inputs).swapaxes(1, 2)
    return np.concatenate([kernel.make_table(call.reshape(rows, -1)) for call in of_calls])


def _positions(operation: ir.TiledLinear | ir.TiledConv) -> int:
    return operation.window.output_size if isinstance(operation, ir.TiledConv) else 1


@dataclass(frozen=True)
class _Inputs:
    """The inputs of a vector, by column group or with groups that alternate.

    Attributes:
        place: where they are.
        calls: what brings them there, for each vector.
        instructions: estimated number.
    """

    place: At
    calls: tuple[Call, ...]
    instructions: int


def _gather(operation: ir.TiledLinear | ir.TiledConv, context: Context, title: str, repeat: int) -> _Inputs:
    """Bring the inputs of one vector, or output position, into the order of column groups, where they are not strided.

    Scaled copies that the inputs stand for are written out: they have different signs.
    """
    (source,), layout, options = operation.inputs, operation.layout, context.options
    groups, scaled = operation.product.mixes, operation.input_alpha is not None
    stored = layout.row_size // operation.replicas
    calls: tuple[Call, ...] = ()
    place, instructions = At(source, stride=stored), 0
    if isinstance(operation, ir.TiledConv):
        window, grouped = operation.window, not scaled
        width = 0 if options.optimize == "size" else window.kernel[1]
        numbers = (operation.input_channels, *((groups,) if grouped else ()))
        patch = Workspace("patch", stored)
        arguments = (window_struct(window), *numbers, source, Index(), patch)
        calls = (Call(patch_name(width, window.dilation[1], grouped), arguments, repeat=repeat),)
        place, instructions = At(patch), patch_instructions(stored, options)
    if scaled:
        copies = Workspace("copies", layout.row_size)
        calls += (Call("tiled_expand", (_expand_struct(operation, title), place, copies), repeat=repeat),)
        place, instructions = At(copies), instructions + regroup_instructions(layout.row_size, options)
    elif not operation.tile.packed and isinstance(operation, ir.TiledLinear):
        grouped_inputs = Workspace("grouped", stored)
        calls = (Call("tiled_regroup", (place, stored, groups, grouped_inputs), repeat=repeat),)
        place, instructions = At(grouped_inputs), regroup_instructions(stored, options)
    return _Inputs(place, calls, instructions)


def _strided(operation: ir.TiledLinear | ir.TiledConv) -> bool:
    """Whether the kernels read the inputs where they are: column groups alternate."""
    return isinstance(operation, ir.TiledLinear) and operation.input_alpha is None and operation.tile.packed


def _expand_struct(operation: ir.TiledLinear | ir.TiledConv, title: str) -> Struct:
    """``tiled_expand_layer``: the scaled copies that the inputs stand for."""
    layout = operation.layout
    fields = (
        ("channels", layout.shape[1] // operation.replicas),
        ("elements", layout.row_size // layout.shape[1]),
        ("groups", layout.p),
        ("copies", operation.replicas),
        ("scale", operation.input_alpha),
    )
    return Struct("tiled_expand_layer", f"{operation.layer}_copies", title, fields)


def _mix_struct(operation: ir.TiledLinear | ir.TiledConv, title: str, stride: int, positions: int) -> Struct:
    """``tiled_mix_layer``: what happens to the products of the column groups."""
    layout, per_alpha = operation.layout, operation.product.rows_per_alpha
    rows = layout.rows // layout.p
    fields = (
        ("rows", rows),
        ("stride", stride),
        ("groups", layout.p),
        ("positions", positions),
        ("alpha_per_row", int(per_alpha == 1)),
        # One alpha serves everything, a copy, or a row.
        ("alpha_per_copy", 0 if per_alpha == layout.rows else rows // per_alpha),
        ("alpha", row_alpha(operation)),
        ("bias", operation.bias),
        ("relu", int(operation.relu)),
    )
    return Struct("tiled_mix_layer", f"{operation.layer}_mix", title, fields)
