"""``tbn::conv*`` by the Triton kernels, in the interpreter, against the PyTorch reference in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tbn_compiler  # noqa: F401  (registers the operators)
from tbn_compiler.backends.triton import conv as wrapper
from tbn_compiler.backends.triton import linear as linear_wrapper
from tbn_compiler.backends.triton import prepared, tuning
from tbn_compiler.backends.triton.conv import conv1d, conv2d, conv3d
from tbn_compiler.backends.triton.search import Config
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import TensorCall
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

    monkeypatch.setattr(prepared, "decline", refuse)
    prepared.forget()


def check(monkeypatch: pytest.MonkeyPatch, kernel: str, call: Call, x: Any, **options: Any) -> torch.Tensor:
    def choose(device: torch.device, key: str, candidates: Any, run: Any) -> Any:
        others = [Config(kernel), Config(kernel, 16, 16, 32)]  # of the shapes for which it is no candidate
        return next(config for config in [*candidates, *others] if config.kernel == kernel)

    monkeypatch.setattr(tuning, "choose", choose)
    return call.check(CONVS[len(call.shape) - 2], x, **options)


@pytest.mark.parametrize("kernel", ["implicit", "library", "unpacked"])
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
        (Call((12, 32, 3, 3), 3, 3, groups=2), (5, 5), SAME),
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


@pytest.mark.parametrize("kernel", ["implicit", "unpacked"])
@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("call", [Call((16, 8, 3, 3), 4, 4), Call((12, 4, 3, 3), 3, 3, torch.bfloat16, groups=2)])
def test_number_formats(monkeypatch: pytest.MonkeyPatch, call: Call, activation: str, kernel: str) -> None:
    """Padding is zero, which is neither of the two signs."""
    check(monkeypatch, kernel, call, call.input(3, 5, 6), activation=activation, epilogue="silu", **SAME)


def test_integers_are_summed_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where sums of 127 times the terms are beyond the integers of half precision."""
    call = Call((16, 32, 3, 3), 4, 1, bias=False)
    x = torch.randint(-127, 128, (2, 32, 5, 6)).float()
    x[:, 0, 0, 0] = 127  # a scale of one: the products are integers
    expected = call(reference.KERNELS["conv2d"], x.double(), **SAME).float()
    assert expected.abs().max() > 2048
    for kernel in ("implicit", "unpacked"):
        assert torch.equal(check(monkeypatch, kernel, call, x, activation="int8", **SAME), expected)


