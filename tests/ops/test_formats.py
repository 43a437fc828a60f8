"""``activation=`` and ``epilogue=`` of the inference operators against NumPy in exact integers."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tbn_compiler.backends import cpu
from tbn_compiler.ops.formats import quantize_int8
from tests import oracle

tbn = torch.ops.tbn
OPS: dict[int, Any] = {0: tbn.linear, 1: tbn.conv1d, 2: tbn.conv2d, 3: tbn.conv3d}
FUNCTIONS: dict[str, Any] = {
    "none": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def quantized(
    x: np.ndarray, activation: str, token_axes: tuple[int, ...], scale: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """``(integers, scales)`` of one input, in float32 arithmetic as the schema defines it."""
    magnitude = np.abs(x)
    if scale is not None:
        factor = np.float32(1) / np.float32(scale)
        integers = np.where(x > 0, 1, -1) if activation == "binary" else np.clip(np.rint(x * factor), -127, 127)
        return integers.astype(np.int64), np.full_like(x.max(token_axes, keepdims=True), np.float32(scale))
    if activation == "binary":
        return np.where(x > 0, 1, -1), magnitude.mean(token_axes, keepdims=True)
    largest = magnitude.max(token_axes, keepdims=True)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        integers = np.rint(x * (np.float32(127) / largest))
    used = largest >= 2.0**-100
    return np.where(used, integers, 0).astype(np.int64), np.where(used, largest, 0) / np.float32(127)


def layer(shape: tuple[int, ...], p: int, num_alphas: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """``(packed tile, alpha, dense weight)``."""
    bits = np.where(np.random.default_rng(1).random(math.prod(shape) // p) < 0.5, -1.0, 1.0)
    alpha = np.random.default_rng(p).integers(1, 9, num_alphas) / 8
    return torch.from_numpy(oracle.pack(bits)), torch.from_numpy(alpha).float(), oracle.fill(shape, bits, alpha)


def run(
    op: Any, x: Tensor, shape: tuple[int, ...], p: int, tile: Tensor, alpha: Tensor, bias: Any, **kw: Any
) -> Tensor:
    if len(shape) == 2:
        return op(x, tile, alpha, bias, shape[1], shape[0], p, **kw)
    return op(x, tile, alpha, bias, shape[1], shape[0], shape[2:], p, **kw)


@pytest.mark.parametrize("scale", [None, 0.03])  # clips beyond 3.8
@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("p", [1, 4, 3])  # 3: misaligned
@pytest.mark.parametrize("d", [0, 1, 2, 3])
def test_products_are_exact_integers(d: int, p: int, activation: str, scale: float | None) -> None:
    shape = (8, 30, *(3, 2, 2)[:d])
    tile, alpha, weight = layer(shape, p, p)
    x = torch.randn(3, 30, *(7, 6, 5)[:d], generator=torch.Generator().manual_seed(0)) * 5
    token_axes = tuple(range(1, x.dim()))
    integers, scales = quantized(x.numpy(), activation, token_axes, scale)
    options = {"activation": activation, "input_scale": None if scale is None else torch.tensor([scale])}
    q = torch.from_numpy(integers).double()
    dense = torch.from_numpy(weight).double()
    # Integers times alphas of a few bits: exact in float64.
    exact = F.linear(q, dense) if d == 0 else (F.conv1d, F.conv2d, F.conv3d)[d - 1](q, dense)
    bias = torch.randn(8, generator=torch.Generator().manual_seed(1))
    expected = exact * torch.from_numpy(scales).double()
    got = run(OPS[d], x, shape, p, tile, alpha, None, **options)
    # One rounding for the alpha, one for the scale; a misaligned tile adds products of alphas exactly.
    torch.testing.assert_close(got.double(), expected, rtol=3 * 2.0**-24, atol=0)
    got = run(OPS[d], x, shape, p, tile, alpha, bias, **options)
    view = bias.double().view(-1, *[1] * d)
    bound = 4 * 2.0**-24 * (expected.abs() + view.abs())
    assert bool(((got.double() - (expected + view)).abs() <= bound).all())


def test_factor_is_rounded_once() -> None:
    """``127 / max|x|`` is one division: with the reciprocal, some inputs next to a half go to the other integer."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2000, 8)).astype(np.float32)
    # The last input is as near to a half as float32 comes.
    factor = np.float32(127) / np.abs(x[:, :7]).max(1)
    x[:, 7] = np.float32(0.5) / factor
    got, _ = quantize_int8(torch.from_numpy(x), (-1,))
    assert np.array_equal(got.numpy(), quantized(x, "int8", (1,))[0])


