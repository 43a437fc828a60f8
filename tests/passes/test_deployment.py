from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.compiler import optimize
from tbn_compiler.passes import FlowReplicas, FoldBatchNorm, RemoveNoOps, deployment_pipeline
from tbn_compiler.passes.deployment import propagate_ranks, rank
from tests import oracle
from tests.passes.deployed import lowered, modules_called


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 8)),
    )


def test_order_of_the_pipeline() -> None:
    assert [type(graph_pass) for graph_pass in deployment_pipeline()] == [RemoveNoOps, FoldBatchNorm, FlowReplicas]


def test_optimise_what_transform_returned() -> None:
    qat = tbn.transform(network(), tbn.TilingConfig(p=4, min_size=0))
    x = torch.randn(2, 4, 8, 8)
    optimized = optimize(qat, x)
    assert not optimized.training
    assert qat.training
    oracle.assert_close(optimized(x), qat.eval()(x), rtol=1e-5)
    with pytest.raises(tbn.LoweringError, match=r"not made by tbn_compiler\.transform"):
        optimize(network())


def test_optimise_after_load(tmp_path: Path) -> None:
    """Files hold the lowered form; optimising comes after loading, with the same result."""
    model, x = network(), torch.randn(2, 4, 8, 8)
    packed = lowered(model)
    tbn.save(packed, tmp_path / "model.safetensors")
    loaded = tbn.load(tmp_path / "model.safetensors", network())
    first, second = optimize(packed, x), optimize(loaded, x)
    assert torch.equal(first(x), second(x))
    assert list(first.state_dict()) == list(second.state_dict())
    assert modules_called(first) == ["ReLU", "ReLU", "MaxPool2d", "Flatten"]


def test_compiles_without_a_graph_break() -> None:
    x = torch.randn(2, 4, 8, 8)
    optimized = optimize(lowered(network()), x)
    compiled = torch.compile(optimized, fullgraph=True, backend="aot_eager")
    oracle.assert_close(compiled(x), optimized(x), rtol=1e-5)


def test_rank_of_a_value_with_several() -> None:
    """A part that is called with matrices and with cubes has no one rank."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = fx.symbolic_trace(nn.Sequential(nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) + self.part(x[None]).sum(0)

    model = Twice()
    propagate_ranks(model.part, torch.zeros(2, 3))
    assert {rank(node) for node in model.part.graph.nodes if node.op == "call_module"} == {2}
    propagate_ranks(model, torch.zeros(2, 3))
    assert {rank(node) for node in model.part.graph.nodes if node.op == "call_module"} == {None}
