"""Copies with Hadamard signs by the Triton kernels, in the interpreter, against the PyTorch reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tbn_compiler  # noqa: F401  (registers the operators)
from tbn_compiler.backends.triton import linear as wrapper
from tbn_compiler.backends.triton import prepared, tuning
from tbn_compiler.backends.triton.conv import conv1d, conv2d, conv3d
from tbn_compiler.backends.triton.linear import linear
from tbn_compiler.backends.triton.search import Config
from tbn_compiler.ops import reference
from tests.backends.triton.calls import Call

# The interpreter computes in NumPy, which says so where infinity and NaN come up as they should.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered in:RuntimeWarning")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CONVS = {1: conv1d, 2: conv2d, 3: conv3d}
SIGNS = {"hadamard": True}
SAME = {"padding": (1, 1), **SIGNS}
LAST = {"memory_format": torch.channels_last}


@pytest.fixture(autouse=True)
def _no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(reason: str) -> None:
        raise AssertionError(f"left to the reference: {reason}")

    monkeypatch.setattr(prepared, "decline", refuse)
    prepared.forget()


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Set ``kernel`` to run the candidate with that kernel, ``index`` for one of several."""
    state: dict[str, Any] = {"kernel": None, "index": 0, "keys": []}

    def choose(device: torch.device, key: str, candidates: Any, run: Any) -> Any:
        state["keys"].append(key)
        found = [config for config in candidates if state["kernel"] in (None, config.kernel)]
        return found[min(state["index"], len(found) - 1)]

    monkeypatch.setattr(tuning, "choose", choose)
    return state


@pytest.mark.parametrize("batch", [1, 17])
@pytest.mark.parametrize(("p", "num_alphas"), [(2, 2), (4, 1), (8, 8), (32, 1)])
def test_unmeasured(p: int, num_alphas: int, batch: int) -> None:
    call = Call((96, 96), p, num_alphas)
    call.check(linear, call.input(batch), **SIGNS)


@pytest.mark.parametrize("kernel", ["sum", "library"])
@pytest.mark.parametrize(
    ("shape", "p", "num_alphas"),
    [
        ((64, 96), 4, 4),  # whole words
        ((64, 96), 16, 64),  # an alpha for each row
        ((64, 104), 4, 1),  # whole bytes
        ((16, 104), 8, 8),
        ((16, 100), 4, 4),  # rows begin inside a byte
        ((6, 34), 2, 2),
        ((4, 36), 4, 4),  # one row
        ((36, 4), 2, 1),  # fewer columns than a byte has bits
    ],
)
def test_kernels(chosen: dict[str, Any], kernel: str, shape: tuple[int, int], p: int, num_alphas: int) -> None:
    chosen["kernel"] = kernel
    for batch in (3, 5):
        call = Call(shape, p, num_alphas)
        call.check(linear, call.input(batch), epilogue="gelu", **SIGNS)
    assert all(f"signed={p}" in key for key in chosen["keys"])


@pytest.mark.parametrize("dtype", [F32, F16, BF16])
@pytest.mark.parametrize("batch", [2, 17])
def test_general(dtype: torch.dtype, batch: int) -> None:
    for call in (
        Call((16, 112), 4, 4, dtype),
        Call((16, 40), 8, 8, dtype, packed=False),
        Call((16, 48), 16, 1, dtype),  # bytes with more groups than bits
        Call((16, 64), 4, 4, dtype, replicas=2),
        Call((12, 36), 2, 2, dtype, replicas=3, bias=False),
    ):
        call.check(linear, call.input(batch), epilogue="silu", **SIGNS)


@pytest.mark.parametrize(("index", "tokens"), [(0, 1), (1, 1), (0, 2)])
@pytest.mark.parametrize(("m", "n", "p"), [(64, 96, 4), (20, 32, 2), (24, 4160, 8)])
def test_limbs(chosen: dict[str, Any], m: int, n: int, p: int, tokens: int, index: int) -> None:
    """Integers of 16 bits, a scale for each word: as exact as one rounding of the largest result."""
    chosen["kernel"], chosen["index"] = "limbs", index
    call = Call((m, n), p, p, BF16)
    x = call.input(tokens)
    x *= torch.logspace(-3, 3, n).bfloat16()
    call.check(linear, x, epilogue="relu", **SIGNS)


