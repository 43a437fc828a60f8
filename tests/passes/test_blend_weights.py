"""``BlendWeights`` and ``RemoveBlends`` as passes: the graph, the gradients, repeated runs, other dtypes, names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig, TransformError
from tbn_compiler.passes import BlendWeights, RemoveBlends
from tests import oracle

CONFIG = TilingConfig(p=4, min_size=0)
GRADUAL = CONFIG.replace(gradual=True)


def targets(gm: Any) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def test_one_blend_for_each_weight() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.once, self.kept = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.kept(self.once(self.twice(self.twice(x))))  # type: ignore[no-any-return]

    qat = tbn.transform(Shared(), GRADUAL.replace(float_layers=("kept",)))
    assert targets(qat).count(torch.lerp) == 2
    tbn.set_tiling_strength(qat, 1)
    x = torch.randn(3, 8)
    oracle.assert_close(tbn.lower(qat)(x), qat(x))


def test_running_twice_changes_nothing() -> None:
    qat = tbn.transform(nn.Sequential(nn.Linear(8, 8)), CONFIG)
    assert BlendWeights()(qat).modified
    assert not BlendWeights()(qat).modified
    tbn.set_tiling_strength(qat, 1)
    assert RemoveBlends()(qat).modified
    assert not RemoveBlends()(qat).modified
    assert "tiling_strength" not in qat.state_dict()
    assert targets(qat)[:2] == [torch.ops.tbn.tile.default, torch.ops.tbn.scale.default]


def test_transforming_twice_changes_nothing() -> None:
    qat = tbn.transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), GRADUAL)
    tbn.set_tiling_strength(qat, 0.5)
    again = tbn.transform(qat, GRADUAL.replace(p=2))
    assert again.code == qat.code
    assert list(again.state_dict()) == list(qat.state_dict())
    assert tbn.tiling_strength(again) == 0.5


def test_blended_module_as_part_of_another_model() -> None:
    """Its blends keep their own strength; those of the outer layers get the outer one. Both move together."""
    inner = tbn.transform(nn.Sequential(nn.Linear(8, 8)), GRADUAL)
    tbn.set_tiling_strength(inner, 0.5)
    qat = tbn.transform(nn.Sequential(inner, nn.Linear(8, 8)), GRADUAL)
    assert {key for key in qat.state_dict() if "strength" in key} == {"tiling_strength", "0.tiling_strength"}
    assert tbn.tiling_strength(qat) == 0
    tbn.set_tiling_strength(qat, 1)
    x = torch.randn(3, 8)
    packed = tbn.lower(qat)
    assert not any("strength" in key for key in packed.state_dict())
    oracle.assert_close(packed(x), qat(x))


@pytest.mark.parametrize("strength", [0.0, 0.375, 1.0])
def test_gradients_by_both_paths(strength: float) -> None:
    """``(1 - s) g + s alpha g`` for the weight, ``s`` times the usual gradient for the alpha source."""
    qat = tbn.transform(nn.Sequential(nn.Linear(6, 8)).double(), GRADUAL)
    tbn.set_tiling_strength(qat, strength)
    w, a = (qat.get_parameter(f"0.{name}") for name in ("weight", "alpha_source"))
    g = torch.randn(8, 6, dtype=torch.float64)
    # With the rows of the identity as input, the output is the weight transposed.
    (qat(torch.eye(6, dtype=torch.float64)).t() * g).sum().backward()
    bits = torch.from_numpy(
        oracle.fill((8, 6), oracle.tile(oracle.array(w), 4), oracle.alphas(oracle.array(a * 0 + 1), 1))
    )
    alpha = a.detach().abs().mean()
    torch.testing.assert_close(w.grad, (1 - strength) * g + strength * alpha * g, rtol=1e-12, atol=1e-13)
    expected = strength * (g * bits).sum() / 48 * a.detach().sign()
    torch.testing.assert_close(a.grad, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [True, False])
def test_other_dtypes(dtype: torch.dtype, whole: bool) -> None:
    """Also where the weights alone are converted, as mixed precision does: both ends stay exact."""
    qat = tbn.transform(nn.Sequential(nn.Linear(64, 64)), GRADUAL)
    if whole:
        qat.to(dtype)
    else:
        for parameter in qat.parameters():
            parameter.data = parameter.data.to(dtype)
    x = torch.randn(3, 64, dtype=dtype)
    assert torch.equal(qat(x), nn.functional.linear(x, qat.get_parameter("0.weight"), qat.get_parameter("0.bias")))
    tbn.set_tiling_strength(qat, 1)
    before = qat(x)
    RemoveBlends()(qat)
    assert torch.equal(qat(x), before)


def test_name_that_is_taken() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.register_buffer("tiling_strength", torch.ones(()))
    with pytest.raises(TransformError, match="has an attribute 'tiling_strength'"):
        tbn.transform(model, GRADUAL)
    assert "tiling_strength" in tbn.transform(model, CONFIG).state_dict()


def test_meta_model() -> None:
    with torch.device("meta"):
        qat = tbn.transform(nn.Sequential(nn.Linear(8, 8)), GRADUAL)
    assert qat.get_buffer("tiling_strength").is_meta
    assert "0.weight_tile" in tbn.lower(qat).state_dict()
