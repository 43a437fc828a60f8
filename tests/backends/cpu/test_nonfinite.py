"""Infinite, NaN and huge inputs at every vector level: the outputs that they reach, and those that they do not.

Inputs, alphas and biases are of few bits, so that sums are exact in every order and results are compared exactly. Where
float32 sums overflow in some orders and not in others, PyTorch's float32 is one order among many: what counts is the
reference in float64, rounded at the end.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import conv
from tbn_compiler.ops.formats import apply_epilogue
from tbn_compiler.ops.reference import KERNELS
from tests import oracle

tbn = torch.ops.tbn
levels = pytest.mark.parametrize("level", cpu.info().available)
activations = pytest.mark.parametrize("activation", ["float", "int8", "binary"])

HUGE = 1.5 * 2.0**127  # 2.6e38: two of them leave float32
SPECIAL: dict[str, list[float]] = {
    "inf": [math.inf],
    "-inf": [-math.inf],
    "nan": [math.nan],
    "inf and inf": [math.inf, math.inf],
    "inf and -inf": [math.inf, -math.inf],
    "inf and nan": [math.inf, math.nan],
}
specials = pytest.mark.parametrize("special", SPECIAL)

MATRICES = [(64, 96, 4), (33, 50, 1), (24, 301, 4), (9, 10, 6)]
GEOMETRIES: list[dict[str, Any]] = [
    {"padding": 1},
    {"stride": 2, "padding": 2},
    {"stride": 3, "padding": 2, "dilation": 2},
    {"groups": 2, "padding": 1},
]


@pytest.fixture(autouse=True)
def _take_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compute small convolutions too, which they leave to PyTorch because it is faster."""
    monkeypatch.setattr(conv, "MIN_FILTERS", dict.fromkeys(cpu.LEVELS, 1))
    monkeypatch.setattr(conv, "MIN_MIXED_FILTERS", 1)
    monkeypatch.setattr(conv, "MIN_CHANNELS", 1)


def exact(*shape: int, seed: int = 0) -> Tensor:
    return oracle.exact(*shape, generator=torch.Generator().manual_seed(seed))


