"""The methods to compare with: values, gradients, counted bits, and that they train."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from paper import baselines
from paper.baselines import METHODS, XNOR, IRNet, SubBitKernels, Ternary, estimators, plain_state, quantise

import tbn_compiler as tbn

# The first and the last layer stay in float, as in the methods' papers; the linear layer between is made binary.
CONFIG = tbn.TilingConfig(p=4, min_size=1100, float_layers=("0", "6"), overrides={"5": {"min_size": 10_000}})


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 32), nn.Linear(32, 4)
    )


def test_xnor_is_a_sign_and_the_mean_magnitude_of_a_filter() -> None:
    weight = torch.randn(4, 3, 3, 3)
    found = XNOR()(weight)
    for filter, used in zip(weight, found, strict=True):
        assert torch.equal(used, filter.abs().mean() * torch.where(filter > 0, 1.0, -1.0))


@pytest.mark.parametrize(("median", "scale"), [(False, 2.5), (True, 2.0)])
def test_ternary_rounds_to_the_scale(median: bool, scale: float) -> None:
    weight = torch.tensor([[0.5, -1.5, 2.0, 6.0, -2.5]])
    expected = torch.tensor([[0.0, -1, 1, 1, -1]]) * scale
    torch.testing.assert_close(Ternary(median)(weight), expected)


def test_irnet_balances_filters_and_scales_by_powers_of_two() -> None:
    weight = torch.randn(4, 64, dtype=torch.float64) + 3  # all positive: a plain sign would tell nothing
    found = IRNet()(weight)
    assert torch.equal(found.sign(), (weight - weight.mean(1, keepdim=True)).sign())
    exponents = found.abs().log2()
    assert torch.equal(exponents, exponents.round())


@pytest.mark.parametrize(("progress", "t"), [(0.0, 0.1), (0.5, 1.0), (1.0, 10.0)])
def test_error_decay_goes_from_the_identity_to_a_step(progress: float, t: float) -> None:
    x = torch.tensor([-1.5, -0.1, 0.0, 0.2], dtype=torch.float64, requires_grad=True)
    estimator = IRNet()
    estimator.set_progress(progress)
    assert estimator.t.item() == pytest.approx(t)
    values = baselines.error_decay(x, estimator.t.double())
    assert values.tolist() == [-1, -1, -1, 1]
    values.sum().backward()
    expected = [max(1 / t, 1) * t / math.cosh(t * value) ** 2 for value in x.tolist()]
    torch.testing.assert_close(x.grad, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def test_sub_bit_kernels_are_the_nearest_of_the_subset() -> None:
    weight = torch.randn(5, 4, 3, 3)
    subset = SubBitKernels(weight, index_bits=3)
    signs = torch.where(subset.patterns > 0, 1.0, -1.0)
    assert signs.unique(dim=0).shape == (8, 9)
    found = subset(weight)
    for filter, used in zip(weight, found, strict=True):
        for kernel, chosen in zip(filter, used / filter.abs().mean(), strict=True):
            distances = (signs - kernel.flatten()).square().sum(1)
            torch.testing.assert_close(chosen.flatten(), signs[distances.argmin()])


@pytest.mark.parametrize("method", METHODS)
def test_methods_train(method: baselines.Method) -> None:
    torch.manual_seed(0)
    model = net()
    quantise(model, method, CONFIG)
    x, y = torch.randn(32, 3, 6, 6), torch.arange(32) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        for estimator in estimators(model):
            estimator.set_progress(step / 40)
        loss: Tensor = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


CONVOLUTION, LINEAR, OUTER = 16 * 8 * 9, 64 * 32, 3 * 8 * 9 + 32 * 4


@pytest.mark.parametrize(
    ("method", "bits", "alphas"),
    [
        ("xnor", CONVOLUTION + LINEAR, 16 + 32),
        ("irnet", CONVOLUTION + LINEAR, 16 + 32),
        ("ternary-mean", math.ceil(CONVOLUTION * math.log2(3)) + math.ceil(LINEAR * math.log2(3)), 2),
        ("ternary-median", math.ceil(CONVOLUTION * math.log2(3)) + math.ceil(LINEAR * math.log2(3)), 2),
        ("snn", 16 * 8 * 5 + 32 * 9 + LINEAR, 16 + 32),  # places and the subset; signs
    ],
)
def test_what_is_stored(method: baselines.Method, bits: int, alphas: int) -> None:
    model = net()
    totals = quantise(model, method, CONFIG)
    weights = CONVOLUTION + LINEAR + OUTER
    assert totals == {
        "weights": weights,
        "stored_bits": bits + 32 * OUTER,
        "bits_per_weight": (bits + 32 * OUTER) / weights,
        "alphas": alphas,
        "tiled_layers": 2,
    }
    quantised = [name for name, module in model.named_modules() if parametrize.is_parametrized(module, "weight")]
    assert quantised == ["2", "5"]


def test_sub_bit_kernels_are_where_tiles_are() -> None:
    model = net()
    totals = quantise(model, "snn", tbn.TilingConfig(p=4, min_size=CONVOLUTION + 1, overrides={"0": {"p": 2}}))
    assert [type(model.get_submodule(f"{place}.parametrizations.weight.0")) for place in (0, 2, 5)] == [
        SubBitKernels,  # by its override
        XNOR,
        XNOR,
    ]
    assert totals["stored_bits"] == 3 * 8 * 5 + 32 * 9 + CONVOLUTION + LINEAR + 32 * 4


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x, x, x, need_weights=False)[0]
        return result


def test_projections_of_an_attention_are_layers_of_their_own() -> None:
    model = Attention()
    with torch.no_grad():
        model.inner.in_proj_weight[8:16] *= 10
    before = model.inner.in_proj_weight.detach().clone()
    totals = quantise(model, "ternary-mean", tbn.TilingConfig(p=4, min_size=1))
    assert totals["tiled_layers"] == totals["alphas"] == 4
    assert totals["stored_bits"] == 4 * math.ceil(64 * math.log2(3))
    found = model.inner.in_proj_weight
    for place in (0, 8, 16):
        part = before[place : place + 8]
        torch.testing.assert_close(found[place : place + 8], Ternary(median=False)(part), rtol=0, atol=0)


def test_an_attention_is_left_in_float_as_tiling_leaves_it() -> None:
    model = Attention()
    totals = quantise(model, "xnor", tbn.TilingConfig(p=4, min_size=1, float_layers=("*_2",)))
    assert not parametrize.is_parametrized(model.inner)
    assert parametrize.is_parametrized(model.inner.out_proj, "weight")
    assert totals["stored_bits"] == 64 + 32 * 3 * 64


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("build", [net, Attention])
def test_the_plain_state_is_the_float_networks(build: type[nn.Module], method: baselines.Method) -> None:
    model = build()
    names = set(model.state_dict())
    quantise(model, method, tbn.TilingConfig(p=4, min_size=1))
    state = plain_state(model)
    assert set(state) == names
    plain = build()
    plain.load_state_dict(state)
    x = torch.randn(2, 3, 6, 6) if build is net else torch.randn(2, 3, 8)
    torch.testing.assert_close(plain(x), model(x), rtol=0, atol=0)


def test_the_choice_of_kernels_is_that_without_autocast() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 32, 3, 3)
    subset = SubBitKernels(weight)
    with torch.autocast("cpu", torch.bfloat16):
        found = subset(weight)
    assert torch.equal(found, subset(weight))


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(ValueError, match="is not one of xnor, irnet"):
        quantise(net(), "dorefa", CONFIG)  # type: ignore[arg-type]
    with pytest.raises(tbn.TransformError, match="nothing to tile in ReLU"):
        quantise(nn.ReLU(), "xnor", CONFIG)
    transposed = nn.Sequential(nn.ConvTranspose2d(8, 8, 3))
    with pytest.raises(ValueError, match="0 is a conv_transpose2d: the methods are for linear layers and convolutions"):
        quantise(transposed, "xnor", tbn.TilingConfig(p=4))
