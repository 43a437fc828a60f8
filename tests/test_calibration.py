"""Alphas fitted to a float model: the least squares solution, layer after layer, in every form of a layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn


def network(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=bias), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 2, bias=bias),
        nn.Flatten(), nn.Linear(8 * 49, 32, bias=bias), nn.Tanh(), nn.Linear(32, 12, bias=bias),
    ).eval()  # fmt: skip


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 3, 6, 6, generator=generator) for _ in range(3)]


def tiled(model: nn.Module, **options: Any) -> nn.Module:
    return tbn.transform(model, tbn.TilingConfig(**{"p": 4, "min_size": 0} | options))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options", [{}, {"alpha": "tile"}, {"p": (2, 2), "alpha": "tile"}, {"latent": "tile"}, {"replicate": "roll"}]
)
def test_every_layer_gets_nearer_to_the_float_one(options: dict[str, Any], bias: bool) -> None:
    model = network(bias)
    qat = tiled(network(bias), **options).train()  # of equal weights; its biases are its own
    x = torch.cat(batches())
    before = (qat.eval()(x) - model(x)).square().mean()
    qat.train()
    fits = tbn.calibrate(qat, model, batches())
    assert qat.training
    assert [fit.name for fit in fits] == ["0", "3", "5", "7"]
    assert all(fit.after <= fit.before for fit in fits)
    assert fits[0].after < 0.9 * fits[0].before
    assert (qat.eval()(x) - model(x)).square().mean() < before


@pytest.mark.parametrize("alpha", ["layer", "tile"])
def test_alphas_are_the_least_squares_solution(alpha: Any) -> None:
    """Of the first layer, whose inputs are given: any other alphas are worse."""
    model = nn.Sequential(nn.Linear(24, 16, bias=False)).double()
    qat = tiled(model, alpha=alpha)
    x = torch.randn(200, 24, dtype=torch.float64)
    (fit,) = tbn.calibrate(qat, model, [x[:120], x[120:]])
    packed = tbn.lower(qat)
    best = packed.get_buffer("0.weight_alpha").clone()
    expected = model(x).detach()

    @torch.no_grad()
    def error() -> float:
        return float((packed(x) - expected).square().sum() / expected.square().sum())

    assert error() == pytest.approx(fit.after)
    for index in range(best.numel()):
        for factor in (0.99, 1.01):
            packed.get_buffer("0.weight_alpha").copy_(best)
            packed.get_buffer("0.weight_alpha")[index] *= factor
            assert error() > fit.after


def test_bias_takes_the_mean_of_what_is_left() -> None:
    model = nn.Sequential(nn.Linear(24, 16)).double()
    qat, x = tiled(model), torch.randn(50, 24, dtype=torch.float64) + 2
    expected = model(x).mean(0)
    tbn.calibrate(qat, model, [x])
    torch.testing.assert_close(qat(x).mean(0), expected)


def test_layers_left_alone_say_why() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Linear(16, 16)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.w = nn.Parameter(torch.randn(16, 16))
            self.last = nn.Linear(16, 16)
            self.unused = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            x = self.twice(self.twice(x))
            return self.last(self.attention(x, x, x)[0] @ self.w)

    model = Model().eval()
    qat = tiled(model, overrides={"last": {"alpha_source": "W"}})
    fits = {fit.name: fit for fit in tbn.calibrate(qat, model, [torch.randn(2, 5, 16)])}
    assert {name: fit.reason for name, fit in fits.items()} == {
        "": "functions use its parameters",
        "twice": "it is called 2 times",
        "attention": "it has several weights",
        "last": "its alphas come from its weight",
        "unused": "it is called 0 times",
    }
    assert all(fit.before is None for fit in fits.values())


def test_nothing_else_changes() -> None:
    model = network()
    qat = tiled(model).train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    float_of = network()
    tbn.calibrate(qat, float_of, batches())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(state[key], value)}
    assert changed <= {"0.bias", "3.bias", "5.bias", "7.bias"}  # which the tiled model shares
    assert not any(part._forward_hooks for part in [*qat.modules(), *float_of.modules()])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tbn.calibrate(tiled(network()), network(), []), "at least one batch"),
        (lambda: tbn.calibrate(network(), network(), batches()), "has no tiled layer"),
        (lambda: tbn.calibrate(tiled(network()), nn.Sequential(network()[0]), batches()), "has no layer '3'"),
    ],
)
def test_what_cannot_be_calibrated(call: Any, message: str) -> None:
    with pytest.raises(tbn.TransformError, match=message):
        call()
