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
    """How ``p`` copies of one tile fill a weight: copies follow one another in row-major order (Eq. 1, 4, 5).

    A weight is also seen as a matrix of ``rows x row_size`` (``m x n``; for a convolution ``m`` is the number of
    output channels and ``n`` is ``in_channels / groups * kernel elements``). Row ``r`` starts at tile offset
    ``(r * n) mod q``, so rows ``r`` and ``r + unique_rows`` have the same sign pattern.

    Attributes:
        shape: shape of the weight, output features or channels first.
        p: number of copies; divides the number of weight elements.

    Raises:
        ConfigError: ``p`` does not divide the number of elements.

    Example:
        >>> layout = TileLayout((128, 784), p=4)
        >>> layout.tile_size, layout.unique_rows
        (25088, 32)
    """

    shape: tuple[int, ...]
    p: int

    def __post_init__(self) -> None:
        """Check that the copies fill the weight exactly."""
        if self.p < 1 or math.prod(self.shape) % self.p:
            raise ConfigError(
                f"p={self.p} does not divide the {math.prod(self.shape)} elements of a weight of shape "
                f"{tuple(self.shape)}; use a divisor"
            )

    @property
    def numel(self) -> int:
        """``N``, the number of weight elements."""
        return math.prod(self.shape)

    @property
    def tile_size(self) -> int:
        """``q = N / p``, the number of tile elements."""
        return self.numel // self.p

    @property
    def rows(self) -> int:
        """``m``, the number of output features or channels."""
        return self.shape[0]

    @property
    def row_size(self) -> int:
        """``n``, the number of weights behind one output."""
        return self.numel // self.rows

    @property
    def aligned(self) -> bool:
        """Whether each copy holds whole rows (``p`` divides ``m``)."""
        return self.rows % self.p == 0

    @property
    def unique_rows(self) -> int:
        """``R = q / gcd(q, n)``, the number of rows with different sign patterns; it divides ``m``."""
        return self.tile_size // math.gcd(self.tile_size, self.row_size)

    def distinct_rows(self, num_alphas: int) -> int:
        """Number of rows that differ once they are scaled, up to one factor per row.

        With one alpha that is :attr:`unique_rows`. With one alpha per copy it still is when copies hold whole
        rows; otherwise a row mixes alphas and every row is its own.
        """
        return self.unique_rows if num_alphas == 1 or self.aligned else self.rows

    def rows_per_group(self, num_alphas: int, groups: int = 1) -> int:
        """Number of rows to multiply in each of ``groups`` convolution groups.

        Groups read different inputs, so only rows of one group share a result: of the ``m / groups``
        neighbouring rows of a group, the first ``min(m / groups, R)`` differ and the others repeat them.
        """
        return min(self.rows // groups, self.distinct_rows(num_alphas))

    def aggregate(self, weight: Tensor) -> Tensor:
        """``s[j] = sum_i W.reshape(p, q)[i, j]`` (Eq. 2); shape ``[q]``, dtype of ``weight``."""
        return weight.reshape(self.p, self.tile_size).sum(0)

    def replicate(self, tile: Tensor) -> Tensor:
        """``B = t.repeat(p).reshape(W.shape)`` (Eq. 4, 5); the adjoint of :meth:`aggregate`."""
        return tile.repeat(self.p).reshape(self.shape)

    def unique_weight(self, tile: Tensor) -> Tensor:
        """The matrix ``[unique_rows, row_size]`` of the different rows, unscaled, from a tile of shape ``[q]``."""
        copies = self.unique_rows * self.row_size // self.tile_size  # 1 when aligned
        return tile.repeat(copies).reshape(self.unique_rows, self.row_size)

    def scale(self, bits: Tensor, alpha: Tensor) -> Tensor:
        """``(alpha[:, None] * B.reshape(k, N / k)).reshape(W.shape)`` for ``alpha`` of shape ``[k]``, k = 1 or p."""
        return (alpha[:, None] * bits.reshape(alpha.numel(), -1)).reshape(self.shape)

    def row_alphas(self, alpha: Tensor) -> Tensor:
        """One factor per row, shape ``[m]`` (or ``[1]``), for rows that :meth:`distinct_rows` lets repeat."""
        return alpha if alpha.numel() == 1 else alpha.repeat_interleave(self.rows // self.p)


@dataclass(frozen=True)
class TileSpec:
    """Everything that fixes the tiling of one weight: layout, number of alphas and their source.

    Attributes:
        layout: the tile layout.
        num_alphas: 1 (one scale per layer) or ``layout.p`` (one per copy).
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


def alphas(source: Tensor, num_alphas: int) -> Tensor:
    """``alpha[i] = mean(abs(source.reshape(num_alphas, -1)[i]))`` (Eq. 7 with 1 alpha, Eq. 9 with p).

    Returns:
        Tensor of shape ``[num_alphas]`` and the dtype of ``source``.
    """
    return source.reshape(num_alphas, -1).abs().mean(1)


def tiled_weight(weight: Tensor, source: Tensor, spec: TileSpec) -> Tensor:
    """The weight that a tiled layer uses, without autograd support: ``alpha * B`` (Eq. 2-9)."""
    layout = spec.layout
    bits = layout.replicate(tile_vector(weight, layout, binary=spec.tile_dtype == "binary"))
    return layout.scale(bits, alphas(source, spec.num_alphas))
