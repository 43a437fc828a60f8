"""Let layers train with the inputs that they will have: int8 or binary.

Before::

    y = tbn.train_linear(x, weight, alpha_source, bias, ...)

After, for a layer whose record says ``activation="int8"``::

    values = tbn.quantize_input(x, "int8", 1)       # one scale for the last dimension: a token
    y = tbn.train_linear(values, weight, alpha_source, bias, ...)

or, where it says ``input_scale="layer"``::

    scale = exp(input_log_scale)                    # one number for all, a parameter of the layer
    values = tbn.quantize_input(x, "int8", 1, scale)
    y = tbn.train_linear(values, weight, alpha_source, bias, ...)

:mod:`tbn_compiler.ops.activations` has the gradients. Lowering turns both into one operator with that ``activation``.

Left alone: layers whose records say ``"float"``, transpose convolutions and attentions among them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx, nn

from tbn_compiler.graph.calls import named_arguments, training_call
from tbn_compiler.graph.layers import LayerCall, find_record, function_arguments, layer_calls
from tbn_compiler.graph.records import LayerRecord, get_records, input_log_scale_key, split_key
from tbn_compiler.ops.calls import OPERATORS
from tbn_compiler.passes.base import GraphPass, copy_meta
from tbn_compiler.passes.choose_tiling import Scope
from tbn_compiler.passes.tile_weights import TileWeights

# For inputs of unit variance: int8 reaches to 4 standard deviations, and binary inputs have their mean magnitude.
FIRST_SCALE = {"int8": 4 / 127, "binary": math.sqrt(2 / math.pi)}


class QuantizeInputs(GraphPass):
    """Bring the input of each tiled layer into the number format of its record.

    Args:
        scope: what the places of a weight share.
    """

    after = (TileWeights,)

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

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
                    operands: tuple[Any, ...] = (x, record.spec.activation, 1 + OPERATORS[call.kind].dims)
                    if record.spec.input_scale == "layer":
                        operands += (self._scale(gm, record),)
                    values = gm.graph.call_function(torch.ops.tbn.quantize_input.default, operands)
                copy_meta(call.node, values)
                call.node.replace_input_with(x, values)
                modified = True
        return modified

    def _scale(self, gm: fx.GraphModule, record: LayerRecord) -> fx.Node:
        """The scale of a layer's inputs, whose logarithm becomes a parameter beside the weight."""
        assert record.spec is not None
        key = input_log_scale_key(record.weight)
        path, name = split_key(key)
        owner = gm.get_submodule(path)
        if name not in owner._parameters:
            weight = gm.get_parameter(record.trained)
            place = (id(weight), record.view)
            if place not in self.scope.input_scales:
                start = torch.full((1,), math.log(FIRST_SCALE[record.spec.activation]), device=weight.device)
                self.scope.input_scales[place] = nn.Parameter(start, requires_grad=weight.requires_grad)
            owner.register_parameter(name, self.scope.input_scales[place])
        return gm.graph.call_function(torch.exp, (gm.graph.get_attr(key),))


def layer_input(call: LayerCall) -> object:
    """What a layer in training form takes as its input."""
    trained = training_call(call.node)
    return (function_arguments(call.node) if trained is None else trained.arguments).get("input")


def quantized_input(node: object) -> tuple[fx.Node, str, fx.Node | None] | None:
    """The input before it is brought into a number format, that format, and its scale where the layer has one.

    ``None`` for any other node.
    """
    if not isinstance(node, fx.Node) or node.target is not torch.ops.tbn.quantize_input.default:
        return None
    arguments = named_arguments(node)
    return arguments["input"], str(arguments["activation"]), arguments["scale"]
