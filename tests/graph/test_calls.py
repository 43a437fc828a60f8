"""Calls of the inference operators in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

import tbn_compiler as tbn
from tbn_compiler.graph.calls import InferenceCall, named_arguments, tiled_call
from tbn_compiler.ops.calls import OPERATORS

LAYERS: dict[str, nn.Module] = {
    "linear": nn.Linear(8, 12),
    "conv1d": nn.Conv1d(8, 12, 3, groups=2),
    "conv2d": nn.Conv2d(8, 12, 3, padding=1),
    "conv3d": nn.Conv3d(8, 12, 3),
    "conv_transpose1d": nn.ConvTranspose1d(8, 12, 3),
    "conv_transpose2d": nn.ConvTranspose2d(8, 12, 3, groups=4),
    "conv_transpose3d": nn.ConvTranspose3d(8, 12, 3),
}


def lowered(layer: nn.Module, **options: Any) -> fx.GraphModule:
    config = tbn.TilingConfig(**{"p": 4, "alpha": "tile", "min_size": 0} | options)
    packed: fx.GraphModule = tbn.lower(tbn.transform(fx.symbolic_trace(nn.Sequential(layer)), config))
    return packed


def only_call(gm: fx.GraphModule) -> InferenceCall:
    (call,) = filter(None, map(tiled_call, gm.graph.nodes))
    return call


@pytest.mark.parametrize("kind", OPERATORS)
def test_every_kind_of_layer_has_a_call(kind: str) -> None:
    layer = LAYERS[kind]
    gm = lowered(layer)
    call = only_call(gm)
    assert (call.kind, call.inputs, call.outputs) == (kind, 8, 12)
    assert call.layout.shape == tuple(layer.weight.shape)  # type: ignore[arg-type]
    assert call.arguments == named_arguments(call.node)
    assert call.is_stored(gm)
    alpha = call.tensor(gm, "alpha")
    assert alpha is not None
    assert call.product(gm).num_alphas == alpha.numel() == 4
    assert call.product(gm).groups == call.groups == getattr(layer, "groups", 1)
    assert call.tensor(gm, "input") is None


@pytest.mark.parametrize("kind", OPERATORS)
def test_transpose_convolutions_take_no_epilogue(kind: str) -> None:
    call = only_call(lowered(LAYERS[kind]))
    assert call.transposed == kind.startswith("conv_transpose")
    assert call.takes_epilogue == call.takes_activation == call.takes_input_alpha == (not call.transposed)


def test_other_nodes_are_no_calls() -> None:
    gm = lowered(LAYERS["linear"])
    assert [tiled_call(node) is not None for node in gm.graph.nodes].count(True) == 1


@pytest.mark.parametrize(
    ("layer", "options", "macs"),
    [
        (nn.Linear(8, 12), {}, 3 * 8),
        (nn.Linear(8, 12), {"p": (2, 2), "alpha": "output"}, 6 * 4),
        (nn.Linear(8, 12), {"replicate": "roll"}, 12 * 8),
        (nn.Conv2d(8, 12, 3, groups=2), {}, 2 * 3 * 4 * 9),
        (nn.ConvTranspose2d(8, 12, 3), {}, 2 * 12 * 9),
        (nn.ConvTranspose2d(8, 12, 3, groups=4), {}, 8 * 3 * 9),  # all of its rows
    ],
    ids=str,
)
def test_multiply_adds(layer: nn.Module, options: dict[str, Any], macs: int) -> None:
    gm = lowered(layer, **options)
    assert only_call(gm).macs(gm) == macs


def test_replicas_are_summed_before() -> None:
    gm = lowered(nn.Linear(8, 12))
    gm.register_buffer("copies", torch.ones(2))
    call = only_call(gm)
    with gm.graph.inserting_before(call.node):
        copies = gm.graph.get_attr("copies")
    call.update(input_alpha=copies, epilogue="relu")
    changed = only_call(gm)
    assert (changed.epilogue, changed.product(gm).replicas, changed.macs(gm)) == ("relu", 2, 3 * 4)


def test_computed_alphas() -> None:
    gm = lowered(nn.Linear(8, 12))
    call = only_call(gm)
    with gm.graph.inserting_before(call.node):
        twice = gm.graph.call_function(torch.mul, (call.arguments["alpha"], 2))
    call.update(alpha=twice)
    changed = only_call(gm)
    assert not changed.is_stored(gm)
    with pytest.raises(ValueError, match=f"the alphas of node {call.node.name} are no parameter or buffer"):
        changed.product(gm)
