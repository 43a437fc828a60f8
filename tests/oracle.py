"""An independent oracle of the method in NumPy and float64, written from the equations and from nothing else.

It shares no code with the package on purpose: indices are spelled out element by element, slowly. The second half
holds the value generators and module helpers that the tests share.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.graph.records import EXTRA_STATE, get_records, split_key
from tbn_compiler.passes import ExposeAttention, ExposeLinears, Scope, TileWeights, run_passes

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def array(tensor: Tensor) -> np.ndarray:
    """A tensor of any floating dtype as float64, exactly."""
    return tensor.detach().to(torch.float64).numpy()


def sums(weight: np.ndarray, p: int) -> np.ndarray:
    """``s[j]``, Eq. 2: element ``j`` of every copy, summed."""
    flat = weight.ravel(order="C")
    q = flat.size // p
    return np.array([sum(flat[i * q + j] for i in range(p)) for j in range(q)], dtype=np.float64)


def tile(weight: np.ndarray, p: int) -> np.ndarray:
    """``t[j]``, Eq. 3: +1 where the sum is positive, else -1 (a sum of 0 gives -1)."""
    return np.array([1.0 if s > 0 else -1.0 for s in sums(weight, p)])


def alphas(source: np.ndarray, count: int) -> np.ndarray:
    """Eq. 7 (``count`` 1) or Eq. 9 (``count`` p): mean absolute value of each run of the source."""
    flat = source.ravel(order="C")
    run = flat.size // count
    return np.array([math.fsum(abs(v) for v in flat[i * run : (i + 1) * run]) / run for i in range(count)])


def fill(shape: tuple[int, ...], t: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Eq. 4, 5 and the scale: element ``k`` is tile element ``k mod q`` times the alpha of its copy (or the one)."""
    numel, q = math.prod(shape), len(t)
    flat = [t[k % q] * (alpha[0] if len(alpha) == 1 else alpha[k // q]) for k in range(numel)]
    return np.array(flat, dtype=np.float64).reshape(shape)


def weight(w: np.ndarray, source: np.ndarray, p: int, num_alphas: int, *, binary: bool = True) -> np.ndarray:
    """The weight that a tiled layer uses."""
    return fill(w.shape, tile(w, p) if binary else sums(w, p), alphas(source, num_alphas))


def pack(t: np.ndarray) -> np.ndarray:
    """DESIGN section 4, bit by bit: element ``j`` is bit ``j mod 8`` of byte ``j // 8``."""
    out = [0] * math.ceil(len(t) / 8)
    for j, value in enumerate(t):
        out[j // 8] |= int(value > 0) << (j % 8)
    return np.array(out, dtype=np.uint8)


def row_starts(shape: tuple[int, ...], p: int) -> list[int]:
    """Tile offset at which each row starts. Rows with the same offset have the same signs, whatever the tile."""
    n = math.prod(shape[1:])
    return [(r * n) % (math.prod(shape) // p) for r in range(shape[0])]


def tile_places(shape: tuple[int, ...], p: int, p_in: int = 1, shift: int = 0) -> np.ndarray:
    """Which tile element each weight element uses, DESIGN sections 1 and 2, one weight element after the other."""
    q = math.prod(shape) // p
    places = np.empty(shape, dtype=np.int64)
    for k, index in enumerate(np.ndindex(shape)):
        if p_in > 1:
            # The tile is [m / p_out, inputs / p_in, kernel]; p_in neighbouring inputs share an element.
            row, column, *taps = index
            tile_shape = (shape[0] * p_in // p, shape[1] // p_in, *shape[2:])
            places[index] = np.ravel_multi_index((row % tile_shape[0], column // p_in, *taps), tile_shape)
        else:
            copy, j = divmod(k, q)
            places[index] = (j - copy * shift) % q
    return places


def sylvester(p: int) -> list[list[int]]:
    """A Hadamard matrix by Sylvester's construction: twice as large is ``[[H, H], [H, -H]]``."""
    if p == 1:
        return [[1]]
    half = sylvester(p // 2)
    return [row + row for row in half] + [row + [-value for value in row] for row in half]


def hadamard_signs(shape: tuple[int, ...], p: int) -> np.ndarray:
    """What copy ``i`` multiplies its tile elements by, at input channel ``c``: ``H[i, c mod p]``."""
    matrix, rows_of_tile = sylvester(p), shape[0] // p
    signs = np.empty(shape, dtype=np.int64)
    for index in np.ndindex(shape):
        signs[index] = matrix[index[0] // rows_of_tile][index[1] % p]
    return signs


def hadamard_sums(weight: np.ndarray, p: int) -> np.ndarray:
    """``s[j]``: element ``j`` of every copy, each times its sign, summed."""
    return sums(weight * hadamard_signs(weight.shape, p), p)


def hadamard_weight(w: np.ndarray, source: np.ndarray, p: int, num_alphas: int, *, binary: bool = True) -> np.ndarray:
    """The weight that a layer uses whose copies have the signs of a Hadamard matrix."""
    s = hadamard_sums(w, p)
    t = np.array([1.0 if value > 0 else -1.0 for value in s]) if binary else s
    return hadamard_fill(w.shape, t, alphas(source, num_alphas))


def hadamard_fill(shape: tuple[int, ...], t: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The same from the tile and the alphas."""
    scales = alpha[alpha_places(shape, p := math.prod(shape) // len(t), len(alpha))]
    return scales * hadamard_signs(shape, p) * t[tile_places(shape, p)]


def alpha_places(shape: tuple[int, ...], p: int, count: int, p_in: int = 1) -> np.ndarray:
    """Which of ``count`` alphas scales each weight element: one, one per copy, per output copy or per row."""
    q = math.prod(shape) // p
    rows_of_tile = shape[0] * p_in // p
    places = np.empty(shape, dtype=np.int64)
    for k, index in enumerate(np.ndindex(shape)):
        if count == 1:
            places[index] = 0
        elif p_in > 1 and count == p:
            places[index] = index[0] // rows_of_tile * p_in + index[1] % p_in
        elif count == shape[0]:
            places[index] = index[0]
        else:
            places[index] = index[0] // rows_of_tile if p_in > 1 else k // q
    return places


# Values and strategies


def exact(*shape: int, dtype: torch.dtype = torch.float32, generator: torch.Generator | None = None) -> Tensor:
    """Multiples of 1/8 in [-1, 1], zero included: sums of 16 of them are exact in every dtype, bfloat16 too."""
    return (torch.randint(-8, 9, shape, generator=generator) / 8).to(dtype)


def divisors(numel: int, at_most: int = 16) -> list[int]:
    return [d for d in range(1, min(numel, at_most) + 1) if numel % d == 0]


@st.composite
def tilings(draw: st.DrawFn, min_dims: int = 1, max_dims: int = 5) -> tuple[tuple[int, ...], int, Tensor, Tensor]:
    """``(shape, p, W, A)`` with awkward shapes: aligned or not, any ``q mod 8``."""
    largest = {1: 60, 2: 12, 3: 7, 4: 5, 5: 3}
    dims = draw(st.integers(min_dims, max_dims))
    shape = tuple(draw(st.lists(st.integers(1, largest[dims]), min_size=dims, max_size=dims)))
    p = draw(st.sampled_from(divisors(math.prod(shape))))
    dtype = draw(st.sampled_from(FLOATS))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    w, a = (exact(*shape, dtype=dtype, generator=generator) for _ in range(2))
    return shape, p, w, a


@st.composite
def layouts(draw: st.DrawFn, max_dims: int = 4) -> tuple[tuple[int, ...], int, int, int, bool]:
    """``(shape, p, p_in, shift, hadamard)`` of every kind of layout, aligned or not."""
    dims = draw(st.integers(2, max_dims))
    # Sizes with divisors, and some without.
    sizes = st.sampled_from([1, 2, 3, 4, 6, 7, 8, 12])
    shape = (draw(sizes), draw(sizes), *draw(st.lists(st.integers(1, 3), min_size=dims - 2, max_size=dims - 2)))
    kind = draw(st.sampled_from(["flat", "two-axis", "rolled", "hadamard"]))
    if kind == "two-axis":
        p_out, p_in = (draw(st.sampled_from(divisors(size))) for size in shape[:2])
        return shape, p_out * p_in, p_in, 0, False
    if kind == "hadamard":
        orders = [p for p in (1, 2, 4, 8) if shape[0] % p == shape[1] % p == 0]
        return shape, draw(st.sampled_from(orders)), 1, 0, True
    p = draw(st.sampled_from(divisors(math.prod(shape))))
    return shape, p, 1, draw(st.integers(1, 20)) if kind == "rolled" else 0, False


# Modules


def whole_graph(model: nn.Module, config: tbn.TilingConfig) -> fx.GraphModule:
    """The model tiled as one graph, in which layers are calls of modules, functions and methods."""
    return tbn.transform(fx.symbolic_trace(model), config)


def chain_graph(model: nn.Module, config: tbn.TilingConfig) -> fx.GraphModule:
    """The model tiled as one graph in which every layer is a ``tile -> scale -> layer`` chain."""
    gm = copy.deepcopy(fx.symbolic_trace(model))
    run_passes(gm, [ExposeAttention(), ExposeLinears(), TileWeights(Scope(config))])
    return gm


# The two ways to tile a model: layer by layer, where the user's code stays, and as one graph.
FORMS: dict[str, Any] = {"module": tbn.transform, "graph": whole_graph}
both_forms = pytest.mark.parametrize("transform", FORMS.values(), ids=FORMS.keys())


def with_oracle_weights(model: nn.Module, qat: nn.Module) -> nn.Module:
    """A copy of the original float model in evaluation mode whose tiled weights are the oracle's."""
    reference = copy.deepcopy(model).eval()
    parameters = dict(qat.named_parameters(remove_duplicate=False))
    for record in get_records(qat) or ():
        if record.spec is None:
            continue
        path, _, name = record.weight.rpartition(".")
        source = parameters[record.weight]
        if record.spec.alpha_source == "A":
            stem = "alpha_source" if name == "weight" else f"{name}_alpha_source"
            source = parameters[f"{path}.{stem}" if path else stem]
        weight_of = hadamard_weight if record.spec.layout.hadamard else weight
        used = weight_of(
            array(parameters[record.weight]),
            array(source),
            record.spec.layout.p,
            record.spec.num_alphas,
            binary=record.spec.tile_dtype == "binary",
        )
        target = reference.get_parameter(record.weight)
        with torch.no_grad():
            target.copy_(torch.from_numpy(used))
    return reference


def flatten(output: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def assert_close(actual: Any, expected: Any, rtol: float = 1e-6) -> None:
    """Outputs agree to ``rtol`` of the largest expected value: what reordering a sum may change, and no more."""
    actual, expected = flatten(actual), flatten(expected)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        assert e.numel() == 0 or e.abs().max() > 0, "an all-zero reference shows nothing"
        atol = rtol * float(e.detach().abs().max()) if e.numel() else 0.0
        torch.testing.assert_close(a, e, rtol=0, atol=atol)


def reasons(module: nn.Module) -> dict[str, str | None]:
    """Layer name -> reason why it was left alone, ``None`` for a tiled layer."""
    return {record.name: record.reason for record in get_records(module) or ()}


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` without the records of how weights are tiled."""
    return {key: tensor for key, tensor in module.state_dict().items() if split_key(key)[1] != EXTRA_STATE}


def state_bytes(module: nn.Module) -> int:
    """Bytes of the state, each tensor once however many names it has."""
    distinct = {id(t): t for t in (*module.parameters(), *module.buffers())}
    saved = tensors(module).keys()
    assert {key for key, _ in module.named_parameters(remove_duplicate=False)} <= saved
    assert {key for key, _ in module.named_buffers(remove_duplicate=False)} <= saved
    return sum(t.numel() * t.element_size() for t in distinct.values())
