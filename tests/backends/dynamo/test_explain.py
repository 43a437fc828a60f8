"""``tbn_compiler.explain`` and the log say what was done, and why the rest was not."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

import tbn_compiler as tbn
from tbn_compiler.backends.dynamo import Explanation, GraphReport, LayerReport, compile_graph
from tests import oracle

CONFIG = tbn.TilingConfig(p=4, min_size=0)


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend=compile_graph)


def test_report(unbound: None, eager_graphs: list[fx.GraphModule], caplog: pytest.LogCaptureFixture) -> None:
    convs = (nn.Conv2d(4, 8, 3, bias=False), nn.ConvTranspose2d(8, 8, 2, bias=False))
    model = nn.Sequential(convs[0], nn.BatchNorm2d(8), nn.SiLU(), convs[1], nn.BatchNorm2d(8), nn.Flatten())
    qat = tbn.transform(model, CONFIG).eval()
    fast = compiled(qat)
    assert str(tbn.explain(fast)) == "nothing was compiled with backend='tbn' yet: call the module once"
    with torch.no_grad(), caplog.at_level(logging.INFO, "tbn_compiler.backends.dynamo"):
        oracle.assert_close(fast(torch.randn(2, 4, 6, 6)), fast(torch.randn(2, 4, 6, 6)) * 0 + 1, rtol=1e9)
    text = "\n".join(
        [
            "inference: 2 of 2 tiled layers on packed tiles",
            "  0 (conv2d): on a packed tile, packed here, batch-norm folded, epilogue silu",
            "  3 (conv_transpose2d): on a packed tile, packed here",
            "  but for 0: its copies are not carried on: it has a bias",
            "  but for 3: batch_norm (node 'input_3') is not folded: "
            "the alphas of a transpose convolution belong to its inputs, not to its outputs",
        ]
    )
    total = "total: 1 graph, 2 of 2 tiled layers on packed tiles, 2 reasons"
    assert str(tbn.explain(fast)) == f"graph 0, {text}\n{total}"
    assert json.loads(json.dumps(tbn.explain(fast).to_dict()))["totals"] == tbn.explain(fast).totals
    assert [record.message for record in caplog.records if record.name.startswith("tbn_compiler")] == [text]


def test_equal_reasons_are_said_once() -> None:
    layers = [LayerReport(name, "linear", True, declined=("it has a bias",)) for name in ("up", "down")]
    layers.append(LayerReport("head", "linear", False, declined=("another reason", "it has a bias")))
    explanation = Explanation((GraphReport("inference", tuple(layers)), GraphReport("inference", tuple(layers[:1]))))
    lines = str(explanation).splitlines()
    assert lines[4:6] == ["  but for 3 layers (up, down, head): it has a bias", "  but for head: another reason"]
    assert lines[6] == "graph 1, inference: 1 of 1 tiled layer on packed tiles"
    assert lines[-1] == "total: 2 graphs, 3 of 4 tiled layers on packed tiles, 2 reasons"


class Checkpointed(nn.Module):
    """Calls a layer inside a higher-order operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (tbn.transform(nn.Sequential(nn.Linear(16, 16)), CONFIG) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(checkpoint(self.first, x, use_reentrant=False))
        return result


def test_layers_inside_a_higher_order_operator(eager_graphs: list[fx.GraphModule]) -> None:
    """They stay in training form, alone, and still compute the same."""
    model = Checkpointed().eval()
    fast = compiled(model)
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    (report,) = tbn.explain(fast).graphs
    assert sorted(layer.lowered for layer in report.layers) == [False, True]
    (left,) = (layer for layer in report.layers if not layer.lowered)
    assert "is not rewritten" in left.declined[0]


class Reader(nn.Module):
    """Reads the weight that one of its layers uses."""

    def __init__(self, other: bool) -> None:
        super().__init__()
        self.other = other
        self.weight, self.alpha_source = (nn.Parameter(torch.randn(16, 16)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        bits = torch.ops.tbn.tile(self.weight, 4)
        used = torch.ops.tbn.scale(bits, self.alpha_source, 4)
        return F.linear(x, used) + (used.sum() if self.other else self.weight.sum())


@pytest.mark.parametrize("other", [False, True])
def test_layers_with_another_reader(other: bool, eager_graphs: list[fx.GraphModule]) -> None:
    model = Reader(other)
    fast = compiled(model)
    x = torch.randn(3, 16)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x))
    (report,) = tbn.explain(fast).graphs
    (layer,) = report.layers
    assert not layer.lowered
    expected = "which lowering removes" if other else "is not a parameter that only tiled layers read"
    assert expected in layer.declined[0]


def test_gradients(eager_graphs: list[fx.GraphModule]) -> None:
    qat = tbn.transform(nn.Sequential(nn.Linear(16, 16)), CONFIG)
    fast = compiled(qat)
    fast(torch.randn(3, 16)).sum().backward()
    (report,) = tbn.explain(fast).graphs
    assert report.form == "gradients"
    assert "call it under torch.no_grad()" in str(report)


def test_only_modules() -> None:
    with pytest.raises(tbn.TBNError, match=r"expected a compiled nn\.Module, got function"):
        tbn.explain(lambda x: x)  # type: ignore[arg-type]
