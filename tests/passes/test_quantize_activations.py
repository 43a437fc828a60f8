from __future__ import annotations

import pytest
import torch
from torch import nn

from tbn_compiler.compiler import optimize
from tbn_compiler.errors import ConfigError
from tbn_compiler.graph.calls import inference_call
from tbn_compiler.passes import QuantizeActivations
from tests.passes.deployed import lowered, modifies, note


@torch.no_grad()
@pytest.mark.parametrize("activation", ["int8", "binary"])
def test_every_tiled_layer_takes_the_format(activation: str) -> None:
    packed = lowered(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16)))
    x = torch.randn(2, 4, 5, 5)
    expected = packed(x)
    assert modifies(QuantizeActivations(activation), packed)
    calls = [call for node in packed.graph.nodes if (call := inference_call(node))]
    assert [call.arguments["activation"] for call in calls] == [activation] * 2
    result = packed(x)
    assert not torch.equal(result, expected)
    if activation == "int8":
        torch.testing.assert_close(result, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    # A format that was chosen before stays.
    assert not modifies(QuantizeActivations("int8"), packed)
    assert [call.arguments["activation"] for call in calls] == [activation] * 2


def test_transpose_convolutions_stay_in_float() -> None:
    packed = lowered(nn.Sequential(nn.ConvTranspose2d(4, 8, 2), nn.Conv2d(8, 8, 3)))
    assert modifies(QuantizeActivations("int8"), packed)
    assert "conv_transpose2d has no int8 form" in note(packed, "0")
    assert note(packed, "1") == ""
    assert not modifies(QuantizeActivations("int8"), packed)


def test_copies_are_not_passed_to_a_layer_with_a_format() -> None:
    """The scale of a token comes from all of its values: scaled copies change it."""
    chain = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False))
    packed = lowered(chain, alpha="tile")
    x = torch.randn(3, 16)
    QuantizeActivations("binary")(packed)
    optimized = optimize(packed, x)
    with torch.no_grad():
        torch.testing.assert_close(optimized(x), packed(x))
    assert "takes the scale of its binary input from all copies" in note(optimized, "0")


@torch.no_grad()
@pytest.mark.parametrize("activation", ["int8", "binary"])
def test_optimize_takes_the_format(activation: str) -> None:
    model = lowered(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)))
    x = torch.randn(3, 16)
    quantized = optimize(model, x, activation=activation)
    calls = [call for node in quantized.graph.nodes if (call := inference_call(node))]
    assert [call.arguments["activation"] for call in calls] == [activation] * 2
    assert not torch.equal(quantized(x), optimize(model, x)(x))
    with pytest.raises(ConfigError, match="activation='int4' is not one of 'float', 'int8', 'binary'"):
        optimize(model, x, activation="int4")