def test_products_are_exact_where_no_rows_repeat() -> None:
    """Alphas come after the sums: multiplied with the weights first, each of 500 products would be rounded."""
    tile, _, weight = layer((8, 500), 1, 1)
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor([1 / 3])
    integers, scales = quantized(x.numpy(), "int8", (1,))
    sums = integers @ (np.sign(weight).T.astype(np.int64))
    expected = torch.from_numpy(sums.astype(np.float32)) * alpha * torch.from_numpy(scales)
    assert torch.equal(tbn.linear(x, tile, alpha, None, 500, 8, 1, activation="int8"), expected)


@pytest.mark.parametrize("d", [0, 2])
@pytest.mark.parametrize("num_alphas", [1, 4])
def test_rolled_copies(num_alphas: int, d: int) -> None:
    """Copies share no rows, and each has its alpha."""
    shape = (16, 40, *(3, 2)[:d])
    tile, alpha, _ = layer(shape, 4, num_alphas)
    x = torch.randn(3, 40, *(5, 4)[:d], generator=torch.Generator().manual_seed(0)) * 5
    integers, scales = quantized(x.numpy(), "int8", tuple(range(1, x.dim())))
    exact = run(OPS[d], torch.from_numpy(integers).double(), shape, 4, tile, alpha, None, shift=5)
    got = run(OPS[d], x, shape, 4, tile, alpha, None, shift=5, activation="int8")
    torch.testing.assert_close(got.double(), exact * torch.from_numpy(scales).double(), rtol=3 * 2.0**-24, atol=0)


@pytest.mark.parametrize("epilogue", FUNCTIONS)
@pytest.mark.parametrize("d", [0, 2])
def test_epilogue(d: int, epilogue: str) -> None:
    shape = (8, 6, *(3, 2, 2)[:d])
    tile, alpha, _ = layer(shape, 4, 1)
    x, bias = torch.randn(3, 6, *(7, 6, 5)[:d], dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    plain = run(OPS[d], x, shape, 4, tile, alpha, bias)
    got = run(OPS[d], x, shape, 4, tile, alpha, bias, epilogue=epilogue)
    torch.testing.assert_close(got, FUNCTIONS[epilogue](plain), rtol=1e-12, atol=1e-12)


def test_a_scale_for_each_token() -> None:
    tile, alpha, _ = layer((4, 8), 2, 1)
    x = torch.randn(2, 3, 8)
    together = tbn.linear(x, tile, alpha, None, 8, 4, 2, activation="int8")
    alone = tbn.linear(x[1, 2] * 1000, tile, alpha, None, 8, 4, 2, activation="int8")
    torch.testing.assert_close(alone, together[1, 2] * 1000)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-38, -1e-45, 2.0**-101])
def test_int8_of_nearly_nothing_is_zero(value: float) -> None:
    tile, alpha, _ = layer((4, 8), 2, 1)
    got = tbn.linear(torch.full((2, 8), value), tile, alpha, None, 8, 4, 2, activation="int8")
    assert torch.equal(got, torch.zeros(2, 4))


def test_int8_ends_of_the_range() -> None:
    """Ties go to even, the largest magnitude becomes 127, and huge values do not overflow."""
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -127.0]])
    one, integers = torch.ones(1), [127, 0, 2, 2, 0, -2, -127]
    for i, q in enumerate(integers):  # +1 at i, -1 elsewhere
        tile = torch.tensor([1 << i], dtype=torch.uint8)
        assert tbn.linear(x, tile, one, None, 7, 1, 1, activation="int8").item() == 2 * q - sum(integers)
    huge = torch.tensor([[torch.finfo(torch.float32).max / 2]])
    got = tbn.linear(huge, torch.ones(1, dtype=torch.uint8), one, None, 1, 1, 1, activation="int8")
    torch.testing.assert_close(got, huge)


@pytest.mark.parametrize("activation", ["int8", "binary"])
def test_nan_is_not_hidden(activation: str) -> None:
    tile, alpha, _ = layer((4, 8), 2, 1)
    x = torch.ones(2, 8)
    x[0, 3] = math.nan
    got = tbn.linear(x, tile, alpha, None, 8, 4, 2, activation=activation)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow(dtype: torch.dtype) -> None:
    """1,024 products of 127 would not fit float16 before the scale brings them back."""
    tile, one = torch.full((128,), 255, dtype=torch.uint8), torch.ones(1, dtype=dtype)
    x = torch.full((2, 1024), 0.25, dtype=dtype)
    got = tbn.linear(x, tile, one, None, 1024, 1, 1, activation="int8")
    assert got.dtype == dtype
    assert torch.equal(got, torch.full((2, 1), 256.0, dtype=dtype))


