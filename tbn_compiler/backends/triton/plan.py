"""What a kernel has to know about a tiled weight, decided from the layout alone: nothing here imports triton."""

from __future__ import annotations

from dataclasses import dataclass

from tbn_compiler.tiling import TileLayout

# Columns and tile positions are 32-bit numbers in the kernels, up to one block beyond the last one.
INDEX_LIMIT = 2**31 - 2**16


class Unsupported(Exception):
    """The Triton kernels do not take a call; the message says why. The reference computes it."""


@dataclass(frozen=True)
class WeightPlan:
    """How kernels read a tiled weight as a matrix ``[rows, columns]``.

    Attributes:
        kind: how the tile is stored and indexed, see :mod:`tbn_compiler.backends.triton.kernels.weights`.
        rows: rows to multiply; the output repeats them ``copies`` times.
        copies: copies of each row in the output.
        columns: weights of a row that meet different inputs.
        row_size: distance of rows in the flat index.
        tile_size: ``q``.
        shift: elements by which each further copy of the tile is rolled.
        blocks: runs of ``columns`` weights that share the input (``input_alpha``), 1 as a rule.
        interleaved: neighbouring inputs that share a weight inside the kernel.
        sum_inputs: neighbouring inputs that are summed before the kernel.
        mixed: each weight has the alpha of its copy, since rows mix alphas.
        inner_alphas: each of the ``interleaved`` neighbours has its own alpha.
        rows_per_alpha: output rows that share an alpha (otherwise).
    """

    kind: str
    rows: int
    copies: int
    columns: int
    row_size: int
    tile_size: int
    shift: int
    blocks: int
    interleaved: int
    sum_inputs: int
    mixed: bool
    inner_alphas: bool
    rows_per_alpha: int

    @property
    def packed(self) -> bool:
        """Whether the tile is packed bits."""
        return self.kind not in ("float", "indexed")

    @property
    def signs(self) -> bool:
        """Whether the weights that meet the inputs are +1 and -1, without a scale among them."""
        return self.packed and self.blocks == 1 and not (self.mixed or self.inner_alphas)

    @property
    def direct(self) -> bool:
        """Whether blocks of the weight are read as they lie: no position goes round, no weight is computed."""
        return self.kind in ("words", "bytes", "float") and self.blocks == 1 and not (self.mixed or self.inner_alphas)


def plan_weight(
    layout: TileLayout,
    num_alphas: int,
    *,
    packed: bool,
    word_aligned: bool = False,
    blocks: int = 1,
    integer: bool = False,
) -> WeightPlan:
    """Decide how kernels read a weight.

    Args:
        layout: layout of the weight ``[m, n]`` or ``[m, channels, *kernel]``.
        num_alphas: number of the layer's alphas.
        packed: the tile is packed bits, otherwise floating point.
        word_aligned: the packed tile begins at a multiple of four bytes.
        blocks: number of input alphas.
        integer: the input is ``int8``.

    Raises:
        Unsupported: no kernel covers the combination.
    """
    q, n, p_in = layout.tile_size, layout.row_size, layout.p_in
    if q + n > INDEX_LIMIT or layout.rows > INDEX_LIMIT:
        raise Unsupported(f"a tile of {q} elements and rows of {n} exceed 32-bit indices")
    if packed and q < 8:
        raise Unsupported(f"a tile of {q} bits is smaller than a byte")
    if integer and not packed:
        raise Unsupported("integer products need a packed tile, this one is floating point")
    inner_alphas = layout.alphas_in(num_alphas) > 1
    rows = layout.rows if inner_alphas else layout.distinct_rows(num_alphas)
    # A copy that ends inside a row brings its alpha along; one alpha for each copy is then all there can be.
    mixed = not inner_alphas and num_alphas == layout.p > 1 and not layout.aligned and num_alphas != layout.rows
    if integer and (mixed or inner_alphas):
        raise Unsupported("rows that mix alphas have no integer products")
    if integer and blocks > 1:
        raise Unsupported("input alphas scale the weights, which leaves no integer products")
    # Sums of int8 need not fit int8: there the neighbours meet the shared weight one after the other.
    inside = p_in if inner_alphas or integer else 1
    if blocks > 1 and p_in > 1 and (inside > 1 or layout.shape[1] // blocks % p_in):
        raise Unsupported("inputs that share a weight lie in different replicas of the input")
    row_size = n // p_in
    columns = row_size // blocks
    contiguous = layout.shift == 0 and rows * row_size <= q
    return WeightPlan(
        kind=_kind(layout.shift, contiguous, packed, word_aligned, row_size, columns),
        rows=rows,
        copies=layout.rows // rows,
        columns=columns,
        row_size=row_size,
        tile_size=q,
        shift=layout.shift,
        blocks=blocks,
        interleaved=inside,
        sum_inputs=p_in // inside,
        mixed=mixed,
        inner_alphas=inner_alphas,
        rows_per_alpha=layout.rows * layout.alphas_in(num_alphas) // num_alphas if not mixed else layout.rows,
    )


def _kind(shift: int, contiguous: bool, packed: bool, word_aligned: bool, row_size: int, columns: int) -> str:
    if not packed:
        return "float" if contiguous else "indexed"
    if contiguous and word_aligned and row_size % 32 == 0 and columns % 32 == 0:
        return "words"
    if contiguous and row_size % 8 == 0 and columns % 8 == 0:
        return "bytes"
    return "rolled" if shift else "bits"
