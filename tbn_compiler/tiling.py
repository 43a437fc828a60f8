"""The method of Tiled Bit Networks in plain tensor code (Gorbett, Shirazi, Ray, CIKM 2024, Eq. 1-9).

A weight ``W`` of ``N`` elements is viewed row-major as ``p`` rows of ``q = N / p`` elements. The rows are summed
(Eq. 2), the sign of the sum is the *tile* ``t`` (Eq. 3), and the weight that the layer uses is ``p`` copies of
the tile times one scale ``alpha`` per layer (Eq. 7) or per copy (Eq. 9).

:class:`TileLayout` is the single answer to "which tile element does a weight element use": every pass and every
backend asks it instead of doing index arithmetic of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from tbn_compiler.config import AlphaSource, TileDType
from tbn_compiler.errors import ConfigError


def largest_divisor(numel: int, at_most: int) -> int:
    """Return the largest divisor of ``numel`` that is not above ``at_most``.

    This is the divisor rule for a layer whose size ``p`` does not divide.

    Example:
        >>> largest_divisor(10, at_most=4)
        2
    """
    return next(d for d in range(min(at_most, numel), 0, -1) if numel % d == 0)


@dataclass(frozen=True)
class TileLayout:
    """How ``p`` copies of one tile fill a weight.

    A weight is seen as a matrix of ``rows x row_size`` (``m x n``; for a convolution ``m`` is the number of output
    channels and ``n`` is ``in_channels / groups * kernel elements``). Three layouts exist:

    * **flat**, the paper's (Eq. 1, 4, 5): copies follow one another in row-major order. Row ``r`` starts at tile
      offset ``(r * n) mod q``, so rows ``r`` and ``r + unique_rows`` have the same sign pattern.
    * **two-axis** (``p_in > 1``): the tile is ``[m / p_out, n / p_in]`` with ``p_out * p_in = p``. Its rows repeat
      as blocks along the output; along the input (the input channels of a convolution) copies are interleaved, so
      that ``p_in`` neighbouring inputs share a weight: they can be summed first.
    * **staggered** (``shift > 0``): flat, with copy ``i`` rolled by ``i * shift`` elements, so that rows differ.

    Attributes:
        shape: shape of the weight, output features or channels first.
        p: number of copies; divides the number of weight elements.
        p_in: copies along the input axis; divides ``p`` and the size of the second axis.
        shift: elements by which each further copy is rolled.

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

    def __post_init__(self) -> None:
        """Check that the copies fill the weight exactly."""
        where = f"a weight of shape {tuple(self.shape)}"
        if self.p < 1 or self.numel % self.p:
            raise ConfigError(f"p={self.p} does not divide the {self.numel} elements of {where}; use a divisor")
        if self.p_in < 1 or self.shift < 0:
            raise ConfigError(f"p_in={self.p_in} must be at least 1 and shift={self.shift} at least 0")
        if self.p_in > 1:
            if self.shift:
                raise ConfigError("a layout is either two-axis (p_in > 1) or staggered (shift > 0), not both")
            if len(self.shape) < 2 or self.p % self.p_in or self.rows % self.p_out or self.shape[1] % self.p_in:
                raise ConfigError(
                    f"p_out={self.p // self.p_in} and p_in={self.p_in} must divide the first two axes of {where}"
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

    @cached_property
    def aligned(self) -> bool:
        """Whether each copy along the output holds whole rows (``p_out`` divides ``m``)."""
        return self.rows % self.p_out == 0

    @cached_property
    def unique_rows(self) -> int:
        """``R``, the number of rows with different sign patterns; it divides ``m``.

        ``q / gcd(q, n)`` in the flat layout, which is ``m / p`` when aligned; ``m / p_out`` in the two-axis one.
        """
        if self.shift and self.p > 1:
            return self.rows
        if self.p_in > 1:
            return self.rows // self.p_out
        return self.tile_size // math.gcd(self.tile_size, self.row_size)

    def alphas_in(self, num_alphas: int) -> int:
        """How many of the alphas lie along the input axis: ``p_in`` with one alpha per copy on both axes, else 1."""
        return self.p_in if num_alphas == self.p else 1

    def allows_alphas(self, num_alphas: int) -> bool:
        """Whether a weight can have this many alphas: one, one per output copy, one per copy, or one per row.

        Training uses the first three; one per row is what folding a norm into the alphas gives.
        """
        return num_alphas in (1, self.p_out, self.p, self.rows)

    def one_alpha_per_row(self, num_alphas: int) -> bool:
        """Whether one alpha holds for a whole row: no copy ends inside a row, and no alphas lie along the input."""
        return self.alphas_in(num_alphas) == 1 and (num_alphas in (1, self.rows) or self.aligned)

    def distinct_rows(self, num_alphas: int) -> int:
        """Number of rows that differ once they are scaled, up to one factor per row.

        That is :attr:`unique_rows` as long as one alpha holds for a whole row. Otherwise a row mixes alphas and every
        row is its own.
        """
        return self.unique_rows if self.one_alpha_per_row(num_alphas) else self.rows

    def rows_per_group(self, num_alphas: int, groups: int = 1) -> int:
        """Number of rows to multiply in each of ``groups`` convolution groups.

        Groups read different inputs, so only rows of one group share a result: of the ``m / groups``
        neighbouring rows of a group, the first ``min(m / groups, R)`` differ and the others repeat them.
        """
        return min(self.rows // groups, self.distinct_rows(num_alphas))

    def inputs_per_row(self, num_alphas: int) -> int:
        """Multiply-adds behind one computed row: ``n / p_in`` where neighbouring inputs are summed first."""
        return self.row_size // (self.p_in if self.alphas_in(num_alphas) == 1 else 1)

    def _axes(self, weight: Tensor) -> Tensor:
        """View of a weight as ``[p_out, m / p_out, inputs / p_in, p_in, kernel]`` (two-axis layout)."""
        return weight.reshape(self.p_out, -1, self.shape[1] // self.p_in, self.p_in, math.prod(self.shape[2:]))

    def aggregate(self, weight: Tensor) -> Tensor:
        """``s[j]``, the sum of the ``p`` weight elements that use tile element ``j`` (Eq. 2).

        Returns:
            Tensor of shape ``[q]`` and the dtype of ``weight``.
        """
        if self.p_in > 1:
            return self._axes(weight).sum((0, 3)).reshape(-1)
        copies = weight.reshape(self.p, self.tile_size)
        if self.shift:
            copies = torch.stack([copies[i].roll(-i * self.shift) for i in range(self.p)])
        return copies.sum(0)

    def replicate(self, tile: Tensor) -> Tensor:
        """``B``, the tile in every place that uses it (Eq. 4, 5); the adjoint of :meth:`aggregate`."""
        if self.p_in > 1:
            kernel = math.prod(self.shape[2:])
            once = tile.reshape(1, -1, self.shape[1] // self.p_in, 1, kernel)
            return once.repeat(self.p_out, 1, 1, self.p_in, 1).reshape(self.shape)
        if self.shift:
            return torch.cat([tile.roll(i * self.shift) for i in range(self.p)]).reshape(self.shape)
        return tile.repeat(self.p).reshape(self.shape)

    def unique_weight(self, tile: Tensor) -> Tensor:
        """The different rows, unscaled, from a tile of shape ``[q]``.

        Returns:
            Tensor of shape ``[unique_rows, n / p_in]``: in the two-axis layout it applies to summed inputs.
        """
        if self.shift:
            return self.replicate(tile).reshape(self.rows, -1)
        row_size = self.row_size // self.p_in
        copies = self.unique_rows * row_size // self.tile_size  # 1 when aligned
        return (tile if copies == 1 else tile.repeat(copies)).reshape(self.unique_rows, row_size)

    def sum_inputs(self, input: Tensor, dim: int) -> Tensor:
        """Sum the ``p_in`` neighbours along ``dim`` that share a weight."""
        if self.p_in == 1:
            return input
        return input.unflatten(dim, (-1, self.p_in)).sum(dim % input.dim() + 1)

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
        """One factor per row, shape ``[m]`` (or ``[1]``), for rows that :meth:`distinct_rows` lets repeat."""
        return alpha if alpha.numel() == 1 else alpha.repeat_interleave(self.rows // alpha.numel())


@dataclass(frozen=True)
class TileSpec:
    """Everything that fixes the tiling of one weight: layout, number of alphas and their source.

    Attributes:
        layout: the tile layout.
        num_alphas: 1 (one scale per layer), ``layout.p_out`` (one per output copy) or ``layout.p`` (one per copy).
        alpha_source: ``"A"``, a second trainable tensor, or ``"W"``, the weight itself.
        tile_dtype: ``"binary"`` (the sign, 1 bit) or ``"float"`` (the sum itself, 32 bits).
    """

    layout: TileLayout
    num_alphas: int
    alpha_source: AlphaSource = "A"
    tile_dtype: TileDType = "binary"

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
    return torch.where(s > 0, 1.0, -1.0).to(weight.dtype) if binary else s


def tiled_weight(weight: Tensor, source: Tensor, spec: TileSpec) -> Tensor:
    """The weight that a tiled layer uses, without autograd support: ``alpha * B`` (Eq. 2-9)."""
    layout = spec.layout
    bits = layout.replicate(tile_vector(weight, layout, binary=spec.tile_dtype == "binary"))
    return layout.scale(bits, layout.alphas(source, spec.num_alphas))
