"""Layers that train with int8 or binary inputs, and the operators that they are lowered to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.records import get_records, graph_parts

FORMATS = ["int8", "binary"]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten(),
        nn.Linear(8 * 16, 16), nn.ReLU(), nn.Linear(16, 8, bias=False),
    )  # fmt: skip


def inputs() -> Tensor:
    return torch.randn(4, 3, 6, 6)


def config(**options: Any) -> tbn.TilingConfig:
    return tbn.TilingConfig(**{"p": 4, "min_size": 0} | options)


def activations(packed: nn.Module) -> list[str]:
    nodes = (node for _, part in graph_parts(packed) for node in part.graph.nodes)
    return [call.activation for node in nodes if (call := tiled_call(node))]


@pytest.mark.parametrize("options", [{}, {"latent": "tile"}, {"p": (2, 2)}, {"p": 1}, {"replicate": "roll"}])
@pytest.mark.parametrize("activation", FORMATS)
def test_lowered_network_computes_what_was_trained(activation: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    qat = tbn.transform(network(), config(activation=activation, **options)).train()
    optimizer = torch.optim.SGD(qat.parameters(), lr=1e-2)
    for _ in range(3):
        F.cross_entropy(qat(inputs()), torch.arange(4)).backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in qat.parameters())
    qat.eval()
    packed, x = tbn.lower(qat), inputs()
    assert activations(packed) == [activation] * 4
    torch.testing.assert_close(packed(x), qat(x), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("activation", FORMATS)
def test_format_changes_the_network(activation: str) -> None:
    torch.manual_seed(0)
    model = network().eval()
    torch.manual_seed(1)
    plain = tbn.transform(model, config())
    torch.manual_seed(1)
    quantised = tbn.transform(model, config(activation=activation))
    x = inputs()
    assert (plain(x) - quantised(x)).abs().max() > 1e-4 * plain(x).abs().max()


def test_layers_that_take_floating_point_say_so() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.up = nn.ConvTranspose1d(5, 4, 3)
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.attention(x, x, x)[0] @ self.w)

    qat = tbn.transform(Model(), config(activation="int8"))
    notes = {record.name: record.note for record in get_records(qat) or ()}
    stay = "its input stays in float: {} has no int8 form"
    assert notes["up"] == stay.format("a transpose convolution")
    assert notes["attention.out_proj"] == stay.format("an attention")
    assert str(notes["attention.in_proj_weight_0"]).startswith(stay.format("an attention"))  # and of its heads
    assert notes["w_0"] == stay.format("code that reads a weight")
    assert set(activations(tbn.lower(qat))) == {"float"}


def test_overrides_choose_the_format_of_a_layer() -> None:
    options = {"overrides": {"0": {"activation": "float"}, "7": {"activation": "binary"}}}
    packed = tbn.lower(tbn.transform(network(), config(activation="int8", **options)))
    assert activations(packed) == ["float", "int8", "int8", "binary"]


def test_files_and_checkpoints_keep_the_format(tmp_path: Path) -> None:
    model = network()
    qat = tbn.transform(model, config(activation="int8")).eval()
    packed, x = tbn.lower(qat), inputs()
    tbn.save(packed, tmp_path / "net.safetensors")
    again = tbn.load(tmp_path / "net.safetensors", model)
    assert torch.equal(again(x), packed(x))
    assert activations(again) == ["int8"] * 4
    with pytest.raises(RuntimeError, match=r"layer '0' is tiled with p=4.*in the checkpoint with .*int8 inputs"):
        tbn.transform(model, config()).load_state_dict(qat.state_dict())
    other = tbn.transform(model, config(activation="int8")).eval()
    other.load_state_dict(qat.state_dict())
    assert torch.equal(other(x), qat(x))


def test_gradual_networks_train_with_it_too() -> None:
    qat = tbn.transform(network(), config(activation="int8", gradual=True))
    tbn.set_tiling_strength(qat, 1)
    qat.eval()
    x = inputs()
    torch.testing.assert_close(tbn.lower(qat)(x), qat(x), rtol=2e-5, atol=1e-5)


def test_deployment_keeps_it() -> None:
    qat = tbn.transform(network(), config(activation="int8")).eval()
    packed, x = tbn.lower(qat), inputs()
    fast = tbn.optimize(packed, x)
    torch.testing.assert_close(fast(x), packed(x), rtol=2e-5, atol=1e-5)
    assert activations(fast) == ["int8"] * 4


def test_compiled_on_the_way(inductor: None) -> None:
    qat = tbn.transform(network(), config(activation="int8")).eval()
    x = inputs()
    with torch.no_grad():
        found = torch.compile(qat, backend="tbn")(x)
    torch.testing.assert_close(found, qat(x), rtol=2e-5, atol=1e-5)
    torch.compiler.reset()
