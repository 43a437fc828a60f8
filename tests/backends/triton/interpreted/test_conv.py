"""``tbn::conv*`` by the Triton kernels, in the interpreter, against the PyTorch reference in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tbn_compiler  # noqa: F401  (registers the operators)
from tbn_compiler.backends.triton import conv as wrapper
from tbn_compiler.backends.triton import linear as linear_wrapper
from tbn_compiler.backends.triton import tuning
from tbn_compiler.backends.triton.conv import conv1d, conv2d, conv3d
from tbn_compiler.ops import reference
from tbn_compiler.packing import pack_bits
from tests.backends.triton.calls import Call

# The interpreter computes in NumPy, which says so where infinity and NaN come up as they should.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered in:RuntimeWarning")

CONVS = {1: conv1d, 2: conv2d, 3: conv3d}
SAME = {"padding": (1, 1)}


@pytest.fixture(autouse=True)
def _no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(reason: str) -> None:
        raise AssertionError(f"left to the reference: {reason}")

    monkeypatch.setattr(wrapper, "decline", refuse)


def check(monkeypatch: pytest.MonkeyPatch, kernel: str, call: Call, x: Any, **options: Any) -> torch.Tensor:
    def choose(device: torch.device, key: str, candidates: Any, run: Any) -> Any:
        return next(config for config in candidates if config.kernel == kernel)

    monkeypatch.setattr(tuning, "choose", choose)
    return call.check(CONVS[len(call.shape) - 2], x, **options)


@pytest.mark.parametrize("kernel", ["implicit", "library"])
@pytest.mark.parametrize(
    ("call", "image", "options"),
    [
        (Call((16, 8, 3, 3), 4, 4), (7, 6), SAME),
        (Call((16, 32, 1, 1), 4, 1, bias=False), (7, 6), {}),
        (Call((16, 8, 3, 2), 4, 4), (7, 6), {"padding": (1, 0), "stride": (2, 1), "dilation": (1, 2)}),
        (Call((10, 3, 3, 3), 6, 6), (7, 6), {}),  # misaligned, alphas mixed in a row
        (Call((10, 3, 3, 3), 6, 1), (7, 6), {}),
        (Call((16, 8, 3, 3), 4, 4), (7, 6), {"shift": 7, **SAME}),
        (Call((16, 8, 3, 3), 8, 4), (7, 6), {"p_in": 2, **SAME}),
        (Call((16, 8, 3, 3), 4, 4, replicas=2), (7, 6), SAME),
        (Call((12, 4, 3, 3), 3, 3, groups=2), (7, 6), {}),
        (Call((12, 2, 3, 3), 3, 1, groups=4), (7, 6), {}),
        (Call((18, 4, 2, 2), 3, 3, groups=2), (5, 5), {}),  # 9 rows a group, the last copy of 6 cut short
        (Call((16, 8, 3, 3), 4, 4, packed=False), (7, 6), SAME),
        (Call((16, 8, 3, 3), 4, 4, torch.float16), (7, 6), SAME),
        (Call((16, 8, 3, 3), 4, 4, torch.bfloat16), (7, 6), SAME),
        (Call((16, 4, 5), 4, 4), (11,), {"padding": (2,), "stride": (2,)}),
        (Call((8, 4, 2, 3, 1), 2, 2), (4, 5, 6), {"padding": (1, 0, 1)}),
    ],
)
def test_kernels(
    monkeypatch: pytest.MonkeyPatch, kernel: str, call: Call, image: tuple[int, ...], options: dict[str, Any]
) -> None:
    x = (call.input(2, *image) * 8).round() / 8  # sums of neighbours are exact in half precision
    check(monkeypatch, kernel, call, x, epilogue="relu", **options)


@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("call", [Call((16, 8, 3, 3), 4, 4), Call((12, 4, 3, 3), 3, 3, torch.bfloat16, groups=2)])
def test_number_formats(monkeypatch: pytest.MonkeyPatch, call: Call, activation: str) -> None:
    """Padding is zero, which is neither of the two signs."""
    check(monkeypatch, "implicit", call, call.input(3, 5, 6), activation=activation, epilogue="silu", **SAME)


@pytest.mark.parametrize("kernel", ["implicit", "library"])
def test_images_and_strides(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    call = Call((16, 8, 3, 3), 4, 4)
    x = call.input(2, 7, 6)
    check(monkeypatch, kernel, call, x.to(memory_format=torch.channels_last))
    check(monkeypatch, kernel, call, torch.randn(2, 16, 7, 12)[:, ::2, :, ::2])
    check(monkeypatch, kernel, call, x[0])
    assert call(conv2d, x[:0]).shape == (0, 16, 5, 4)


def test_float32_in_three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_wrapper, "compute_capability", lambda device: 100)
    call = Call((16, 8, 3, 3), 4, 4)
    check(monkeypatch, "implicit", call, call.input(2, 7, 6))


def test_bad_operands_are_refused() -> None:
    tile, one, x = pack_bits(torch.randn(16 * 8 * 9 // 4)), torch.ones(1), torch.ones(2, 8, 5, 5)
    with pytest.raises(RuntimeError, match="expected 8 input channels"):
        conv2d(x[:, :3], tile, one, None, 8, 16, (3, 3), 4)
    with pytest.raises(ValueError, match="is on meta, input on cpu"):
        conv2d(x, tile.to("meta"), one, None, 8, 16, (3, 3), 4)
    with pytest.raises(ValueError, match="input_alpha is on meta"):
        conv2d(x[:, :4], tile, one, None, 8, 16, (3, 3), 4, torch.ones(2, device="meta"))


def test_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(wrapper, "decline", reasons.append)
    call = Call((16, 8, 3, 3), 8, 4)
    x = call.input(2, 7, 6)
    got = call(conv2d, x, p_in=2, activation="int8")
    assert torch.equal(got, call(reference.KERNELS["conv2d"], x, p_in=2, activation="int8"))
    x = x.double()
    assert torch.equal(call(conv2d, x, p_in=2), call(reference.KERNELS["conv2d"], x, p_in=2))
    assert ["meet it one by one" in reasons[0], "float64" in reasons[1], len(reasons)] == [True, True, 2]
