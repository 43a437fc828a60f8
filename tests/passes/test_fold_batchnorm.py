from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.compiler import optimize
from tbn_compiler.passes import FoldBatchNorm
from tests import oracle
from tests.passes.deployed import check, lowered, modifies, modules_called, note

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def folded(module: nn.Module) -> list[str]:
    return [key for key in module.state_dict() if "_folded_" in key]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("alpha", ["layer", "tile"])
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
def test_norm_goes_into_alphas_and_bias(dims: int, alpha: str, affine: bool, bias: bool) -> None:
    if dims:
        layer = _CONVS[dims](4, 8, 3, bias=bias)
        model, x = nn.Sequential(layer, _NORMS[dims](8, affine=affine), nn.ReLU()), torch.randn(2, 4, *(5,) * dims)
    else:
        model = nn.Sequential(nn.Linear(12, 8, bias=bias), nn.BatchNorm1d(8, affine=affine), nn.ReLU())
        x = torch.randn(4, 12)
    optimized = check(lowered(model, alpha=alpha), x)
    assert modules_called(optimized) == ["ReLU"]
    # The whole state: the tile, one alpha and one bias per row.
    assert list(optimized.state_dict()) == ["0.weight_tile", "0.weight_folded_alpha", "0.weight_folded_bias"]
    assert oracle.state_bytes(optimized) == -(-optimized.meta["tbn_layers"][0].spec.layout.tile_size // 8) + 2 * 4 * 8
    # The rows are still shared.
    assert tbn.summary(optimized).totals["macs_tiled"] == tbn.summary(lowered(model)).totals["macs"] // 4


@given(
    st.sampled_from([(8, 8), (8, 12), (6, 8), (10, 4), (5, 16)]),
    st.sampled_from([1, 2, 4, 8, (2, 2), (4, 2)]),
    st.sampled_from(["layer", "output", "tile"]),
    st.sampled_from(["repeat", "roll"]),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_any_layout(shape: tuple[int, int], p: Any, alpha: str, replicate: str, groups: int, bias: bool) -> None:
    outputs, inputs = shape
    groups = 1 if outputs % 2 else groups
    if isinstance(p, tuple):
        replicate = "repeat"
    layer = nn.Conv2d(inputs, outputs, 3, groups=groups, bias=bias)
    packed = lowered(nn.Sequential(layer, nn.BatchNorm2d(outputs)), p=p, alpha=alpha, replicate=replicate)
    optimized = check(packed, torch.randn(2, inputs, 4, 4))
    record = packed.meta["tbn_layers"][0]
    if record.spec is None:
        return
    # Exactly the layers whose alphas change within a row are refused, and those where their number is ambiguous.
    layout, count = record.spec.layout, record.spec.num_alphas
    mixed = layout.alphas_in(count) > 1 or not (count in (1, outputs) or layout.aligned)
    ambiguous = layout.p_in > 1 and layout.p == outputs
    assert bool(folded(optimized)) is not (mixed or ambiguous)
    assert ("is not folded" in note(optimized, "0")) is (mixed or ambiguous)


def test_functional_norm() -> None:
    class Net(nn.Module):
        mean: Tensor
        var: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 8, 3)
            self.gamma, self.beta = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))
            self.register_buffer("mean", torch.randn(8))
            self.register_buffer("var", torch.rand(8) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var, self.gamma, self.beta, self.training, eps=1e-3)

    packed = lowered(Net())
    optimized = check(packed, torch.randn(2, 4, 6, 6))
    assert len(folded(optimized)) == 2
    assert not {"gamma", "beta", "mean", "var"} & set(optimized.state_dict())
    # The rank is not known without inputs, and the function takes any.
    assert not folded(optimize(packed))


