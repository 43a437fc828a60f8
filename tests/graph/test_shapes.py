from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.errors import TBNError
from tbn_compiler.graph.records import graph_parts
from tbn_compiler.graph.shapes import visit_results
from tests import oracle


class Parts(nn.Module):
    """Two chains of layers around code of its own; the head is called on two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 8, bias=False))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Flatten(), nn.Linear(8, 8))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.body(x if scale is None else x * scale)
        return self.head(x) + self.head(x[:, :, None].transpose(1, 2))


def shapes(module: nn.Module, inputs: Any) -> list[tuple[str, list[int]]]:
    found: list[tuple[str, list[int]]] = []

    def visit(node: fx.Node, result: Any) -> None:
        if node.op == "call_module":
            found.append((str(node.target), list(result.shape)))

    visit_results(module, inputs, visit)
    return found


def test_every_result_is_visited_in_order() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)))
    expected = [("0", [3, 6]), ("1", [3, 6]), ("2", [3, 2])]
    assert shapes(gm, torch.zeros(3, 4)) == shapes(gm, (torch.zeros(3, 4),)) == expected
    assert "forward" not in gm.__dict__


def test_layers_of_a_model() -> None:
    """Each is a graph, visited as often as it is called; an example may leave out what has a default."""
    packed = tbn.lower(tbn.transform(Parts(), tbn.TilingConfig(p=4, min_size=0)))
    parts = graph_parts(packed)
    assert {path for path, _ in parts} == {"body.0", "body.2", "head.0", "head.2"}
    named = {"scale": torch.zeros(16), "x": torch.zeros(3, 16)}
    graphs = {part.graph: path for path, part in parts}
    for inputs in (torch.zeros(3, 16), (torch.zeros(3, 16), torch.zeros(16)), named):
        found: list[tuple[str, list[int]]] = []

        def visit(node: fx.Node, result: Any, found: Any = found) -> None:
            if node.op == "output":
                found.append((graphs[node.graph], list(result.shape)))

        visit_results(packed, inputs, visit)
        head = [("head.0", [3, 8]), ("head.2", [3, 8])]
        assert found == [("body.0", [3, 16]), ("body.2", [3, 8]), *head, ("head.0", [3, 1, 8]), ("head.2", [3, 8])]
    rows = {row.name: row.macs_tiled for row in tbn.summary(packed, torch.zeros(3, 16)).layers}
    # The head runs twice.
    assert rows == {"body.0": 3 * 4 * 16, "body.2": 3 * 2 * 16, "head.0": 6 * 2 * 8, "head.2": 6 * 2 * 8}
    assert not any("forward" in part.__dict__ for _, part in parts)


def test_layers_of_a_model_are_optimised_together() -> None:
    packed = tbn.lower(tbn.transform(Parts(), tbn.TilingConfig(p=4, min_size=0)))
    x = torch.randn(3, 16)
    optimized, scaled = tbn.optimize(packed, x), tbn.optimize(packed, (x, x))
    oracle.assert_close(optimized(x), packed(x), rtol=1e-5)
    oracle.assert_close(scaled(x, x), packed(x, x), rtol=1e-5)
    rows = {row.name: row for row in tbn.summary(optimized, x).layers}
    assert rows["body.2"].macs_tiled == 3 * 2 * 4
    assert "slice.Tensor (node 'slice_1') is not known to keep them" in rows["body.2"].note
    assert "it has a bias" in rows["head.0"].note
    apart = {row.name: row for row in tbn.summary(tbn.optimize(packed), x).layers}
    assert apart["body.2"].macs_tiled == 3 * 2 * 16
    assert "its result is an output" in apart["body.2"].note


def test_nothing_is_computed() -> None:
    """Running statistics stay, also those of modules in training mode, and a model of 4 TB is no problem."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    gm = fx.symbolic_trace(model.train())
    before = copy.deepcopy(gm.state_dict())
    shapes(gm, torch.randn(2, 3, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in gm.state_dict().items())
    with torch.device("meta"):
        large = nn.Sequential(nn.Linear(10**6, 10**6))
    assert shapes(fx.symbolic_trace(large), torch.zeros(1, 10**6, device="meta")) == [("0", [1, 10**6])]


@pytest.mark.filterwarnings("ignore")
def test_error_names_the_shapes() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 6)))
    with pytest.raises(TBNError, match=r"Sequential does not run on example inputs of shapes \(\[3, 5\],\)"):
        shapes(gm, torch.zeros(3, 5))
    assert "forward" not in gm.__dict__