@pytest.mark.parametrize("p", [2, 4, 8])
def test_integers_of_limbs_are_summed_exactly(chosen: dict[str, Any], p: int) -> None:
    """Inputs with a scale of 2^-9 lose nothing, and odd numbers of it are left where the large ones cancel."""
    chosen["kernel"] = "limbs"
    call = Call((64, 64), p, 1, BF16, bias=False)
    x = torch.randint(-3, 4, (2, 64), generator=torch.Generator().manual_seed(0)).bfloat16() / 512
    x[:, [0, p]] = 63  # of one column group; 63 / 2^-9 is the largest integer
    got, expected = call(linear, x, **SIGNS), call(reference.linear, x, exact=True, **SIGNS)
    small = expected.abs() < 1
    assert 0 < small.sum() < small.numel()
    assert torch.equal(got[small].double(), expected[small])


def test_limbs_of_small_and_large_inputs(chosen: dict[str, Any]) -> None:
    chosen["kernel"] = "limbs"
    call = Call((16, 64), 4, 4, BF16, bias=False)
    for scale in (0.0, 1e-36, 1e30):
        x = (call.input(2).float() * scale).bfloat16()
        expected = call(reference.linear, x, exact=True, **SIGNS).bfloat16()
        torch.testing.assert_close(call(linear, x, **SIGNS), expected, rtol=2.0**-7, atol=scale * 2.0**-6)


