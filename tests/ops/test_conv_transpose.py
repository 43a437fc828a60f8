"""Transpose convolutions: rows of the weight belong to input channels, which are summed instead of copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.graph.records import get_records
from tests import oracle

LAYERS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


def build(d: int, p: Any, alpha: str, groups: int = 1, bias: bool = True, **options: Any) -> tuple[Any, Any, Tensor]:
    """A float model, its tiled form in evaluation mode, and an input."""
    layer = LAYERS[d](8, 12, 3, stride=2, padding=1, output_padding=1, groups=groups, bias=bias)
    model = nn.Sequential(layer).double()
    qat = tbn.transform(model, tbn.TilingConfig(p=p, alpha=alpha, min_size=0, **options)).eval()
    return model, qat, torch.randn(2, 8, *(4,) * d, dtype=torch.float64)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("alpha", ["layer", "tile"])
@pytest.mark.parametrize("p", [1, 2, 4, 3])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_trained_and_lowered_layers_use_the_oracles_weight(d: int, p: int, alpha: str, groups: int) -> None:
    model, qat, x = build(d, p, alpha, groups)
    packed = tbn.lower(qat)
    expected = oracle.with_oracle_weights(model, qat)
    for value in (x, x[0]):
        oracle.assert_close(qat(value), expected(value))
        oracle.assert_close(packed(value), expected(value))
    assert "0.weight" not in packed.state_dict()


@pytest.mark.parametrize(("p", "alpha", "saving"), [(1, "layer", 1), (4, "layer", 4), (4, "tile", 4), (3, "tile", 1)])
def test_multiply_adds_are_counted_by_input_position(p: int, alpha: str, saving: int) -> None:
    model, qat, x = build(2, p, alpha)
    for module in (qat, tbn.lower(qat)):
        (row,) = tbn.summary(module, x).layers
        assert row.macs == 2 * 16 * model[0].weight.numel()
        assert row.macs_tiled == row.macs // saving


@pytest.mark.parametrize(
    "options", [{"replicate": "roll"}, {"replicate": "hadamard"}, {"tile_dtype": "float"}, {"alpha_source": "W"}]
)
def test_options(options: Any) -> None:
    _, qat, x = build(2, 4, "tile", **options)
    oracle.assert_close(tbn.lower(qat)(x), qat(x))


@pytest.mark.parametrize(("p", "alpha", "groups"), [(4, "tile", 1), (4, "layer", 2), (3, "tile", 1)])
@pytest.mark.parametrize("d", [1, 2])
def test_gradients_and_opcheck(d: int, p: int, alpha: str, groups: int) -> None:
    packed = tbn.lower(build(d, p, alpha, groups)[1])
    graph = packed[0].graph
    (node,) = (node for node in graph.nodes if "conv_transpose" in str(node.target))
    sizes, options = node.args[4:], {**node.kwargs, "output_padding": [1] * d}
    tile, alphas = packed.get_buffer("0.weight_tile"), packed.get_buffer("0.weight_alpha").requires_grad_()
    bias = packed.get_parameter("0.bias").detach().requires_grad_()
    x = torch.randn(1, 8, *(3,) * d, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, alphas: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = node.target(x, tile, alphas, bias, *sizes, **options)
        return y

    assert torch.autograd.gradcheck(run, (x, alphas, bias), fast_mode=True)
    torch.library.opcheck(node.target, (x, tile, alphas, bias, *sizes), options)


def test_a_pair_p_becomes_flat_with_a_note() -> None:
    (record,) = get_records(build(2, (2, 2), "layer")[1]) or ()
    assert record.spec is not None
    assert (record.spec.layout.p, record.spec.layout.p_in) == (4, 1)
    assert record.note == "p=(2, 2) on a transpose convolution: flat, p=4"


def test_output_size() -> None:
    class Resized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = nn.Linear(8, 8)
            self.up = nn.ConvTranspose1d(8, 8, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.up(self.plain(x).transpose(1, 2), output_size=[12])
            return y

    model, x = Resized().eval(), torch.randn(1, 5, 8)
    qat = tbn.transform(model, tbn.TilingConfig(p=2, min_size=0))
    assert oracle.reasons(qat)["up"] is None
    packed = tbn.lower(qat)
    assert packed(x).shape == model(x).shape == (1, 8, 12)
    oracle.assert_close(packed(x), qat(x))
    wanted = r"requested an output size of \[14\], but valid sizes range from \[11\] to \[12\]"
    with pytest.raises(ValueError, match=wanted):
        packed.up(x.transpose(1, 2), output_size=[14])


def test_norms_behind_are_not_folded_and_copies_do_not_flow() -> None:
    """In and out channels are equal here: a rule for ordinary convolutions would seem to fit."""
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 2, 2, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1))
    qat = tbn.transform(model, tbn.TilingConfig(p=2, min_size=0))
    x = torch.randn(2, 8, 4, 4)
    qat(x)
    qat.eval()
    oracle.assert_close(tbn.optimize(qat, x)(x), qat(x), 1e-5)
