"""The native ``tbn::linear`` at every vector level against the oracle."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import library
from tbn_compiler.ops import reference
from tbn_compiler.tiling import TileLayout
from tests import oracle

tbn = torch.ops.tbn
AVAILABLE = cpu.info().available
levels = pytest.mark.parametrize("level", AVAILABLE)
# Float kernels of those that multiply bytes are those of avx512.
float_levels = pytest.mark.parametrize("level", [level for level in AVAILABLE if not library.has_limbs(level)])

# 11 to 17: tables in registers, both, and tables in memory.
TOKENS = [0, 1, 3, 4, 5, 11, 12, 15, 16, 17, 37]
MATRICES = [
    (1, 1, 1),
    (8, 3, 2),
    (64, 96, 4),
    (33, 50, 1),  # no multiple of any vector or group
    (130, 301, 2),
    (512, 70, 4),
    (6, 8, 4),  # misaligned: R = 3
    (9, 10, 6),
    (40, 1023, 8),
]


def operands(m: int, n: int, p: int, num_alphas: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``(packed tile, alpha, dense float64 weight)``, alphas of 3 bits."""
    rng = np.random.default_rng(seed)
    t = np.where(rng.random(m * n // p) < 0.5, -1.0, 1.0)
    alpha = rng.integers(1, 9, num_alphas) / 8
    flat = np.resize(t, m * n)  # repeats the tile
    weight = flat.reshape(m, n) * (alpha if num_alphas == 1 else np.repeat(alpha, m // num_alphas))[:, None]
    return torch.from_numpy(oracle.pack(t)), torch.from_numpy(alpha).float(), torch.from_numpy(weight)


def exact_input(*shape: int, seed: int = 0) -> Tensor:
    """Multiples of 1/8 up to 4: float32 sums of them are exact in every order."""
    return oracle.exact(*shape, generator=torch.Generator().manual_seed(seed)) * 4


def native(before: dict[str, int]) -> None:
    """Check that no call was left to PyTorch since ``before``."""
    assert cpu.info().declined == before


@float_levels
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("mnp", MATRICES, ids=str)
def test_float_is_exact_where_float32_is(mnp: tuple[int, int, int], tokens: int, level: str) -> None:
    m, n, p = mnp
    declined = cpu.info().declined
    x, bias = exact_input(tokens, n), exact_input(m, seed=1)
    for num_alphas in {1, m} | ({p} if m % p == 0 else set()):
        tile, alpha, weight = operands(m, n, p, num_alphas)
        for b in (None, bias):
            with cpu.use_level(level):
                got = tbn.linear(x, tile, alpha, b, n, m, p)
            assert torch.equal(got.double(), F.linear(x.double(), weight, None if b is None else b.double()))
    native(declined)


@levels
@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("tokens", [0, 1, 3, 4, 17])
@pytest.mark.parametrize("mnp", [*MATRICES, (64, 2000, 2)], ids=str)  # 2000: sums leave 16 bits
def test_integers_are_exact(mnp: tuple[int, int, int], tokens: int, activation: str, level: str) -> None:
    m, n, p = mnp
    declined = cpu.info().declined
    tile, alpha, weight = operands(m, n, p, 1)
    x = torch.randn(tokens, n)
    bias = torch.randn(m)
    with cpu.use_level(level):
        got = tbn.linear(x, tile, alpha, bias, n, m, p, activation=activation)
    expected = reference.linear(x, tile, alpha, bias, n, m, p, activation=activation)
    if activation == "int8":
        assert torch.equal(got, expected)
    else:  # the mean is summed in another order
        bound = 4 * torch.finfo(torch.float32).eps * (F.linear(x.sign().double(), weight).abs() + bias.abs() + 1) * 4
        assert bool(((got - expected).abs() <= bound).all())
    native(declined)


@levels
def test_int8_sums_reach_the_largest_magnitude(level: str) -> None:
    """All products of one sign: 16-bit sums would overflow if more than 256 inputs were added in them."""
    n = 5000
    x = torch.full((5, n), 3.0)
    tile = torch.full((32 * n // 8,), 255, dtype=torch.uint8)
    with cpu.use_level(level):
        up = tbn.linear(x, tile, torch.ones(1), None, n, 32, 1, activation="int8")
        down = tbn.linear(-x, tile, torch.ones(1), None, n, 32, 1, activation="int8")
    expected = torch.tensor(127.0 * n) * (torch.tensor(3.0) / 127)
    assert torch.equal(up, expected.expand(5, 32))
    assert torch.equal(down, -expected.expand(5, 32))


@float_levels
@settings(max_examples=40)
@given(st.integers(1, 80), st.integers(1, 120), st.integers(0, 40), st.booleans(), st.data())
def test_float_property(level: str, m: int, n: int, tokens: int, per_row: bool, data: st.DataObject) -> None:
    p = data.draw(st.sampled_from(oracle.divisors(m * n)))
    epilogue = data.draw(st.sampled_from(["none", "relu"]))
    tile, alpha, weight = operands(m, n, p, m if per_row else 1, seed=m * n)
    x, bias = exact_input(tokens, n, seed=n), exact_input(m, seed=m)
    expected = F.linear(x.double(), weight, bias.double())
    with cpu.use_level(level):
        got = tbn.linear(x, tile, alpha, bias, n, m, p, epilogue=epilogue)
    assert torch.equal(got.double(), expected.relu() if epilogue == "relu" else expected)


@float_levels
@pytest.mark.parametrize("tokens", [1, 4, 20])
def test_rounding_stays_within_the_bound_of_the_summation(tokens: int, level: str) -> None:
    m, n, p = 96, 3000, 2
    tile, alpha, weight = operands(m, n, p, p)
    x = torch.randn(tokens, n)
    with cpu.use_level(level):
        got = tbn.linear(x, tile, alpha, None, n, m, p)
    exact = F.linear(x.double(), weight)
    # A sum whose longest chain has k additions is off by at most k u sum|x|: groups hold 3 inputs at least, and at
    # most 5 additions build a table. One product with alpha rounds once more.
    u = torch.finfo(torch.float32).eps / 2
    bound = u * ((n / 3 + 6) * F.linear(x.double().abs(), weight.abs()) + exact.abs())
    assert bool(((got - exact).abs() <= bound).all())
    # The bound is a worst case; errors of random signs are far smaller, and a wrong sign is far larger.
    assert float((got - exact).abs().max()) < 1e-3


@float_levels
def test_threads_and_other_tokens_change_no_bit(level: str) -> None:
    """Also where a thread's share of the rows is below what a layer has to have for larger tables."""
    tile, alpha, _ = operands(320, 480, 1, 1)
    x = torch.randn(32, 480)
    threads = torch.get_num_threads()
    with cpu.use_level(level):
        found = tbn.linear(x, tile, alpha, None, 480, 320, 1)
        assert torch.equal(tbn.linear(x[:16], tile, alpha, None, 480, 320, 1), found[:16])
        try:
            for count in (2, 3):
                torch.set_num_threads(count)
                for tokens in (16, 32):
                    assert torch.equal(tbn.linear(x[:tokens], tile, alpha, None, 480, 320, 1), found[:tokens])
        finally:
            torch.set_num_threads(threads)


@levels
@pytest.mark.parametrize("epilogue", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("tokens", [2, 16])
def test_epilogues(epilogue: str, activation: str, tokens: int, level: str) -> None:
    tile, alpha, _ = operands(64, 96, 4, 4)
    x, bias = exact_input(tokens, 96), exact_input(64, seed=1)
    kw = {"activation": activation, "epilogue": epilogue}
    with cpu.use_level(level):
        got = tbn.linear(x, tile, alpha, bias, 96, 64, 4, **kw)
    # Sums are exact here, so that both apply the same function to the same values.
    assert torch.equal(got, reference.linear(x, tile, alpha, bias, 96, 64, 4, **kw))


@levels
@pytest.mark.parametrize("special", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("epilogue", ["none", "relu"])
def test_special_values_stay_in_their_token(special: float, activation: str, epilogue: str, level: str) -> None:
    tile, alpha, _ = operands(24, 40, 2, 2)
    for tokens in (3, 16):
        x = exact_input(tokens, 40)
        x[1, 7] = special
        with cpu.use_level(level):
            got = tbn.linear(x, tile, alpha, None, 40, 24, 2, activation=activation, epilogue=epilogue)
        expected = reference.linear(x, tile, alpha, None, 40, 24, 2, activation=activation, epilogue=epilogue)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@levels
def test_zero_and_tiny_tokens_quantise_to_zero(level: str) -> None:
    tile, alpha, _ = operands(24, 40, 2, 2)
    x = torch.stack([torch.zeros(40), torch.full((40,), 1e-35), torch.ones(40)])
    with cpu.use_level(level):
        got = tbn.linear(x, tile, alpha, None, 40, 24, 2, activation="int8")
    assert not got[:2].any()
    assert got[2].any()


# Layouts and operands that are not as the kernels read them


@levels
@pytest.mark.parametrize(("p", "p_in", "shift"), [(8, 2, 0), (4, 4, 0), (4, 1, 5), (4, 1, 96)])
@pytest.mark.parametrize("tokens", [1, 20])
def test_other_layouts(p: int, p_in: int, shift: int, tokens: int, level: str) -> None:
    m, n = 64, 96
    layout = TileLayout((m, n), p, p_in, shift)
    tile = torch.from_numpy(oracle.pack(np.random.default_rng(0).standard_normal(layout.tile_size)))
    x = exact_input(tokens, n)
    declined = cpu.info().declined
    for num_alphas in {1, m, layout.p_out}:
        alpha = torch.randint(1, 9, (num_alphas,)) / 8
        with cpu.use_level(level):
            got = tbn.linear(x, tile, alpha, None, n, m, p, p_in=p_in, shift=shift)
        assert torch.equal(got, reference.linear(x, tile, alpha, None, n, m, p, p_in=p_in, shift=shift))
    native(declined)


@levels
def test_replicated_input(level: str) -> None:
    tile, alpha, _ = operands(64, 96, 4, 4)
    x, copies = exact_input(5, 24), torch.tensor([0.5, 1.0, 2.0, 0.25])
    declined = cpu.info().declined
    with cpu.use_level(level):
        got = tbn.linear(x, tile, alpha, None, 96, 64, 4, copies)
    assert torch.equal(got, reference.linear(x, tile, alpha, None, 96, 64, 4, copies))
    native(declined)


@levels
@pytest.mark.parametrize("tokens", [3, 16])
def test_operands_that_are_not_contiguous_or_aligned(tokens: int, level: str) -> None:
    tile, alpha, weight = operands(64, 96, 4, 64)
    expected = F.linear(exact_input(tokens, 96).double(), weight)
    x = exact_input(tokens, 96)
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view(tokens, 96)
    strided = torch.stack([x, x], 2)[:, :, 0]
    stretched = torch.stack([alpha, alpha], 1)[:, 0]
    with cpu.use_level(level):
        for given_x in (shifted, strided, x.t().contiguous().t()):
            for given_alpha in (alpha, stretched):
                got = tbn.linear(given_x, tile, given_alpha, None, 96, 64, 4)
                assert torch.equal(got.double(), expected)
        leading = tbn.linear(x.view(1, tokens, 1, 96), tile, alpha, None, 96, 64, 4)
        vector = tbn.linear(x[0], tile, alpha, None, 96, 64, 4)
    assert leading.shape == (1, tokens, 1, 64)
    assert torch.equal(leading.flatten(0, 2).double(), expected)
    assert torch.equal(vector.double(), expected[0])


@levels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["float", "int8"])
def test_half_precision_rounds_once(dtype: torch.dtype, activation: str, level: str) -> None:
    tile, alpha, _ = operands(64, 96, 4, 4)
    x = exact_input(3, 96).to(dtype)
    with cpu.use_level(level):
        got = tbn.linear(x, tile, alpha, None, 96, 64, 4, activation=activation)
    wide = reference.linear(x.float(), tile, alpha, None, 96, 64, 4, activation=activation)
    assert got.dtype == dtype
    assert torch.equal(got, wide.to(dtype))


DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"input": torch.ones(3, 96, dtype=torch.float64)}, "float64 input"),
    "full-precision tile": ({"tile": torch.randn(64 * 96 // 4)}, "full-precision tile"),
    "mixed alphas": (
        {"p": 6, "tile": torch.zeros(128, dtype=torch.uint8), "alpha": torch.rand(6)},
        "mix several alphas",
    ),
    "alphas on both axes": ({"p_in": 2, "alpha": torch.rand(4)}, "mix several alphas"),
    "int8 on sums": ({"p_in": 2, "activation": "int8"}, "int8 activations are summed"),
}


@pytest.mark.parametrize("case", DECLINED)
@pytest.mark.skipif(not AVAILABLE, reason="no native library and no compiler; test_library checks that")
def test_what_the_kernels_leave_to_pytorch(case: str) -> None:
    changes, reason = DECLINED[case]
    tile, alpha, _ = operands(64, 96, 4, 1)
    call = {"input": torch.randn(3, 96), "tile": tile, "alpha": alpha, "bias": None, "in_features": 96}
    call |= {"out_features": 64, "p": 4} | changes
    before = sum(count for text, count in cpu.info().declined.items() if reason in text)
    got = tbn.linear(**call)
    assert sum(count for text, count in cpu.info().declined.items() if reason in text) == before + 1
    assert torch.equal(got, reference.linear(**call))


@levels
@pytest.mark.parametrize("tokens", [3, 16])
def test_opcheck(tokens: int, level: str) -> None:
    tile, alpha, _ = operands(64, 96, 4, 4)
    x = torch.randn(tokens, 96, requires_grad=True)
    with cpu.use_level(level):
        torch.library.opcheck(tbn.linear.default, (x, tile, alpha, torch.randn(64), 96, 64, 4))
        kw = {"activation": "int8", "epilogue": "silu"}
        torch.library.opcheck(tbn.linear.default, (x.detach(), tile, alpha, None, 96, 64, 4), kw)
