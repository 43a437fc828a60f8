"""What a tiled layer multiplies, against weights that are spelled out element by element."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tbn_compiler.tiling import TiledProduct, TileLayout
from tests import oracle


@dataclass(frozen=True)
class Case:
    """A product, and its weight from the oracle.

    Attributes:
        product: what is tested.
        places: the tile element that each weight element uses, ``[m, inputs, kernel]``.
        alphas: the alpha that scales it, likewise.
        signs: +1 or -1, which it is multiplied by, likewise.
    """

    product: TiledProduct
    places: np.ndarray
    alphas: np.ndarray
    signs: np.ndarray


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape, p, p_in, shift, hadamard = draw(oracle.layouts())
    layout = TileLayout(shape, p, p_in, shift, hadamard=hadamard)
    num_alphas = draw(st.sampled_from(sorted({1, layout.p_out, p, shape[0]})))
    groups = draw(st.sampled_from(oracle.divisors(shape[0])))
    replicas = draw(st.sampled_from(oracle.divisors(shape[1]))) if groups == 1 else 1
    places = oracle.tile_places(shape, p, p_in, shift)
    alphas = oracle.alpha_places(shape, p, num_alphas, p_in)
    signs = oracle.hadamard_signs(shape, p) if hadamard else np.ones(shape, np.int64)
    product, three = TiledProduct(layout, num_alphas, groups, replicas), (*shape[:2], -1)
    return Case(product, *(values.reshape(three) for values in (places, alphas, signs)))


@given(cases())
def test_the_layout_is_the_oracles(case: Case) -> None:
    layout, num_alphas = case.product.layout, case.product.num_alphas
    tile, alpha = torch.rand(layout.tile_size), torch.rand(num_alphas)
    used = layout.scale(layout.replicate(tile), alpha)
    expected = tile[torch.from_numpy(case.places)] * alpha[torch.from_numpy(case.alphas)] * torch.from_numpy(case.signs)
    assert torch.equal(used, expected.reshape(layout.shape))


@given(cases())
def test_alphas_lie_where_they_are_said_to(case: Case) -> None:
    product, (m, inputs, kernel) = case.product, case.places.shape
    layout = product.layout
    row, column, tap = np.indices((m, inputs, kernel))
    if product.alphas in ("layer", "copy", "row"):
        assert np.array_equal(case.alphas, row // product.rows_per_alpha)
    elif product.alphas == "input":
        copy, neighbour = row // (m // layout.p_out), column % product.neighbours
        assert np.array_equal(case.alphas, copy * product.neighbours + neighbour)
    else:
        assert np.array_equal(case.alphas, ((row * inputs + column) * kernel + tap) // layout.tile_size)
    assert product.scales_results == all(len(set(alphas.flat)) == 1 for alphas in case.alphas)
    assert (product.rows_per_alpha > 0) == product.scales_results


@given(cases())
def test_rows_are_those_that_differ_and_repeat_the_others(case: Case) -> None:
    product, signs = case.product, ((case.places + 1) * case.signs).reshape(len(case.places), -1)
    assert 1 <= product.rows <= product.group_rows
    if not product.scales_results:
        assert product.distinct_rows == len(signs)
    for first in range(0, len(signs), product.group_rows):
        group = signs[first : first + product.group_rows]
        for j, row in enumerate(group):
            assert np.array_equal(row, group[j % product.rows])
        # Rows of rolled copies may happen to be equal; nobody looks for that.
        if product.scales_results and product.layout.kind != "staggered":
            assert len({tuple(row) for row in group}) == product.rows
    assert (product.repeats - 1) * product.rows < product.group_rows <= product.repeats * product.rows
    if product.groups == 1:
        assert product.repeats * product.rows == len(signs)


@given(cases())
def test_neighbours_are_summed_where_they_share_weight_and_replica(case: Case) -> None:
    product, inputs = case.product, case.places.shape[1]
    weight = np.stack([case.places, case.alphas, case.signs], -1)
    replica = np.arange(inputs) // (inputs // product.replicas)

    def shared(count: int) -> bool:
        """Whether runs of ``count`` inputs have the same weights and lie in the same replica."""
        first = np.arange(inputs) // count * count
        return np.array_equal(weight, weight[:, first]) and np.array_equal(replica, replica[first])

    assert shared(product.summed)
    assert product.summed in (1, product.neighbours)
    if product.summed < product.neighbours:
        assert not shared(product.neighbours)
    # A row is so many different weights, each replica's counted.
    assert product.columns * product.summed == case.places[0].size
    assert product.macs * product.replicas * product.mixes == product.groups * product.rows * product.columns


@given(cases())
def test_places_of_rows_in_the_tile(case: Case) -> None:
    product, layout = case.product, case.product.layout
    elements = case.places[:, :: product.neighbours].reshape(layout.rows, -1)
    assert product.row_elements == elements.shape[1]
    flat = elements[: product.distinct_rows].reshape(-1)
    assert product.contiguous == np.array_equal(flat, np.arange(layout.tile_size))
    if product.row_elements % product.replicas:
        return
    starts = elements.reshape(layout.rows, product.replicas, -1)[:, :, 0]
    assert not (starts % product.alignment).any()
    assert layout.tile_size % product.alignment == 0
    if layout.kind != "staggered" and product.replicas == 1:
        assert product.alignment == math.gcd(layout.tile_size, *starts.reshape(-1).tolist(), product.row_elements)


@given(cases(), st.integers(0, 2**16))
def test_the_recipe_gives_the_product(case: Case, seed: int) -> None:
    """Sum neighbours, multiply with the rows, replicas added up, repeat the results, scale, in each group."""
    product, layout, random = case.product, case.product.layout, np.random.default_rng(seed)
    k, groups, (m, inputs, kernel) = product.replicas, product.groups, case.places.shape
    tile, alpha, input_alpha = (random.integers(1, 9, size) / 8 for size in (layout.tile_size, product.num_alphas, k))
    x = random.integers(-8, 9, (groups, inputs // k, kernel)) / 8
    weight = (tile[case.places] * alpha[case.alphas] * case.signs).reshape(groups, -1, inputs, kernel)
    replicated = np.concatenate([factor * x for factor in input_alpha], 1)
    expected = np.einsum("gric,gic->gr", weight, replicated).reshape(m)

    if not product.bare:
        assert product.rows == product.group_rows or product.summed < product.neighbours
        return
    summed = x.reshape(groups, -1, product.summed, kernel).sum(2)
    bits = layout.unique_weight(torch.from_numpy(tile)).numpy()
    folded = (bits.reshape(len(bits), k, -1, kernel) * input_alpha[:, None, None]).sum(1)
    assert folded[0].size * groups * product.rows == product.macs * product.mixes
    results = []
    for g, rows in enumerate(product.computed_rows().tolist()):
        computed = folded[rows]
        results.append(np.tile(np.einsum("ric,ic->r", computed, summed[g]), product.repeats)[: product.group_rows])
    assert np.array_equal(np.concatenate(results) * np.repeat(alpha, product.rows_per_alpha), expected)


@given(cases(), st.integers(0, 2**16))
def test_column_groups_are_multiplied_apart_and_mixed(case: Case, seed: int) -> None:
    """Rows of the tile meet each group of columns, replicas added up, and the results are mixed and scaled."""
    product, layout, random = case.product, case.product.layout, np.random.default_rng(seed)
    k, p, (m, inputs, kernel) = product.replicas, layout.p, case.places.shape
    assert product.mixes in (1, p)
    assert (product.mixes > 1) == (layout.kind == "hadamard" and product.groups == 1 and inputs // k % p == 0)
    if product.mixes == 1:
        assert product.additions == 0
        return
    tile, alpha, input_alpha = (random.integers(1, 9, size) / 8 for size in (layout.tile_size, product.num_alphas, k))
    x = random.integers(-8, 9, (inputs // k, kernel)) / 8
    weight = tile[case.places] * alpha[case.alphas] * case.signs
    expected = np.einsum("ric,ic->r", weight, np.concatenate([factor * x for factor in input_alpha]))
    groups = layout.column_groups(torch.from_numpy(tile)).numpy().reshape(p, m // p, k, -1, kernel)
    groups = (groups * input_alpha[:, None, None]).sum(2)
    assert groups.size == product.macs
    z = np.einsum("jric,ijc->jr", groups, x.reshape(-1, p, kernel))
    additions, half = 0, 1
    while half < p:  # a butterfly: a sum and a difference for each pair
        for i in range(p):
            if not i & half:
                z[i], z[i | half] = z[i] + z[i | half], z[i] - z[i | half]
                additions += 2 * z.shape[1]
        half *= 2
    assert additions == product.additions
    assert np.array_equal(z.reshape(m) * np.repeat(alpha, product.rows_per_alpha), expected)


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        (TiledProduct(TileLayout((8, 6), 4), 4), {"alphas": "copy", "rows": 2, "repeats": 4, "alignment": 6}),
        (TiledProduct(TileLayout((8, 6), 8), 8), {"alphas": "row", "rows": 1, "repeats": 8}),
        # Misaligned: half as many sign patterns, but with an alpha for each copy a row has two.
        (TiledProduct(TileLayout((6, 8), 4), 1), {"alphas": "layer", "rows": 3, "contiguous": False, "alignment": 4}),
        (TiledProduct(TileLayout((6, 8), 4), 4), {"alphas": "mixed", "rows": 6, "rows_per_alpha": 0, "bare": False}),
        (TiledProduct(TileLayout((6, 8), 4), 6), {"alphas": "row", "rows": 3}),
        # 6 rows of a group repeat 4 of them, the last time only two.
        (TiledProduct(TileLayout((12, 5), 3), 1, groups=2), {"rows": 4, "repeats": 2, "macs": 2 * 4 * 5}),
        (TiledProduct(TileLayout((8, 1, 3, 3), 4), 1, groups=8), {"rows": 1, "repeats": 1, "macs": 8 * 9}),
        (TiledProduct(TileLayout((8, 6), 4, 2), 2), {"alphas": "copy", "rows": 4, "summed": 2, "columns": 3}),
        (TiledProduct(TileLayout((8, 6), 4, 2), 4), {"alphas": "input", "rows": 8, "summed": 1, "columns": 6}),
        (TiledProduct(TileLayout((8, 6), 4, 2), 2, replicas=3), {"summed": 2, "columns": 3, "macs": 4}),
        (TiledProduct(TileLayout((8, 6), 4, 2), 2, replicas=2), {"summed": 1, "bare": False}),
        (TiledProduct(TileLayout((8, 6), 4, shift=2), 4), {"alphas": "copy", "rows": 8, "contiguous": False}),
        (TiledProduct(TileLayout((8, 12), 4, hadamard=True), 4), {"alphas": "copy", "rows": 8, "mixes": 4, "macs": 24}),
        (TiledProduct(TileLayout((8, 12), 4, hadamard=True), 4), {"repeats": 1, "contiguous": False, "additions": 16}),
        (TiledProduct(TileLayout((8, 12), 4, hadamard=True), 8, replicas=3), {"mixes": 4, "macs": 8}),
        (TiledProduct(TileLayout((8, 12), 4, hadamard=True), 1, replicas=2), {"mixes": 1, "macs": 48, "additions": 0}),
        (TiledProduct(TileLayout((8, 4, 3, 3), 4, hadamard=True), 4, groups=2), {"mixes": 1, "macs": 288}),
        (TiledProduct(TileLayout((8, 12), 1, hadamard=True), 1), {"mixes": 1, "contiguous": True, "rows": 8}),
        (TiledProduct(TileLayout((8, 6), 1, shift=2), 1), {"rows": 8, "contiguous": True, "alignment": 6}),
    ],
    ids=repr,
)
def test_examples(product: TiledProduct, expected: dict[str, Any]) -> None:
    assert {name: getattr(product, name) for name in expected} == expected


def test_products_are_compared_by_value() -> None:
    product = TiledProduct(TileLayout((8, 6), 4), 4)
    assert product.rows == 2  # what is computed on the way is no part of the value
    assert product == TiledProduct(TileLayout((8, 6), 4), 4)
    assert hash(product) == hash(replace(product))
    assert product != replace(product, num_alphas=1)
