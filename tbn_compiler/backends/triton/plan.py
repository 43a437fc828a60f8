"""What a kernel has to know about a tiled weight, decided from the layout alone: nothing here imports triton."""

from __future__ import annotations

from dataclasses import dataclass, replace

from tbn_compiler.tiling import LayoutKind, TiledProduct, TileLayout

# Columns and tile positions are 32-bit numbers in the kernels, up to one block beyond the last one.
INDEX_LIMIT = 2**31 - 2**16

# Column groups whose results a program keeps side by side to mix them, and those that it also multiplies on tensor
# cores: with more of them, compiling takes a minute.
MOST_MIXES = 32
MOST_GROUPS = 16

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
        mixes: column groups, 1 as a rule. Otherwise rows are multiplied by column groups, ``columns`` are those of all
            of them, and the results of the groups are mixed into those of as many ``repeats``.
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
    mixes: int = 1

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
    if layout.kind == "hadamard":
        return _plan_mixes(product, packed=packed, word_aligned=word_aligned, integer=integer)
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


def _plan_mixes(product: TiledProduct, *, packed: bool, word_aligned: bool, integer: bool) -> WeightPlan:
    """Copies with Hadamard signs: the rows of the tile, one behind the other, are read like those of one copy.

    Raises:
        UnsupportedError: the results of column groups cannot be mixed, or no kernel reads the rows.
    """
    layout, p = product.layout, product.layout.p
    if product.mixes == 1:
        where = (
            "the groups of a convolution" if product.groups > 1 else "replicas of the input that split column groups"
        )
        raise UnsupportedError(f"copies with Hadamard signs in {where}: their products have nothing to share")
    most = MOST_GROUPS if integer else MOST_MIXES
    if p > most:
        raise UnsupportedError(f"{p} copies with Hadamard signs, more than {most}{' with integers' if integer else ''}")
    tile = TiledProduct(TileLayout((layout.rows // p, *layout.shape[1:]), 1), 1, replicas=product.replicas)
    plan = plan_weight(tile, packed=packed, word_aligned=word_aligned, integer=integer)
    return replace(plan, repeats=p, rows_per_alpha=product.rows_per_alpha, mixes=p)


def _kind(product: TiledProduct, packed: bool, word_aligned: bool) -> str:
    if not packed:
        return "float" if product.contiguous else "indexed"
    if product.contiguous and word_aligned and product.alignment % 32 == 0:
        return "words"
    if product.contiguous and product.alignment % 8 == 0:
        return "bytes"
    return _KINDS[product.layout.kind]
