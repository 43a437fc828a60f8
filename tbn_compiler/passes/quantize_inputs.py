"""Let layers train with the inputs that they will have: int8 or binary.

Before::

    y = tbn.train_linear(x, weight, alpha_source, bias, ...)

After, for a layer whose record says ``activation="int8"``::

    values = tbn.quantize_input(x, "int8", 1)       # one scale for the last dimension: a token
    y = tbn.train_linear(values, weight, alpha_source, bias, ...)

:mod:`tbn_compiler.ops.activations` has the gradients. Lowering turns both into one operator with that ``activation``.

Left alone: layers whose records say ``"float"``, transpose convolutions and attentions among them.
"""

from __future__ import annotations

import torch
from torch import fx

from tbn_compiler.graph.calls import training_call
from tbn_compiler.graph.layers import LayerCall, find_record, function_arguments, layer_calls
from tbn_compiler.graph.records import get_records
from tbn_compiler.ops.calls import OPERATORS
from tbn_compiler.passes.base import GraphPass, copy_meta
from tbn_compiler.passes.tile_weights import TileWeights


class QuantizeInputs(GraphPass):
    """Bring the input of each tiled layer into the number format of its record."""

    after = (TileWeights,)

    def run(self, gm: fx.GraphModule) -> bool:
        """Match and rewrite."""
        records = get_records(gm) or ()
        modified = False
        for call in list(layer_calls(gm)):
            record = find_record(records, call) if call.form == "tiled" else None
            if record is None or record.spec is None or record.spec.activation == "float":
                continue
            x = layer_input(call)
            if isinstance(x, fx.Node) and quantized_input(x) is None:
                with gm.graph.inserting_before(call.node):
                    operands = (x, record.spec.activation, 1 + OPERATORS[call.kind].dims)
                    values = gm.graph.call_function(torch.ops.tbn.quantize_input.default, operands)
                copy_meta(call.node, values)
                call.node.replace_input_with(x, values)
                modified = True
        return modified


def layer_input(call: LayerCall) -> object:
    """What a layer in training form takes as its input."""
    trained = training_call(call.node)
    return (function_arguments(call.node) if trained is None else trained.arguments).get("input")


def quantized_input(node: object) -> tuple[fx.Node, str] | None:
    """The input before it is brought into a number format, and that format; ``None`` for any other node."""
    if not isinstance(node, fx.Node) or node.target is not torch.ops.tbn.quantize_input.default:
        return None
    source, activation, _ = node.args
    assert isinstance(source, fx.Node)
    return source, str(activation)
