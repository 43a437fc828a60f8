"""The models that nobody here wrote, and those that stand for architectures, lowered before or while compiling."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import fx, nn

import tbn_compiler as tbn
from tbn_compiler.backends.dynamo import compile_graph
from tbn_compiler.graph.layers import layer_calls
from tests.models.test_models import Case
from tests.models.zoo import EXAMPLES

# Inductor takes 3 to 20 seconds for a model: these cover convolutions, transpose and grouped ones, attention and gates.
INDUCTOR = ("torch-encoder", "resnet", "unet", "mobilenet", "causal-conv1d", "mixer")


def check(case: Case, model: nn.Module, graphs: list[fx.GraphModule]) -> None:
    expected = case.evaluate(model)
    compiled = torch.compile(model, backend=compile_graph)
    torch.testing.assert_close(case.evaluate(compiled), expected, rtol=0, atol=5e-6 * float(expected.abs().max()))
    reports = tbn.explain(compiled).graphs
    assert len(reports) == len(graphs)
    assert {report.form for report in reports} <= {"inference"}
    layers = [layer for report in reports for layer in report.layers]
    assert {layer.name for layer in layers if not layer.lowered} == set()
    if len(reports) == 1:  # else the graphs break between layers, and one may serve several of them
        assert len({layer.name for layer in layers}) == case.example.tiled
    count = len(graphs)
    case.evaluate(compiled)
    assert len(graphs) == count


@pytest.fixture
def quiet() -> None:
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # graph breaks of models are theirs


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", EXAMPLES)
def test_models(name: str, eager_graphs: list[fx.GraphModule]) -> None:
    """The large ones in training form only, which is packed while it is compiled."""
    case = Case(EXAMPLES[name])
    if not name.startswith("hf-") or name == "hf-llama":
        check(case, case.packed.eval(), eager_graphs)
        eager_graphs.clear()
    check(case, case.qat.eval(), eager_graphs)
    for gm in eager_graphs:
        assert not [call for call in layer_calls(gm) if call.form == "tiled"]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", INDUCTOR)
def test_models_under_inductor(name: str, graphs: list[fx.GraphModule]) -> None:
    case = Case(EXAMPLES[name])
    check(case, case.qat.eval(), graphs)
