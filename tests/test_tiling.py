from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tbn_compiler import ConfigError
from tbn_compiler.tiling import (
    TiledProduct,
    TileLayout,
    TileSpec,
    _computed_hadamard_matrix,
    hadamard_matrix,
    hadamard_order,
    largest_divisor,
    tile_vector,
    tiled_weight,
)
from tests import oracle

Tiling = tuple[tuple[int, ...], int, torch.Tensor, torch.Tensor]


def rounding(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).eps


@given(oracle.tilings())
def test_tile_matches_oracle_exactly(tiling: Tiling) -> None:
    shape, p, w, _ = tiling
    layout = TileLayout(shape, p)
    t = tile_vector(w, layout)
    assert t.dtype == w.dtype
    np.testing.assert_array_equal(oracle.array(t), oracle.tile(oracle.array(w), p))
    ones = np.ones(1)
    np.testing.assert_array_equal(
        oracle.array(layout.replicate(t)), oracle.fill(shape, oracle.tile(oracle.array(w), p), ones)
    )


@given(oracle.tilings())
def test_float_tile_keeps_the_sums(tiling: Tiling) -> None:
    shape, p, w, _ = tiling
    s = tile_vector(w, TileLayout(shape, p), binary=False)
    assert s.dtype == w.dtype
    np.testing.assert_array_equal(oracle.array(s), oracle.sums(oracle.array(w), p))


@given(oracle.tilings(), st.booleans())
def test_alphas_match_oracle(tiling: Tiling, per_tile: bool) -> None:
    _, p, _, a = tiling
    count = p if per_tile else 1
    got = TileLayout(tuple(a.shape), count).alphas(a, count)
    assert got.shape == (count,)
    assert got.dtype == a.dtype
    np.testing.assert_allclose(oracle.array(got), oracle.alphas(oracle.array(a), count), rtol=rounding(a), atol=0)


@given(oracle.tilings(), st.booleans(), st.booleans())
def test_weight_matches_oracle(tiling: Tiling, per_tile: bool, binary: bool) -> None:
    shape, p, w, a = tiling
    spec = TileSpec(TileLayout(shape, p), p if per_tile else 1, tile_dtype="binary" if binary else "float")
    got = tiled_weight(w, a, spec)
    expected = oracle.weight(oracle.array(w), oracle.array(a), p, spec.num_alphas, binary=binary)
    assert got.shape == w.shape
    assert got.dtype == w.dtype
    # One rounding of alpha, one of the product.
    np.testing.assert_allclose(oracle.array(got), expected, rtol=2 * rounding(w), atol=0)


@given(oracle.tilings(min_dims=2), st.booleans())
def test_weight_of_a_transposed_tensor_is_read_row_major(tiling: Tiling, per_tile: bool) -> None:
    shape, p, w, a = tiling
    spec = TileSpec(TileLayout(shape, p), p if per_tile else 1)
    strided = w.mT.contiguous().mT
    assert torch.equal(tiled_weight(strided, a, spec), tiled_weight(w, a, spec))


