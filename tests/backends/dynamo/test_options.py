"""``mode`` and ``options`` of ``torch.compile``."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import fx, nn

import tbn_compiler as tbn
from tbn_compiler.backends import dynamo
from tbn_compiler.backends.dynamo import compile_graph
from tbn_compiler.backends.dynamo.options import Options, parse_options
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.records import graph_parts
from tests import oracle


def module() -> fx.GraphModule:
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    return tbn.transform(model, tbn.TilingConfig(p=4, min_size=0)).eval()


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The options that reach Inductor; the graph then runs in eager mode."""
    found: list[Options] = []

    def compile_fx(gm: fx.GraphModule, inputs: Any, options: Options) -> Any:
        found.append(options)
        return gm.forward

    monkeypatch.setattr(dynamo, "_compile_fx", compile_fx)
    return found


def test_modes_and_settings_reach_inductor(settings: list[Options]) -> None:
    qat, x = module(), torch.randn(3, 16)
    for options, expected in (
        ({}, {}),
        ({"mode": "default"}, {}),
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        ({"options": {"max_autotune": True, "activation": "int8"}}, {"max_autotune": True}),
        ({"options": {"epilogue-fusion": False}}, {"epilogue_fusion": False}),
    ):
        torch._dynamo.reset()
        settings.clear()
        with torch.no_grad():
            torch.compile(qat, backend=compile_graph, **options)(x)  # type: ignore[call-overload]
        (found,) = settings
        assert found.inductor == expected


def test_settings_change_what_inductor_does() -> None:
    """A setting of which the effect shows: Inductor raises for its own test switch."""
    fast = torch.compile(module(), backend=compile_graph, options={"_raise_error_for_testing": True})
    with torch.no_grad(), pytest.raises(Exception, match=r"_raise_error_for_testing|AssertionError"):
        fast(torch.randn(3, 16))


@pytest.mark.parametrize(
    ("mode", "options", "message"),
    [
        ("fast", None, "mode='fast' is not one of 'default', .*'reduce-overhead'"),
        (None, {"activations": "int8"}, "option 'activations' is neither 'activation' nor .* close to it: activation"),
        (None, {"activation": "int4"}, "activation='int4' is not one of 'float', 'int8'"),
        (None, {"activation": "binary"}, "activation='binary' is not one of"),
    ],
)
def test_errors(mode: str | None, options: dict[str, Any] | None, message: str) -> None:
    with pytest.raises(tbn.ConfigError, match=message):
        parse_options(mode, options)
    given = {key: value for key, value in (("mode", mode), ("options", options)) if value is not None}
    with torch.no_grad(), pytest.raises(Exception, match=message):
        torch.compile(module(), backend=compile_graph, **given)(torch.randn(3, 16))


def test_int8_activations(unbound: None, eager_graphs: list[fx.GraphModule]) -> None:
    qat, x = module(), torch.randn(5, 16)
    with torch.no_grad():
        result = torch.compile(qat, backend=compile_graph, options={"activation": "int8"})(x)
        usual = torch.compile(qat, backend=compile_graph)(x)
        expected = qat(x)
    calls = [[call for node in gm.graph.nodes if (call := tiled_call(node))] for gm in eager_graphs]
    assert [[call.arguments["activation"] for call in graph] for graph in calls] == [["int8"] * 2, ["float"] * 2]
    oracle.assert_close(usual, expected, rtol=1e-5)
    difference = float((result - expected).abs().max() / expected.abs().max())
    assert 1e-5 < difference < 0.02
    # The operators themselves, one after the other.
    packed = tbn.lower(qat)
    for _, part in graph_parts(packed):
        for node in part.graph.nodes:
            if call := tiled_call(node):
                call.update(activation="int8")
        part.recompile()
    with torch.no_grad():
        oracle.assert_close(result, packed(x), rtol=1e-5)


def test_int8_is_not_dropped_without_a_word(eager_graphs: list[fx.GraphModule]) -> None:
    qat, x = module(), torch.randn(5, 16)
    fast = torch.compile(qat, backend=compile_graph, options={"activation": "int8"})
    with pytest.warns(UserWarning, match="activation='int8' is for inference, and is not applied"):
        fast(x).sum().backward()
    (report,) = tbn.explain(fast).graphs
    assert any("is not applied" in note for note in report.notes)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        fast(x)
