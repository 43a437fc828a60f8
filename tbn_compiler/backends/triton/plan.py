"""What a kernel has to know about a tiled weight, decided from the layout alone: nothing here imports triton."""

from __future__ import annotations

from dataclasses import dataclass

from tbn_compiler.tiling import LayoutKind, TiledProduct

# Columns and tile positions are 32-bit numbers in the kernels, up to one block beyond the last one.
INDEX_LIMIT = 2**31 - 2**16

# How rows that begin inside bytes are indexed, by kind of layout; the kernels know no other kind.
_KINDS: dict[LayoutKind, str] = {"flat": "bits", "two-axis": "bits", "staggered": "rolled"}


class UnsupportedError(Exception):
    """The Triton kernels do not take a call; the message says why. The reference computes it."""


@dataclass(frozen=True)
class WeightPlan:
    """How kernels read a tiled weight as a matrix ``[rows, columns]``.

    Attributes:
        kind: how the tile is stored and indexed, see :mod:`tbn_compiler.backends.triton.kernels.weights`.
        rows: rows to multiply, of the whole weight.
        repeats: how often the result of each row occurs in the output.
        columns: weights of a row that meet different inputs.
        row_size: distance of rows in the flat index.
        tile_size: ``q``.
        shift: elements by which each further copy of the tile is rolled.
        replicas: runs of ``columns`` weights that share the input (``input_alpha``), 1 as a rule.
        interleaved: neighbouring inputs that share a weight inside the kernel.
        sum_inputs: neighbouring inputs that are summed before the kernel.
        mixed: each weight has the alpha of its copy, since rows mix alphas.
        inner_alphas: each of the ``interleaved`` neighbours has its own alpha.
        rows_per_alpha: output rows that share an alpha, or the alphas of their neighbours; any number where ``mixed``.
    """

    kind: str
    rows: int
    repeats: int
    columns: int
    row_size: int
    tile_size: int
    shift: int
    replicas: int
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
        return self.packed and self.replicas == 1 and not (self.mixed or self.inner_alphas)

    @property
    def whole_words(self) -> bool:
        """Whether each row is whole 32-bit words of +1 and -1, and each of its weights meets an input of its own."""
        return self.kind == "words" and self.signs and self.interleaved == 1

    @property
    def direct(self) -> bool:
        """Whether blocks of the weight are read as they lie: no position goes round, no weight is computed."""
        return self.kind in ("words", "bytes", "float") and self.replicas == 1 and not (self.mixed or self.inner_alphas)


def plan_weight(
    product: TiledProduct, *, packed: bool, word_aligned: bool = False, integer: bool = False
) -> WeightPlan:
    """Decide how kernels read a weight.

    Args:
        product: what the layer multiplies.
        packed: the tile is packed bits, otherwise floating point.
        word_aligned: the packed tile begins at a multiple of four bytes.
        integer: the input is ``int8``.

    Raises:
        UnsupportedError: no kernel covers the combination.
    """
    layout, replicas = product.layout, product.replicas
    q, n = layout.tile_size, layout.row_size
    if layout.kind not in _KINDS:
        raise UnsupportedError(f"a {layout.kind} layout")
    if q + n > INDEX_LIMIT or layout.rows > INDEX_LIMIT:
        raise UnsupportedError(f"a tile of {q} elements and rows of {n} exceed 32-bit indices")
    if packed and q < 8:
        raise UnsupportedError(f"a tile of {q} bits is smaller than a byte")
    if integer and not packed:
        raise UnsupportedError("integer products need a packed tile, this one is floating point")
    if integer and not product.scales_results:
        raise UnsupportedError("rows that mix alphas have no integer products")
    if integer and replicas > 1:
        raise UnsupportedError("input alphas scale the weights, which leaves no integer products")
    # Sums of int8 need not fit int8: there the neighbours meet the shared weight one after the other.
    summed = 1 if integer else product.summed
    if replicas > 1 and summed < product.neighbours:
        raise UnsupportedError("inputs that share a weight lie in different replicas of the input")
    return WeightPlan(
        kind=_kind(product, packed, word_aligned),
        rows=product.distinct_rows,
        repeats=layout.rows // product.distinct_rows,
        columns=product.row_elements // replicas,
        row_size=product.row_elements,
        tile_size=q,
        shift=layout.shift,
        replicas=replicas,
        interleaved=product.neighbours // summed,
        sum_inputs=summed,
        mixed=product.alphas == "mixed",
        inner_alphas=product.alphas == "input",
        rows_per_alpha=product.rows_per_alpha or max(layout.rows // layout.p_out, 1),
    )


def _kind(product: TiledProduct, packed: bool, word_aligned: bool) -> str:
    if not packed:
        return "float" if product.contiguous else "indexed"
    if product.contiguous and word_aligned and product.alignment % 32 == 0:
        return "words"
    if product.contiguous and product.alignment % 8 == 0:
        return "bytes"
    return _KINDS[product.layout.kind]
