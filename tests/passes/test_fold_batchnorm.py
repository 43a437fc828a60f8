from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.compiler import optimize
from tbn_compiler.graph.records import get_records
from tbn_compiler.passes import FoldBatchNorm
from tests import oracle
from tests.oracle import both_forms
from tests.passes.deployed import called, check, lowered, modifies, note, optimized

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}

# What each form of a graph calls.
NORM_NAMES = {oracle.whole_graph: "BatchNorm2d", tbn.transform: "batch_norm"}


def folded(module: nn.Module) -> list[str]:
    return [key for key in module.state_dict() if "_folded_" in key]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("alpha", ["layer", "tile"])
@pytest.mark.parametrize("dims", [0, 1, 2, 3])
@both_forms
def test_norm_goes_into_alphas_and_bias(transform: Any, dims: int, alpha: str, affine: bool, bias: bool) -> None:
    if dims:
        layer = _CONVS[dims](4, 8, 3, bias=bias)
        model, x = nn.Sequential(layer, _NORMS[dims](8, affine=affine), nn.ReLU()), torch.randn(2, 4, *(5,) * dims)
    else:
        model = nn.Sequential(nn.Linear(12, 8, bias=bias), nn.BatchNorm1d(8, affine=affine), nn.ReLU())
        x = torch.randn(4, 12)
    packed = lowered(model, transform, alpha=alpha)
    result = check(packed, x)
    assert called(result) == []  # the function is inside the layer, too
    # The whole state: the tile, one alpha and one bias per row.
    assert set(oracle.tensors(result)) == {"0.weight_tile", "0.weight_folded_alpha", "0.weight_folded_bias"}
    (record,) = get_records(result) or ()
    assert record.spec is not None
    assert oracle.state_bytes(result) == -(-record.spec.layout.tile_size // 8) + 2 * 4 * 8
    # The rows are still shared.
    assert tbn.summary(result).totals["macs_tiled"] == tbn.summary(packed).totals["macs"] // 4


@pytest.mark.filterwarnings("ignore:the tiled layers keep 1.000 bits")  # where no axis has the divisor
@given(
    st.sampled_from([(8, 8), (8, 12), (6, 8), (10, 4), (5, 16)]),
    st.sampled_from([1, 2, 4, 8, (2, 2), (4, 2)]),
    st.sampled_from(["layer", "output", "tile"]),
    st.sampled_from(["repeat", "roll", "hadamard"]),
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
    result = check(packed, torch.randn(2, inputs, 4, 4))
    (record,) = get_records(packed) or ()
    if record.spec is None:
        return
    # Exactly the layers whose alphas change within a row are refused, and those where their number is ambiguous.
    layout, count = record.spec.layout, record.spec.num_alphas
    mixed = layout.alphas_in(count) > 1 or not (count in (1, outputs) or layout.aligned)
    ambiguous = layout.p_in > 1 and layout.p == outputs
    assert bool(folded(result)) is not (mixed or ambiguous)
    assert ("is not folded" in note(result, "0")) is (mixed or ambiguous)


@both_forms
def test_functional_norm(transform: Any) -> None:
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

    packed = lowered(Net(), transform)
    result = check(packed, torch.randn(2, 4, 6, 6))
    assert len(folded(result)) == 2
    assert not {"gamma", "beta", "mean", "var"} & set(result.state_dict())
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


@both_forms
def test_shared_layers_and_norms(transform: Any) -> None:
    result = check(lowered(Shared(), transform), torch.randn(2, 8, 5, 5))
    assert called(result) == []
    names = {"conv.weight_folded_alpha", "conv.weight_folded_bias"}
    names |= {f"{name}_1" for name in names} | {"other.weight_folded_alpha", "other.weight_folded_bias"}
    assert set(folded(result)) == names
    assert set(oracle.tensors(result)) == names | {"conv.weight_tile", "other.weight_tile"}


@both_forms
def test_norm_and_alphas_that_are_used_elsewhere_stay(transform: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(self.conv(x))) + self.norm(x)

    result = check(lowered(Net(), transform), torch.randn(2, 8, 5, 5))
    assert len(folded(result)) == 2
    assert called(result) == [NORM_NAMES[transform], "add"]
    assert {"conv.weight_alpha", "conv.bias", "norm.weight"} <= set(result.state_dict())


# Refusals


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y


@both_forms
def test_result_with_another_reader(transform: Any) -> None:
    result = check(lowered(Branch(), transform), torch.randn(2, 4, 6, 6))
    assert not folded(result)
    norm = "BatchNorm2d 'norm'" if transform is oracle.whole_graph else "batch_norm.default (node 'batch_norm')"
    assert f"{norm} is not folded: the layer's result has another reader" in note(result, "conv")


@both_forms
@pytest.mark.parametrize("alpha", ["layer", "tile"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_norm_behind_a_transpose_convolution(transform: Any, dims: int, alpha: str) -> None:
    """As many outputs as inputs: folded as behind another convolution, the norm would scale the wrong axis."""
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1](8, 8, 3, stride=2)
    result = check(
        lowered(nn.Sequential(layer, _NORMS[dims](8)), transform, alpha=alpha), torch.randn(2, 8, *(4,) * dims)
    )
    assert not folded(result)
    norm = f"BatchNorm{dims}d '1'" if transform is oracle.whole_graph else "batch_norm.default (node 'batch_norm')"
    reason = "the alphas of a transpose convolution belong to its inputs, not to its outputs"
    assert note(result, "0") == f"{norm} is not folded: {reason}"


@both_forms
def test_norm_without_running_statistics(transform: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8, track_running_stats=False))
    result = check(lowered(model, transform), torch.randn(2, 4, 6, 6))
    assert "it has no running statistics" in note(result, "0")


def test_norm_in_training_mode() -> None:
    packed = lowered(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)))
    packed.get_submodule("1").train()
    assert not modifies(FoldBatchNorm(), packed)
    assert "it is in training mode" in note(packed, "0")


