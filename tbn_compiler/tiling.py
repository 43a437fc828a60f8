"""The method of Tiled Bit Networks in plain tensor code (Gorbett, Shirazi, Ray, CIKM 2024, Eq. 1-9).

A weight ``W`` of ``N`` elements is viewed row-major as ``p`` rows of ``q = N / p`` elements. The rows are summed
(Eq. 2), the sign of the sum is the *tile* ``t`` (Eq. 3), and the weight that the layer uses is ``p`` copies of
the tile times one scale ``alpha`` per layer (Eq. 7) or per copy (Eq. 9).

:class:`TileLayout` is the single answer to "which tile element does a weight element use", and :class:`TiledProduct` to
"what has to be multiplied, and where do the alphas come in": every pass and every backend asks them instead of doing
arithmetic of its own. A further layout is a further :attr:`TileLayout.kind`, and its case in the properties and methods
of these two classes that ask for the kind, ``p_in`` or ``shift``; backends that follow the tile element by element name
the kinds that they know, and decline others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from tbn_compiler.config import Activation, AlphaSource, InputScale, Latent, TileDType
from tbn_compiler.errors import ConfigError

LayoutKind = Literal["flat", "two-axis", "staggered", "hadamard"]
"""How the copies of a tile lie in a weight, see :class:`TileLayout`."""

AlphaPlace = Literal["layer", "copy", "row", "input", "mixed"]
"""Where the alphas of a weight lie, see :attr:`TiledProduct.alphas`."""


def largest_divisor(numel: int, at_most: int) -> int:
    """Return the largest divisor of ``numel`` that is not above ``at_most``.

    This is the divisor rule for a layer whose size ``p`` does not divide.

    Example:
        >>> largest_divisor(10, at_most=4)
        2
    """
    return next(d for d in range(min(at_most, numel), 0, -1) if numel % d == 0)


def hadamard_order(rows: int, inputs: int, at_most: int) -> int:
    """Return the largest power of two that divides both axes of a weight and is not above ``at_most``.

    This is the rule for ``p`` in a Hadamard layout: Sylvester's matrices have these orders.

    Example:
        >>> hadamard_order(64, 24, at_most=16)
        8
    """
    common = math.gcd(rows, inputs)
    return min(common & -common, 1 << (at_most.bit_length() - 1))


@functools.cache
def _hadamard_signs(order: int) -> list[list[int]]:
    """The rows of Sylvester's matrix, ``(-1) ** popcount(i & j)``. Nobody changes the lists."""
    return [[1 - 2 * ((i & j).bit_count() % 2) for j in range(order)] for i in range(order)]


def hadamard_matrix(order: int, like: Tensor) -> Tensor:
    """The Hadamard matrix ``H [order, order]`` of +1 and -1 in Sylvester's order; symmetric, and ``H H = order I``.

    It is made anew each time: a kept tensor would be a fake one where a graph is traced first.

    Args:
        order: a power of two.
        like: gives dtype and device.
    """
    if like.device.type == "cpu":
        return torch.tensor(_hadamard_signs(order), dtype=like.dtype)
    return _computed_hadamard_matrix(order, like)


def _computed_hadamard_matrix(order: int, like: Tensor) -> Tensor:
    """The same, made on the device: copying to a GPU waits for it, and cannot be recorded in a CUDA graph."""
    index = torch.arange(order, device=like.device)
    bits = index[:, None] & index
    for half in range(order.bit_length() - 1):
        bits = bits ^ (bits >> 2**half)  # the lowest bit becomes the parity of 2, 4, ... bits
    return (1 - 2 * (bits & 1)).to(like.dtype)


def _rolled(rows: Sequence[Tensor], shift: int) -> Tensor:
    """Row ``i`` rolled by ``i * shift``, one behind the other.

    A CPU's autocast refuses to join tensors, as rolling does, of another half precision than its own.
    """
    if rows[0].device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        with torch.autocast("cpu", enabled=False):
            return _rolled(rows, shift)
    return torch.cat([row.roll(i * shift) for i, row in enumerate(rows)])


