"""Norms of values whose order was changed read a dense copy; other norms stay as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.backends.cpu import bound
from tbn_compiler.backends.dynamo import compile_graph
from tests import oracle

pytestmark = pytest.mark.skipif(bound.unavailable() is not None, reason=str(bound.unavailable()))


def patches(x: Tensor) -> Tensor:
    return x.unflatten(3, (-1, 4)).unflatten(2, (-1, 4)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


class Embedding(nn.Module):
    """A norm and a layer behind a change of order, from images ``[n, 3, 8, 8]`` to ``[..., 48]``."""

    def __init__(self, rearrange: Callable[[Tensor], Tensor], read_twice: bool = False) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(48), nn.Linear(48, 32)
        self.rearrange, self.read_twice = rearrange, read_twice

    def forward(self, x: Tensor) -> Tensor:
        order = self.rearrange(x)
        result: Tensor = self.layer(self.norm(order))
        return result + order.sum() if self.read_twice else result


def run(module: nn.Module, x: Tensor, graphs: list[fx.GraphModule]) -> int:
    """Copies in the graph of a compiled module, whose result is right."""
    torch.manual_seed(0)
    packed = tbn.lower(tbn.transform(module.eval(), tbn.TilingConfig(p=4, min_size=0)))
    with torch.no_grad():
        oracle.assert_close(torch.compile(packed, backend=compile_graph)(x), packed(x), rtol=1e-5)
    return sum(node.target is torch.ops.tbn_cpu.dense.default for graph in graphs for node in graph.graph.nodes)


@pytest.mark.parametrize(
    "rearrange",
    [
        patches,
        lambda x: x.reshape(-1, 3, 2, 4, 2, 4).movedim(1, -1).reshape(-1, 8, 48),
        lambda x: x.flatten(2).transpose(1, 2).contiguous().view(-1, 4, 48),
    ],
)
def test_a_copy_is_made(rearrange: Callable[[Tensor], Tensor], eager_graphs: list[fx.GraphModule]) -> None:
    assert run(Embedding(rearrange), torch.randn(2, 3, 8, 8), eager_graphs) == 1


@pytest.mark.parametrize(
    "module",
    [
        Embedding(lambda x: x.flatten(1).unflatten(1, (-1, 48))),
        Embedding(lambda x: x.reshape(-1, 48, 4).transpose(1, 2)),
        Embedding(patches, read_twice=True),
        Embedding(lambda x: patches(x).relu()),
    ],
    ids=["the order is kept", "nothing is reshaped behind it", "something else reads it", "a function between"],
)
def test_what_stays(module: nn.Module, eager_graphs: list[fx.GraphModule]) -> None:
    assert run(module, torch.randn(2, 3, 8, 8), eager_graphs) == 0


class Written(nn.Module):
    """A value is written in place between the change of its order and the norm."""

    def __init__(self, rearrange: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.layer = nn.Linear(48, 48), nn.LayerNorm(48), nn.Linear(48, 32)
        self.rearrange = rearrange

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        order = self.rearrange(y)
        y[:, 0] = 3.0
        result: Tensor = self.layer(self.norm(order))
        return result


@pytest.mark.parametrize(
    "rearrange",
    [
        lambda y: y.transpose(0, 1).unflatten(-1, (1, 48)),  # a view, which sees what is written
        lambda y: y.transpose(0, 1).flatten(0, 1),  # a copy, which does not
    ],
)
def test_values_that_are_written_meanwhile(
    rearrange: Callable[[Tensor], Tensor], eager_graphs: list[fx.GraphModule]
) -> None:
    assert run(Written(rearrange), torch.randn(4, 6, 48), eager_graphs) == 0


def test_compiled_by_inductor(graphs: list[fx.GraphModule]) -> None:
    assert run(Embedding(patches), torch.randn(2, 3, 8, 8), graphs) == 1
