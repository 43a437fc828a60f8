from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import TransformError
from tbn_compiler.compiler import optimize
from tbn_compiler.graph.calls import tiled_call
from tests import oracle
from tests.oracle import both_forms
from tests.passes.deployed import check, lowered, macs, note

_CONVS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def reads(gm: fx.GraphModule) -> dict[str, int]:
    """Weight -> number of copies that its layer sums (1: it reads its inputs as they are)."""
    found = {}
    for node in gm.graph.nodes:
        call = tiled_call(node)
        if call is not None:
            factors = call.tensor(gm, "input_alpha")
            name = str(call.arguments["tile"].target).removesuffix(".weight_tile")
            found[name] = 1 if factors is None else factors.numel()
    return found


def savings(module: nn.Module, x: Tensor) -> dict[str, float]:
    """How many times fewer multiply-adds than in the dense model each layer takes."""
    return {row.name: (row.macs or 0) / (row.macs_tiled or 1) for row in tbn.summary(module, x).layers}


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, bias=False, **options)


def fc(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


# What it saves


@pytest.mark.parametrize("alpha", ["layer", "tile"])
@both_forms
def test_second_layer_of_the_papers_mlp_reads_32_values(transform: Any, alpha: str) -> None:
    packed = lowered(nn.Sequential(fc(784, 128), nn.ReLU(), fc(128, 10)), transform, alpha=alpha, min_size=64_000)
    x = torch.randn(5, 784)
    result = check(packed, x)
    first, second = (tiled_call(node) for node in result.graph.nodes if tiled_call(node))
    assert first is not None
    assert second is not None
    assert (first.arguments["out_features"], first.arguments["p"]) == (32, 1)
    assert second.arguments["in_features"] == 128
    assert reads(result) == {"0": 1, "2": 4}
    assert macs(packed, x) == {"0": 5 * 32 * 784, "2": 5 * 10 * 128}
    assert macs(result, x) == {"0": 5 * 32 * 784, "2": 5 * 10 * 32}
    assert tbn.summary(result).totals["macs_tiled"] == 32 * 784 + 10 * 32
    # One more small vector is stored; tiles and alphas keep their names.
    state = result.state_dict()
    assert set(oracle.tensors(result)) == set(oracle.tensors(packed)) | {"0.weight_unit_alpha"}
    assert all(torch.equal(tensor, state[key]) for key, tensor in oracle.tensors(packed).items())


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("alpha", ["layer", "tile"])
@both_forms
def test_bias_free_chains_save_p_twice(transform: Any, p: int, alpha: str) -> None:
    mlp = nn.Sequential(fc(32, 64), nn.ReLU(), fc(64, 64), nn.LeakyReLU(0.1), fc(64, 32))
    x = torch.randn(3, 32)
    packed = lowered(mlp, transform, p=p, alpha=alpha)
    saved = savings(check(packed, x), x)
    assert saved == {"0": p, "2": p * p, "4": p * p}

    chain = nn.Sequential(conv(8, 16), nn.ReLU(), nn.MaxPool2d(2), conv(16, 32, padding="same"), nn.ReLU())
    chain.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), fc(32, 16)])
    x = torch.randn(2, 8, 12, 12)
    packed = lowered(chain, transform, p=p, alpha=alpha)
    saved = savings(check(packed, x), x)
    assert saved == {"0": p, "3": p * p, "7": p * p}


# What carries copies on. Each entry stands between two layers: function, whether scaled copies pass (not only equal).