@given(oracle.tilings())
def test_unique_rows_are_the_different_rows(tiling: Tiling) -> None:
    shape, p, _, _ = tiling
    layout = TileLayout(shape, p)
    starts = oracle.row_starts(shape, p)
    assert layout.unique_rows == len(set(starts))
    assert layout.rows % layout.unique_rows == 0
    assert layout.aligned == (shape[0] % p == 0)
    if layout.aligned:
        assert layout.unique_rows == shape[0] // p
    # Distinct tile elements, so that equal rows can only come from equal offsets.
    t = torch.arange(layout.tile_size, dtype=torch.float64)
    matrix = layout.replicate(t).reshape(layout.rows, -1)
    assert len(torch.unique(matrix, dim=0)) == layout.unique_rows
    assert torch.equal(layout.unique_weight(t), matrix[: layout.unique_rows])
    assert torch.equal(layout.unique_weight(t).repeat(layout.rows // layout.unique_rows, 1), matrix)


@given(oracle.tilings(min_dims=2), st.booleans(), st.data())
def test_computed_rows_are_enough(tiling: Tiling, per_tile: bool, data: st.DataObject) -> None:
    """Within a group, row j is row j % R times a factor that ``row_alphas`` knows."""
    shape, p, _, _ = tiling
    layout = TileLayout(shape, p)
    groups = data.draw(st.sampled_from(oracle.divisors(shape[0])))
    alpha = torch.arange(1, (p if per_tile else 1) + 1, dtype=torch.float64)
    t = torch.arange(1, layout.tile_size + 1, dtype=torch.float64)
    used = layout.scale(layout.replicate(t), alpha).reshape(shape[0], -1)
    per_group, computed = shape[0] // groups, TiledProduct(layout, alpha.numel(), groups).rows
    assert 1 <= computed <= per_group
    if computed == per_group:
        return
    unscaled = used / layout.row_alphas(alpha)[:, None]
    for k in range(groups):
        for j in range(per_group):
            torch.testing.assert_close(unscaled[k * per_group + j], unscaled[k * per_group + j % computed])


@st.composite
def hadamard_tilings(draw: st.DrawFn) -> Tiling:
    """``(shape, p, W, A)`` that a Hadamard layout takes."""
    p = draw(st.sampled_from([1, 2, 4, 8]))
    kernel = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = (p * draw(st.integers(1, 3)), p * draw(st.integers(1, 3)), *kernel)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    w, a = (oracle.exact(*shape, dtype=draw(st.sampled_from(oracle.FLOATS)), generator=generator) for _ in range(2))
    return shape, p, w, a


@given(hadamard_tilings(), st.booleans(), st.booleans())
def test_hadamard_weight_matches_oracle(tiling: Tiling, per_tile: bool, binary: bool) -> None:
    shape, p, w, a = tiling
    layout = TileLayout(shape, p, hadamard=True)
    spec = TileSpec(layout, p if per_tile else 1, tile_dtype="binary" if binary else "float")
    np.testing.assert_array_equal(oracle.array(layout.aggregate(w)), oracle.hadamard_sums(oracle.array(w), p))
    got = tiled_weight(w, a.to(w.dtype), spec)
    expected = oracle.hadamard_weight(oracle.array(w), oracle.array(a), p, spec.num_alphas, binary=binary)
    assert got.shape == w.shape
    assert got.dtype == w.dtype
    np.testing.assert_allclose(oracle.array(got), expected, rtol=2 * rounding(w), atol=0)


@given(hadamard_tilings())
def test_hadamard_copies_are_adjoint_and_inverse(tiling: Tiling) -> None:
    """``aggregate`` sums with the signs that ``replicate`` gives: it is the adjoint, and ``p`` times the inverse."""
    shape, p, w, _ = tiling
    layout = TileLayout(shape, p, hadamard=True)
    w = w.double()
    tile = oracle.exact(layout.tile_size, dtype=torch.float64)
    copies = layout.replicate(tile)
    assert torch.equal(layout.aggregate(copies), p * tile)
    assert (copies * w).sum() == (tile * layout.aggregate(w)).sum()
    assert torch.equal(layout.column_groups(tile).movedim(0, 2).reshape(-1), tile)
    assert torch.equal(layout.unique_weight(tile).reshape(shape), copies)


@pytest.mark.parametrize("shape", [(16, 64), (64, 64), (64, 16), (32, 8, 3, 3)])
@pytest.mark.parametrize("p", [2, 4, 8])
def test_hadamard_copies_have_full_rank(shape: tuple[int, ...], p: int) -> None:
    """Where plain copies leave the rank of the tile's rows. Few signs may be dependent by chance, numbers are not."""
    rows, columns = shape[0], math.prod(shape[1:])
    tile = torch.randn(math.prod(shape) // p, dtype=torch.float64, generator=torch.Generator().manual_seed(p))
    ranks = [
        int(torch.linalg.matrix_rank(TileLayout(shape, p, hadamard=hadamard).replicate(tile).reshape(rows, columns)))
        for hadamard in (False, True)
    ]
    assert ranks == [min(rows // p, columns), min(rows, columns)]


def test_signs_in_hadamard_copies_have_full_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    signs = torch.where(torch.rand(64 * 256 // 8, generator=generator) > 0.5, 1.0, -1.0)
    for hadamard, rank in ((False, 8), (True, 64)):
        assert torch.linalg.matrix_rank(TileLayout((64, 256), 8, hadamard=hadamard).replicate(signs)) == rank


@pytest.mark.parametrize("p", [1, 2, 4, 8, 16, 32])
def test_hadamard_matrices(p: int) -> None:
    matrix = hadamard_matrix(p, torch.ones(1, dtype=torch.int64))
    assert matrix.tolist() == oracle.sylvester(p)
    assert torch.equal(matrix @ matrix, p * torch.eye(p, dtype=torch.int64))
    assert torch.equal(_computed_hadamard_matrix(p, matrix), matrix)
    assert hadamard_matrix(p, torch.ones(1, device="meta")).shape == (p, p)


@given(st.integers(1, 200), st.integers(1, 200), st.integers(1, 100))
def test_hadamard_order(rows: int, inputs: int, at_most: int) -> None:
    fitting = [2**k for k in range(8) if rows % 2**k == inputs % 2**k == 0 and 2**k <= at_most]
    assert hadamard_order(rows, inputs, at_most) == max(fitting)


@pytest.mark.parametrize(
    ("shape", "p", "options", "message"),
    [
        ((8, 6), 4, {}, r"p=4 with Hadamard signs must be a power of two .* of a weight of shape \(8, 6\)"),
        ((6, 8), 4, {}, "p=4 with Hadamard signs"),
        ((12, 12), 3, {}, "p=3 with Hadamard signs"),
        ((8,), 2, {}, "p=2 with Hadamard signs"),
        ((8, 8), 4, {"p_in": 2}, "neither two-axis"),
        ((8, 8), 4, {"shift": 2}, "nor staggered"),
        ((8, 8), 4, {"batch": 2}, "a batch of weights takes flat tiles"),
    ],
)
def test_hadamard_layouts_that_do_not_fit(
    shape: tuple[int, ...], p: int, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TileLayout(shape, p, **options, hadamard=True)


def test_zero_sum_gives_minus_one() -> None:
    w = torch.tensor([[0.0, 1.0, -1.0, 0.5], [0.0, -1.0, 2.0, -0.5]])
    assert tile_vector(w, TileLayout((2, 4), 2)).tolist() == [-1.0, -1.0, 1.0, -1.0]
    assert tile_vector(-torch.zeros(4), TileLayout((4,), 1)).tolist() == [-1.0] * 4


def test_p_one_is_the_binary_network() -> None:
    w = oracle.exact(5, 7)
    spec = TileSpec(TileLayout((5, 7), 1), 1, "W")
    expected = torch.where(w > 0, 1.0, -1.0) * w.abs().mean()
    torch.testing.assert_close(tiled_weight(w, w, spec), expected, rtol=2e-7, atol=0)
    assert TileLayout((5, 7), 1).unique_rows == 5


@given(st.integers(1, 5000), st.integers(1, 300))
def test_largest_divisor(numel: int, at_most: int) -> None:
    assert largest_divisor(numel, at_most) == max(d for d in range(1, at_most + 1) if numel % d == 0)


@pytest.mark.parametrize("p", [3, 0, -2])
def test_layout_rejects_p_that_does_not_divide(p: int) -> None:
    with pytest.raises(ConfigError, match=rf"p={p} does not divide the 8 elements of a weight of shape \(4, 2\)"):
        TileLayout((4, 2), p)


@pytest.mark.parametrize(("tile_dtype", "bits"), [("binary", 25_088), ("float", 32 * 25_088)])
def test_stored_bits(tile_dtype: Any, bits: int) -> None:
    spec = TileSpec(TileLayout((128, 784), 4), 1, tile_dtype=tile_dtype)
    assert spec.tile_bits == bits
    assert (spec.layout.numel, spec.layout.rows, spec.layout.row_size) == (math.prod((128, 784)), 128, 784)


def test_alphas_of_large_weights_keep_their_digits() -> None:
    source = torch.rand(1024, 1024)
    got = TileLayout((1024, 1024), 1).alphas(source, 1).double()
    torch.testing.assert_close(got, source.double().mean().reshape(1), rtol=2e-7, atol=0)
