"""Graph modules with equal nodes share their code; every other one has its own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import tbn_compiler as tbn
from tbn_compiler.graph import layer_graph
from tbn_compiler.graph.layer_graph import TiledGraph, adopt


def one_call(
    function: Any, *arguments: Any, options: dict[str, Any] | None = None, name: str | None = None
) -> TiledGraph:
    """A module that calls ``function(x, *arguments, **options)``."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.create_node("call_function", function, (x, *arguments), options or {}, name))
    gm: TiledGraph = adopt(nn.Module(), graph, name="Case")
    return gm


def by(factor: float) -> Callable[[Tensor], Tensor]:
    def scaled(x: Tensor) -> Tensor:
        return factor * x

    return scaled


def kind(x: Tensor, value: Any = None, **options: Any) -> str:
    return repr((type(value).__name__.removeprefix("immutable_"), value, options))


TWO = by(2.0)
# Each is a case of its own, next to others that are nearly or by Python's rules the same.
CASES: dict[str, Callable[[], TiledGraph]] = {
    "int": lambda: one_call(kind, 1),
    "bool": lambda: one_call(kind, True),
    "float": lambda: one_call(kind, 1.0),
    "zero": lambda: one_call(kind, 0.0),
    "negative zero": lambda: one_call(kind, -0.0),
    "nothing": lambda: one_call(kind),
    "none": lambda: one_call(kind, None),
    "text": lambda: one_call(kind, "1"),
    "tuple": lambda: one_call(kind, (1, 2)),
    "list": lambda: one_call(kind, [1, 2]),
    "nested": lambda: one_call(kind, [(1,), 2]),
    "nested deeper": lambda: one_call(kind, [(1, 2)]),
    "dictionary": lambda: one_call(kind, {"a": 1}),
    "other key": lambda: one_call(kind, {"b": 1}),
    "keyword": lambda: one_call(kind, options={"value": 2}),
    "other keyword": lambda: one_call(kind, options={"a": 2}),
    "dtype": lambda: one_call(kind, torch.float16),
    "other dtype": lambda: one_call(kind, torch.bfloat16),
    "device": lambda: one_call(kind, torch.device("meta")),
    "closure": lambda: one_call(TWO),
    "same function, other closure": lambda: one_call(by(3.0)),
    "operator": lambda: one_call(torch.ops.aten.relu.default),
    "other operator": lambda: one_call(torch.ops.aten.tanh.default),
    "function": lambda: one_call(F.silu),
    "other function": lambda: one_call(F.gelu),
    "name": lambda: one_call(kind, 1, name="given"),
}


def test_every_case_does_what_it_says() -> None:
    modules, x = {name: build() for name, build in CASES.items()}, torch.tensor([-1.0, 2.0])
    for name, gm in modules.items():
        assert gm.code == fx.GraphModule(gm, gm.graph, "Case").code, name
        (node,) = (node for node in gm.graph.nodes if node.op == "call_function")
        expected = node.target(x, *node.args[1:], **node.kwargs)
        result = gm(x)
        assert torch.equal(result, expected) if isinstance(expected, Tensor) else result == expected, name
    codes = [(gm.code, tuple(node.target for node in gm.graph.nodes)) for gm in modules.values()]
    for gm, code in zip(modules.values(), codes, strict=True):
        twins = [other for other, its in zip(modules.values(), codes, strict=True) if its == code]
        assert [other for other in modules.values() if type(other) is type(gm)] == twins


@pytest.mark.parametrize("name", [name for name in CASES if name != "same function, other closure"])
def test_equal_nodes_share_a_class_and_write_no_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = CASES[name]()

    def refuse(self: Any, *arguments: Any, **options: Any) -> Any:
        raise AssertionError("code is written again")

    monkeypatch.setattr(fx.Graph, "python_code", refuse)
    second = CASES[name]()
    assert type(first) is type(second)
    assert second.code == first.code
    assert second.recompile().src == first.code
    assert second.graph.owning_module is second


def test_names_that_stand_for_other_nodes() -> None:
    """Names are unique in a graph unless somebody sets them; the code numbers them then."""

    def build(number: int) -> TiledGraph:
        graph = fx.Graph()
        x = graph.placeholder("x")
        nodes = [graph.call_function(torch.add, (x, i)) for i in range(2)]
        for node in nodes:
            node._rename("same")
            node.name = "same"
        graph.output(nodes[number])
        gm: TiledGraph = adopt(nn.Module(), graph, name="Case")
        return gm

    first, second, x = build(0), build(1), torch.zeros(2)
    assert torch.equal(first(x), x)
    assert torch.equal(second(x), x + 1)


def annotated(gm: TiledGraph) -> None:
    next(iter(gm.graph.nodes)).type = Tensor


def with_metadata(gm: TiledGraph) -> None:
    ShapeProp(gm).propagate(torch.ones(2))


def transformed(gm: TiledGraph) -> None:
    gm.graph.on_generate_code(lambda _: lambda body: ["assert True\n", *body])


def unknown(gm: TiledGraph) -> None:
    """A value of which the code is not looked into."""
    node = gm.graph.find_nodes(op="call_function", target=F.silu)[0]
    node.target, node.args = kind, (node.args[0], slice(1, 2))


@pytest.mark.parametrize("change", [annotated, with_metadata, transformed, unknown])
def test_what_is_not_known_is_written_anew(change: Callable[[TiledGraph], None]) -> None:
    gm, other = one_call(F.silu), one_call(F.silu)
    assert type(gm) is type(other)
    before = gm.code
    change(gm)
    gm.recompile()
    assert gm.code == gm.graph.python_code("self").src
    assert other.code == before
    assert layer_graph._nodes(gm.graph) is None
    assert layer_graph._nodes(other.graph) is not None


def test_graph_modules_inside_are_compiled_with_the_outer_one() -> None:
    inner = one_call(F.silu)
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    gm = adopt(nn.ModuleDict({"inner": inner}), graph)
    node = inner.graph.find_nodes(op="call_function", target=F.silu)[0]
    node.target = F.gelu
    gm.recompile()
    x = torch.randn(3)
    assert torch.equal(gm(x), F.gelu(x))


def test_classes_are_not_kept_alive() -> None:
    def build() -> weakref.ref[Any]:
        model = nn.Linear(4, 4)
        gm = one_call(lambda x: model(x))
        model.holder = gm
        gm(torch.ones(4))
        return weakref.ref(model)

    gc.collect()
    before = len(layer_graph._classes_by_nodes)
    reference = build()
    qat = tbn.transform(nn.Sequential(nn.Linear(24, 8)), tbn.TilingConfig(p=2, min_size=0))
    assert len(layer_graph._classes_by_nodes) > before
    del qat
    gc.collect()
    assert reference() is None
    assert len(layer_graph._classes_by_nodes) <= before
