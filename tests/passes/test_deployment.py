from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.compiler import optimize
from tbn_compiler.passes import (
    ExposeLinears,
    FlowReplicas,
    FoldBatchNorm,
    FuseEpilogue,
    FuseUnpack,
    QuantizeActivations,
    RemoveDeadNodes,
    RemoveNoOps,
    deployment_pipeline,
)
from tbn_compiler.passes.deployment import note_values, rank
from tests import oracle
from tests.oracle import both_forms
from tests.passes.deployed import called, epilogues, lowered
from tests.passes.deployed import optimized as optimized_graph


def network() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d()),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 8)),
    )


def test_order_of_the_pipeline() -> None:
    order = [RemoveDeadNodes, RemoveNoOps, ExposeLinears, FuseUnpack, FoldBatchNorm, FlowReplicas, FuseEpilogue]
    assert [type(graph_pass) for graph_pass in deployment_pipeline()] == order
    assert [type(graph_pass) for graph_pass in deployment_pipeline("int8")] == [
        *order[:5],
        QuantizeActivations,
        *order[5:],
    ]


@both_forms
def test_optimise_what_transform_returned(transform: Any) -> None:
    qat = transform(network(), tbn.TilingConfig(p=4, min_size=0))
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
    packed = lowered(model, tbn.transform)
    tbn.save(packed, tmp_path / "model.safetensors")
    loaded = tbn.load(tmp_path / "model.safetensors", network())
    first, second = optimize(packed, x), optimize(loaded, x)
    assert torch.equal(first(x), second(x))
    assert list(first.state_dict()) == list(second.state_dict())
    assert epilogues(first) == ["relu", "relu", "none"]
    assert called(first) == ["max_pool2d", "flatten"]


@both_forms
def test_compiles_without_a_graph_break(transform: Any) -> None:
    x = torch.randn(2, 4, 8, 8)
    optimized = optimized_graph(lowered(network(), transform), x)
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
    note_values(model.part, torch.zeros(2, 3))
    assert {rank(node) for node in model.part.graph.nodes if node.op == "call_module"} == {2}
    note_values(model, torch.zeros(2, 3))
    assert {rank(node) for node in model.part.graph.nodes if node.op == "call_module"} == {None}
