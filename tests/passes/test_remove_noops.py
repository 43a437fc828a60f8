from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.passes import RemoveNoOps
from tbn_compiler.passes.decompose_attention import attention_core
from tests.oracle import both_forms
from tests.passes.deployed import called, check, lowered, modifies, modules_called


class Called(nn.Module):
    """A module that calls a function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Mixed(nn.Module):
    """Dropout in several forms, by mode and in an attention, and identities."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)
        self.drop, self.alpha, self.same = nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Identity()
        self.attention = nn.MultiheadAttention(16, 2, dropout=0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.same(self.drop(self.fc1(x))), 0.5, training=self.training)
        x = torch.dropout(x.detach(), 0.5, self.training)
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.alpha(self.fc2(x))


def test_every_form_is_removed() -> None:
    x = torch.randn(3, 16)
    packed = lowered(Mixed())
    assert {"TrainingFlag", "Dropout", "AlphaDropout", "Identity", "dropout", "detach"} <= set(called(packed))
    optimized = check(packed, x)
    assert set(called(optimized)) == {"attention_core", "chunk", "getitem"}
    assert not any(type(module).__name__ == "TrainingFlag" for module in optimized.modules())
    attention = next(node for node in optimized.graph.nodes if node.target is attention_core)
    assert attention.kwargs["training"] is False
    # Nothing else went: the lowered module still has them.
    assert "Dropout" in modules_called(packed)


def test_every_form_is_removed_from_an_exported_graph() -> None:
    optimized = check(lowered(Mixed(), tbn.transform), torch.randn(3, 16))
    names = set(called(optimized))
    assert "scaled_dot_product_attention" in names
    assert not {name for name in names if "dropout" in name or "detach" in name}
    attention = next(node for node in optimized.graph.nodes if "scaled_dot_product" in str(node.target))
    assert 0.5 not in attention.args


DROPOUTS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "dropout": (nn.Dropout(), (2, 8)),
    "dropout in place": (nn.Dropout(inplace=True), (2, 8)),
    "1d": (nn.Dropout1d(), (2, 3, 8)),
    "2d": (nn.Dropout2d(), (2, 3, 4, 8)),
    "2d in place": (nn.Dropout2d(inplace=True), (2, 3, 4, 8)),
    "3d": (nn.Dropout3d(), (2, 3, 4, 5, 8)),
    "alpha": (nn.AlphaDropout(), (2, 8)),
    "alpha in place": (nn.AlphaDropout(inplace=True), (2, 8)),
    "feature alpha": (nn.FeatureAlphaDropout(), (2, 3, 4, 8)),
    "torch.feature_dropout_": (Called(lambda x: torch.feature_dropout_(x, 0.5, False)), (2, 3, 4, 8)),
    "F.dropout2d": (Called(lambda x: F.dropout2d(x, training=False)), (2, 3, 4, 8)),
    "F.alpha_dropout": (Called(F.alpha_dropout), (2, 8)),
}


@both_forms
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_that_is_off(transform: Any, name: str) -> None:
    dropout, size = DROPOUTS[name]
    packed = lowered(nn.Sequential(nn.Linear(8, 8), dropout, nn.Linear(8, 8)), transform)
    assert called(check(packed, torch.randn(size))) == []


def traced(model: nn.Module) -> fx.GraphModule:
    return fx.symbolic_trace(model)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train(),
        nn.Sequential(nn.Linear(4, 4), nn.RReLU()).eval(),
    ],
)
def test_what_is_on_stays(model: nn.Module) -> None:
    gm = traced(model)
    assert not modifies(RemoveNoOps(), gm)
    assert len(modules_called(gm)) == 2


def test_functional_dropout_that_is_always_on_stays() -> None:
    class AlwaysOn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(x, 0.5) + F.dropout(x, training=True)

    gm = traced(AlwaysOn().eval())
    assert not modifies(RemoveNoOps(), gm)
    assert sum(node.target is F.dropout for node in gm.graph.nodes) == 2


def test_module_with_a_hook_stays() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Identity()).eval()
    model[1].register_forward_hook(lambda module, inputs, output: output + 1)
    assert not modifies(RemoveNoOps(), traced(model))


def test_detach_stays_in_training_mode() -> None:
    class Stop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach() * 2

    assert not modifies(RemoveNoOps(), traced(Stop().train()))
    assert modifies(RemoveNoOps(), traced(Stop().eval()))


def test_module_that_is_called_twice_and_output_of_an_identity() -> None:
    drop = nn.Dropout()
    gm = traced(nn.Sequential(drop, nn.Linear(4, 4), drop, nn.Identity()).eval())
    x = torch.randn(2, 4)
    expected = gm(x)
    assert modifies(RemoveNoOps(), gm)
    assert modules_called(gm) == ["Linear"]
    assert torch.equal(gm(x), expected)
