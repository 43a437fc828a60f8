"""An independent oracle of the method in NumPy and float64, written from the equations and from nothing else.

It shares no code with the package on purpose: indices are spelled out element by element, slowly. The second half
holds the value generators and module helpers that the tests share.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from tbn_compiler.graph.layers import get_records

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


# Modules


def with_oracle_weights(model: nn.Module, qat: fx.GraphModule) -> nn.Module:
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
        used = weight(
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


def reasons(gm: fx.GraphModule) -> dict[str, str | None]:
    """Layer name -> reason why it was left alone, ``None`` for a tiled layer."""
    return {record.name: record.reason for record in get_records(gm) or ()}


def state_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in module.state_dict().values())