class Between(nn.Module):
    """Two convolutions of ``dims`` dimensions, or two linear layers (0), with something between."""

    def __init__(self, dims: int, between: Callable[[Tensor], Tensor], flat: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.first = _CONVS[dims](4, 8, 3, padding=1, bias=False) if dims else fc(8, 8)
        if flat or not dims:
            self.second = fc(flat or 8, 12)
        else:
            self.second = _CONVS[dims](8, 12, 3, padding=1, groups=groups)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


SIZES = {0: (3, 8), 1: (2, 4, 6), 2: (2, 4, 6, 6), 3: (2, 4, 4, 4, 4)}

BOTH: dict[str, tuple[int, Any, int]] = {
    "relu module": (2, nn.ReLU(), 0),
    "relu in place": (2, nn.ReLU(inplace=True), 0),
    "F.relu": (0, F.relu, 0),
    "torch.relu": (0, torch.relu, 0),
    "method relu": (1, lambda x: x.relu(), 0),
    "leaky relu": (2, nn.LeakyReLU(0.3), 0),
    "F.leaky_relu": (2, lambda x: F.leaky_relu(x, 0.2), 0),
    "max pool 1d": (1, nn.MaxPool1d(2), 0),
    "max pool": (2, nn.MaxPool2d(3, stride=2, padding=1), 0),
    "F.max_pool2d": (2, lambda x: F.max_pool2d(x, 2), 0),
    "average pool": (2, nn.AvgPool2d(3, 2, 1), 0),
    "F.avg_pool3d": (3, lambda x: F.avg_pool3d(x, 2), 0),
    "adaptive max pool": (3, nn.AdaptiveMaxPool3d(2), 0),
    "F.adaptive_avg_pool2d": (2, lambda x: F.adaptive_avg_pool2d(x, 3), 0),
    "dropout": (2, nn.Dropout(), 0),
    "identity": (2, nn.Identity(), 0),
    "contiguous": (2, lambda x: x.contiguous(), 0),
    "zero padding": (2, lambda x: F.pad(x, (1, 2, 0, 1)), 0),
    "reflection padding": (2, lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect"), 0),
    "flatten module": (2, nn.Flatten(), 8 * 36),
    "torch.flatten": (2, lambda x: torch.flatten(x, 1), 8 * 36),
    "method flatten": (1, lambda x: x.flatten(start_dim=-2), 8 * 6),
    "view": (2, lambda x: x.view(x.size(0), -1), 8 * 36),
    "reshape": (2, lambda x: x.reshape((x.shape[0], -1)), 8 * 36),
    "mean": (2, lambda x: x.mean((2, 3)), 8),
    "mean from the end": (2, lambda x: torch.mean(x, dim=(-1, -2)), 8),
    "mean with the dimensions kept": (2, lambda x: x.mean((2, 3), keepdim=True), 0),
    "mean of rows": (1, lambda x: x.mean(-1), 8),
    "flatten of spatial dimensions, mean": (2, lambda x: x.flatten(2).mean(-1), 8),
    "sum of two readers": (2, lambda x: x.relu() + F.avg_pool2d(x, 3, 1, 1), 0),
    "torch.add": (2, lambda x: torch.add(x.relu(), x), 0),
}
EQUAL: dict[str, tuple[int, Any, int]] = {
    "sigmoid": (2, nn.Sigmoid(), 0),
    "tanh": (0, torch.tanh, 0),
    "gelu": (0, F.gelu, 0),
    "relu6": (2, nn.ReLU6(), 0),
    "silu": (2, F.silu, 0),
    "padding with a number": (2, lambda x: F.pad(x, (1, 1, 1, 1), value=0.5), 0),
}
NEITHER: dict[str, tuple[int, Any, int]] = {
    "softmax over the copies": (0, lambda x: F.softmax(x, -1), 0),
    "pooling over the copies": (0, lambda x: F.max_pool1d(x, 2, 1, 1)[..., :8], 0),
    "padding of the copies": (0, lambda x: F.pad(x, (1, -1)), 0),
    "mean over all axes": (0, lambda x: x + x.mean(), 0),
    "mean over the copies": (2, lambda x: x + x.mean(1, keepdim=True), 0),
    "flatten in another order": (2, lambda x: x.permute(0, 2, 3, 1).flatten(1), 8 * 36),
    "flatten with the batch": (0, lambda x: x.flatten().view(3, 8), 0),
    "transpose": (1, lambda x: x.transpose(1, 2).transpose(1, 2), 0),
    "fixed view": (2, lambda x: x.view(-1, 8 * 36), 8 * 36),
    "sum with another value": (2, lambda x: x + torch.ones(8, 1, 1), 0),
    "sum with a number": (2, lambda x: x + 1, 0),
    "scaled sum": (2, lambda x: torch.add(x, x, alpha=2), 0),
    "slice": (2, lambda x: x[:, :, 1:], 0),
    "layer norm": (0, nn.LayerNorm(8), 0),
    "size of the copies": (2, lambda x: x.relu() * x.size(1), 0),
}


@pytest.mark.parametrize("name", [*BOTH, *EQUAL, *NEITHER])
@pytest.mark.parametrize("alpha", ["layer", "tile"])
@both_forms
def test_what_carries_copies_on(transform: Any, name: str, alpha: str) -> None:
    dims, between, flat = (BOTH | EQUAL | NEITHER)[name]
    x = torch.randn(SIZES[dims])
    result = check(lowered(Between(dims, between, flat), transform, alpha=alpha), x)
    carries = name in BOTH or (name in EQUAL and alpha == "layer")
    assert reads(result) == {"first": 1, "second": 4 if carries else 1}
    assert ("its copies are not carried on" in note(result, "first")) is not carries


# Residual networks


class Residual(nn.Module):
    def __init__(self, width: int = 16, bias: bool = False) -> None:
        super().__init__()
        self.stem = conv(4, width)
        self.a, self.b = conv(width, width, padding=1), nn.Conv2d(width, width, 3, padding=1, bias=bias)
        self.head = fc(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = (x + self.b(self.a(x).relu())).relu()
        return self.head(x.mean((2, 3)))


@both_forms
def test_residual_with_one_alpha_per_layer(transform: Any) -> None:
    """Copies with one alpha are equal whatever the alpha, so that two such values may be added."""
    x = torch.randn(2, 4, 8, 8)
    packed = lowered(Residual(), transform)
    result = check(packed, x)
    assert reads(result) == {"stem": 1, "a": 4, "b": 4, "head": 4}
    before, after = macs(packed, x), macs(result, x)
    assert after["stem"] == before["stem"]
    assert all(4 * after[name] == before[name] for name in ("a", "b", "head"))


@both_forms
def test_residual_with_different_factors_stops(transform: Any) -> None:
    result = check(lowered(Residual(), transform, alpha="tile"), torch.randn(2, 4, 8, 8))
    # Only `a` has no reader that adds.
    assert reads(result) == {"stem": 1, "a": 1, "b": 4, "head": 1}
    assert "adds copies with other factors" in note(result, "stem")
    assert "adds copies with other factors" in note(result, "b")


@both_forms
def test_bias_on_one_branch_stops_both(transform: Any) -> None:
    result = check(lowered(Residual(bias=True), transform), torch.randn(2, 4, 8, 8))
    assert reads(result) == {"stem": 1, "a": 1, "b": 4, "head": 1}
    assert "adds a value without copies" in note(result, "stem")
    assert "it has a bias" in note(result, "b")


@both_forms
def test_one_lost_branch_takes_the_other_along(transform: Any) -> None:
    """``y`` is read by the output, too: it keeps its copies, and then so does what is added to it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = fc(8, 8), fc(8, 8), fc(8, 8)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.b(x)
            return self.c(self.a(x) + y), y

    result = check(lowered(Net(), transform), torch.randn(3, 8))
    assert reads(result) == {"a": 1, "b": 1, "c": 1}
    assert "its result is an output" in note(result, "b")
    assert "adds a value that keeps its copies" in note(result, "a")


def test_equal_factors_of_two_layers_may_be_added() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = fc(8, 8), fc(8, 8), fc(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.a(x).relu() + self.b(x).relu())

    packed = lowered(Net(), alpha="tile")
    packed.get_buffer("b.weight_alpha").copy_(packed.get_buffer("a.weight_alpha"))
    assert reads(check(packed, torch.randn(3, 8)))["c"] == 4


# Producers and consumers


@both_forms
def test_layer_that_is_called_twice(transform: Any) -> None:
    """One call is carried, the other is an output: the buffers serve both."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = fc(8, 8), fc(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).relu()) + self.a(x * 2)

    for alpha in ("layer", "tile"):
        packed = lowered(Net(), transform, alpha=alpha)
        x = torch.randn(3, 8)
        result = check(packed, x)
        assert reads(result) == {"a": 1, "b": 4}
        assert macs(packed, x) == {"a": 2 * 3 * 2 * 8, "b": 3 * 2 * 8}
        assert macs(result, x) == {"a": 2 * 3 * 2 * 8, "b": 3 * 2 * 2}


@both_forms
def test_misaligned_tile_with_one_alpha_has_copies(transform: Any) -> None:
    """6 rows of 8 in 4 copies of 12: rows 0..2 differ, 3..5 repeat them."""
    model = nn.Sequential(fc(8, 6), nn.ReLU(), fc(6, 8))
    assert reads(check(lowered(model, transform), torch.randn(3, 8))) == {"0": 1, "2": 2}
    model = nn.Sequential(fc(8, 6), nn.ReLU(), fc(6, 8))
    result = check(lowered(model, transform, alpha="tile"), torch.randn(3, 8))
    assert reads(result) == {"0": 1, "2": 1}
    assert "its 4 alphas are not one for each of the 2 copies" in note(result, "0")


@pytest.mark.parametrize(("alpha", "count"), [("layer", 2), ("output", 2), ("tile", 1)])
@both_forms
def test_two_axis_tile_has_p_out_copies(transform: Any, alpha: str, count: int) -> None:
    model = nn.Sequential(fc(16, 8), nn.ReLU(), fc(8, 12))
    result = check(lowered(model, transform, p=(2, 2), alpha=alpha), torch.randn(3, 16))
    assert reads(result) == {"0": 1, "2": count}


@both_forms
def test_neighbours_in_different_copies_stop(transform: Any) -> None:
    """8 values in 4 copies of 2; the second layer sums 4 neighbours before it multiplies."""
    model = nn.Sequential(fc(16, 8), nn.ReLU(), fc(8, 16))
    packed = lowered(model, transform, p=4, overrides={"2": {"p": (2, 4)}})
    result = check(packed, torch.randn(3, 16))
    assert reads(result) == {"0": 1, "2": 1}
    assert "neighbouring inputs that share a weight of layer '2.weight'" in note(result, "0")


@both_forms
def test_groups_stop_copies(transform: Any) -> None:
    grouped = nn.Sequential(conv(8, 8, groups=2), nn.ReLU(), conv(8, 8))
    result = check(lowered(grouped, transform), torch.randn(2, 8, 6, 6))
    assert reads(result) == {"0": 1, "2": 1}
    assert "it has 2 groups" in note(result, "0")
    result = check(lowered(Between(2, nn.ReLU(), groups=2), transform), torch.randn(SIZES[2]))
    assert reads(result) == {"first": 1, "second": 1}
    assert "has 2 groups, which read different copies" in note(result, "first")


@both_forms
def test_negative_alpha_stops_copies(transform: Any) -> None:
    packed = lowered(nn.Sequential(fc(8, 8), nn.ReLU(), fc(8, 8)), transform, alpha="tile")
    packed.get_buffer("0.weight_alpha")[1] *= -1
    result = check(packed, torch.randn(3, 8))
    assert reads(result) == {"0": 1, "2": 1}
    assert "an alpha is negative" in note(result, "0")


@both_forms
@pytest.mark.parametrize("replicate", ["roll", "hadamard"])
def test_copies_that_differ_have_no_equal_rows(transform: Any, replicate: str) -> None:
    result = check(lowered(nn.Sequential(fc(8, 8), fc(8, 8)), transform, replicate=replicate), torch.randn(3, 8))
    assert reads(result) == {"0": 1, "1": 1}
    assert "not carried on" not in note(result, "0")


@pytest.mark.parametrize(("copies", "summed"), [(2, True), (4, False)])
@both_forms
def test_a_layer_with_signs_sums_copies_that_hold_whole_column_groups(
    transform: Any, copies: int, summed: bool
) -> None:
    """8 inputs in 4 column groups: each of 2 copies has all of them, of 4 only half."""
    layers = {"0": {"p": copies}, "1": {"p": 4, "replicate": "hadamard"}}
    packed = lowered(nn.Sequential(fc(8, 8), fc(8, 8)), transform, overrides=layers)
    result = check(packed, torch.randn(3, 8))
    assert reads(result) == {"0": 1, "1": copies if summed else 1}
    if not summed:
        assert "the column groups of layer '1.weight' do not lie alike in all copies" in note(result, "0")


@both_forms
def test_float_reader_stops_copies(transform: Any) -> None:
    packed = lowered(nn.Sequential(fc(8, 8), nn.ReLU(), fc(8, 8)), transform, float_layers=("2",))
    reader = "Linear '2'" if transform is oracle.whole_graph else "linear.default (node 'linear_1')"
    assert f"{reader} is not known to keep them" in note(check(packed, torch.randn(3, 8)), "0")


@both_forms
def test_features_are_not_channels(transform: Any) -> None:
    """A convolution reads a linear layer's features as positions, a linear layer a convolution's rows."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = fc(8, 8), nn.Conv1d(8, 8, 1, bias=False), fc(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    result = check(lowered(Net(), transform), torch.randn(2, 8, 8))
    assert reads(result) == {"a": 1, "b": 1, "c": 1}
    assert "layer 'b.weight' does not read them as its features" in note(result, "a")


def test_ranks_are_needed_to_flatten() -> None:
    packed = lowered(nn.Sequential(conv(4, 8), nn.ReLU(), nn.Flatten(), fc(8 * 16, 8)))
    assert reads(check(packed, torch.randn(2, 4, 6, 6))) == {"0": 1, "3": 4}
    result = optimize(packed)
    assert reads(result) == {"0": 1, "3": 1}
    assert "Flatten '2' takes axes of a value of unknown rank: give example_inputs" in note(result, "0")


@both_forms
def test_flatten_of_an_unbatched_value(transform: Any) -> None:
    """``[C, H, W]`` becomes ``[C, H * W]``: the copies lie along another axis than the next layer's features."""
    packed = lowered(nn.Sequential(conv(4, 8), nn.Flatten(), fc(16, 8)), transform)
    assert reads(check(packed, torch.randn(4, 6, 6))) == {"0": 1, "2": 1}


@both_forms
def test_leading_dimensions(transform: Any) -> None:
    packed = lowered(nn.Sequential(fc(8, 16), nn.ReLU(), fc(16, 8)), transform, alpha="tile")
    assert reads(check(packed, torch.randn(2, 3, 5, 8))) == {"0": 1, "2": 4}


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # torch, when it copies an exported graph
def test_exported_graph() -> None:
    model = nn.Sequential(conv(4, 8), nn.ReLU(), nn.MaxPool2d(2), conv(8, 8), nn.Flatten(), nn.Dropout(), fc(8, 8))
    x = torch.randn(2, 4, 8, 8)
    """A graph that the user has exported before it was tiled brings its shapes."""
    packed = tbn.lower(tbn.transform(torch.export.export(model.eval(), (x,)), tbn.TilingConfig(p=4, min_size=0)))
    result = optimize(packed)
    assert reads(result) == {"0": 1, "3": 4, "6": 4}
    oracle.assert_close(result(x), packed(x), rtol=1e-5)


# Random networks


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Sequential, tuple[int, ...]]:
    """A chain of layers, norms, activations, poolings and residual blocks, and the shape of its input."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims = draw(st.sampled_from([0, 0, 1, 2]))
    width, size = draw(st.sampled_from([8, 12])), 8
    shape = (2, width, *(size,) * dims)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(2, 4))):
        block, width = _layer(draw, dims, width)
        if draw(st.booleans()):
            block = _AddInput(block, _layer(draw, dims, width, outputs=width)[0])
        layers.append(block)
        if draw(st.integers(0, 3)) == 0:
            layers.append((nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d)[dims](width))
        layers.append(draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.2), nn.Tanh(), nn.Identity(), nn.Dropout()])))
    if dims:
        pools: list[nn.Module] = [nn.Identity(), (nn.MaxPool1d, nn.MaxPool2d)[dims - 1](2)]
        layers.append(draw(st.sampled_from(pools)))
        layers.append(nn.Flatten())
        with torch.no_grad():
            width = nn.Sequential(*layers).eval()(torch.zeros(shape)).shape[1]
    layers.append(nn.Linear(width, draw(st.sampled_from([6, 8])), bias=draw(st.booleans())))
    return nn.Sequential(*layers), shape


class _AddInput(nn.Module):
    """``x = first(x); x + second(relu(x))``."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + self.second(F.relu(x))


def _layer(draw: st.DrawFn, dims: int, inputs: int, outputs: int = 0) -> tuple[nn.Module, int]:
    outputs = outputs or draw(st.sampled_from([6, 8, 12, 16]))
    bias = draw(st.integers(0, 3)) == 0
    if not dims:
        return nn.Linear(inputs, outputs, bias=bias), outputs
    groups = 2 if inputs % 2 == outputs % 2 == draw(st.integers(0, 4)) else 1
    return _CONVS[dims](inputs, outputs, 3, padding=1, bias=bias, groups=groups), outputs


OPTIONS = st.fixed_dictionaries(
    {
        "p": st.sampled_from([1, 2, 3, 4, 8, (2, 2), (4, 2), (2, 4)]),
        "alpha": st.sampled_from(["layer", "output", "tile"]),
        "tile_dtype": st.sampled_from(["binary", "float"]),
        "replicate": st.sampled_from(["repeat", "repeat", "hadamard"]),
    }
).filter(lambda options: isinstance(options["p"], int) or options["replicate"] == "repeat")


@settings(max_examples=40)
@given(networks(), OPTIONS)
def test_random_networks(network: tuple[nn.Sequential, tuple[int, ...]], options: dict[str, Any]) -> None:
    check_savings(network, oracle.whole_graph, options)


@settings(max_examples=12)  # torch.export is slow
@given(networks(), OPTIONS)
def test_random_networks_exported(network: tuple[nn.Sequential, tuple[int, ...]], options: dict[str, Any]) -> None:
    check_savings(network, tbn.transform, options)


def check_savings(network: tuple[nn.Sequential, tuple[int, ...]], transform: Any, options: dict[str, Any]) -> None:
    """Results stay the same, and no network costs more than before."""
    model, shape = network
    x = torch.randn(shape)
    try:
        packed = lowered(model, transform, **options)
    except TransformError:  # p is too large for every layer
        reject()
    with torch.no_grad():
        assume(packed(x).any())  # not all of the values before the last layer are negative
    result = check(packed, x)
    assert tbn.summary(result, x).totals["macs_tiled"] <= tbn.summary(packed, x).totals["macs_tiled"]
    assert tbn.summary(result, x).totals["macs"] == tbn.summary(packed, x).totals["macs"]