@dataclass(frozen=True)
class TileLayout:
    """How ``p`` copies of one tile fill a weight.

    A weight is seen as a matrix of ``rows x row_size`` (``m x n``; for a convolution ``m`` is the number of output
    channels and ``n`` is ``in_channels / groups * kernel elements``). Four layouts exist:

    * **flat**, the paper's (Eq. 1, 4, 5): copies follow one another in row-major order. Row ``r`` starts at tile
      offset ``(r * n) mod q``, so rows ``r`` and ``r + unique_rows`` have the same sign pattern.
    * **two-axis** (``p_in > 1``): the tile is ``[m / p_out, n / p_in]`` with ``p_out * p_in = p``. Its rows repeat
      as blocks along the output; along the input (the input channels of a convolution) copies are interleaved, so
      that ``p_in`` neighbouring inputs share a weight: they can be summed first.
    * **staggered** (``shift > 0``): flat, with copy ``i`` rolled by ``i * shift`` elements, so that rows differ.
    * **hadamard**: aligned flat copies with signs. Input ``c`` (an input channel of a convolution, whose kernel
      positions follow it) belongs to column group ``c mod p``, and copy ``i`` takes group ``j`` times ``H[i, j]``,
      Sylvester's Hadamard matrix ``(-1) ** popcount(i & j)``. Rows differ; the ``p`` group sums of a tile row serve all
      its copies.

    A parameter that holds a ``batch`` of weights along its first axes (the experts of a mixture) has a flat tile for
    each of them, one behind the other.

    Attributes:
        shape: shape of the weight, output features or channels first.
        p: number of copies; divides the number of weight elements.
        p_in: copies along the input axis; divides ``p`` and the size of the second axis.
        shift: elements by which each further copy is rolled.
        batch: number of weights that the tensor holds, each with a tile of its own.
        hadamard: copies have the signs of a Hadamard matrix; ``p`` is a power of two and divides the first two axes.

    Raises:
        ConfigError: the copies do not fill the weight exactly.

    Example:
        >>> layout = TileLayout((128, 784), p=4)
        >>> layout.tile_size, layout.unique_rows
        (25088, 32)
    """

    shape: tuple[int, ...]
    p: int
    p_in: int = 1
    shift: int = 0
    batch: int = 1
    hadamard: bool = False

    def __post_init__(self) -> None:
        """Check that the copies fill the weight exactly."""
        where = f"a weight of shape {tuple(self.shape)}"
        if self.p < 1 or self.numel % self.p:
            raise ConfigError(f"p={self.p} does not divide the {self.numel} elements of {where}; use a divisor")
        if self.p_in < 1 or self.shift < 0:
            raise ConfigError(f"p_in={self.p_in} must be at least 1 and shift={self.shift} at least 0")
        if self.batch != 1:
            if self.p_in > 1 or self.shift or self.hadamard:
                raise ConfigError("a batch of weights takes flat tiles: neither p_in, shift nor hadamard")
            if self.batch < 1 or self.numel % (self.batch * self.p):
                raise ConfigError(f"batch={self.batch} times p={self.p} does not divide {where}")
        if self.p_in > 1:
            if self.shift:
                raise ConfigError("a layout is either two-axis (p_in > 1) or staggered (shift > 0), not both")
            if len(self.shape) < 2 or self.p % self.p_in or self.rows % self.p_out or self.shape[1] % self.p_in:
                raise ConfigError(
                    f"p_out={self.p // self.p_in} and p_in={self.p_in} must divide the first two axes of {where}"
                )
        if self.hadamard:
            if self.p_in > 1 or self.shift:
                raise ConfigError("a Hadamard layout is neither two-axis (p_in > 1) nor staggered (shift > 0)")
            if self.p > 1 and (len(self.shape) < 2 or hadamard_order(self.shape[0], self.shape[1], self.p) != self.p):
                raise ConfigError(
                    f"p={self.p} with Hadamard signs must be a power of two that divides the first two axes of {where}"
                )

    @cached_property
    def numel(self) -> int:
        """``N``, the number of weight elements."""
        return math.prod(self.shape)

    @cached_property
    def tile_size(self) -> int:
        """``q = N / p``, the number of tile elements."""
        return self.numel // self.p

    @cached_property
    def p_out(self) -> int:
        """Copies along the output axis."""
        return self.p // self.p_in

    @property
    def rows(self) -> int:
        """``m``, the number of output features or channels."""
        return self.shape[0]

    @cached_property
    def row_size(self) -> int:
        """``n``, the number of weights behind one output."""
        return self.numel // self.rows

    @property
    def kind(self) -> LayoutKind:
        """Which layout this is; one copy alone is flat, whatever the shift or the signs."""
        if self.p_in > 1:
            return "two-axis"
        if self.p == 1:
            return "flat"
        return "hadamard" if self.hadamard else "staggered" if self.shift else "flat"

    @cached_property
    def roll(self) -> int:
        """Elements, fewer than ``q``, by which each further copy is rolled."""
        return self.shift % self.tile_size if self.kind == "staggered" else 0

    @cached_property
    def tile_shape(self) -> tuple[int, ...]:
        """Shape in which a tile is trained: that of its whole rows where it holds these and no more, else ``[q]``."""
        if self.p == 1:
            return self.shape
        if self.batch > 1 or self.kind == "staggered" or not self.aligned:
            return (self.tile_size,)
        inputs = self.shape[1:] if self.p_in == 1 else (self.shape[1] // self.p_in, *self.shape[2:])
        return (self.rows // self.p_out, *inputs)

    @cached_property
    def aligned(self) -> bool:
        """Whether each copy along the output holds whole rows (``p_out`` divides ``m``)."""
        return self.rows % self.p_out == 0

    @cached_property
    def unique_rows(self) -> int:
        """``R``, the number of rows (of each weight of a batch) with different sign patterns; it divides ``m``.

        ``q / gcd(q, n)`` in the flat layout, which is ``m / p`` when aligned; ``m / p_out`` in the two-axis one; ``m``
        in the staggered and the Hadamard one.
        """
        if self.batch > 1:
            tile_size = self.tile_size // self.batch
            return tile_size // math.gcd(tile_size, self.shape[-1])
        if self.kind in ("staggered", "hadamard"):
            return self.rows
        if self.kind == "two-axis":
            return self.rows // self.p_out
        return self.tile_size // math.gcd(self.tile_size, self.row_size)

    def distinct_blocks(self, count: int) -> int:
        """How many of ``count`` blocks of rows, one behind the other, differ in their signs: the heads of an attention.

        Example:
            >>> TileLayout((512, 512), p=4).distinct_blocks(8)
            2
        """
        return min(count, self.unique_rows // math.gcd(self.unique_rows, self.rows // count))

    def alphas_in(self, num_alphas: int) -> int:
        """How many of the alphas lie along the input axis: ``p_in`` with one alpha per copy on both axes, else 1."""
        return self.p_in if num_alphas == self.p else 1

    def allows_alphas(self, num_alphas: int) -> bool:
        """Whether a weight can have this many alphas: one, one per output copy, one per copy, or one per row.

        Training uses the first three; one per row is what folding a norm into the alphas gives. A batch has one for
        each of its weights, or for each copy in each of them.
        """
        if self.batch > 1:
            return num_alphas in (self.batch, self.batch * self.p)
        return num_alphas in (1, self.p_out, self.p, self.rows)

    def _axes(self, weight: Tensor) -> Tensor:
        """View of a weight as ``[p_out, m / p_out, inputs / p_in, p_in, kernel]`` (two-axis layout)."""
        return weight.reshape(self.p_out, -1, self.shape[1] // self.p_in, self.p_in, math.prod(self.shape[2:]))

    def _signed(self, copies: Tensor) -> Tensor:
        """Copies, one or ``p`` of them, as ``[p, m / p, inputs / p, p, kernel]``, each with its signs."""
        kernel = math.prod(self.shape[2:])
        columns = copies.reshape(-1, self.rows // self.p, self.shape[1] // self.p, self.p, kernel)
        return columns * hadamard_matrix(self.p, copies).view(self.p, 1, 1, self.p, 1)

    def aggregate(self, weight: Tensor) -> Tensor:
        """``s[j]``, the sum of the ``p`` weight elements that use tile element ``j``, with their signs (Eq. 2).

        Returns:
            Tensor of shape ``[q]`` and the dtype of ``weight``.
        """
        if self.p_in > 1:
            return self._axes(weight).sum((0, 3)).reshape(-1)
        if self.kind == "hadamard":
            return self._signed(weight).sum(0).reshape(-1)
        if self.batch > 1:
            return weight.reshape(self.batch, self.p, -1).sum(1).reshape(-1)
        copies = weight.reshape(self.p, self.tile_size)
        if self.shift:
            copies = _rolled(copies.unbind(), -self.shift).view_as(copies)
        return copies.sum(0)

    def replicate(self, tile: Tensor) -> Tensor:
        """``B``, the tile in every place that uses it (Eq. 4, 5); the adjoint of :meth:`aggregate`."""
        if self.p_in > 1:
            kernel = math.prod(self.shape[2:])
            once = tile.reshape(1, -1, self.shape[1] // self.p_in, 1, kernel)
            return once.repeat(self.p_out, 1, 1, self.p_in, 1).reshape(self.shape)
        if self.kind == "hadamard":
            return self._signed(tile).reshape(self.shape)
        if self.shift:
            return _rolled([tile] * self.p, self.shift).reshape(self.shape)
        if self.batch > 1:
            return tile.reshape(self.batch, 1, -1).repeat(1, self.p, 1).reshape(self.shape)
        return tile.repeat(self.p).reshape(self.shape)

    def unique_weight(self, tile: Tensor) -> Tensor:
        """The different rows, unscaled, from a tile of shape ``[q]``.

        Returns:
            Tensor of shape ``[unique_rows, n / p_in]``: in the two-axis layout it applies to summed inputs.
        """
        if self.shift or self.kind == "hadamard":
            return self.replicate(tile).reshape(self.rows, -1)
        row_size = self.row_size // self.p_in
        copies = self.unique_rows * row_size // self.tile_size  # 1 when aligned
        return (tile if copies == 1 else tile.repeat(copies)).reshape(self.unique_rows, row_size)

    def sum_inputs(self, input: Tensor, dim: int) -> Tensor:
        """Sum the ``p_in`` neighbours along ``dim`` that share a weight."""
        if self.p_in == 1:
            return input
        neighbours: Tensor = input.unflatten(dim, (-1, self.p_in))
        return neighbours.sum(dim % input.dim() + 1)

    def column_groups(self, tile: Tensor) -> Tensor:
        """A tile ``[q]`` of a Hadamard layout by column groups: ``[p, m / p, inputs / p, *kernel]``."""
        rows = tile.reshape(self.rows // self.p, self.shape[1] // self.p, self.p, *self.shape[2:])
        return rows.movedim(2, 0)

    def alpha_groups(self, weight: Tensor, num_alphas: int) -> Tensor:
        """View of a weight as ``[a_out, x, a_in, y]`` where one alpha holds for each pair of the ``a`` axes."""
        a_in = self.alphas_in(num_alphas)
        kernel = math.prod(self.shape[2:]) if a_in > 1 else 1
        return weight.reshape(num_alphas // a_in, -1, a_in, kernel)

    def scale(self, bits: Tensor, alpha: Tensor) -> Tensor:
        """``alpha * B`` with each alpha in its place (Eq. 7, 9); ``alpha`` has shape ``[num_alphas]``."""
        groups = self.alpha_groups(bits, alpha.numel())
        return (alpha.reshape(groups.shape[0], 1, groups.shape[2], 1) * groups).reshape(self.shape)

    def alphas(self, source: Tensor, num_alphas: int) -> Tensor:
        """``alpha = mean(abs(A))`` over the elements that each alpha scales (Eq. 7, 9).

        Returns:
            Tensor of shape ``[num_alphas]`` and the dtype of ``source``.
        """
        # A mean, not a 1-norm: PyTorch sums that one in sequence, which loses digits on large weights.
        return self.alpha_groups(source, num_alphas).abs().mean((1, 3)).reshape(-1)

    def row_alphas(self, alpha: Tensor) -> Tensor:
        """One factor per row, shape ``[m]`` (or ``[1]``), of alphas that scale whole rows."""
        return alpha if alpha.numel() == 1 else alpha.repeat_interleave(self.rows // alpha.numel())


@dataclass(frozen=True)
class TiledProduct:
    """What a layer on a tiled weight has to multiply, where its alphas come in, and how the rows lie in the tile.

    Six words, each with one meaning here and in every backend:

    * **copies**: how often the tile occurs in the weight, ``p``; ``p_out`` times along the outputs, ``p_in`` along the
      inputs.
    * **neighbours**: the ``p_in`` inputs side by side that share a tile element. Where they share the scale too, they
      are **summed** before the product.
    * **unique rows**: the ``R`` rows of the weight with different signs. They are the **distinct rows** as long as each
      row has one scale; otherwise every row counts as its own.
    * **repeats**: how often the result of a computed row occurs among the outputs, scaled each time. The groups of a
      convolution read different inputs, so that only rows of one group share a result.
    * **replicas**: the ``k`` scaled copies, one behind the other, that the *input* stands for (``input_alpha``).
    * **mixes**: the ``p`` column groups of a Hadamard layout, where the results of one row for each group can be
      **mixed** into the results of its ``p`` copies: that takes ``p`` times fewer multiply-adds. Whoever does not mix
      multiplies with all ``rows``.

    The whole is: sum neighbours, multiply with ``rows`` rows of ``columns`` weights, repeat the results, scale. With
    signs it is: multiply each of ``rows / mixes`` rows with each of ``mixes`` groups of columns apart, mix, scale. A
    transpose convolution has a row for each *input* channel; there, inputs whose rows repeat are scaled and summed (or
    mixed), and then multiplied.

    Attributes:
        layout: layout of the weight, not of a batch of them.
        num_alphas: number of alphas, one that ``layout`` allows.
        groups: convolution groups; divides the rows of the layout.
        replicas: number of input alphas, 1 if there are none; divides the inputs.

    Example:
        >>> product = TiledProduct(TileLayout((128, 784), p=4), num_alphas=4)
        >>> product.rows, product.columns, product.repeats, product.alphas
        (32, 784, 4, 'copy')
    """

    layout: TileLayout
    num_alphas: int
    groups: int = 1
    replicas: int = 1

    # Alphas

    @cached_property
    def alphas(self) -> AlphaPlace:
        """Where the alphas lie.

        * ``"layer"``: one scales the whole weight.
        * ``"row"``: row ``r`` has ``alpha[r]``.
        * ``"copy"``: each copy along the outputs holds whole rows and has its own: row ``r`` has
          ``alpha[r // rows_per_alpha]``.
        * ``"input"``: the neighbours have different ones: neighbour ``j`` of copy ``i`` along the outputs has
          ``alpha[i * p_in + j]``.
        * ``"mixed"``: each copy has its own, and copies end inside rows: element ``e`` has ``alpha[e // q]``.

        Where a number of alphas can be read in two ways, the first of ``"layer"``, ``"input"``, ``"row"`` holds.
        """
        layout = self.layout
        if self.num_alphas == 1:
            return "layer"
        if layout.alphas_in(self.num_alphas) > 1:
            return "input"
        if self.num_alphas == layout.rows:
            return "row"
        return "copy" if layout.aligned else "mixed"

    @cached_property
    def scales_results(self) -> bool:
        """Whether each row has one alpha, so that the scales can wait until after the product."""
        return self.alphas in ("layer", "copy", "row")

    @cached_property
    def rows_per_alpha(self) -> int:
        """Row ``r`` of the weight is scaled by ``alpha[r // rows_per_alpha]``; 0 where a row has several alphas."""
        return self.layout.rows // self.num_alphas if self.scales_results else 0

    # Rows

    @cached_property
    def distinct_rows(self) -> int:
        """Rows of the whole weight that differ once they are scaled, up to one factor for each.

        Row ``r`` is row ``r mod distinct_rows`` times a factor.
        """
        return self.layout.unique_rows if self.scales_results else self.layout.rows

    @cached_property
    def group_rows(self) -> int:
        """Rows of one group, ``m / groups``."""
        return self.layout.rows // self.groups

    @cached_property
    def rows(self) -> int:
        """Rows to compute in each group: its first ones. Row ``j`` of the group is its row ``j mod rows``, scaled."""
        return min(self.group_rows, self.distinct_rows)

    def computed_rows(self, device: torch.device | None = None) -> Tensor:
        """Which of the distinct rows each group computes, ``[groups, rows]``."""
        first = torch.arange(self.groups, device=device)[:, None] * self.group_rows
        return (first + torch.arange(self.rows, device=device)) % self.distinct_rows

    @cached_property
    def repeats(self) -> int:
        """How often the results of a group's rows occur among its outputs, the last time perhaps not all of them.

        Without groups it is always all of them: ``rows * repeats == m``.
        """
        return -(-self.group_rows // self.rows)

    @cached_property
    def alpha_per_repeat(self) -> bool:
        """Whether each alpha scales one repeat of all rows, as those of copies do that are not rolled."""
        return self.alphas == "copy" and self.num_alphas == self.repeats

    # Columns

    @property
    def neighbours(self) -> int:
        """Inputs side by side that share a tile element: ``p_in``."""
        return self.layout.p_in

    @cached_property
    def summed(self) -> int:
        """Neighbours that are summed before the product: all, or 1 where they have different scales.

        That is where alphas lie along the input, and where replicas of the input end between neighbours.
        """
        layout = self.layout
        if self.neighbours == 1 or self.alphas == "input" or layout.shape[1] // self.replicas % self.neighbours:
            return 1
        return self.neighbours

    @property
    def columns(self) -> int:
        """Weights of a computed row, those of all replicas: ``n``, or ``n / p_in`` after neighbours are summed."""
        return self.layout.row_size // self.summed

    @cached_property
    def mixes(self) -> int:
        """Column groups whose results are mixed into those of the copies; 1 where all rows have to be multiplied.

        That is in other layouts, where the groups of a convolution read different inputs, and where column groups do
        not lie alike in all replicas of the input.
        """
        layout = self.layout
        mixed = layout.kind == "hadamard" and self.groups == 1 and layout.shape[1] // self.replicas % layout.p == 0
        return layout.p if mixed else 1

    @property
    def macs(self) -> int:
        """Multiply-adds for one output vector or position, with the columns of replicas added up before."""
        return self.groups * self.rows * self.columns // self.replicas // self.mixes

    @property
    def additions(self) -> int:
        """Further additions for it, of a butterfly that mixes the results: ``log2(p)`` for each row."""
        return self.rows * (self.mixes.bit_length() - 1)

    @cached_property
    def bare(self) -> bool:
        """Whether the (summed) inputs meet tile elements without scales: rows of :meth:`TileLayout.unique_weight`."""
        return self.scales_results and self.summed == self.neighbours

    # Places in the tile

    @property
    def row_elements(self) -> int:
        """Tile elements of one row: ``n / p_in``, whether neighbours are summed or not."""
        return self.layout.row_size // self.neighbours

    @cached_property
    def contiguous(self) -> bool:
        """Whether the tile is the distinct rows one behind the other, and nothing else.

        Otherwise rows begin inside the tile, go round its end, or belong to copies that are rolled or have signs.
        """
        layout = self.layout
        return (
            layout.kind not in ("staggered", "hadamard") and self.distinct_rows * self.row_elements == layout.tile_size
        )

    @cached_property
    def alignment(self) -> int:
        """Every row, and each replica's part of it, begins at a multiple of so many elements; so does the tile end.

        Eight packed bits are a byte: rows begin on whole bytes where this is a multiple of 8.
        """
        layout = self.layout
        return math.gcd(layout.tile_size, self.row_elements // self.replicas, self.row_elements, layout.roll)


@dataclass(frozen=True)
class TileSpec:
    """Everything that fixes the tiling of one weight: layout, number of alphas and their source.

    Attributes:
        layout: the tile layout.
        num_alphas: 1 (one scale per layer), ``layout.p_out`` (one per output copy) or ``layout.p`` (one per copy).
        alpha_source: ``"A"``, a second trainable tensor, or ``"W"``, the weight itself.
        tile_dtype: ``"binary"`` (the sign, 1 bit) or ``"float"`` (the sum itself, 32 bits).
        latent: what is trained, ``"weight"`` or ``"tile"``; ``"weight"`` once it is stored.
        activation: number format of the layer's input.
        input_scale: whose scale that has: each token's own, or one of the layer. ``"token"`` where it is float.
    """

    layout: TileLayout
    num_alphas: int
    alpha_source: AlphaSource = "A"
    tile_dtype: TileDType = "binary"
    latent: Latent = "weight"
    activation: Activation = "float"
    input_scale: InputScale = "token"

    @property
    def tile_bits(self) -> int:
        """Stored bits of the tile: ``q``, or ``32 q`` for a full-precision tile."""
        return self.layout.tile_size * (1 if self.tile_dtype == "binary" else 32)


def tile_vector(weight: Tensor, layout: TileLayout, *, binary: bool = True) -> Tensor:
    """The tile of a weight: ``t[j] = +1 if s[j] > 0 else -1`` (Eq. 3), or ``s`` itself if not ``binary``.

    Args:
        weight: tensor of ``layout.shape``, any floating dtype.
        layout: the tile layout.
        binary: take the sign; otherwise keep the sums (full-precision tile).

    Returns:
        Tensor of shape ``[q]`` and the dtype of ``weight``. A sum of exactly 0 gives -1.
    """
    s = layout.aggregate(weight)
    return tile_signs(s) if binary else s


def tile_signs(s: Tensor) -> Tensor:
    """``+1`` where ``s > 0``, else ``-1`` (Eq. 3), in its shape and dtype."""
    return s.clone().gt_(0).mul_(2).sub_(1)  # torch.where takes ten times as long


def tiled_weight(weight: Tensor, source: Tensor, spec: TileSpec) -> Tensor:
    """The weight that a tiled layer uses, without autograd support: ``alpha * B`` (Eq. 2-9)."""
    layout = spec.layout
    bits = layout.replicate(tile_vector(weight, layout, binary=spec.tile_dtype == "binary"))
    return layout.scale(bits, layout.alphas(source, spec.num_alphas))
