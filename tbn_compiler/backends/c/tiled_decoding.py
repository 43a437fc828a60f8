"""Weights in any layout as whole rows of signs, decoded when a model is exported.

A kernel for rows of signs multiplies one vector of inputs with all rows of a table, and each row has one scale. Every
weight can be brought to that form:

* The inputs of a convolution with groups are cut into one piece for each group, and each group has its own rows. Groups
  whose rows have the same signs share a table.
* Where neighbouring inputs have different scales (``alphas == "input"``), the inputs are cut into one piece for each
  neighbour; all neighbours have the same signs.
* A replica of the input (``input_alpha``) is the same piece again, with rows of its own.
* Where the scale changes inside a row, from ``a_1`` on its first elements to ``a_K`` on its last ones, the row is a sum
  of rows of signs that each have one scale. With ``s_k`` the product of the elements that ``a_k`` scales, and
  ``P_k = s_1 + ... + s_k - s_(k + 1) - ... - s_K``, a row of signs::

      sum_k a_k s_k = (a_1 + a_K) / 2 P_K + sum_(k < K) (a_k - a_(k + 1)) / 2 P_k
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from tbn_compiler.backends.c import ir
from tbn_compiler.tiling import TiledProduct

# Rows of more pieces with different scales than that, on average, are not worth a row of signs for each.
_MOST_PIECES = 8


@dataclass(frozen=True)
class Correction:
    """A product that is added to an output beside its whole rows, because its scale changes inside a row.

    Attributes:
        output: number of the output.
        piece, row: which product, as in :class:`Decoded`.
        factor: what it is multiplied with.
    """

    output: int
    piece: int
    row: int
    factor: float


@dataclass(frozen=True)
class Decoded:
    """A weight as rows of signs.

    Attributes:
        pieces: parts of an input vector that are multiplied apart: for each neighbour, the groups.
        tables: ``bool [T, R, inputs]``, signs; piece ``i`` is multiplied with the rows of ``tables[i % T]``.
        piece, row: ``int [m, terms]``, the products that an output is the sum of.
        factor: ``float32 [m, terms]``, what these are multiplied with; ``None`` where each output has one product,
            times the alpha of its row.
        corrections: further products, by output.
    """

    pieces: int
    tables: np.ndarray
    piece: np.ndarray
    row: np.ndarray
    factor: np.ndarray | None = None
    corrections: tuple[Correction, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of a table."""
        return int(self.tables.shape[1])

    @property
    def inputs(self) -> int:
        """Inputs of a piece."""
        return int(self.tables.shape[2])


def tile_bits(operation: ir.Tiled) -> np.ndarray:
    """The signs of a packed tile, ``bool [q]``."""
    count = operation.layout.tile_size
    return np.unpackbits(operation.tile.array, count=count, bitorder="little").astype(bool)


def decoded_signs(operation: ir.Tiled) -> np.ndarray:
    """The signs of a packed weight, ``bool [m, n]``."""
    layout = operation.layout
    weight = layout.replicate(torch.from_numpy(tile_bits(operation).astype(np.float32) * 2 - 1))
    return (weight.reshape(layout.rows, -1) > 0).numpy()


