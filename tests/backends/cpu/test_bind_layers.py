"""Modules whose layers are bound to their operands without ``torch.compile``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import bound
from tbn_compiler.backends.cpu.bind_layers import bind_layers, find_bindings
from tbn_compiler.errors import LoweringError, TBNError
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.records import graph_parts
from tests import oracle

CONFIG = tbn.TilingConfig(p=4, min_size=0)

pytestmark = pytest.mark.skipif(bound.unavailable() is not None, reason=str(bound.unavailable()))


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 8))
    return tbn.lower(tbn.transform(model, CONFIG))


def left(module: nn.Module) -> int:
    """Layers that are not bound."""
    return sum(tiled_call(node) is not None for _, part in graph_parts(module) for node in part.graph.nodes)


@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
@pytest.mark.parametrize("whole", [False, True])
def test_results(whole: bool, activation: Any) -> None:
    packed, example = network(), torch.randn(3, 24)
    module = tbn.optimize(packed, example if whole else None, activation=activation)
    fast = cpu.bind(module, None if whole else example)
    assert left(fast) == 0
    assert left(module) == 2
    with torch.no_grad():
        for size in (1, 3, 40):
            x = torch.randn(size, 24)
            oracle.assert_close(fast(x), module(x), rtol=1e-6)


class Several(nn.Module):
    """Takes a named tensor, and gives two."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 32)

    def forward(self, x: Tensor, *, scale: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y, y * scale


def test_nested_inputs_and_results() -> None:
    inputs = {"x": torch.randn(3, 24), "scale": torch.randn(3, 1)}
    module = tbn.optimize(tbn.lower(tbn.transform(Several(), CONFIG)), inputs)
    fast = cpu.bind(module)
    with torch.no_grad():
        for result, expected in zip(fast(**inputs), module(**inputs), strict=True):
            assert torch.equal(result, expected)


def test_sizes_are_still_checked() -> None:
    fast = cpu.bind(tbn.optimize(network(), torch.randn(3, 24)))
    with pytest.raises((RuntimeError, AssertionError)):
        fast(torch.randn(3, 25))


def test_values_are_those_of_the_time_of_binding() -> None:
    packed, x = network(), torch.randn(3, 24)
    fast = cpu.bind(packed, x)
    with torch.no_grad():
        expected = fast(x)
        assert not set(fast.state_dict()) - set(packed.state_dict())
        packed.load_state_dict({**packed.state_dict(), "0.weight_tile": 255 - packed[0].weight_tile})  # type: ignore[index]
        assert not torch.equal(packed(x), expected)
        again = cpu.bind(packed, x)
        oracle.assert_close(again(x), packed(x), rtol=1e-6)
        with pytest.raises(RuntimeError, match="not one that this process made"):
            copy.deepcopy(again)(x)


def test_values_have_memory_of_their_own() -> None:
    """Changing the dtype of a module gives its parameters other memory, and frees what they had."""
    packed, x = network(), torch.randn(3, 24)
    fast = cpu.bind(packed, x)
    with torch.no_grad():
        expected = fast(x)
        for parameter in packed.parameters():
            parameter.mul_(3)
        norm = packed[2].double().float()  # type: ignore[index]
        norm.weight.data /= 3
        norm.bias.data /= 3
        packed[0].double()  # type: ignore[index]
        torch.full((1 << 12,), 7.0)
        oracle.assert_close(fast(x), expected, rtol=1e-6)


class Half(nn.Module):
    """Its first layer computes in float64, which no kernel takes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x.double()).float())
        return result


def test_layers_that_stay_are_computed_all_the_same() -> None:
    packed, x = tbn.lower(tbn.transform(Half(), CONFIG)), torch.randn(3, 24)
    packed.first.double()
    fast = cpu.bind(packed, x)
    assert left(fast) == 1
    reasons = [reason for _, part in graph_parts(fast) for reason in find_bindings(part).values()]
    assert reasons == ["float64 input"]
    with torch.no_grad():
        assert torch.equal(fast(x), packed(x))
        packed.first.float()  # what is bound stays, and the rest can be bound later
    with pytest.raises(LoweringError, match="no layer of Half can be bound: float64 input"):
        cpu.bind(fast, x)


def test_a_second_time() -> None:
    """Plans of the first time keep their names."""
    chain = nn.Sequential(nn.Conv2d(16, 48, 3), nn.Conv2d(48, 48, 1), nn.Conv2d(48, 48, 3))
    packed, x = tbn.lower(tbn.transform(chain, CONFIG.replace(alpha="tile"))), torch.randn(1, 16, 8, 8)
    module = tbn.optimize(packed, x)
    assert isinstance(module, torch.fx.GraphModule)
    with torch.no_grad():
        expected = module(x)
        for node, layer in find_bindings(module).items():  # one at a time
            bind_layers(module, {node: layer})
        oracle.assert_close(module(x), expected, rtol=1e-6)


def test_layers_behind_copies_that_are_passed_on() -> None:
    chain = nn.Sequential(nn.Linear(24, 32, bias=False), nn.ReLU(), nn.Linear(32, 32, bias=False), nn.Linear(32, 8))
    module = tbn.optimize(tbn.lower(tbn.transform(chain, CONFIG)), torch.randn(3, 24))
    fast = cpu.bind(module)
    assert left(fast) == 0
    with torch.no_grad():
        x = torch.randn(5, 24)
        oracle.assert_close(fast(x), module(x), rtol=1e-5)


def test_operands_that_do_not_fit_are_left_to_the_operator() -> None:
    module = tbn.optimize(network(), torch.randn(3, 24))
    layers = [name for name, value in module.named_parameters() if value.shape == (32,)]
    owner, _, name = layers[0].rpartition(".")
    setattr(module.get_submodule(owner), name, nn.Parameter(torch.zeros(1)))
    fast = cpu.bind(module)
    assert left(fast) == 1
    with pytest.raises(ValueError, match="bias must have shape"), torch.no_grad():
        fast(torch.randn(3, 24))


def test_gradients_are_refused() -> None:
    fast = cpu.bind(network(), torch.randn(3, 24))
    with pytest.raises(RuntimeError, match="has no gradients"):
        fast(torch.randn(3, 24, requires_grad=True))
    with torch.no_grad():
        fast(torch.randn(3, 24, requires_grad=True))


def test_what_cannot_be_bound() -> None:
    with pytest.raises(LoweringError, match=r"can be bound: the dtype of its input is not known; pass example_inputs"):
        cpu.bind(network())
    with pytest.raises(LoweringError, match="Linear has no lowered layer"):
        cpu.bind(nn.Linear(3, 3), torch.ones(3))
    with pytest.raises(LoweringError, match="has no lowered layer"):
        cpu.bind(tbn.transform(nn.Linear(24, 32), CONFIG), torch.ones(24))
    with pytest.raises(TBNError, match="does not run on example inputs"):
        cpu.bind(network(), torch.randn(3, 25))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by the first torch.func.jvp
def test_forward_mode_is_refused() -> None:
    x = torch.randn(3, 24)
    for fast in (cpu.bind(network(), x), cpu.bind(tbn.optimize(network(), x))):
        with pytest.raises(NotImplementedError, match="a module that was bound has no forward derivative"):
            torch.func.jvp(fast, (x,), (x,))