def test_norm_with_hooks() -> None:
    packed = lowered(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)))
    packed.get_submodule("1").register_forward_hook(lambda module, inputs, output: output * 2)
    assert "the module has hooks" in note(check(packed, torch.randn(2, 4, 6, 6)), "0")


@both_forms
def test_linear_features_are_axis_1_of_a_matrix_only(transform: Any) -> None:
    """``[N, C, L]`` with as many channels as features: the shapes fit, the axis is another."""
    packed = lowered(nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8)), transform)
    assert folded(check(packed, torch.randn(5, 12)))
    result = check(packed, torch.randn(5, 8, 12))
    assert not folded(result)
    assert "normalises axis 1, but the layer's outputs lie along axis -1" in note(result, "0")


def test_a_rank_that_is_not_known() -> None:
    packed = lowered(nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8)))
    assert "give example_inputs" in note(optimize(packed), "0")
    assert not folded(optimize(packed))


@both_forms
def test_unbatched_convolution(transform: Any) -> None:
    """``BatchNorm1d`` takes the ``[C, L]`` of an unbatched convolution for ``[N, C]``."""
    packed = lowered(nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)), transform)
    assert not folded(check(packed, torch.randn(4, 10)))
    assert folded(check(packed, torch.randn(2, 4, 10)))


@both_forms
def test_norm_of_another_size_is_not_folded(transform: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 8, 3), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(torch.cat([self.conv(x), self.conv(x)], 1))

    assert not folded(check(lowered(Net(), transform), torch.randn(2, 4, 6, 6)))


@both_forms
def test_norm_behind_a_float_layer_is_left_alone(transform: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    packed = lowered(model, transform, float_layers=("2",))
    result = check(packed, torch.randn(2, 4, 8, 8))
    assert called(result) == ["Conv2d" if transform is oracle.whole_graph else "conv2d", NORM_NAMES[transform]]


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch, when it copies an exported graph
def test_graph_of_torch_export() -> None:
    """A graph that the user has exported before it was tiled."""
    model = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU()).eval()
    x = torch.randn(4, 12)
    packed = tbn.lower(tbn.transform(torch.export.export(model, (x,)), tbn.TilingConfig(p=4, min_size=0)))
    assert any(node.target is torch.ops.aten.batch_norm.default for node in packed.graph.nodes)
    assert len(folded(optimize(packed))) == 2  # the graph brings its shapes
    oracle.assert_close(optimize(packed)(x), packed(x), rtol=1e-5)


@both_forms
def test_half_precision_statistics(transform: Any) -> None:
    packed = lowered(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)), transform).half()
    x = torch.randn(2, 4, 6, 6).half()
    result = optimized(packed, x)
    assert folded(result)
    oracle.assert_close(result(x), packed(x), rtol=5e-3)
