"""``tbn::linear`` by the Triton kernels, in the interpreter, against the PyTorch reference in float64."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import tbn_compiler  # noqa: F401  (registers the operators)
from tbn_compiler.backends import triton as backend
from tbn_compiler.backends.triton import linear as wrapper
from tbn_compiler.backends.triton import prepared, search, tuning
from tbn_compiler.backends.triton.linear import linear
from tbn_compiler.backends.triton.quantize import quantize
from tbn_compiler.backends.triton.search import Gpu
from tbn_compiler.ops import reference
from tbn_compiler.packing import pack_bits
from tests.backends.triton.calls import Call

# The interpreter computes in NumPy, which says so where infinity and NaN come up as they should.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero) encountered in:RuntimeWarning")

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that is left to the reference would agree with it: tests that expect that undo this."""

    def refuse(reason: str) -> None:
        raise AssertionError(f"left to the reference: {reason}")

    monkeypatch.setattr(prepared, "decline", refuse)


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """Set ``kernel`` to run the candidate with that kernel; ``keys`` collects what was tuned."""
    state: dict[str, Any] = {"kernel": None, "keys": []}

    def choose(device: torch.device, key: str, candidates: Any, run: Any) -> Any:
        state["keys"].append(key)
        wanted = [config for config in candidates if state["kernel"] in (None, config.kernel)]
        return wanted[0]

    monkeypatch.setattr(tuning, "choose", choose)
    return state


@pytest.mark.parametrize("batch", [1, 17])
@pytest.mark.parametrize("p", [1, 2, 7, 16])
def test_aligned(p: int, batch: int) -> None:
    call = Call((112, 32), p, p)
    call.check(linear, call.input(batch))


@pytest.mark.parametrize("kernel", ["sum", "dot"])
@pytest.mark.parametrize(
    ("shape", "p", "num_alphas"),
    [
        ((64, 96), 4, 4),  # whole words
        ((64, 104), 4, 1),  # whole bytes
        ((16, 100), 4, 16),  # rows begin inside a byte
        ((16, 37), 4, 4),
        ((10, 36), 4, 1),  # misaligned: 90 elements, 5 different rows
        ((32, 33), 44, 1),  # 24 elements: less than a row
        ((7, 16), 4, 7),  # misaligned, an alpha for each row
    ],
)
def test_kernels(chosen: dict[str, Any], kernel: str, shape: tuple[int, int], p: int, num_alphas: int) -> None:
    chosen["kernel"] = kernel
    for batch in (3, 5):
        call = Call(shape, p, num_alphas)
        call.check(linear, call.input(batch))
    assert len(chosen["keys"]) == 2


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ((10, 36, 4, 4, 0), {}),  # a copy ends inside a row: its alpha changes there
        ((7, 20, 10, 10, 0), {}),  # and twice in some rows
        ((16, 40, 4, 4, 0), {"shift": 5}),
        ((10, 36, 4, 4, 0), {"shift": 5}),
        ((10, 36, 4, 1, 0), {"shift": 89}),
        ((16, 48, 8, 2, 0), {"p_in": 4}),
        ((16, 48, 8, 1, 0), {"p_in": 4}),
        ((16, 48, 8, 8, 0), {"p_in": 4}),  # an alpha for each copy along both axes
        ((16, 64, 4, 4, 2), {}),  # replicas of the input, folded into the weight
        ((10, 36, 4, 4, 3), {}),
        ((16, 48, 4, 2, 3), {"p_in": 2}),
    ],
)
def test_general(case: tuple[int, ...], options: dict[str, int], dtype: torch.dtype) -> None:
    m, n, p, num_alphas, replicas = case
    call = Call((m, n), p, num_alphas, dtype, replicas=replicas)
    for batch in (3, 17):
        # Neighbours that share a weight are summed in the dtype of the input first: here, exactly.
        x = (call.input(batch) * 8).round() / 8
        call.check(linear, x, **options)


@pytest.mark.parametrize("batch", [3, 17])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision(dtype: torch.dtype, batch: int) -> None:
    """float32 accumulation: 512 terms lose nothing but the last rounding."""
    call = Call((16, 512), 4, 4, dtype)
    call.check(linear, call.input(batch))


