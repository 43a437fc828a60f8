"""Replace ``tile -> scale -> layer`` by one inference operator on the stored tile.

Before::

    bits = tbn.tile(weight, p)
    used = tbn.scale(bits, alpha_source, k)
    y = linear(x, used, bias)

After::

    y = tbn.linear(x, weight_tile, weight_alpha, bias, out_features, p)

``weight_tile`` holds the packed tile (``uint8 [ceil(q / 8)]``; ``[q]`` floats for a full-precision tile) and
``weight_alpha`` the ``k`` alphas. The float weight and its alpha source are removed under every name they have.
Layers left in float are not touched.

This is a required lowering: a non-finite weight or a subgraph that was edited beyond recognition raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.errors import LoweringError
from tbn_compiler.layers import (
    INFERENCE_OPS,
    LayerCall,
    LayerRecord,
    alpha_key,
    alpha_source_key,
    function_arguments,
    get_records,
    layer_calls,
    module_kind,
    split_key,
    tile_key,
    weight_chain,
)
from tbn_compiler.packing import pack_bits
from tbn_compiler.passes.base import GraphPass, copy_meta, layout_options
from tbn_compiler.tiling import tile_vector


class PackedLayer(nn.Module):
    """Holds the stored tensors of a lowered layer in place of its float module; it has no ``forward`` of its own."""

    def __init__(self, description: str) -> None:
        super().__init__()
        self.description = description

    def extra_repr(self) -> str:
        """Kind, shape and tiling of the layer."""
        return self.description


class LowerTiles(GraphPass):
    """Lower every tiled layer of a graph that :class:`TileWeights` has rewritten.

    Args:
        stored: tiles and alphas by ``state_dict`` key, as read from a file; default: computed from the weights.
    """

    def __init__(self, stored: Mapping[str, Tensor] | None = None) -> None:
        self.stored = stored

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        records = {key: record for record in get_records(gm) or () for key in (record.weight, *record.tied)}
        calls = [call for call in layer_calls(gm) if call.form == "tiled"]
        for call in calls:
            record = _check(gm, call, records)
            if self.stored is None:
                _check_finite(gm, record)
        keys = list(dict.fromkeys(records[str(call.weight)].weight for call in calls))
        for key in keys:
            _store(gm, records[key], self.stored)
        for call in calls:
            _lower_call(gm, call, records[str(call.weight)])
        gm.graph.eliminate_dead_code()
        _remove_float_weights(gm, [records[key] for key in keys])
        return bool(calls)


def _check(gm: fx.GraphModule, call: LayerCall, records: dict[str, LayerRecord]) -> LayerRecord:
    """The record behind a call, once its subgraph is known to have no other reader."""
    record = records.get(str(call.weight))
    if record is None or record.spec is None:
        raise LoweringError(
            f"node {call.node.name} uses tiled weight {call.weight!r}, of which there is no record; "
            "transform the model with tbn_compiler.transform"
        )
    weight_node, tile, scale = weight_chain(call.node) or (None, None, None)
    assert weight_node is not None
    assert tile is not None
    assert scale is not None
    for node, allowed in ((weight_node, {tile, scale}), (tile, {scale})):
        for user in node.users:
            if user not in allowed and weight_chain(user) is None and user.target is not torch.ops.tbn.tile.default:
                raise LoweringError(
                    f"node {user.name} reads {node.name}, which lowering removes (weight {record.weight!r}, shape "
                    f"{record.shape}); remove that use or keep the layer in float"
                )
    return record


def _check_finite(gm: fx.GraphModule, record: LayerRecord) -> None:
    for key in (record.weight, _source_key(record)):
        tensor = gm.get_parameter(key)
        if not tensor.is_meta and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise LoweringError(
                f"{key} of shape {tuple(tensor.shape)} has {bad} non-finite values (NaN or infinity): "
                "its tile is not defined. Check the training run before lowering."
            )


def _source_key(record: LayerRecord) -> str:
    assert record.spec is not None
    return alpha_source_key(record.weight) if record.spec.alpha_source == "A" else record.weight


def _compute(gm: fx.GraphModule, record: LayerRecord) -> tuple[Tensor, Tensor]:
    """The stored tile and the alphas of a trained weight."""
    spec = record.spec
    assert spec is not None
    binary = spec.tile_dtype == "binary"
    tile = tile_vector(gm.get_parameter(record.weight).detach(), spec.layout, binary=binary)
    alpha = spec.layout.alphas(gm.get_parameter(_source_key(record)).detach(), spec.num_alphas)
    return pack_bits(tile) if binary else tile, alpha


def _store(gm: fx.GraphModule, record: LayerRecord, stored: Mapping[str, Tensor] | None) -> None:
    """Register the stored tile and the alphas where the weight is; layer modules make room for plain holders."""
    keys = (tile_key(record.weight), alpha_key(record.weight))
    if stored is None:
        tensors = _compute(gm, record)
    else:
        missing = [key for key in keys if key not in stored]
        if missing:
            raise LoweringError(f"the stored tensors lack {', '.join(missing)} of layer {record.name!r}")
        tensors = (stored[keys[0]], stored[keys[1]])
    for path, _ in map(split_key, (record.weight, *record.tied)):
        if path and module_kind(gm.get_submodule(path)):
            _replace_by_holder(gm, path, record)
    path, _ = split_key(record.weight)
    owner = gm.get_submodule(path)
    for key, tensor in zip(keys, tensors, strict=True):
        owner.register_buffer(split_key(key)[1], tensor)


def _replace_by_holder(gm: fx.GraphModule, path: str, record: LayerRecord) -> None:
    assert record.spec is not None
    module, (parent, name) = gm.get_submodule(path), split_key(path)
    holder = PackedLayer(
        f"{record.kind}, shape={record.shape}, p={record.spec.layout.p}, alphas={record.spec.num_alphas}"
    )
    holder._parameters.update({key: value for key, value in module._parameters.items() if value is not None})
    setattr(gm.get_submodule(parent), name, holder)


def _lower_call(gm: fx.GraphModule, call: LayerCall, record: LayerRecord) -> None:
    graph, node, spec = gm.graph, call.node, record.spec
    assert spec is not None
    arguments = function_arguments(node)
    with graph.inserting_before(node):
        tile, alpha = graph.get_attr(tile_key(record.weight)), graph.get_attr(alpha_key(record.weight))
        inputs = record.shape[1] * record.groups
        operands: tuple[Any, ...] = (arguments["input"], tile, alpha, arguments.get("bias"), inputs, record.shape[0])
        options = layout_options(spec.layout)
        if call.kind != "linear":
            operands += (record.shape[2:],)
            options |= {name: arguments[name] for name in ("stride", "padding", "dilation", "groups")}
        new = graph.call_function(INFERENCE_OPS[call.kind], (*operands, spec.layout.p), options)
    copy_meta(node, new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _remove_float_weights(gm: fx.GraphModule, records: list[LayerRecord]) -> None:
    for record in records:
        for key in (record.weight, *record.tied, alpha_source_key(record.weight)):
            path, name = split_key(key)
            gm.get_submodule(path)._parameters.pop(name, None)
