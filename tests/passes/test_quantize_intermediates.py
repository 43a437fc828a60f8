"""Values between layers in int8: which ones, with which scales, and what they are then."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import ConfigError

_QUANTIZE = torch.ops.tbn.quantize_input.default


class Block(nn.Module):
    """A residual block between two layers; the sum is also a result of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.stem(x))
        total = torch.relu(x + self.first(x))
        return self.last(total), total.softmax(1)


def _packed(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return tbn.lower(tbn.transform(model.eval(), tbn.TilingConfig(min_size=0, p=2)))


def _optimized(model: nn.Module, shape: tuple[int, ...] = (4, 6, 6)) -> tuple[fx.GraphModule, Tensor]:
    packed = _packed(model)
    batch = torch.randn(16, *shape)
    result = tbn.optimize(packed, batch[:2], activation="int8", calibration=[batch], intermediates="int8")
    assert isinstance(result, fx.GraphModule)
    return result, batch


def _rounded(gm: fx.GraphModule) -> dict[str, tuple[float, list[fx.Node]]]:
    """Scale and readers of each value that is rounded, by the name of what makes it."""
    found = {}
    for node in gm.graph.find_nodes(op="call_function", target=_QUANTIZE):
        source, activation, _, scale = node.args
        assert activation == "int8"
        found[source.name] = (float(gm.get_buffer(scale.target)), list(node.users))
    return found


def test_values_that_a_sum_reads_are_rounded() -> None:
    gm, _ = _optimized(Block())
    found = _rounded(gm)
    # The stem's result, which the first layer reads too, and the first layer's; not the sum, which a layer quantises.
    assert len(found) == 2
    assert all(any(user.target is torch.ops.aten.add.Tensor for user in users) for _, users in found.values())
    softmax = next(node for node in gm.graph.nodes if "softmax" in str(node.target))
    assert softmax.args[0].target is torch.ops.aten.relu.default  # stays a float


def test_a_value_has_the_scale_of_the_layer_that_reads_it() -> None:
    gm, _ = _optimized(Block())
    scale = float(gm.get_buffer("first.weight_input_scale"))
    assert scale in [found for found, _ in _rounded(gm).values()]


def test_the_result_is_near_that_of_floats() -> None:
    model = Block()
    gm, batch = _optimized(model)
    with torch.no_grad():
        for have, want in zip(gm(batch), _packed(model)(batch), strict=True):
            assert (have - want).norm() <= 0.03 * want.norm()
            assert (have != want).any()


def test_means_joins_and_functions_round_what_they_read() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 1), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            joined = torch.cat([torch.sigmoid(self.a(x)), nn.functional.max_pool2d(self.b(x), 3, 1, 1)], 1)
            return self.c(joined.mean((2, 3)))

    gm, _ = _optimized(Mixed())
    # Both convolutions, the sigmoid behind one of them, and the join, of which the mean is taken.
    assert len(_rounded(gm)) == 4


def test_nothing_is_rounded_where_only_layers_read() -> None:
    gm, _ = _optimized(nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)))
    assert _rounded(gm) == {}


def test_a_copy_computes_the_same() -> None:
    gm, batch = _optimized(Block())
    torch.testing.assert_close(copy.deepcopy(gm)(batch), gm(batch), rtol=0, atol=0)


def test_a_value_that_is_always_zero_stays_a_float() -> None:
    model = Block()
    nn.init.constant_(model.stem.bias, -1e4)
    gm, _ = _optimized(model)
    assert len(_rounded(gm)) == 1
    assert all(buffer.isfinite().all() for buffer in gm.buffers())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"intermediates": "int4"}, "neither 'float' nor 'int8'"),
        ({"intermediates": "int8"}, "takes example inputs, activation='int8' and calibration batches"),
        ({"intermediates": "int8", "activation": "int8"}, "calibration batches"),
    ],
)
def test_what_is_missing_is_said(options: dict[str, str], message: str) -> None:
    packed = tbn.lower(tbn.transform(nn.Linear(8, 8), tbn.TilingConfig(min_size=0)))
    with pytest.raises(ConfigError, match=message):
        tbn.optimize(packed, torch.randn(1, 8), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("intermediates", ["float", "int8"])
def test_results_are_rounded_where_they_are_wanted_so(intermediates: str) -> None:
    """Each with its own scale; what passes between layers is another question. Inputs stay what they are."""

    class Results(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
            last, weights = super().forward(x)
            return last, weights, last.argmax(1), x

    packed, batch = _packed(Results()), torch.randn(16, 4, 6, 6)
    gm = tbn.optimize(
        *(packed, batch[:2]),
        activation="int8",
        calibration=[batch],
        intermediates=intermediates,  # type: ignore[arg-type]
        outputs="int8",
    )
    assert isinstance(gm, fx.GraphModule)
    makers = gm.graph.output_node().all_input_nodes
    assert [node.target is _QUANTIZE for node in makers] == [True, True, False, False]
    assert len(_rounded(gm)) == (2 if intermediates == "float" else 4)
    for node, result in zip(makers[:2], gm(batch), strict=False):
        steps = result / gm.get_buffer(node.args[3].target)
        torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
        assert steps.abs().max() <= 127.001
        assert steps.abs().max() >= 64
    assert gm(batch)[2].dtype == torch.int64


def test_results_in_int8_take_what_intermediates_do() -> None:
    packed = _packed(nn.Sequential(nn.Linear(8, 8)))
    with pytest.raises(ConfigError, match="outputs='int8' takes example inputs, activation='int8' and calibration"):
        tbn.optimize(packed, torch.randn(1, 8), outputs="int8")
    with pytest.raises(ConfigError, match="outputs='int4' is neither 'float' nor 'int8'"):
        tbn.optimize(packed, torch.randn(1, 8), outputs="int4")  # type: ignore[arg-type]
