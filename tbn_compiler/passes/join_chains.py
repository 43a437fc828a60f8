"""Train each layer by one operator, which multiplies the rows that differ once for all copies.

Before::

    bits = tbn.tile(weight, p)
    used = tbn.scale(bits, alpha_source, k)         # alpha * B, every row
    y = linear(x, used, bias)

After::

    y = tbn.train_linear(x, weight, alpha_source, bias, in_features, out_features, p, k)

The result and all gradients are equal up to rounding; :mod:`tbn_compiler.ops.training` has the algebra. With ``p``
copies that hold whole rows, the products of the forward and of the input's gradient are ``p`` times smaller. So they
are where copies have Hadamard signs, whose rows differ. Where no row repeats (rolled copies, misaligned ones with an
alpha each, ``p = 1``) the operator saves the steps in between, and what they keep for the backward.

Left alone: weights that are blended with their float form (gradual tiling), that an attention reads, or that several
layers read of which no row repeats.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from tbn_compiler.graph.calls import named_arguments
from tbn_compiler.graph.layers import (
    LayerCall,
    blend_strength,
    find_record,
    function_arguments,
    layer_calls,
    weight_chain,
)
from tbn_compiler.graph.records import LayerRecord, get_records
from tbn_compiler.ops.calls import TRAINING_OPERATORS, TiledCall
from tbn_compiler.ops.training import shares_products
from tbn_compiler.passes.base import GraphPass, copy_meta, layout_options, normalize_sizes
from tbn_compiler.passes.tile_weights import TileWeights


class JoinChains(GraphPass):
    """Turn ``tile -> scale -> layer`` into one operator."""

    after = (TileWeights,)

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        records = get_records(gm) or ()
        modified = False
        for call in list(layer_calls(gm)):
            record = find_record(records, call) if call.form == "tiled" else None
            if record is not None and _joins(call, record):
                _rewrite(gm, call, record)
                modified = True
        return modified


def _joins(call: LayerCall, record: LayerRecord) -> bool:
    if record.spec is None or call.kind not in TRAINING_OPERATORS or blend_strength(call.weight_node) is not None:
        return False
    arguments = function_arguments(call.node)
    if weight_chain(call.weight_node) is None or "weight" not in arguments:
        return False
    # A whole weight with several readers is computed once.
    return len(call.weight_node.users) == 1 or shares_products(_described(call.kind, record, arguments))


def _described(kind: str, record: LayerRecord, arguments: Mapping[str, Any]) -> TiledCall:
    """The call of the operator that trains a layer of this kind, without its operands."""
    spec, operator = record.spec, TRAINING_OPERATORS[kind]
    assert spec is not None
    inputs, outputs = operator.channels(record.shape, record.groups)
    options: dict[str, Any] = {
        operator.inputs_argument: inputs,
        operator.outputs_argument: outputs,
        "p": spec.layout.p,
        "num_alphas": spec.num_alphas,
        "binary": spec.tile_dtype == "binary",
        **layout_options(spec.layout),
    }
    if operator.dims:
        options["kernel_size"] = record.shape[2:]
        for name in operator.geometry:
            value = arguments[name]
            single = name == "groups" or isinstance(value, fx.Node)
            options[name] = value if single else normalize_sizes(value, operator.dims)
    return TiledCall(operator, {**operator.defaults, **options})


def _rewrite(gm: fx.GraphModule, call: LayerCall, record: LayerRecord) -> None:
    chain = weight_chain(call.weight_node)
    assert chain is not None
    tile, scale = (named_arguments(node) for node in chain)
    arguments = function_arguments(call.node)
    described = _described(call.kind, record, arguments)
    operator = described.operator
    operands = (arguments["input"], tile["weight"], scale["source"], arguments["bias"])
    positional = [described.arguments[name] for name in operator.positional[len(operands) :]]
    options = {
        name: described.arguments[name]
        for name in operator.names[len(operator.positional) :]
        if described.arguments[name] != operator.defaults[name]
    }
    with gm.graph.inserting_before(call.node):
        new = gm.graph.call_function(operator.overload, (*operands, *positional), options)
    copy_meta(call.node, new)
    call.node.replace_all_uses_with(new)
    gm.graph.erase_node(call.node)


def attention_shares_rows(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Whether rows repeat in a weight of an attention, so that its linears are worth to be called by themselves."""
    records = get_records(gm) or ()
    for call in layer_calls(gm):
        record = find_record(records, call) if call.node is node and call.form == "tiled" else None
        if record is None or record.spec is None or blend_strength(call.weight_node) is not None:
            continue
        if shares_products(_described("linear", record, {})):
            return True
    return False
