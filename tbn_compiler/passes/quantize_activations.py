"""Bring the inputs of tiled layers into a number format.

Before::

    y = tbn.linear(x, tile, alpha, bias, n, m, p)

After::

    y = tbn.linear(x, tile, alpha, bias, n, m, p, activation="int8")

This changes results, within the rounding of the format (:mod:`tbn_compiler.ops.schemas` defines it), so it is no part
of any default pipeline. It runs before :class:`FlowReplicas`, which carries no copies on to such a layer: the scale is
that of all its inputs, as in training, and kernels multiply integers by signs alone. In a graph that was optimised in
float before, copies are carried already: such a layer takes its scale from one of them, and PyTorch computes it.

Left alone, with the reason in the note of the layer's record: transpose convolutions, whose operators take floating
point only. A layer that has a format already keeps it.
"""

from __future__ import annotations

from torch import fx

from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.layers import layer_calls
from tbn_compiler.passes.base import GraphPass
from tbn_compiler.passes.deployment import record_refusal


class QuantizeActivations(GraphPass):
    """Set the number format of the input of every tiled layer.

    Args:
        activation: ``"int8"`` or ``"binary"``.
    """

    def __init__(self, activation: str) -> None:
        self.activation = activation

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
                modified = True
        return modified
