from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tbn_compiler.compiler import optimize
from tbn_compiler.errors import ConfigError
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.records import graph_parts
from tbn_compiler.ops.schemas import Activation
from tbn_compiler.passes import QuantizeActivations
from tests import oracle
from tests.oracle import both_forms
from tests.passes.deployed import lowered, modifies, note, optimized


@torch.no_grad()
@pytest.mark.parametrize("activation", ["int8", "binary"])
def test_every_tiled_layer_takes_the_format(activation: str) -> None:
    packed = lowered(nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16)))
    x = torch.randn(2, 4, 5, 5)
    expected = packed(x)
    assert modifies(QuantizeActivations(activation), packed)
    calls = [call for node in packed.graph.nodes if (call := tiled_call(node))]
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


@both_forms
def test_copies_are_not_passed_to_a_layer_with_a_format(transform: Any) -> None:
    """The scale of a token comes from all of its values: scaled copies change it."""
    chain = nn.Sequential(nn.Linear(16, 16, bias=False), nn.ReLU(), nn.Linear(16, 16, bias=False))
    packed = lowered(chain, transform, alpha="tile")
    x = torch.randn(3, 16)
    for _, part in graph_parts(packed):
        QuantizeActivations("binary")(part)
    result = optimized(packed, x)
    with torch.no_grad():
        torch.testing.assert_close(result(x), packed(x))
    assert "takes the scale of its binary input from all copies" in note(result, "0")


@torch.no_grad()
@both_forms
@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("bias", [True, False])
def test_optimize_takes_the_format(bias: bool, activation: Activation, transform: Any) -> None:
    """With and without a graph of the whole model; copies that could be passed on change nothing."""
    chain = nn.Sequential(nn.Linear(16, 32, bias=bias), nn.ReLU(), nn.Linear(32, 8))
    model = lowered(chain, transform, alpha="tile")
    x = torch.randn(3, 16)
    for quantized in (optimize(model, x, activation=activation), optimize(model, activation=activation)):
        nodes = [node for _, part in graph_parts(quantized) for node in part.graph.nodes]
        calls = [call for node in nodes if (call := tiled_call(node))]
        assert [call.arguments["activation"] for call in calls] == [activation] * 2
        assert all(call.arguments["input_alpha"] is None for call in calls)
        assert not torch.equal(quantized(x), optimize(model, x)(x))
        oracle.assert_close(quantized(x), quantized_alone(model, activation)(x))
    with pytest.raises(ConfigError, match="activation='int4' is not one of 'float', 'int8', 'binary'"):
        optimize(model, x, activation="int4")


def quantized_alone(packed: nn.Module, activation: Activation) -> nn.Module:
    """The lowered model with the format and nothing else."""
    result = copy.deepcopy(packed)
    for _, part in graph_parts(result):
        QuantizeActivations(activation)(part)
    return result
