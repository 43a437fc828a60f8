from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tbn_compiler.passes import RemoveNoOps
from tests.passes.deployed import check, lowered, modifies, modules_called


class Mixed(nn.Module):
    """Dropout in every form, identities, and a block whose training flag tracing must keep."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 16)
        self.drop, self.alpha, self.same = nn.Dropout(0.5), nn.AlphaDropout(0.5), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.same(self.drop(self.fc1(x))), 0.5, training=self.training)
        x = torch.dropout(x.detach(), 0.5, self.training)
        q = x[:, None, None]
        x = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5 if self.training else 0.0)[:, 0, 0]
        return self.alpha(self.fc2(x))


def test_every_form_is_removed() -> None:
    x = torch.randn(3, 16)
    packed = lowered(Mixed())
    assert "TrainingFlag" in modules_called(packed)
    optimized = check(packed, x)
    assert modules_called(optimized) == []
    assert not any(type(module).__name__ == "TrainingFlag" for module in optimized.modules())
    names = [getattr(node.target, "__name__", node.target) for node in optimized.graph.nodes]
    assert "detach" not in names
    assert "dropout" not in names
    attention = next(n for n in optimized.graph.nodes if n.target is F.scaled_dot_product_attention)
    assert attention.kwargs["dropout_p"] == 0.0
    # Nothing else went: the lowered module still has them.
    assert "Dropout" in modules_called(packed)


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