@pytest.mark.parametrize("epilogue", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("batch", [2, 17])
def test_epilogues(epilogue: str, batch: int) -> None:
    call = Call((64, 96), 4, 4)
    call.check(linear, call.input(batch), epilogue=epilogue)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kernel", ["dot", "left", "right"])
def test_split_columns(chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch, bias: bool, kernel: str) -> None:
    """Sums in several programs, added by the last of them, with everything that follows."""
    monkeypatch.setattr(search, "_split", lambda *sizes: 4)
    chosen["kernel"] = kernel
    tokens = {"dot": 17, "left": 5, "right": 70}[kernel]
    for shape, p, num_alphas, options in (
        ((64, 1088), 4, 4, {"epilogue": "gelu"}),
        ((48, 320), 4, 4, {}),
        ((64, 32), 4, 4, {}),  # more programs than steps
    ):
        call = Call(shape, p, num_alphas, torch.bfloat16, bias=bias)
        call.check(linear, call.input(tokens), **options)
    if kernel == "dot":
        for shape, options in (((10, 300), {}), ((64, 544), {"activation": "int8"})):
            call = Call(shape, 4, 4, bias=bias)
            call.check(linear, call.input(17), **options)


@pytest.mark.parametrize(("m", "n", "p", "tokens"), [(64, 96, 4, 1), (20, 32, 4, 3), (8, 4160, 4, 2)])
def test_limbs(chosen: dict[str, Any], m: int, n: int, p: int, tokens: int) -> None:
    """Integers of 16 bits, a scale for each word: as exact as one rounding of the largest result."""
    chosen["kernel"] = "limbs"
    call = Call((m, n), p, p, torch.bfloat16)
    x = call.input(tokens)
    x *= torch.logspace(-3, 3, n).bfloat16()
    call.check(linear, x, epilogue="relu")


def test_limbs_beside_an_outlier(chosen: dict[str, Any]) -> None:
    """An input is off by at most half a step, 1 / 64512 of the largest of its word, whatever the result."""
    chosen["kernel"] = "limbs"
    call = Call((16, 64), 4, 1, torch.bfloat16, bias=False)
    x = call.input(1)
    x[0, 3], x[0, 7] = 4096.0, 4096.0  # with opposite weights they leave nothing of themselves
    got, expected = call(linear, x).double(), call(reference.linear, x, exact=True)
    steps = 32 * 4096 / 64512 + 32 * x[0, 32:].abs().max().item() / 64512  # both words, all inputs off at once
    assert ((got - expected).abs() <= steps + 2.0**-8 * expected.abs()).all()


def test_limbs_of_small_and_large_inputs(chosen: dict[str, Any]) -> None:
    chosen["kernel"] = "limbs"
    call = Call((16, 64), 4, 4, torch.bfloat16, bias=False)
    for scale in (0.0, 1e-36, 1e30):
        x = (call.input(2).float() * scale).bfloat16()
        torch.testing.assert_close(call(linear, x), call(reference.linear, x), rtol=2.0**-7, atol=scale * 2.0**-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_limbs_that_are_not_finite(chosen: dict[str, Any], value: float) -> None:
    """Rows with such inputs are computed again as floats; the others of the block keep their sums."""
    chosen["kernel"] = "limbs"
    call = Call((16, 64), 4, 4, torch.bfloat16)
    x = call.input(2)
    x[1, 3] = value
    got, expected = call(linear, x), call(reference.linear, x)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=2.0**-7, atol=2.0**-5)
    assert not got[1].isfinite().any()
    assert got[0].isfinite().all()


@pytest.mark.parametrize("kernel", ["dot", "gemm", "library", "right"])
@pytest.mark.parametrize("shape", [(64, 96), (160, 96)])
def test_many_tokens(chosen: dict[str, Any], kernel: str, shape: tuple[int, int]) -> None:
    chosen["kernel"] = kernel
    call = Call(shape, 4, 4, torch.bfloat16)
    call.check(linear, call.input(513), epilogue="relu")


def test_many_tokens_before_hopper(chosen: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "gpu_of", lambda device: Gpu(capability=80))
    chosen["kernel"] = "unpack"
    call = Call((64, 96), 4, 4, torch.bfloat16)
    call.check(linear, call.input(513), epilogue="relu")


def test_many_float32_tokens(chosen: dict[str, Any]) -> None:
    chosen["kernel"] = "library"
    call = Call((64, 96), 4, 4)
    call.check(linear, call.input(513), epilogue="relu")


def test_float32_in_three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wrapper, "compute_capability", lambda device: 100)
    call = Call((64, 96), 4, 4)
    x = call.input(17)
    call.check(linear, x)
    call.check(linear, x * torch.logspace(-30, 30, 96))
    x[0, 3], x[1, 5], x[2, 0] = torch.inf, torch.nan, torch.finfo(torch.float32).max
    got, expected = call(linear, x), call(reference.linear, x)
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ((16, 40, 4, 4), {}),
        ((10, 36, 4, 4), {}),
        ((10, 36, 4, 1), {}),
        ((16, 40, 4, 4), {"shift": 5}),
        ((16, 48, 8, 2), {"p_in": 4}),
        ((16, 48, 8, 8), {"p_in": 4}),
    ],
)
@pytest.mark.parametrize("batch", [3, 17])
def test_full_precision_tile(case: tuple[int, ...], options: dict[str, int], batch: int) -> None:
    m, n, p, num_alphas = case
    call = Call((m, n), p, num_alphas, packed=False)
    call.check(linear, call.input(batch), **options)


