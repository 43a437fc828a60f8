"""Calls that repeat the launches of earlier ones, in the interpreter, with what stands in for compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from tbn_compiler.backends.triton import conv, linear, prepared, replay, search, tuning
from tests.backends.triton.calls import Call

pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered in:RuntimeWarning", "ignore:The given buffer:UserWarning"
)

BF16 = torch.bfloat16
LAST = torch.channels_last


class Compiled:
    """A kernel compiled for the types of its first arguments: it takes addresses for tensors, as on a GPU."""

    launch_metadata = None

    def __init__(self, kernel: Any, args: tuple[Any, ...]) -> None:
        self.kernel = kernel
        self.forms = {
            at: (value.dtype, value.untyped_storage().nbytes() // value.itemsize - value.storage_offset())
            for at, value in enumerate(args)
            if isinstance(value, Tensor)
        }

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any) -> None:
            values = [self.tensor(at, value) if at in self.forms else value for at, value in enumerate(args)]
            LAUNCH(self.kernel, grid)(**dict(zip(self.kernel.arg_names, values, strict=True)))
            LAUNCHED.append(type(args[0]))

        return run

    def tensor(self, at: int, value: Any) -> Any:
        """The tensor at an address."""
        if isinstance(value, Tensor):
            return value
        assert value % 16 == 0
        dtype, size = self.forms[at]
        memory = (ctypes.c_char * (size * dtype.itemsize)).from_address(value)
        return torch.frombuffer(memory, dtype=dtype)


LAUNCH = InterpretedFunction.__getitem__
LAUNCHED: list[type] = []


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def compile_first(self: Any, grid: Any) -> Any:
        def run(*args: Any, **constants: Any) -> Compiled:
            LAUNCH(self, grid)(*args, **constants)
            return Compiled(self, args)

        return run

    monkeypatch.setattr(InterpretedFunction, "__getitem__", compile_first)
    monkeypatch.setattr(tuning, "settled", lambda *_: True)
    prepared.forget()
    LAUNCHED.clear()
    yield
    prepared.forget()


def choose(monkeypatch: pytest.MonkeyPatch, kernel: str, split_k: int | None = None) -> None:
    def first(device: Any, key: Any, candidates: Any, launch: Any) -> Any:
        return next(c for c in candidates if c.kernel == kernel and split_k in (None, c.split_k))

    monkeypatch.setattr(tuning, "choose", first)


def check(call: Call, x: Tensor, *, replayed: bool, **options: Any) -> None:
    """Four calls with other tensors each: the last one repeats, and gives what it gives alone."""
    function = linear.linear if len(call.shape) == 2 else conv.conv2d
    first, *_, last = (call(function, (x * number).to(x.dtype), **options) for number in range(1, 5))
    assert (int in LAUNCHED) == replayed, LAUNCHED
    prepared.forget()
    alone = call(function, (x * 4).to(x.dtype), **options)
    assert torch.equal(last, alone)
    assert last.stride() == alone.stride()
    assert not torch.equal(first, last)


@pytest.mark.parametrize(
    ("kernel", "call", "tokens", "options"),
    [
        ("sum", Call((64, 96), 4, 4), 3, {"epilogue": "relu"}),
        ("sum", Call((64, 104), 4, 1, bias=False), 1, {}),
        ("left", Call((64, 96), 4, 4, BF16), 17, {}),
        ("dot", Call((16, 40), 4, 4), 17, {"shift": 5}),
        ("dot", Call((64, 96), 4, 4), 9, {"activation": "int8"}),
        ("dot", Call((64, 96), 4, 4, replicas=2), 9, {}),
        ("sum", Call((64, 96), 4, 4), 3, {"hadamard": True}),
    ],
    ids=str,
)
def test_linear(monkeypatch: pytest.MonkeyPatch, kernel: str, call: Call, tokens: int, options: dict[str, Any]) -> None:
    choose(monkeypatch, kernel)
    check(call, call.input(tokens), replayed=True, **options)


def test_signs_are_packed_and_met(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call((64, 96), 4, 4)
    x = call.input(3)
    results = [call(linear.linear, x.roll(number, 1), activation="binary") for number in range(4)]
    assert int in LAUNCHED
    prepared.forget()
    assert torch.equal(results[3], call(linear.linear, x.roll(3, 1), activation="binary"))


def test_programs_that_share_columns_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call((64, 2048), 4, 4, BF16)
    split = next(
        (c.kernel, c.split_k)
        for c in search.linear_candidates(plan_of(call), 16, BF16, search.Gpu(), "none", aligned=True)
        if c.split_k > 1
    )
    choose(monkeypatch, *split)
    check(call, call.input(16), replayed=True)


def plan_of(call: Call) -> Any:
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        original = linear.plan_call
        patch.setattr(linear, "plan_call", lambda bound: found.append(original(bound)) or found[-1])
        call(linear.linear, call.input(1))
    prepared.forget()
    return found[0]


@pytest.mark.parametrize(
    ("kernel", "call", "memory_format", "options", "replayed"),
    [
        ("implicit", Call((16, 8, 3, 3), 4, 4), torch.contiguous_format, {"padding": (1, 1)}, True),
        ("unpacked", Call((16, 16, 3, 3), 4, 4, BF16), LAST, {"padding": (1, 1)}, True),
        ("unpacked", Call((16, 16, 3, 3), 4, 4, BF16), LAST, {"padding": (1, 1), "activation": "int8"}, True),
        ("library", Call((16, 8, 3, 3), 4, 4), LAST, {"padding": (1, 1)}, False),  # PyTorch convolves
        ("unpacked", Call((16, 16, 3, 3), 4, 4, BF16), torch.contiguous_format, {}, False),  # and copies here
        ("sum", Call((16, 32, 1, 1), 4, 4), LAST, {}, True),
    ],
    ids=str,
)
def test_conv(
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    call: Call,
    memory_format: torch.memory_format,
    options: dict[str, Any],
    replayed: bool,
) -> None:
    choose(monkeypatch, kernel)
    x = call.input(2, 5, 4) if kernel != "sum" else call.input(2, 2, 2)
    check(call, x.to(memory_format=memory_format), replayed=replayed, **options)


def test_one_tensor_in_two_places_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call whose scales are its bias does not say which of both an argument is."""
    choose(monkeypatch, "sum")
    x, both = torch.randn(2, 32), torch.rand(4)
    tile = torch.randint(0, 256, (4,), dtype=torch.uint8)

    def run(alpha: Tensor, bias: Tensor) -> Tensor:
        return linear.linear(x, tile, alpha, bias, 32, 4, 4)

    for _ in range(3):
        run(both, both)
    assert int not in LAUNCHED
    other = torch.rand(4)
    expected = run(both, other)
    prepared.forget()
    assert torch.equal(run(both, other), expected)


def test_what_was_not_noted_is_not_repeated() -> None:
    x, out = torch.zeros(4), torch.zeros(4)
    for spoil in (
        lambda notes: notes.stop(),
        lambda notes: notes.launch(Compiled(None, ()), (1, 1, 1), (x, out, torch.ones(4)), ()),
        lambda notes: notes.launch(Compiled(None, ()), (1, 1, 1), (x, out, object()), ()),
    ):
        notes = replay.Notes([x, None], out)
        notes.launch(Compiled(None, ()), (1, 1, 1), (x, None, out, 3), (True,))
        assert notes.replay() is not None
        spoil(notes)
        assert notes.replay() is None
    assert replay.Notes([x], out).replay() is None
    notes = replay.Notes([x], out)
    notes.launch(Compiled(None, ()), (1, 1, 1), (x, 3), ())  # something else has written the result
    assert notes.replay() is None