def decode(operation: ir.TiledLinear | ir.TiledConv) -> Decoded | None:
    """The rows of a packed weight.

    Returns:
        ``None`` where rows fall into too many pieces, and where replicas end between neighbours of different scales.
    """
    product, layout = operation.product, operation.layout
    groups = product.groups
    signs = decoded_signs(operation)
    if product.scales_results and operation.input_alpha is None:
        group, row = np.divmod(np.arange(layout.rows), product.group_rows)
        tables = without_repeats(signs[product.computed_rows().numpy()])
        return Decoded(groups, tables, group[:, None], (row % product.rows)[:, None])
    neighbours = product.neighbours if product.alphas == "input" else 1
    channels = layout.shape[1] // operation.replicas
    if channels % neighbours:
        return None
    shape = (groups, product.group_rows, operation.replicas, channels // neighbours, neighbours)
    signs = _by_piece(signs, shape)
    scales = _by_piece(_scales(operation), shape)
    changes = scales[..., 1:] != scales[..., :-1]
    if changes.sum() > (_MOST_PIECES - 1) * np.prod(scales.shape[:-1]):
        return None
    return _combined(signs, scales, changes)


def _scales(operation: ir.TiledLinear | ir.TiledConv) -> np.ndarray:
    """What each element of a weight is multiplied with, alphas of the input too: ``float32 [m, n]``."""
    layout = operation.layout
    scales = layout.scale(torch.ones(layout.shape), torch.from_numpy(np.array(operation.alpha.array)))
    by_replica = scales.numpy().reshape(layout.rows, operation.replicas, -1)
    if operation.input_alpha is not None:
        by_replica = by_replica * operation.input_alpha.array.reshape(-1, 1)
    return by_replica.reshape(layout.rows, -1)


def _by_piece(weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """``[m, n]`` as ``[neighbours, groups, m / groups, replicas, inputs]``.

    Args:
        weight: what to bring into this order.
        shape: groups, rows of a group, replicas, channels of a neighbour, neighbours.
    """
    apart = weight.reshape(*shape, -1).transpose(4, 0, 1, 2, 3, 5)
    return apart.reshape(*apart.shape[:4], -1)


def without_repeats(tables: np.ndarray) -> np.ndarray:
    """The first tables ``[T, ...]`` such that table ``i`` is number ``i % T``; ``T`` divides their number."""
    count = len(tables)
    period = next(t for t in range(1, count + 1) if count % t == 0 and (tables[t:] == tables[:-t]).all())
    return tables[:period]


def transposed_tables(operation: ir.TiledConvTranspose, product: TiledProduct) -> np.ndarray:
    """The rows of a packed transpose convolution, which belong to its input channels, as columns.

    Returns:
        ``bool [T, kernel * outputs, R]``: for each group, by place in the window, there by output channel, the signs of
        the ``R`` input channels that differ. Group ``g`` has number ``g % T``.
    """
    layout = operation.layout
    rows = decoded_signs(operation)[product.computed_rows().numpy()]  # [groups, R, outputs * kernel]
    places = rows.reshape(*rows.shape[:2], layout.shape[1], -1).transpose(0, 3, 2, 1)
    return without_repeats(places.reshape(len(rows), -1, rows.shape[1]))


def _combined(signs: np.ndarray, scales: np.ndarray, changes: np.ndarray) -> Decoded:
    """Rows of signs for outputs that are sums of several products."""
    neighbours, groups, group_rows, replicas, inputs = signs.shape
    tables: list[list[np.ndarray]] = []
    first = scales[..., 0]
    factor = np.where(changes.any(-1), (first + scales[..., -1]) / 2, first).transpose(1, 2, 0, 3)
    row = np.zeros((groups, group_rows, neighbours, replicas), np.int64)
    corrections = []
    for group in range(groups):
        numbers: dict[bytes, int] = {}
        table: list[np.ndarray] = []

        def number(of: np.ndarray, numbers: dict[bytes, int] = numbers, table: list[np.ndarray] = table) -> int:
            if (key := of.tobytes()) not in numbers:
                numbers[key] = len(table)
                table.append(of)
            return numbers[key]

        for r, replica in np.ndindex(group_rows, replicas):
            row[group, r, :, replica] = number(signs[0, group, r, replica])  # all neighbours have the same signs
        for r, replica, neighbour in np.ndindex(group_rows, replicas, neighbours):
            place = neighbour, group, r, replica
            for change in np.flatnonzero(changes[place]) + 1:
                flipped = signs[place] ^ (np.arange(inputs) >= change)
                half = (scales[place][change - 1] - scales[place][change]) / 2
                output = group * group_rows + r
                corrections.append(Correction(output, neighbour * groups + group, number(flipped), float(half)))
        tables.append(table)
    most = max(map(len, tables))
    stored = np.zeros((groups, most, inputs), bool)
    for group, table in enumerate(tables):
        stored[group, : len(table)] = table
    piece = np.arange(neighbours)[:, None] * groups + np.arange(groups)[:, None, None, None]
    outputs, terms = groups * group_rows, neighbours * replicas
    return Decoded(
        pieces=neighbours * groups,
        tables=without_repeats(stored),
        piece=np.broadcast_to(piece, row.shape).reshape(outputs, terms),
        row=row.reshape(outputs, terms),
        factor=factor.reshape(outputs, terms).astype(np.float32),
        corrections=tuple(corrections),
    )