class Shared(nn.Module):
    """One convolution before two norms, and one norm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.a, self.b = nn.BatchNorm2d(8), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.other(self.b(self.conv(self.a(self.conv(x)).relu())).relu()))


def test_shared_layers_and_norms() -> None:
    optimized = check(lowered(Shared()), torch.randn(2, 8, 5, 5))
    assert modules_called(optimized) == []
    names = {"conv.weight_folded_alpha", "conv.weight_folded_bias"}
    names |= {f"{name}_1" for name in names} | {"other.weight_folded_alpha", "other.weight_folded_bias"}
    assert set(folded(optimized)) == names
    assert set(optimized.state_dict()) == names | {"conv.weight_tile", "other.weight_tile"}


def test_norm_and_alphas_that_are_used_elsewhere_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(self.conv(x))) + self.norm(x)

    optimized = check(lowered(Net()), torch.randn(2, 8, 5, 5))
    assert len(folded(optimized)) == 2
    assert modules_called(optimized) == ["BatchNorm2d"]
    assert {"conv.weight_alpha", "conv.bias", "norm.weight"} <= set(optimized.state_dict())


# Refusals


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


def test_result_with_another_reader() -> None:
    optimized = check(lowered(Branch()), torch.randn(2, 4, 6, 6))
    assert not folded(optimized)
    assert "BatchNorm2d 'norm' is not folded: the layer's result has another reader" in note(optimized, "conv")


def test_norm_without_running_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    optimized = check(lowered(model), torch.randn(2, 4, 6, 6))
    assert "it has no running statistics" in note(optimized, "0")


def test_norm_in_training_mode() -> None:
    packed = lowered(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)))
    packed.get_submodule("1").train()
    assert not modifies(FoldBatchNorm(), packed)
    assert "it is in training mode" in note(packed, "0")


def test_norm_with_hooks() -> None:
    packed = lowered(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)))
    packed.get_submodule("1").register_forward_hook(lambda module, inputs, output: output * 2)
    assert "the module has hooks" in note(check(packed, torch.randn(2, 4, 6, 6)), "0")


def test_linear_features_are_axis_1_of_a_matrix_only() -> None:
    """``[N, C, L]`` with as many channels as features: the shapes fit, the axis is another."""
    packed = lowered(nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8)))
    assert folded(check(packed, torch.randn(5, 12)))
    optimized = check(packed, torch.randn(5, 8, 12))
    assert not folded(optimized)
    assert "normalises axis 1, but the layer's outputs lie along axis -1" in note(optimized, "0")
    assert "give example_inputs" in note(optimize(packed), "0")


def test_unbatched_convolution() -> None:
    """``BatchNorm1d`` takes the ``[C, L]`` of an unbatched convolution for ``[N, C]``."""
    packed = lowered(nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)))
    assert not folded(check(packed, torch.randn(4, 10)))
    assert folded(check(packed, torch.randn(2, 4, 10)))


def test_norm_of_another_size_is_not_folded() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.cat([self.conv(x), self.conv(x)], 1))

    assert not folded(check(lowered(Net()), torch.randn(2, 4, 6, 6)))


def test_norm_behind_a_float_layer_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    packed = lowered(model, float_layers=("2",))
    optimized = check(packed, torch.randn(2, 4, 8, 8))
    assert modules_called(optimized) == ["ReLU", "Conv2d", "BatchNorm2d"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch, when it copies an exported graph
def test_exported_graph() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU()).eval()
    x = torch.randn(4, 12)
    exported = torch.export.export(model, (x,)).module()
    packed = lowered(fx.GraphModule(exported, exported.graph))
    assert any(node.target is torch.ops.aten.batch_norm.default for node in packed.graph.nodes)
    assert len(folded(optimize(packed))) == 2  # the graph brings its shapes
    check(packed, x)


def test_half_precision_statistics() -> None:
    packed = lowered(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8))).half()
    x = torch.randn(2, 4, 6, 6).half()
    optimized = optimize(packed, x)
    assert folded(optimized)
    oracle.assert_close(optimized(x), packed(x), rtol=5e-3)