def test_full_precision_tile_in_half() -> None:
    call = Call((16, 40), 4, 4, torch.bfloat16, packed=False)
    call.check(linear, call.input(17))


@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ((64, 96, 4, 4), {}),
        ((64, 72, 4, 4), {}),
        ((10, 36, 4, 1), {}),
        ((16, 40, 4, 4), {"shift": 5}),
        ((16, 48, 8, 2), {"p_in": 4}),
        ((16, 2048, 2, 2), {}),
    ],
)
@pytest.mark.parametrize("batch", [1, 17])
def test_number_formats(case: tuple[int, ...], options: dict[str, int], activation: str, batch: int) -> None:
    m, n, p, num_alphas = case
    for dtype in (torch.float32, torch.bfloat16):
        call = Call((m, n), p, num_alphas, dtype)
        call.check(linear, call.input(batch), activation=activation, epilogue="relu", **options)


@pytest.mark.parametrize("activation", ["int8", "binary"])
def test_one_scale(activation: str) -> None:
    """Few tokens by signs and many by integers, and the layer with others' scales before it."""
    call = Call((64, 64), 4)
    for batch in (2, 40):
        x = call.input(batch)
        for scale in (0.01, 0.02):
            call.check(linear, x, activation=activation, input_scale=torch.tensor([scale]))


@pytest.mark.parametrize("activation", ["int8", "binary"])
def test_quantised_values(activation: str) -> None:
    """Bit for bit what the reference multiplies, in every dtype; ties, zeros and tiny tokens included."""
    from tbn_compiler.ops import formats

    x = torch.randn(9, 40, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 30, 9)[:, None]
    x[0] = torch.arange(-20, 20) + 0.5
    x[0, 0] = 127
    x[1] = 0
    x[2] = 2.0**-101
    for dtype in (torch.float32, torch.bfloat16):
        values, scale = quantize(x.to(dtype), activation)
        function = formats.quantize_int8 if activation == "int8" else formats.binarize
        wanted, wanted_scale = function(x.to(dtype).float(), (-1,))
        assert torch.equal(values.float(), wanted)
        torch.testing.assert_close(scale, wanted_scale[:, 0], rtol=0 if activation == "int8" else 1e-6, atol=0)


def test_packed_signs() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    x[0, 5] = 0
    values, _ = quantize(x, "signs")
    assert torch.equal(values, torch.stack([pack_bits(row) for row in x]))


@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite(activation: str, value: float) -> None:
    call = Call((16, 64), 4)
    x = call.input(3)
    x[1, 3] = value
    got, expected = (call(f, x, activation=activation) for f in (linear, reference.linear))
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    assert not got[1].isfinite().any()


