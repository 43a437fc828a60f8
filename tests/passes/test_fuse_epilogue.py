from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.capture import capture
from tbn_compiler.passes import FuseEpilogue, deployment_pipeline, run_passes
from tests import oracle
from tests.oracle import both_forms
from tests.passes.deployed import lowered, modifies, note, noted


class Wrapped(nn.Module):
    """A layer and what stands behind it."""

    def __init__(self, layer: nn.Module, behind: Any) -> None:
        super().__init__()
        self.layer = layer
        if isinstance(behind, nn.Module):
            self.behind = behind
        else:
            self._behind = behind
        self.extra = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        behind = self._modules.get("behind")
        result: Tensor = behind(self.layer(x)) if behind is not None else self._behind(self, self.layer(x))
        return result


def fused(packed: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """Fuse a copy whose dtypes and ranks are known; the results stay the same and a second run changes nothing."""
    gm = noted(packed, *inputs) if isinstance(packed, fx.GraphModule) else capture(packed, inputs)
    assert isinstance(gm, fx.GraphModule)
    nodes = len(gm.graph.nodes)
    modified = modifies(FuseEpilogue(), gm)
    assert modified == (len(gm.graph.nodes) < nodes)
    assert not modifies(FuseEpilogue(), gm)
    with torch.no_grad():
        oracle.assert_close(gm(*inputs), packed(*inputs), rtol=1e-5)
    return gm


def call_of(gm: fx.GraphModule) -> dict[str, Any]:
    """Arguments of the only tiled layer."""
    (call,) = filter(None, map(tiled_call, gm.graph.nodes))
    return call.arguments


FUNCTIONS: list[tuple[Any, str]] = [
    (nn.ReLU(), "relu"),
    (nn.ReLU(inplace=True), "relu"),
    (lambda self, y: F.relu(y), "relu"),
    (lambda self, y: F.relu(y, inplace=True), "relu"),
    (lambda self, y: torch.relu(y), "relu"),
    (lambda self, y: y.relu(), "relu"),
    (lambda self, y: y.relu_(), "relu"),
    (nn.GELU(), "gelu"),
    (nn.GELU(approximate="tanh"), "gelu_tanh"),
    (lambda self, y: F.gelu(y), "gelu"),
    (lambda self, y: F.gelu(y, approximate="tanh"), "gelu_tanh"),
    (nn.SiLU(), "silu"),
    (lambda self, y: F.silu(y), "silu"),
]


@both_forms
@pytest.mark.parametrize("index", range(len(FUNCTIONS)))
def test_functions(index: int, transform: Any) -> None:
    behind, name = FUNCTIONS[index]
    for layer, x in ((nn.Linear(16, 16), torch.randn(3, 16)), (nn.Conv2d(4, 16, 3), torch.randn(2, 4, 5, 5))):
        packed = lowered(Wrapped(layer, behind), transform)
        gm = fused(packed, x)
        assert call_of(gm)["epilogue"] == name
        (output,) = (node for node in gm.graph.nodes if node.op == "output")
        assert [tiled_call(node) is not None for node in output.all_input_nodes] == [True]


OTHERS: dict[str, Any] = {
    "second reader": lambda self, y: F.relu(y) + y,
    "other function": lambda self, y: torch.tanh(y),
    "computed addend": lambda self, y: y + self.extra * 2,
    "scaled sum": lambda self, y: torch.add(y, self.extra, alpha=2),
    "single number": lambda self, y: y + 1.0,
    "other dtype": lambda self, y: y + self.extra.double(),
}


@both_forms
@pytest.mark.parametrize("name", OTHERS)
def test_left_alone(name: str, transform: Any) -> None:
    packed = lowered(Wrapped(nn.Linear(16, 16, bias=False), OTHERS[name]), transform)
    gm = fused(packed, torch.randn(3, 16))
    assert call_of(gm)["epilogue"] == "none"
    assert call_of(gm)["bias"] is None


@both_forms
def test_a_constant_that_makes_the_result_wider(transform: Any) -> None:
    model = Wrapped(nn.Linear(16, 16, bias=False), lambda self, y: y + self.extra)
    model.extra = nn.Parameter(torch.randn(16, dtype=torch.float64))
    assert call_of(fused(lowered(model, transform), torch.randn(3, 16)))["bias"] is None


@both_forms
def test_added_constants_become_the_bias(transform: Any) -> None:
    for behind in (lambda self, y: y + self.extra, lambda self, y: self.extra + y, lambda self, y: y.add_(self.extra)):
        model = Wrapped(nn.Linear(16, 16, bias=False), lambda self, y, f=behind: F.relu(f(self, y)))
        packed = lowered(model, transform)
        arguments = call_of(fused(packed, torch.randn(3, 16)))
        assert arguments["bias"].target == "extra"
        assert arguments["epilogue"] == "relu"
    # A layer with a bias would add the two in another order.
    packed = lowered(Wrapped(nn.Linear(16, 16), lambda self, y: y + self.extra), transform)
    assert call_of(fused(packed, torch.randn(3, 16)))["bias"].target == "layer.bias"


@pytest.mark.parametrize(
    ("shape", "fuses"),
    [((16, 1, 1), True), ((1, 16, 1, 1), True), ((1, 1, 16, 1, 1), False), ((1, 1, 16), False), ((16, 5, 1), False)],
)
@both_forms
def test_the_constant_lies_along_the_channels(transform: Any, shape: tuple[int, ...], fuses: bool) -> None:
    model = Wrapped(nn.Conv2d(4, 16, 3, bias=False), lambda self, y: y + self.extra)
    model.extra = nn.Parameter(torch.randn(shape))
    x = torch.randn(2, 4, 18, 18) if shape == (1, 1, 16) else torch.randn(2, 4, 7, 7)
    arguments = call_of(fused(lowered(model, transform), x))
    assert (arguments["bias"] is not None) == fuses


def test_without_shapes_only_functions_are_fused() -> None:
    packed = lowered(Wrapped(nn.Linear(16, 16, bias=False), lambda self, y: F.relu(y + self.extra)))
    assert not modifies(FuseEpilogue(), copy.deepcopy(packed))
    packed = lowered(Wrapped(nn.Linear(16, 16, bias=False), nn.ReLU()))
    assert modifies(FuseEpilogue(), packed)


def test_modules_with_hooks_are_left_alone() -> None:
    packed = lowered(Wrapped(nn.Linear(16, 16), nn.ReLU()))
    packed.get_submodule("behind").register_forward_hook(lambda module, inputs, output: output * 2)
    assert not modifies(FuseEpilogue(), packed)


@both_forms
def test_other_passes_do_not_see_through_an_epilogue(transform: Any) -> None:
    """A norm behind an epilogue stays, and scaled copies stop at one."""
    norm = nn.Sequential(nn.Linear(16, 16, bias=False), nn.GELU(), nn.BatchNorm1d(16))
    chain = nn.Sequential(nn.Linear(16, 16, bias=False), nn.SiLU(), nn.Linear(16, 16, bias=False))
    for model, kept in ((norm, "ends in gelu"), (chain, "silu is fused behind it")):
        x = torch.randn(3, 16)
        packed = lowered(model, transform, alpha="layer")
        gm = run_passes(fused(packed, x), deployment_pipeline())
        with torch.no_grad():
            oracle.assert_close(gm(x), packed(x), rtol=1e-5)
        assert kept in note(gm, "0")
