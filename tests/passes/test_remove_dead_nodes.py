from __future__ import annotations

import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.passes import RemoveDeadNodes
from tests import oracle


class ReadsDtype(nn.Module):
    """Code of the user's that asks a layer's weight for its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.to(self.fc.weight.dtype))
        return y


def test_a_weight_is_not_decoded_for_its_dtype() -> None:
    packed, x = tbn.lower(tbn.transform(ReadsDtype(), tbn.TilingConfig(p=4, min_size=0))), torch.randn(3, 16)
    optimized = tbn.optimize(packed, x)
    assert isinstance(optimized, fx.GraphModule)
    targets = [node.target for node in optimized.graph.nodes]
    assert torch.ops.tbn.unpack.default not in targets
    (call,) = optimized.graph.find_nodes(op="call_function", target=torch.ops.tbn.linear.default)
    assert [node.op for node in call.args[1:4]] == ["get_attr"] * 3
    oracle.assert_close(optimized(x), packed(x), 2e-6)


def test_writes_are_left_alone() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(torch.sin, (x,))
    graph.call_method("add_", (x, 1))
    graph.output(x)
    gm = fx.GraphModule(nn.Module(), graph)
    assert RemoveDeadNodes()(gm).modified
    assert [node.target for node in gm.graph.nodes if node.op.startswith("call")] == ["add_"]
    assert not RemoveDeadNodes()(gm).modified
    assert torch.equal(gm(torch.zeros(2)), torch.ones(2))
