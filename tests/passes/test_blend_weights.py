"""``BlendWeights`` and ``RemoveBlends`` as passes: the graph, the gradients, repeated runs, other dtypes, names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig, TransformError
from tbn_compiler.graph.records import graph_parts
from tbn_compiler.passes import BlendWeights, RemoveBlends
from tests import oracle
from tests.oracle import both_forms

CONFIG = TilingConfig(p=4, min_size=0)
GRADUAL = CONFIG.replace(gradual=True)


def targets(module: nn.Module) -> list[Any]:
    """The functions that the graph, or those in a module, call."""
    return [node.target for _, gm in graph_parts(module) for node in gm.graph.nodes if node.op == "call_function"]


def codes(module: nn.Module) -> dict[str, str]:
    return {path: gm.code for path, gm in graph_parts(module)}


@both_forms
def test_one_blend_for_each_weight(transform: Any) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice, self.once, self.kept = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.kept(self.once(self.twice(self.twice(x))))  # type: ignore[no-any-return]

    qat = transform(Shared(), GRADUAL.replace(float_layers=("kept",)))
    assert targets(qat).count(torch.lerp) == 2
    tbn.set_tiling_strength(qat, 1)
    x = torch.randn(3, 8)
    oracle.assert_close(tbn.lower(qat)(x), qat(x))


def test_running_twice_changes_nothing() -> None:
    qat = oracle.chain_graph(nn.Sequential(nn.Linear(8, 8)), CONFIG)
    assert BlendWeights()(qat).modified
    assert not BlendWeights()(qat).modified
    tbn.set_tiling_strength(qat, 1)
    assert RemoveBlends()(qat).modified
    assert not RemoveBlends()(qat).modified
    assert "tiling_strength" not in qat.state_dict()
    assert targets(qat)[:2] == [torch.ops.tbn.tile.default, torch.ops.tbn.scale.default]


@both_forms
def test_transforming_twice_changes_nothing(transform: Any) -> None:
    qat = transform(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), GRADUAL)
    tbn.set_tiling_strength(qat, 0.5)
    again = tbn.transform(qat, GRADUAL.replace(p=2))
    assert codes(again) == codes(qat)
    assert list(again.state_dict()) == list(qat.state_dict())
    assert tbn.tiling_strength(again) == 0.5


@both_forms
def test_blended_module_as_part_of_another_model(transform: Any) -> None:
    """Its blends keep their own strength; those of the outer layers get another. Both move together."""
    inner = transform(nn.Sequential(nn.Linear(8, 8)), GRADUAL)
    tbn.set_tiling_strength(inner, 0.5)
    qat = tbn.transform(nn.Sequential(inner, nn.Linear(8, 8)), GRADUAL)
    place = "0" if transform is oracle.whole_graph else "0.0"
    strengths = {key: float(value) for key, value in qat.state_dict().items() if "strength" in key}
    assert strengths == {f"{place}.tiling_strength": 0.5, "1.tiling_strength": 0}
    assert tbn.tiling_strength(qat) == 0
    tbn.set_tiling_strength(qat, 1)
    x = torch.randn(3, 8)
    packed = tbn.lower(qat)
    assert not any("strength" in key for key in packed.state_dict())
    oracle.assert_close(packed(x), qat(x))


@pytest.mark.parametrize("strength", [0.0, 0.375, 1.0])
@both_forms
def test_gradients_by_both_paths(transform: Any, strength: float) -> None:
    """``(1 - s) g + s alpha g`` for the weight, ``s`` times the usual gradient for the alpha source."""
    qat = transform(nn.Sequential(nn.Linear(6, 8)).double(), GRADUAL)
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
    qat = oracle.whole_graph(nn.Sequential(nn.Linear(64, 64)), GRADUAL)
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


class Read(nn.Module):
    """Its weight is used by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.w)


@pytest.mark.parametrize("build", [lambda: nn.Linear(8, 8), Read], ids=["layer", "parameter"])
def test_name_that_is_taken(build: Any) -> None:
    """The strength stands at the module whose weights it blends."""
    owner = build()
    owner.register_buffer("tiling_strength", torch.ones(()))
    with pytest.raises(TransformError, match=f"{type(owner).__name__} has an attribute 'tiling_strength'"):
        tbn.transform(nn.Sequential(owner), GRADUAL)
    assert "0.tiling_strength" in tbn.transform(nn.Sequential(owner), CONFIG).state_dict()


def test_name_that_is_taken_in_a_graph() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8)))
    gm.register_buffer("tiling_strength", torch.ones(()))
    with pytest.raises(TransformError, match="has an attribute 'tiling_strength'"):
        tbn.transform(gm, GRADUAL)
    assert "tiling_strength" in tbn.transform(gm, CONFIG).state_dict()


@both_forms
def test_meta_model(transform: Any) -> None:
    with torch.device("meta"):
        qat = transform(nn.Sequential(nn.Linear(8, 8)), GRADUAL)
    (strength,) = (buffer for key, buffer in qat.named_buffers() if "tiling_strength" in key)
    assert strength.is_meta
    assert "0.weight_tile" in tbn.lower(qat).state_dict()
