"""Every test starts with empty caches of Dynamo, and can look at what reached Inductor."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.debugging import aot_eager

from tbn_compiler.backends import dynamo


@pytest.fixture(autouse=True)
def _reset(inductor: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    monkeypatch.setattr(dynamo, "_warned", set())
    yield
    torch._dynamo.reset()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that reach Inductor, which then compiles them."""
    return _spy(monkeypatch, dynamo._compile_fx)


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that would reach Inductor: they go through AOTAutograd, as there, and then run in eager mode."""
    return _spy(monkeypatch, lambda gm, inputs, options: aot_eager(gm, inputs))


@pytest.fixture
def unbound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers keep their ``tbn::`` operators, so that what the passes made of them can be read from the graph."""
    module = importlib.import_module("tbn_compiler.backends.dynamo.prepare")  # the package has a function of that name
    monkeypatch.setattr(module, "find_bindings", lambda gm: {})


def _spy(monkeypatch: pytest.MonkeyPatch, compile_fx: Callable[..., Any]) -> list[fx.GraphModule]:
    found: list[fx.GraphModule] = []

    def spy(gm: fx.GraphModule, *arguments: Any) -> Any:
        found.append(gm)
        return compile_fx(gm, *arguments)

    monkeypatch.setattr(dynamo, "_compile_fx", spy)
    return found
