"""Copies with Hadamard signs in graphs of Dynamo: they keep their layout when they are lowered on the way."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

import tbn_compiler as tbn
from tbn_compiler.backends.dynamo import compile_graph
from tbn_compiler.graph.calls import tiled_call
from tests import oracle

CONFIG = tbn.TilingConfig(p=4, min_size=0, replicate="hadamard", alpha="tile")


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, groups=2),
        nn.ConvTranspose2d(16, 8, 2, 2),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 12),
    )


@pytest.mark.parametrize("options", [{}, {"latent": "tile"}, {"tile_dtype": "float"}, {"alpha_source": "W"}], ids=str)
@pytest.mark.parametrize("form", ["trained", "lowered"])
def test_layers_keep_their_signs(
    form: str, options: dict[str, str], unbound: None, eager_graphs: list[fx.GraphModule]
) -> None:
    torch.manual_seed(0)
    qat = tbn.transform(network(), CONFIG.replace(**options)).eval()
    module = qat if form == "trained" else tbn.lower(qat)
    x = torch.randn(2, 8, 6, 6)
    compiled = torch.compile(module, backend=compile_graph)
    with torch.no_grad():
        oracle.assert_close(compiled(x), qat(x), 1e-5)
    (gm,) = eager_graphs
    calls = [call for node in gm.graph.nodes if (call := tiled_call(node))]
    assert [call.kind for call in calls] == ["conv2d", "conv2d", "conv_transpose2d", "linear"]
    assert {(call.layout.kind, call.layout.p) for call in calls} == {("hadamard", 4)}
    (report,) = tbn.explain(compiled).graphs
    assert all(layer.lowered for layer in report.layers)


@pytest.mark.parametrize("latent", ["weight", "tile"])
def test_training(latent: str, eager_graphs: list[fx.GraphModule]) -> None:
    torch.manual_seed(0)
    qat = tbn.transform(network(), CONFIG.replace(latent=latent))
    x = torch.randn(2, 8, 6, 6)
    grads = []
    for module in (qat, torch.compile(qat, backend=compile_graph)):
        qat.zero_grad()
        module(x).square().sum().backward()
        grads.append([p.grad.clone() for p in qat.parameters() if p.grad is not None])
    # The norm behind the first layer leaves nothing of its bias's gradient but rounding.
    assert len(grads[0]) == len(list(qat.parameters()))
    scale = max(float(grad.abs().max()) for grad in grads[0])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6 * scale)