@pytest.mark.parametrize("kernel", ["limbs", "sum", "groups", "library"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(chosen: dict[str, Any], kernel: str, value: float) -> None:
    """An infinite input gives infinities of both signs, as with the whole weight, and no NaN."""
    chosen["kernel"] = kernel
    call = Call((16, 64), 4, 4, BF16)
    x = call.input(1 if kernel == "sum" else 2)
    x[-1, 3] = value
    got, expected = call(linear, x, **SIGNS), call(reference.linear, x, exact=True, **SIGNS).bfloat16()
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=2.0**-7, atol=2.0**-5)
    assert not got[-1].isfinite().any()


@pytest.mark.parametrize("kernel", ["groups", "library"])
@pytest.mark.parametrize(("shape", "p"), [((64, 96), 4), ((80, 200), 8), ((32, 32), 2), ((64, 64), 16)])
def test_many_tokens(chosen: dict[str, Any], kernel: str, shape: tuple[int, int], p: int) -> None:
    chosen["kernel"] = kernel
    for tokens in (33, 130):
        call = Call(shape, p, p, BF16)
        call.check(linear, call.input(tokens), epilogue="relu", **SIGNS)


def test_more_tokens_than_a_program_keeps(chosen: dict[str, Any]) -> None:
    """The library's products come first from some size on; one pass over the bits takes no memory at any."""
    call = Call((16, 32), 4, 4, BF16)
    x = call.input(2050)
    call.check(linear, x, **SIGNS)
    chosen["kernel"] = "sum"
    call.check(linear, x[:40], **SIGNS)


@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize(("shape", "p"), [((64, 96), 4), ((16, 36), 2), ((64, 64), 16)])
@pytest.mark.parametrize("batch", [1, 40])
def test_number_formats(shape: tuple[int, int], p: int, activation: str, batch: int) -> None:
    for dtype in (F32, BF16):
        call = Call(shape, p, p, dtype)
        call.check(linear, call.input(batch), activation=activation, epilogue="relu", **SIGNS)


def test_integers_are_summed_exactly() -> None:
    call = Call((16, 2048), 8, 1, bias=False)
    x = torch.randint(-127, 128, (3, 2048)).float()
    x[:, 0] = 127  # a scale of one: the products are integers
    expected = call(reference.linear, x.double(), **SIGNS).float()
    assert torch.equal(call(linear, x, activation="int8", **SIGNS), expected)


def test_shapes_and_strides() -> None:
    call = Call((64, 96), 4, 4)
    call.check(linear, call.input(2, 3, 5), **SIGNS)
    call.check(linear, call.input(), **SIGNS)
    call.check(linear, torch.randn(17, 192)[:, ::2], **SIGNS)
    call.check(linear, torch.randn(17, 192)[:, 96:], **SIGNS)
    call.check(linear, torch.randn(96, 17).t(), **SIGNS)
    assert call(linear, torch.randn(0, 96), **SIGNS).shape == (0, 64)


def check(monkeypatch: pytest.MonkeyPatch, kernel: str, call: Call, x: Any, **options: Any) -> torch.Tensor:
    def choose(device: torch.device, key: str, candidates: Any, run: Any) -> Any:
        return next(config for config in [*candidates, Config(kernel)] if config.kernel == kernel)

    monkeypatch.setattr(tuning, "choose", choose)
    return call.check(CONVS[len(call.shape) - 2], x, **options)


@pytest.mark.parametrize("kernel", ["library", "unpacked"])
@pytest.mark.parametrize(
    ("call", "image", "options"),
    [
        (Call((16, 8, 3, 3), 4, 4, BF16), (7, 6), SAME),
        (Call((16, 32, 1, 1), 16, 1, BF16, bias=False), (7, 6), SIGNS),
        (Call((16, 8, 3, 2), 8, 16, BF16), (7, 6), {"padding": (1, 0), "stride": (2, 1), "dilation": (1, 2), **SIGNS}),
        (Call((6, 10, 3, 3), 2, 2, F16), (7, 6), SAME),
        (Call((16, 8, 3, 3), 4, 4, BF16, replicas=2), (7, 6), SAME),
        (Call((16, 8, 3, 3), 4, 4, BF16, packed=False), (7, 6), SAME),
        (Call((16, 4, 5), 4, 4, BF16), (11,), {"padding": (2,), "stride": (2,), **SIGNS}),
        (Call((8, 4, 2, 3, 1), 2, 2, BF16), (4, 5, 6), {"padding": (1, 0, 1), **SIGNS}),
    ],
)
def test_convolutions(
    monkeypatch: pytest.MonkeyPatch, kernel: str, call: Call, image: tuple[int, ...], options: dict[str, Any]
) -> None:
    check(monkeypatch, kernel, call, call.input(2, *image), epilogue="relu", **options)


def test_convolutions_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    for call, image, options in (
        (Call((16, 8, 3, 3), 4, 4), (7, 6), SAME),
        (Call((16, 4, 5), 4, 4), (11,), {"padding": (2,), "stride": (2,), **SIGNS}),
    ):
        check(monkeypatch, "library", call, call.input(2, *image), epilogue="gelu", **options)


@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("call", [Call((16, 8, 3, 3), 4, 4), Call((16, 32, 3, 3), 2, 1, BF16)])
def test_convolutions_of_integers(monkeypatch: pytest.MonkeyPatch, call: Call, activation: str) -> None:
    """Padding is zero, which is neither of the two signs."""
    x = call.input(3, 5, 6)
    check(monkeypatch, "unpacked", call, x, activation=activation, epilogue="silu", **SAME)


@pytest.mark.parametrize("kernel", ["library", "library_last", "unpacked"])
def test_memory_formats(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    call = Call((32, 16, 3, 3), 4, 4, BF16)
    x = call.input(2, 7, 6)
    if kernel != "library_last":
        check(monkeypatch, kernel, call, x.to(**LAST), **LAST, **SAME)
    check(monkeypatch, kernel, call, x, **SAME)
    check(monkeypatch, kernel, call, torch.randn(2, 32, 7, 12).bfloat16()[:, ::2, :, ::2], **SAME)
    check(monkeypatch, kernel, call, x[0][None], **SAME)


def test_single_positions_are_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    plan = wrapper.plan_weight
    monkeypatch.setattr(wrapper, "plan_weight", lambda *args, **named: planned.append(args) or plan(*args, **named))
    call = Call((16, 32, 1, 1), 4, 4, BF16)
    call.check(conv2d, call.input(2, 7, 6).to(**LAST), **LAST, **SIGNS)
    assert [product.layout.shape for (product,) in planned] == [(16, 32)]