@pytest.mark.parametrize("kernel", ["implicit", "library", "unpacked"])
def test_images_and_strides(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    call = Call((16, 8, 3, 3), 4, 4)
    x = call.input(2, 7, 6)
    check(monkeypatch, kernel, call, torch.randn(2, 16, 7, 12)[:, ::2, :, ::2])
    check(monkeypatch, kernel, call, x[0])
    check(monkeypatch, kernel, call, x[:1].expand(3, -1, -1, -1))
    assert call(conv2d, x[:0]).shape == (0, 16, 5, 4)


LAST = {"memory_format": torch.channels_last}


@pytest.mark.parametrize("kernel", ["implicit", "library", "library_last", "unpacked"])
@pytest.mark.parametrize("call", [Call((16, 32, 3, 3), 4, 4), Call((12, 4, 3, 3), 3, 3, groups=2)])
def test_memory_formats(monkeypatch: pytest.MonkeyPatch, kernel: str, call: Call) -> None:
    """The result is in the format of the input."""
    x = call.input(2, 7, 6)
    check(monkeypatch, kernel, call, x, epilogue="silu", **SAME)
    check(monkeypatch, kernel, call, x.to(**LAST), epilogue="silu", **SAME, **LAST)
    if kernel != "library_last":
        check(monkeypatch, kernel, call, x.mT, **SAME)  # in neither
    if kernel in ("implicit", "unpacked"):
        check(monkeypatch, kernel, call, x.to(**LAST), activation="int8", **SAME, **LAST)


@pytest.mark.parametrize("kernel", ["implicit", "library", "library_last", "unpacked"])
def test_volumes_with_channels_last(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    call, last = Call((8, 16, 2, 3, 1), 2, 2), {"memory_format": torch.channels_last_3d}
    check(monkeypatch, kernel, call, call.input(2, 4, 5, 6).to(**last), padding=(1, 0, 1), **last)


@pytest.mark.parametrize(
    ("call", "options"),
    [
        (Call((16, 32, 1, 1), 4, 4), {}),
        (Call((16, 32, 1, 1), 4, 4, torch.bfloat16), {"epilogue": "relu"}),
        (Call((16, 32, 1, 1), 8, 4), {"p_in": 2}),
        (Call((16, 32, 1, 1), 4, 1, replicas=2), {}),
    ],
)
def test_single_positions_are_tokens(monkeypatch: pytest.MonkeyPatch, call: Call, options: dict[str, Any]) -> None:
    """A 1 x 1 convolution of channels that lie side by side is a linear layer on the same memory."""
    calls: list[TensorCall] = []
    prepare = wrapper.prepare_linear
    monkeypatch.setattr(wrapper, "prepare_linear", lambda call: calls.append(call) or prepare(call))
    prepared.forget()
    x = ((call.input(2, 7, 6) * 8).round() / 8).to(**LAST)
    call.check(conv2d, x, **options, **LAST)
    assert [c.input.shape for c in calls] == [(2, 7, 6, x.shape[1])]
    assert calls[0].input.data_ptr() == x.data_ptr()
    call.check(conv2d, x, stride=(2, 2), **options, **LAST)
    call.check(conv2d, x.contiguous(), **options)
    assert len(calls) == 1


def test_offsets_beyond_32_bits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few elements, far apart: strides count as well as sizes. The file behind them is empty but for those."""
    memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=2**31 + 64, dtype=torch.float16)
    x = memory.as_strided((2, 3, 3, 3), (0, 2**30, 3, 1))
    x[0] = (torch.randn(3, 3, 3) * 8).round() / 8
    call = Call((16, 3, 3, 3), 4, 4, torch.float16)
    wide = []
    monkeypatch.setattr(wrapper, "span", lambda *sizes, span=wrapper.span: wide.append(span(*sizes)) or wide[-1])
    for kernel in ("implicit", "library", "unpacked"):
        check(monkeypatch, kernel, call, x, **SAME)
    check(monkeypatch, "implicit", call, x, activation="int8", **SAME)
    assert wide[0] > 2**31


def test_offsets_that_are_checked() -> None:
    assert wrapper.span((3, 3, 3), (2**30, 3, 1), (0, 0)) == 2**31 + 8
    assert wrapper.span((3, 4, 5), (20, 5, 1), (0, 0)) == 59
    assert wrapper.span((3, 4, 5), (20, 5, 1), (1, 2)) == 59 + 2 * 5 + 4


@pytest.mark.parametrize("kernel", ["implicit", "unpacked"])
def test_wide_offsets(monkeypatch: pytest.MonkeyPatch, kernel: str) -> None:
    monkeypatch.setattr(wrapper, "span", lambda *sizes: 2**40)
    call = Call((16, 8, 3, 2), 4, 4)
    options = {"padding": (1, 0), "stride": (2, 1), "dilation": (1, 2)}
    check(monkeypatch, kernel, call, call.input(2, 7, 6), **options)
    check(monkeypatch, kernel, call, call.input(2, 7, 6).to(**LAST), **options, **LAST)
    check(monkeypatch, kernel, Call((8, 4, 2, 3, 1), 2, 2), Call((8, 4, 2, 3, 1), 2, 2).input(2, 4, 5, 6))


def test_what_no_kernel_indexes_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons: list[str] = []
    monkeypatch.setattr(prepared, "decline", reasons.append)
    monkeypatch.setattr(reference, "compute", lambda call: torch.zeros(()))
    call = Call((16, 8, 1, 1), 4, 4)
    call(conv2d, torch.zeros(1).expand(1, 8, 2**16, 2**15))
    call(conv2d, torch.zeros(1).expand(1, 8, 2**15, 2**13), activation="int8")
    monkeypatch.setattr(wrapper, "GROUP_LIMIT", 3)
    Call((16, 2, 1, 1), 2, 2, groups=4)(conv2d, torch.zeros(1, 8, 2, 2))
    expected = ["positions exceeds 32-bit indices", "has to become integers", "4 groups exceed the grid"]
    assert [text in reason for text, reason in zip(expected, reasons, strict=True)] == [True] * 3


def test_float32_in_three_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_wrapper, "compute_capability", lambda device: 100)
    call = Call((16, 8, 3, 3), 4, 4)
    check(monkeypatch, "implicit", call, call.input(2, 7, 6))


def test_the_reference_keeps_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "decline", lambda reason: None)
    call = Call((16, 8, 3, 3), 4, 4)
    assert call(conv2d, call.input(2, 7, 6).double().to(**LAST)).is_contiguous(**LAST)


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
    monkeypatch.setattr(prepared, "decline", reasons.append)
    call = Call((16, 8, 3, 3), 8, 4)
    x = call.input(2, 7, 6)
    got = call(conv2d, x, p_in=2, activation="int8")
    assert torch.equal(got, call(reference.KERNELS["conv2d"], x, p_in=2, activation="int8"))
    x = x.double()
    assert torch.equal(call(conv2d, x, p_in=2), call(reference.KERNELS["conv2d"], x, p_in=2))
    assert ["meet it one by one" in reasons[0], "float64" in reasons[1], len(reasons)] == [True, True, 2]


def test_single_positions_that_no_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A 1 x 1 convolution of float64 channels that lie side by side is left to the reference, in its format."""
    reasons: list[str] = []
    monkeypatch.setattr(prepared, "decline", reasons.append)
    call = Call((16, 32, 1, 1), 4, 4)
    x = call.input(2, 7, 6).double().to(**LAST)
    got = call(conv2d, x)
    assert torch.equal(got, call(reference.KERNELS["conv2d"], x))
    assert got.is_contiguous(**LAST)
    assert "float64" in reasons[0]
