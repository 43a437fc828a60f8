"""``JoinChains``: which layers become one operator, and which stay a chain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig
from tbn_compiler.graph.calls import training_call
from tbn_compiler.graph.layers import layer_calls
from tbn_compiler.ops.latents import used_weight
from tbn_compiler.passes import JoinChains
from tests import oracle

ALL = TilingConfig(p=4, min_size=0)


def tiled(model: nn.Module, config: TilingConfig = ALL) -> fx.GraphModule:
    """The graph before the pass."""
    return oracle.chain_graph(model, config)


def shared(gm: fx.GraphModule) -> list[str]:
    return [call.kind for node in gm.graph.nodes if (call := training_call(node))]


Build = Callable[[], nn.Module]
SHARED: dict[str, tuple[Build, tuple[int, ...], TilingConfig]] = {
    "linear": (lambda: nn.Linear(12, 16), (3, 12), ALL),
    "linear without bias": (lambda: nn.Linear(12, 16, bias=False), (2, 3, 12), ALL.replace(alpha="tile")),
    "misaligned": (lambda: nn.Linear(8, 12), (3, 8), ALL.replace(p=8)),
    "two-axis": (lambda: nn.Linear(12, 16), (3, 12), ALL.replace(p=(2, 2), alpha="output")),
    "alphas from the weight": (lambda: nn.Linear(12, 16), (3, 12), ALL.replace(alpha_source="W")),
    "full-precision tile": (lambda: nn.Linear(12, 16), (3, 12), ALL.replace(tile_dtype="float")),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=2, dilation=2), (2, 4, 9), ALL),
    "conv2d": (lambda: nn.Conv2d(4, 8, (3, 1), stride=(2, 1), padding=(1, 0)), (2, 4, 6, 5), ALL),
    "conv2d unbatched": (lambda: nn.Conv2d(4, 8, 3), (4, 6, 5), ALL),
    "conv3d": (lambda: nn.Conv3d(4, 8, 2), (2, 4, 3, 4, 5), ALL),
    "groups": (lambda: nn.Conv2d(8, 16, 3, groups=2), (2, 8, 5, 5), ALL),
    "padding by name": (lambda: nn.Conv2d(4, 8, 3, padding="same"), (2, 4, 6, 5), ALL),
    "no padding by name": (lambda: nn.Conv1d(4, 8, 4, padding="valid"), (2, 4, 9), ALL),
    "padding with a mode": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), (2, 4, 6, 5), ALL),
    "one copy": (lambda: nn.Linear(12, 16), (3, 12), ALL.replace(p=1)),
    "rolled": (lambda: nn.Linear(12, 16), (3, 12), ALL.replace(replicate="roll")),
    "an alpha within rows": (lambda: nn.Linear(8, 10), (3, 8), ALL.replace(alpha="tile")),
    "alphas along the inputs": (lambda: nn.Linear(12, 16), (3, 12), ALL.replace(p=(2, 2), alpha="tile")),
    "groups read other inputs": (lambda: nn.Conv2d(8, 16, 3, groups=4), (2, 8, 5, 5), ALL),
    "transpose in groups": (lambda: nn.ConvTranspose2d(8, 4, 3, groups=2), (2, 8, 4, 5), ALL),
    "transpose": (lambda: nn.ConvTranspose2d(8, 4, 3, stride=2, output_padding=1), (2, 8, 4, 5), ALL),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared(name: str) -> None:
    """The operator stands where the chain stood, with the same result and gradients."""
    build, shape, config = SHARED[name]
    gm = tiled(nn.Sequential(build()), config)
    x = torch.randn(shape, requires_grad=True)

    def run() -> Any:
        gm.zero_grad()
        x.grad = None
        y = gm(x)
        (y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).sum().backward()
        return y, x.grad, [p.grad for p in gm.parameters()]

    before = run()
    keys = list(gm.state_dict())
    result = JoinChains().call(gm)
    assert result.modified
    assert len(shared(gm)) == 1
    assert not gm.graph.find_nodes(op="call_function", target=torch.ops.tbn.tile.default)
    assert list(gm.state_dict()) == keys
    oracle.assert_close(run(), before, 1e-5)
    assert not JoinChains().call(gm).modified


class Twice(nn.Module):
    """A layer whose weight another one reads, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        return F.linear(F.linear(x, weight, self.fc.bias), weight)


LEFT: dict[str, tuple[Build, TilingConfig]] = {
    "float": (lambda: nn.Linear(12, 16), ALL.replace(float_layers=("*",))),
    "a whole weight with two readers": (Twice, ALL.replace(p=1)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str) -> None:
    build, config = LEFT[name]
    gm = tiled(build(), config)
    code = gm.code
    assert not JoinChains().call(gm).modified
    assert gm.code == code


def test_gradual_weights_are_left_alone() -> None:
    gm = oracle.whole_graph(nn.Sequential(nn.Linear(12, 16)), ALL.replace(gradual=True))
    assert not shared(gm)
    assert not JoinChains().call(gm).modified


def test_an_attentions_weights() -> None:
    """The four linears that it is made of share their rows."""
    gm = tbn.transform(nn.MultiheadAttention(16, 4, batch_first=True), ALL)
    assert shared(gm) == ["linear"] * 4
    assert not JoinChains().call(gm).modified
    x = torch.randn(2, 5, 16)
    oracle.assert_close(gm(x, x, x), tbn.lower(gm)(x, x, x), 1e-5)


def test_weights_with_several_readers() -> None:
    """Each call is rewritten where rows repeat; the weight is tiled in each."""
    gm = tiled(Twice())
    x = torch.randn(3, 16)
    before = gm(x)
    assert JoinChains().call(gm).modified
    assert shared(gm) == ["linear", "linear"]
    oracle.assert_close(gm(x), before, 1e-5)


def test_geometry_that_is_computed() -> None:
    """Sizes given by nodes or by numbers."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv1d(x, self.weight, None, 1, 1) + F.conv1d(x, self.weight, stride=1, padding=(1,))

    gm = tiled(Model())
    x = torch.randn(2, 4, 7)
    before = gm(x)
    assert JoinChains().call(gm).modified
    assert shared(gm) == ["conv1d", "conv1d"]
    oracle.assert_close(gm(x), before, 1e-5)


def test_meta_data_is_kept() -> None:
    gm = tiled(nn.Sequential(nn.Linear(12, 16)))
    (node,) = (call.node for call in layer_calls(gm))
    node.meta["mine"] = 1
    JoinChains().call(gm)
    (node,) = (call.node for call in layer_calls(gm))
    assert node.meta["mine"] == 1


def test_the_operator_reads_as_its_weight() -> None:
    """``used_weight`` is the chain, for both latents."""
    qat, x = tbn.transform(nn.Linear(12, 16), ALL.replace(alpha="tile")), torch.eye(12)
    (call,) = (c for node in qat.graph.nodes if (c := training_call(node)))
    held = tbn.convert_latent(qat, "tile")
    bias = qat.bias
    for module in (qat, held):
        used = used_weight(module.weight, module.alpha_source, call.layout, 4, True)
        oracle.assert_close(module(x) - bias, used.t(), 1e-5)