def stored(numel: int, p: int, num_alphas: int) -> tuple[Tensor, Tensor]:
    """``(packed tile, alpha)``, alphas of 3 bits."""
    rng = np.random.default_rng(0)
    tile = torch.from_numpy(oracle.pack(rng.standard_normal(numel // p)))
    return tile, torch.from_numpy(rng.integers(1, 9, num_alphas) / 8).float()


def run(level: str, op: str, x: Tensor, *args: Any, **kw: Any) -> Tensor:
    """The native kernel's result, and nobody else's."""
    declined = cpu.info().declined
    with cpu.use_level(level):
        got = getattr(tbn, op)(x, *args, **kw)
    assert cpu.info().declined == declined, "PyTorch computed it"
    return got


def exact_reference(op: str, x: Tensor, *args: Any, activation: str = "float", **kw: Any) -> Tensor:
    """The reference without overflows on the way. Integers have none, and are defined by float32's rounding.

    The bias comes last: some of PyTorch's products of matrices begin with it, and lose it beside a huge input.
    """
    if activation == "int8":
        return KERNELS[op](x, *args, activation=activation, **kw).float()
    tile, alpha, bias, *sizes = args
    epilogue = kw.pop("epilogue", "none")
    result = KERNELS[op](x.double(), tile, alpha, None, *sizes, activation=activation, **kw)
    if bias is not None:
        result = result + (bias.double() if op == "linear" else bias.double().view(-1, *[1] * (int(op[4]))))
    return apply_epilogue(result, epilogue).float()


def same(got: Tensor, expected: Tensor, activation: str = "float") -> None:
    """Infinities and NaN in the same places; the mean of binary activations is summed in another order."""
    rtol = 2e-6 if activation == "binary" else 0
    torch.testing.assert_close(got, expected, rtol=rtol, atol=rtol * 100, equal_nan=True)


def huge(*shape: int, seed: int, zeros: float = 0.5) -> Tensor:
    """``+-HUGE``, and zeros."""
    g = torch.Generator().manual_seed(seed)
    signs = torch.where(torch.rand(shape, generator=g) < 0.5, -1.0, 1.0)
    return signs * HUGE * (torch.rand(shape, generator=g) >= zeros)


# Linear layers


@levels
@activations
@specials
@pytest.mark.parametrize("mnp", MATRICES, ids=str)
def test_linear(mnp: tuple[int, int, int], special: str, activation: str, level: str) -> None:
    m, n, p = mnp
    args = (*stored(m * n, p, 1), exact(m, seed=1), n, m, p)
    for tokens in range(1, 65) if mnp == MATRICES[0] else (1, 3, 4, 11, 12, 17, 37):
        clean = exact(tokens, n, seed=tokens)
        x, token = clean.clone(), tokens * 2 // 3
        for k, value in enumerate(SPECIAL[special]):
            x[token, (tokens - 1 + 29 * k) % n] = value
        got = run(level, "linear", x, *args, activation=activation)
        same(got, KERNELS["linear"](x, *args, activation=activation), activation)
        others = torch.arange(tokens) != token
        assert torch.equal(got[others], run(level, "linear", clean, *args, activation=activation)[others])


@levels
def test_an_infinity_gives_infinities_at_every_place(level: str) -> None:
    """The fault that was there: NaN, from 12 tokens on, for the first and fourth input of six."""
    args = (*stored(64 * 96, 4, 1), None, 96, 64, 4)
    weight = KERNELS["unpack"](*args[:2], [64, 96], 4)
    for tokens in (1, 4, 11, 12, 16, 40):
        for i in range(96):
            x = exact(tokens, 96)
            x[tokens // 2, i] = math.inf
            got = run(level, "linear", x, *args)[tokens // 2]
            assert torch.equal(got, weight[:, i] * math.inf)


@levels
@activations
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_linear_in_half_precision(dtype: torch.dtype, activation: str, level: str) -> None:
    """Computed in float32 and rounded once; infinities and NaN are those of the reference in half precision too."""
    args = (*stored(64 * 96, 4, 4), exact(64, seed=1), 96, 64, 4)
    for special in SPECIAL.values():
        for tokens in (1, 5, 12, 16, 33):
            x = exact(tokens, 96).to(dtype)
            x[tokens - 1, torch.arange(len(special)) * 29 + tokens] = torch.tensor(special, dtype=dtype)
            got = run(level, "linear", x, *args, activation=activation)
            assert got.dtype == dtype
            wide = KERNELS["linear"](x.float(), *args, activation=activation)
            torch.testing.assert_close(got, wide.to(dtype), rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)
            half = KERNELS["linear"](x, *args, activation=activation)
            assert torch.equal(got.isnan(), half.isnan())
            assert torch.equal(got.isposinf(), half.isposinf())
            assert torch.equal(got.isneginf(), half.isneginf())


@levels
@activations
@pytest.mark.parametrize("num_alphas", ["layer", "row"])
@pytest.mark.parametrize("mnp", MATRICES, ids=str)
def test_linear_of_huge_inputs(mnp: tuple[int, int, int], num_alphas: str, activation: str, level: str) -> None:
    """A sum is infinite only if it is so at the end."""
    m, n, p = mnp
    args = (*stored(m * n, p, 1 if num_alphas == "layer" else m), exact(m, seed=1), n, m, p)
    finite = 0
    for tokens in (*range(1, 18), 40, 64):
        for epilogue in ("none", "relu"):
            x = exact(tokens, n, seed=tokens)
            x[tokens // 2] = huge(n, seed=tokens, zeros=1 - 6 / n)
            x[-1] = huge(n, seed=tokens + 64, zeros=0.25)
            kw = {"activation": activation, "epilogue": epilogue}
            got = run(level, "linear", x, *args, **kw)
            same(got, exact_reference("linear", x, *args, **kw), activation)
            finite += int(got[tokens // 2].isfinite().sum())
    assert finite > 0


@levels
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_an_infinity_among_huge_inputs(special: float, level: str) -> None:
    """Finite inputs that overflow to the other side do not make a NaN of it."""
    args = (*stored(64 * 96, 4, 64), exact(64, seed=1), 96, 64, 4)
    for tokens in (1, 4, 12, 16, 17):
        x = exact(tokens, 96)
        x[tokens // 2] = huge(96, seed=tokens)
        x[tokens // 2, 6] = special
        same(run(level, "linear", x, *args), exact_reference("linear", x, *args))


@levels
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_that_share_a_token(threads: int, level: str) -> None:
    args = (*stored(150 * 96, 2, 150), exact(150, seed=1), 96, 150, 2)
    torch.set_num_threads(threads)
    try:
        for tokens in (1, 3, 12, 16, 20):
            x = exact(tokens, 96)
            x[0], x[-1, 3] = huge(96, seed=tokens), math.inf
            same(run(level, "linear", x, *args), exact_reference("linear", x, *args))
    finally:
        torch.set_num_threads(1)


# Convolutions


def layer(d: int, geometry: dict[str, Any], p: int = 4) -> tuple[tuple[Any, ...], dict[str, Any], tuple[int, ...]]:
    """``(operands behind the input, geometry by axis, shape of the input)``."""
    groups = geometry.get("groups", 1)
    shape = (24, 15, *(3, 2)[:d])
    axes = {key: value if key == "groups" else [value] * d for key, value in geometry.items()}
    args = (*stored(math.prod(shape), p, p), exact(24, seed=1), 15 * groups, 24, list(shape[2:]), p)
    return args, axes, (2, 15 * groups, *(11, 12)[:d])


@levels
@activations
@specials
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("d", [1, 2])
def test_conv(d: int, geometry: dict[str, Any], special: str, activation: str, level: str) -> None:
    args, axes, shape = layer(d, geometry)
    for seed in range(6):
        clean = exact(*shape, seed=seed)
        x = clean.clone()
        for k, value in enumerate(SPECIAL[special]):  # neighbours, so that outputs see both, or one
            x[(1, (3 * seed + k) % 15, *[seed + k] * d)] = value
        got = run(level, f"conv{d}d", x, *args, **axes, activation=activation)
        same(got, KERNELS[f"conv{d}d"](x, *args, **axes, activation=activation), activation)
        assert torch.equal(got[0], run(level, f"conv{d}d", clean, *args, **axes, activation=activation)[0])


@levels
@activations
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("d", [1, 2])
def test_conv_of_huge_inputs(d: int, geometry: dict[str, Any], activation: str, level: str) -> None:
    args, axes, shape = layer(d, geometry)
    finite = 0
    for seed in range(4):
        x = exact(*shape, seed=seed)
        x[1] = huge(*shape[1:], seed=seed, zeros=0.9)
        if seed == 3:
            x[(1, 5, *[4] * d)] = math.inf
        kw: dict[str, Any] = {**axes, "activation": activation, "epilogue": "relu" if seed % 2 else "none"}
        got = run(level, f"conv{d}d", x, *args, **kw)
        same(got, exact_reference(f"conv{d}d", x, *args, **kw), activation)
        finite += int((got[1].isfinite() & (got[1].abs() > 1e30)).sum())
    assert finite > 0


@levels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conv_in_half_precision(dtype: torch.dtype, level: str) -> None:
    args, axes, shape = layer(2, {"padding": 1})
    for special in SPECIAL.values():
        x = exact(*shape).to(dtype)
        x[1, 4, 5, torch.arange(len(special)) + 3] = torch.tensor(special, dtype=dtype)
        got = run(level, "conv2d", x, *args, **axes)
        wide = KERNELS["conv2d"](x.float(), *args, **axes)
        torch.testing.assert_close(got, wide.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.isnan(), KERNELS["conv2d"](x, *args, **axes).isnan())


@levels
def test_bands_of_an_image(level: str) -> None:
    """Outputs of an image that is computed in several bands, by one and by two threads."""
    args = (*stored(8 * 10 * 9, 2, 2), exact(8, seed=1), 10, 8, [3, 3], 2)
    x = exact(1, 10, 70, 64)
    x[:, :, 28:36, 18:32] = 0  # no output adds small inputs to huge ones: that would depend on the order
    x[:, :, 30:34, 20:30] = huge(10, 4, 10, seed=0)
    x[0, 3, 0, 0], x[0, 6, 69, 63], x[0, 0, 50, 40] = math.inf, -math.inf, math.nan
    expected = exact_reference("conv2d", x, *args, padding=[1, 1])
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            same(run(level, "conv2d", x, *args, padding=[1, 1]), expected)
    finally:
        torch.set_num_threads(1)


TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)


@levels
@specials
@pytest.mark.parametrize("d", [1, 2, 3])
def test_transpose_convolutions_are_pytorchs(d: int, special: str, level: str) -> None:
    """Nothing native takes these; they agree with the whole weight as well."""
    shape = (16, 6, *(3, 2, 2)[:d])
    tile, alpha = stored(math.prod(shape), 4, 4)
    weight = KERNELS["unpack"](tile, alpha, list(shape), 4)
    args = (tile, alpha, exact(6, seed=1), 16, 6, list(shape[2:]), 4)
    x = exact(2, 16, *(5, 6, 4)[:d])
    for k, value in enumerate(SPECIAL[special]):
        x[(1, 3 + k, *[2 + k] * d)] = value
    with cpu.use_level(level):
        got = getattr(tbn, f"conv_transpose{d}d")(x, *args, stride=[2] * d)
    same(got, KERNELS[f"conv_transpose{d}d"](x, *args, stride=[2] * d))
    same(got, TRANSPOSED[d - 1](x.double(), weight.double(), args[2].double(), stride=2).float())
