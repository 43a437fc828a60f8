"""Bring the inputs of tiled layers into a number format.

Before::

    y = tbn.linear(x, tile, alpha, bias, n, m, p)

After::

    y = tbn.linear(x, tile, alpha, bias, n, m, p, activation="int8")

or, with one scale for all inputs of a layer::

    y = tbn.linear(x, tile, alpha, bias, n, m, p, None, input_scale, activation="int8")

where ``input_scale`` is NaN until :func:`~tbn_compiler.compiler.deploy` has found it from batches.

This changes results, within the rounding of the format (:mod:`tbn_compiler.ops.schemas` defines it), so it is no part
of any default pipeline. It runs before :class:`FlowReplicas`, which carries no copies on to such a layer: the scale is
that of all its inputs, as in training, and kernels multiply integers by signs alone. In a graph that was optimised in
float before, copies are carried already: such a layer takes its scale from one of them, and PyTorch computes it.

Left alone, with the reason in the note of the layer's record: transpose convolutions, whose operators take floating
point only. A layer that has a format already keeps it.
"""

from __future__ import annotations

import torch
from torch import fx

from tbn_compiler.graph.calls import InferenceCall, tiled_call
from tbn_compiler.graph.layers import layer_calls
from tbn_compiler.graph.records import input_scale_key, split_key
from tbn_compiler.passes.base import GraphPass
from tbn_compiler.passes.deployment import record_refusal

Scales = dict[tuple[fx.GraphModule, str], None]  # in the order in which layers are found


class QuantizeActivations(GraphPass):
    """Set the number format of the input of every tiled layer.

    Args:
        activation: ``"int8"`` or ``"binary"``.
        scales: takes the graphs and names of weights whose inputs have got one scale; ``None``: each token has its
            own.
    """

    def __init__(self, activation: str, scales: Scales | None = None) -> None:
        self.activation, self.scales = activation, scales

    def run(self, gm: fx.GraphModule) -> bool:
        """Match and rewrite."""
        modified = False
        for layer in layer_calls(gm):
            if layer.form != "lowered":
                continue
            call = tiled_call(layer.node)
            if call is None:
                continue
            if call.transposed:
                reason = f"its input stays in float: tbn::{layer.kind} has no {self.activation} form"
                record_refusal(gm, str(layer.weight), reason)
            elif call.arguments["activation"] == "float":
                call.update(activation=self.activation)
                if self.scales is not None:
                    _add_scale(gm, call, str(layer.weight))
                    self.scales[gm, str(layer.weight)] = None
                modified = True
        return modified


def _add_scale(gm: fx.GraphModule, call: InferenceCall, weight: str) -> None:
    """Register the scale of a layer's inputs beside its tile: all calls of the layer share it."""
    key = input_scale_key(weight)
    path, name = split_key(key)
    owner = gm.get_submodule(path)
    if name not in owner._buffers:
        tile = call.tensor(gm, "tile")
        owner.register_buffer(name, torch.full((1,), torch.nan, device=None if tile is None else tile.device))
    with gm.graph.inserting_before(call.node):
        call.update(input_scale=gm.graph.get_attr(key))


def drop_scale(gm: fx.GraphModule, weight: str, reason: str) -> None:
    """Let each token of a layer have a scale of its own again, with the reason in the note of the layer's record."""
    key = input_scale_key(weight)
    for node in gm.graph.nodes:
        call = tiled_call(node)
        if call is not None and getattr(call.arguments.get("input_scale"), "target", None) == key:
            call.update(input_scale=None)
    path, name = split_key(key)
    del gm.get_submodule(path)._buffers[name]
    for node in gm.graph.find_nodes(op="get_attr", target=key):
        gm.graph.erase_node(node)
    gm.recompile()
    record_refusal(gm, weight, reason)