@pytest.mark.parametrize("activation", ["int8", "binary"])
def test_empty_batch(activation: str) -> None:
    tile, alpha, _ = layer((4, 8), 2, 1)
    assert tbn.linear(torch.ones(0, 8), tile, alpha, None, 8, 4, 2, activation=activation).shape == (0, 4)


@pytest.mark.parametrize("level", ["none", *cpu.info().available])
@pytest.mark.parametrize("tokens", [2, 20])
def test_one_scale_at_the_ends(tokens: int, level: str) -> None:
    """Halves go to even, infinities end at the range, a NaN takes its token, and a scale of nothing takes all."""
    x = torch.zeros(tokens, 64)
    x[0, :8] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 1000.0, math.inf, -math.inf])
    x[1, 5] = math.nan
    tile, one = torch.full((8 * 8,), 255, dtype=torch.uint8), torch.ones(1)

    def linear(scale: float) -> Tensor:
        with cpu.use_level(level):
            given = torch.tensor([scale])
            return tbn.linear(x, tile, one, None, 64, 8, 1, input_scale=given, activation="int8")

    got = linear(1.0)
    assert torch.equal(got[0], torch.full((8,), 0.0 + 2 + 2 - 0 - 2 + 127))
    assert got[1].isnan().all()
    assert torch.equal(got[2:], torch.zeros(tokens - 2, 8))
    for scale in (0.0, -1.0, math.nan, math.inf, 2.0**-101):
        assert linear(scale).isnan().all()


@pytest.mark.parametrize("level", ["none", *cpu.info().available])
@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("d", [0, 1, 2])
def test_one_scale_at_every_level(d: int, activation: str, level: str) -> None:
    shape = (64, 16, *(3, 3)[:d])
    tile, alpha, _ = layer(shape, 4, 4)
    x, scale = torch.randn(17, 16, *(9, 8)[:d]), torch.tensor([0.02])
    x[3].view(-1)[7] = math.nan
    options: dict[str, Any] = {"activation": activation, "input_scale": scale}
    arguments = (16, 64, *([shape[2:]] if d else []), 4)
    images = [x, x.contiguous(memory_format=torch.channels_last)] if d == 2 else [x]
    for values in images:
        with cpu.use_level("none"):
            expected = OPS[d](values, tile, alpha, None, *arguments, **options)
        with cpu.use_level(level):
            got = OPS[d](values, tile, alpha, None, *arguments, **options)
        assert torch.equal(got[3].isnan(), torch.ones_like(got[3], dtype=torch.bool))
        assert torch.equal(got.nan_to_num(), expected.nan_to_num())
        half = OPS[d](values.half(), tile, alpha, None, *arguments, **{**options, "input_scale": scale.double()})
        assert half.dtype == torch.float16


def test_one_scale_that_does_not_fit_is_refused() -> None:
    tile, alpha, _ = layer((4, 8), 2, 1)
    for scale, activation, message in (
        (torch.ones(2), "int8", r"input_scale must be one floating-point number, got torch.float32 \(2,\)"),
        (torch.ones(1, dtype=torch.int32), "int8", "input_scale must be one floating-point number"),
        (torch.ones(1), "float", "input_scale needs activation='int8' or 'binary'"),
    ):
        with pytest.raises(ValueError, match=message):
            tbn.linear(torch.ones(2, 8), tile, alpha, None, 8, 4, 2, input_scale=scale, activation=activation)


def test_wrong_names_are_refused() -> None:
    tile, alpha, _ = layer((4, 8), 2, 1)
    for option in ({"activation": "int4"}, {"epilogue": "tanh"}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}='(int4|tanh)' is not one of '(float|none)'"):
            tbn.linear(torch.ones(2, 8), tile, alpha, None, 8, 4, 2, **option)


def test_gradients_are_refused_but_the_forward_runs() -> None:
    tile, alpha, _ = layer((4, 8), 2, 1)
    x = torch.ones(2, 8, requires_grad=True)
    for option in ({"activation": "int8"}, {"epilogue": "relu"}):
        out = tbn.linear(x, tile, alpha, None, 8, 4, 2, **option)
        with pytest.raises(RuntimeError, match="for inference"):
            out.sum().backward()


def test_opcheck() -> None:
    tile, alpha, _ = layer((4, 8), 2, 1)
    for activation, epilogue in itertools.product(("float", "int8", "binary"), ("none", "gelu")):
        torch.library.opcheck(
            tbn.linear.default,
            (torch.randn(2, 8), tile, alpha, torch.randn(4), 8, 4, 2),
            {"activation": activation, "epilogue": epilogue},
        )
