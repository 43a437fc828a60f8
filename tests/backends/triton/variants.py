"""Running a call of a tiled layer in every configuration that may be chosen for it, against float64.

:class:`Chosen` takes the place of the tuner, and looks into no configuration. The tests on a GPU compare their results
here; a few of the same run in Triton's interpreter, so that this file is tested without one.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from tbn_compiler.backends.triton import prepared, tuning
from tbn_compiler.ops import reference
from tests.backends.triton.calls import Call

PACKAGE = "tbn_compiler.backends.triton"

# Norm of the error over the norm of the result. One value of an int8 input that is rounded the other way is more than
# the first.
LIMIT = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}

KEPT = "a prepared launch was kept, and the choice not asked for: forget() has to drop it"
REFUSALS = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)


@dataclass
class Chosen:
    """Chooses the candidate of a number.

    Attributes:
        number: which one, counted from 0 for the one that is used unmeasured.
        candidates: those of the last choice; empty before the first.
        calls: choices made.
    """

    number: int = 0
    candidates: Sequence[Any] = field(default_factory=list)
    calls: int = 0

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Choose in the tuner's place, wherever its function was imported to."""
        original = tuning.choose
        signature = inspect.signature(original)

        def choose(*args: Any, **named: Any) -> Any:
            self.candidates = list(signature.bind(*args, **named).arguments["candidates"])
            self.calls += 1
            return self.candidates[min(self.number, len(self.candidates) - 1)]

        with pytest.MonkeyPatch.context() as patch:
            for name, module in list(sys.modules.items()):
                if name.startswith(PACKAGE) and vars(module).get("choose") is original:
                    patch.setattr(module, "choose", choose)
            patch.setattr(tuning, "settled", lambda *_: True)
            try:
                yield
            finally:
                prepared.forget()


def operator(call: Call, device: torch.device) -> Callable[..., Tensor]:
    """The operator of a call: as it is dispatched on a GPU; in the interpreter, by name."""
    name = "linear" if len(call.shape) == 2 else f"conv{len(call.shape) - 2}d"
    space = torch.ops.tbn if device.type == "cuda" else importlib.import_module(f"{PACKAGE}.{name.rstrip('123d')}")
    found: Callable[..., Tensor] = getattr(space, name)
    return found


def on_device(values: Sequence[Any], device: torch.device) -> list[Any]:
    """New copies of the tensors among the arguments, as of a layer that was just loaded."""
    return [value.to(device, copy=True) if isinstance(value, Tensor) else value for value in values]


def operands(
    call: Call, x: Tensor, options: dict[str, Any], *, exact: bool = False
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments that a call gives its operator, on the CPU."""
    found: list[tuple[list[Any], dict[str, Any]]] = []

    def keep(*args: Any, **named: Any) -> Tensor:
        found.append((list(args), named))
        return x

    call(keep, x, exact=exact, **options)
    return found[0]


def views(x: Tensor) -> dict[str, Tensor]:
    """The same values in other places of memory: rows apart and on odd addresses, axes in another order."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    wide[..., 1:-2] = x
    found = {"plain": x, "rows apart": wide[..., 1:-2]}
    if x.dim() == 2:
        found["transposed"] = x.t().contiguous().t()
    elif x.dim() == 4:
        found["channels last"] = x.to(memory_format=torch.channels_last)
    else:
        found["transposed"] = x.transpose(0, 1).contiguous().transpose(0, 1)
    return found


def repeated(
    run: Callable[..., Tensor], x: Tensor, args: Sequence[Any], named: dict[str, Any], device: torch.device
) -> Iterator[Tensor]:
    """Results of equal calls with new operands each, those of the one before being lost; on a GPU as many as repeat."""
    for _ in range(5 if device.type == "cuda" else 1):
        operands = on_device(args, device)
        yield run(x, *operands, **named)
        for value in operands:
            if isinstance(value, Tensor):
                value.zero_()


def check_variants(call: Call, size: tuple[int, ...], options: dict[str, Any], device: torch.device) -> int:
    """Compare all configurations of a call with the reference in float64, the first one on all :func:`views`.

    Returns:
        How many ran.

    Raises:
        AssertionError: a result is wrong, the first configuration is refused, or the choice is not asked for.
    """
    exact = reference.linear if len(call.shape) == 2 else reference.KERNELS[f"conv{len(call.shape) - 2}d"]
    # Eighths: with the scales of calls, int8 inputs that lie halfway between two integers come up.
    x = (call.input(*size) * 8).round() / 8
    # Integers are found on the CPU, whose float32 is what it says.
    at = device if options.get("activation", "float") == "float" else torch.device("cpu")
    args, named = operands(call, x, options, exact=True)
    expected = exact(*on_device(args, at), **named).double().to(device)
    assert expected.isfinite().all()
    run = operator(call, device)
    (_, *args), named = operands(call, x, options)
    x = x.to(device)
    chosen, ran, wrong = Chosen(), 0, []
    while chosen.number < max(len(chosen.candidates), 1):
        for view, values in (views(x) if chosen.number == 0 else {"plain": x}).items():
            prepared.forget()
            calls = chosen.calls
            with chosen.installed():
                try:
                    results = list(repeated(run, values, args, named, device))
                except REFUSALS:
                    assert chosen.number, "the configuration that is used unmeasured is refused"
                    continue
            assert chosen.calls > calls or not chosen.candidates, KEPT
            assert {(got.dtype, got.shape) for got in results} == {(call.dtype, expected.shape)}
            error = max(float((got.double() - expected).norm() / expected.norm()) for got in results)
            if not error <= LIMIT[call.dtype]:
                which = chosen.candidates[chosen.number] if chosen.candidates else "the only configuration"
                wrong.append(f"{which}, input {view}: error {error:.2g}")
            ran += 1
        chosen.number += 1
    assert not wrong, "\n".join(wrong)
    return ran
