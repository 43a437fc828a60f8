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
from paper.baselines import METHODS, XNOR, IRNet, SubBitKernels, Ternary, quantise, set_progress, weight_bits


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
    baselines._ErrorDecay.apply(x, 0.1 * 10 ** (2 * progress)).sum().backward()
    expected = [max(1 / t, 1) * t / math.cosh(t * value) ** 2 for value in x.tolist()]
    torch.testing.assert_close(x.grad, torch.tensor(expected, dtype=torch.float64))


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
    model = quantise(net(), method)
    x, y = torch.randn(32, 3, 6, 6), torch.arange(32) % 4
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(40):
        set_progress(model, step / 40)
        loss: Tensor = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("method", "bits"),
    [("xnor", 1.0), ("irnet", 1.0), ("ternary-mean", math.log2(3)), ("ternary-median", math.log2(3))],
)
def test_bits(method: baselines.Method, bits: float) -> None:
    model = quantise(net(), method)
    assert weight_bits(model) == pytest.approx(bits)
    quantised = [name for name, module in model.named_modules() if parametrize.is_parametrized(module, "weight")]
    assert quantised == ["2", "5"]  # not the first and the last layer
    assert weight_bits(net()) == 32


def test_bits_of_sub_bit_kernels() -> None:
    convolution, linear = 16 * 8 * 9, 64 * 32
    expected = (convolution * 5 / 9 + linear) / (convolution + linear)
    assert weight_bits(quantise(net(), "snn")) == pytest.approx(expected)
    everything = quantise(net(), "snn", everything=True, index_bits=4)
    assert sum(parametrize.is_parametrized(module, "weight") for module in everything.modules()) == 4


def test_what_cannot_be_quantised() -> None:
    with pytest.raises(ValueError, match="is not one of xnor, irnet"):
        quantise(net(), "dorefa")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ReLU has no linear layers"):
        quantise(nn.ReLU(), "xnor")