def test_shapes_and_strides() -> None:
    call = Call((64, 96), 4, 4)
    call.check(linear, call.input(2, 3, 5))
    call.check(linear, call.input())
    call.check(linear, torch.randn(17, 192)[:, ::2])
    call.check(linear, torch.randn(17, 192)[:, 96:])
    call.check(linear, torch.randn(96, 17).t())
    assert call(linear, torch.randn(0, 96)).shape == (0, 64)
    assert call(linear, torch.randn(2, 0, 96), activation="int8").shape == (2, 0, 64)


def test_tile_at_an_odd_address() -> None:
    """A tile inside a flat buffer need not begin at a whole word."""
    tile = pack_bits(torch.randn(16 * 64))
    shifted = torch.cat([tile.new_zeros(1), tile])[1:]
    assert shifted.data_ptr() % 4
    x = torch.randn(3, 64)
    args = (torch.ones(1), None, 64, 64, 4)
    torch.testing.assert_close(linear(x, shifted, *args), linear(x, tile, *args), rtol=0, atol=1e-5)


def test_alpha_and_bias_of_other_dtypes() -> None:
    tile, x = pack_bits(torch.randn(16 * 64)), torch.randn(3, 64)
    alpha, bias = torch.rand(4, dtype=torch.bfloat16), torch.randn(64, dtype=torch.float16)
    got = linear(x, tile, alpha, bias, 64, 64, 4)
    torch.testing.assert_close(got, reference.linear(x, tile, alpha, bias, 64, 64, 4), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "dtype", "options", "reason"),
    [
        (Call((16, 64), 4), torch.float64, {}, "input of dtype torch.float64"),
        (Call((2, 4), 4), torch.float32, {}, "a tile of 2 bits is smaller than a byte"),
        (Call((10, 36), 4, 4), torch.float32, {"activation": "int8"}, "rows that mix alphas"),
        (Call((16, 64), 4, packed=False), torch.float32, {"activation": "int8"}, "integer products need a packed tile"),
        (Call((16, 64), 4, replicas=2), torch.float32, {"activation": "int8"}, "input alphas scale the weights"),
        (Call((16, 48), 8, 8, replicas=2), torch.float32, {"p_in": 4}, "lie in different replicas"),
    ],
)
def test_left_to_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    call: Call,
    dtype: torch.dtype,
    options: dict[str, Any],
    reason: str,
) -> None:
    monkeypatch.setattr(prepared, "decline", backend.decline)
    monkeypatch.setattr(backend, "_declined", {})
    x = call.input(3).to(dtype)
    with caplog.at_level(logging.INFO, logger="tbn_compiler.backends.triton"):
        for _ in range(2):
            assert torch.equal(call(linear, x, **options), call(reference.linear, x, **options))
    assert [reason in record.message for record in caplog.records] == [True]
    assert list(backend.info().declined.values()) == [2]


def test_bad_operands_are_refused() -> None:
    tile, one = pack_bits(torch.randn(16 * 64)), torch.ones(1)
    with pytest.raises(RuntimeError, match="expected 64 input features"):
        linear(torch.ones(3, 63), tile, one, None, 64, 64, 4)
    with pytest.raises(ValueError, match="bias must have shape"):
        linear(torch.ones(3, 64), tile, one, torch.ones(3), 64, 64, 4)
    with pytest.raises(ValueError, match="is on meta, input on cpu"):
        linear(torch.ones(3, 64), tile.to("meta"), one, None, 64, 64, 4)
    with pytest.raises(ValueError, match="input_alpha is on meta, input on cpu"):
        linear(torch.ones(3, 32), tile, one, None, 64, 64, 4, torch.ones(2, device="meta"))
    with pytest.raises(TypeError, match="input must be floating point"):
        linear(torch.ones(3, 64, dtype=torch.int32), tile, one, None, 64, 64, 4)
    with pytest.raises(ValueError, match="activation='int4'"):
        linear(torch.ones(3, 64), tile, one, None, 64, 64, 4, activation="int4")
