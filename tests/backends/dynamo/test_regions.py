"""Blocks that are compiled one by one share what is compiled, in training form and lowered."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.backends.dynamo import compile_graph
from tbn_compiler.graph.calls import training_call

BLOCKS = 12  # more than torch._dynamo.config.recompile_limit


class Block(nn.Module):
    """A layer module of each form: linears, an attention, a parameter that a product reads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.relu(self.up(x))) @ self.mix
        context: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return x + context


@pytest.mark.parametrize("lowered", [False, True])
def test_equal_blocks_are_compiled_once(lowered: bool, eager_graphs: list[fx.GraphModule]) -> None:
    assert torch._dynamo.config.recompile_limit < BLOCKS
    qat = tbn.transform(nn.Sequential(*(Block() for _ in range(BLOCKS))), tbn.TilingConfig(p=4, min_size=0)).eval()
    model: Any = tbn.lower(qat) if lowered else qat
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        expected = tbn.lower(qat)(x)
        for block in model:
            block.compile(backend=compile_graph)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert len(eager_graphs) == 1
    assert not [node for node in eager_graphs[0].graph.nodes if training_call(node)]
