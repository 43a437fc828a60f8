"""Accesses composed with accesses, against NumPy's strides."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.views import compose


def read(array: np.ndarray, access: ir.Access) -> np.ndarray:
    """The elements that an access names, one by one."""
    result = np.empty(access.sizes, array.dtype)
    for index in np.ndindex(access.sizes):
        at = access.offset + sum(i * s for i, s in zip(index, access.strides, strict=True))
        assert 0 <= at < array.size, "reads outside the array"
        result[index] = array.reshape(-1)[at]
    return result


@st.composite
def _accesses(draw: st.DrawFn, shape: tuple[int, ...]) -> ir.Access:
    """What permute, slice, flip and expand give, in any order."""
    access = ir.Access.whole(shape)
    for _ in range(draw(st.integers(0, 3))):
        sizes, strides, offset = list(access.sizes), list(access.strides), access.offset
        d = draw(st.integers(0, len(sizes) - 1))
        kind = draw(st.sampled_from(["permute", "slice", "flip", "expand", "split"]))
        if kind == "permute":
            order = draw(st.permutations(range(len(sizes))))
            sizes, strides = [sizes[i] for i in order], [strides[i] for i in order]
        elif kind == "slice":
            start, step = draw(st.integers(0, sizes[d] - 1)), draw(st.integers(1, 2))
            offset += start * strides[d]
            sizes[d], strides[d] = len(range(start, sizes[d], step)), strides[d] * step
        elif kind == "flip":
            offset, strides[d] = offset + (sizes[d] - 1) * strides[d], -strides[d]
        elif kind == "expand":
            sizes.insert(d, 2)
            strides.insert(d, 0)
        elif sizes[d] % 2 == 0:
            sizes[d : d + 1], strides[d : d + 1] = [2, sizes[d] // 2], [strides[d] * (sizes[d] // 2), strides[d]]
        access = ir.Access(tuple(sizes), tuple(strides), offset)
    return access


@st.composite
def _pairs(draw: st.DrawFn) -> tuple[tuple[int, ...], ir.Access, ir.Access]:
    shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    inner = draw(_accesses(shape))
    # The copy may be seen with another shape.
    other = draw(
        st.sampled_from([inner.sizes, (math.prod(inner.sizes),), (*inner.sizes[:1], math.prod(inner.sizes[1:]))])
    )
    return shape, inner, draw(_accesses(other))


@given(_pairs())
def test_a_composed_access_reads_what_both_do_one_after_the_other(
    pair: tuple[tuple[int, ...], ir.Access, ir.Access],
) -> None:
    shape, inner, outer = pair
    array = np.arange(math.prod(shape))
    composed = compose(outer, inner)
    if composed is not None:
        np.testing.assert_array_equal(read(array, composed), read(read(array, inner), outer))
    elif inner.sizes == outer.sizes:
        assert outer.strides != ir.row_major(outer.sizes), "a whole copy can always be read through"


def test_heads_of_a_permuted_projection_are_read_in_place() -> None:
    # [tokens, 3 * heads * width] copied to [3, tokens, heads * width], of which k is read as [heads, tokens, width].
    inner = ir.Access((3, 12, 16), (16, 48, 1))
    outer = ir.Access((2, 12, 8), (8, 16, 1), offset=192)
    assert compose(outer, inner) == ir.Access((2, 12, 8), (8, 48, 1), offset=16)
