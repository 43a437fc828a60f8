from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import tbn_compiler as tbn
from tbn_compiler.passes import DropAbsentTensors, inference_pipeline
from tests import oracle

CONFIG = tbn.TilingConfig(p=4, min_size=0)


def traced() -> tuple[fx.GraphModule, list[nn.Module]]:
    """A model as a graph of functions on its parameters."""
    qat = oracle.whole_graph(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)), CONFIG)
    return qat, [qat.get_submodule(name) for name in ("0", "2")]


def reads(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.find_nodes(op="get_attr")]


def test_it_comes_first() -> None:
    assert isinstance(inference_pipeline()[0], DropAbsentTensors)


def test_an_absent_bias_is_not_read() -> None:
    gm, (_, last) = traced()
    last.bias = None  # type: ignore[assignment]
    assert "2.bias" in reads(gm)
    assert DropAbsentTensors()(gm).modified
    assert [name for name in reads(gm) if name.endswith("bias")] == ["0.bias"]
    (call,) = [node for node in gm.graph.nodes if node.name == "train_linear_default_1"]
    assert None in (*call.args, *call.kwargs.values())
    assert not DropAbsentTensors()(gm).modified
    x = torch.randn(3, 16)
    oracle.assert_close(tbn.lower(gm)(x), gm.eval()(x), 2e-6)


def test_what_is_there_is_left_alone() -> None:
    gm, _ = traced()
    before = gm.code
    assert not DropAbsentTensors()(gm).modified
    assert gm.code == before


@pytest.mark.parametrize("nested", [False, True])
def test_arguments_by_name_and_in_lists(nested: bool) -> None:
    graph = fx.Graph()
    x, offset = graph.placeholder("x"), graph.get_attr("offset")
    arguments: tuple[Any, dict[str, Any]] = ((x, [offset, {"a": offset}]), {}) if nested else ((x,), {"offset": offset})
    graph.output(graph.call_function(record, *arguments))
    gm = fx.GraphModule({"offset": torch.ones(2)}, graph)
    gm.offset = None
    assert DropAbsentTensors()(gm).modified
    assert reads(gm) == []
    assert gm(3) == ((3, [None, {"a": None}]) if nested else (3, {"offset": None}))


def record(*args: Any, **kwargs: Any) -> Any:
    return (*args, kwargs) if kwargs else args
