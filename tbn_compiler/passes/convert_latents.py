"""Train the aggregated tile in place of the weight, or the weight in place of the tile.

Before::

    y = tbn.train_linear(x, weight, alpha_source, ...)      # weight [m, n], alpha_source [m, n]

After :class:`HoldTiles`::

    y = tbn.train_linear(x, weight, alpha_source, ...)      # weight [R, n], the aggregated tile; alpha_source [k]

The parameter ``weight`` becomes ``s``, the sum of its copies (Eq. 2), and ``alpha_source`` the alphas themselves
(Eq. 7, 9), under the same names, so that the network computes the same. A ``tile -> scale`` subgraph, where no rows
repeat, becomes one ``tbn.train_weight``. Each view of a packed parameter (the projections of an attention) becomes a
parameter of its own, named after its record.

:class:`HoldWeights` is the way back, as far as there is one: every copy of the weight gets its part of ``s``,
``W_i = s / p`` (with its signs), and every element of ``A`` the alpha that it gives. The network computes the same.

Left alone: weights that are blended with their float form, or take their alphas from themselves.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.config import Latent
from tbn_compiler.graph.calls import training_call
from tbn_compiler.graph.layers import LayerCall, apply_view, blend_strength, find_record, layer_calls, weight_chain
from tbn_compiler.graph.records import (
    TRANSPOSED,
    LayerRecord,
    alpha_source_key,
    attach_records,
    get_records,
    own_records,
    set_records,
    split_key,
)
from tbn_compiler.graph.tiled_parameters import ReadForm, read_forms, read_tiled
from tbn_compiler.ops.latents import alphas_of
from tbn_compiler.passes.base import GraphPass, copy_meta
from tbn_compiler.passes.choose_tiling import Scope
from tbn_compiler.passes.tile_weights import TileWeights
from tbn_compiler.tiling import TileSpec


class HoldTiles(GraphPass):
    """Let every layer whose record says so train its tile.

    Args:
        scope: where the graph stands in the user's model: weights that places share stay shared.
    """

    after = (TileWeights,)

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        calls = _calls(gm)
        work = [
            (record, calls[record.weight])
            for record in get_records(gm) or ()
            if record.weight in calls and _holds_weight(gm, record)
        ]
        for record, places in work:
            key = (id(_parameter(gm, record.parameter)), record.view)
            if key not in self.scope.latents:
                self.scope.latents[key] = _to_tile(gm, record, places[0])
            _retrain(gm, record, places, *self.scope.latents[key])
        for record, _ in work:
            if record.trained != record.parameter:  # its views have parameters of their own
                _delete(gm, (record.parameter, *record.tied))
        return bool(work)


class HoldWeights(GraphPass):
    """Let every layer that trains its tile train a weight; the records say so then."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        calls, records = _calls(gm), []
        modified = False
        for record in get_records(gm) or ():
            if record.weight not in calls or record.spec is None or record.spec.latent == "weight":
                records.append(record)
                continue
            key = (id(_parameter(gm, record.trained)), record.view)
            if key not in self.scope.latents:
                latents = _parameter(gm, record.trained), _parameter(gm, alpha_source_key(record.weight))
                self.scope.latents[key] = to_weight(record, *latents)
            done = _with_latent(record, "weight")
            if record.trained != record.parameter:
                done = replace(done, parameter=record.weight, view="", tied=())
            _retrain(gm, done, calls[record.weight], *self.scope.latents[key])
            records.append(done)
            modified = True
        set_records(gm, records)
        return modified


def _calls(gm: fx.GraphModule) -> dict[str, list[LayerCall]]:
    """The calls in training form of each weight with a record; none of a weight that is blended."""
    found: dict[str, list[LayerCall]] = {}
    for call in layer_calls(gm):
        record = find_record(get_records(gm) or (), call) if call.form == "tiled" else None
        if record is not None and blend_strength(call.weight_node) is None:
            found.setdefault(record.weight, []).append(call)
    return found


def _holds_weight(gm: fx.GraphModule, record: LayerRecord) -> bool:
    """Whether a record that asks for a tile still has a weight behind it."""
    if record.spec is None or record.spec.latent != "tile":
        return False
    return _parameter(gm, alpha_source_key(record.weight)).numel() != record.spec.num_alphas


def _with_latent(record: LayerRecord, latent: Latent) -> LayerRecord:
    assert record.spec is not None
    return replace(record, spec=replace(record.spec, latent=latent))


def _parameter(module: nn.Module, key: str) -> nn.Parameter:
    """The parameter under a key; not through the attribute, which may stand for the tiled weight."""
    path, name = split_key(key)
    parameter = module.get_submodule(path)._parameters[name]
    assert parameter is not None
    return parameter


def _delete(gm: fx.GraphModule, keys: tuple[str, ...]) -> None:
    for key in keys:
        path, name = split_key(key)
        gm.get_submodule(path)._parameters.pop(name, None)


def _to_tile(gm: fx.GraphModule, record: LayerRecord, call: LayerCall) -> tuple[nn.Parameter, nn.Parameter]:
    weight = _parameter(gm, record.parameter)
    source = _parameter(gm, alpha_source_key(record.weight))
    assert record.spec is not None
    return to_tile(record.spec, weight, source, apply_view(weight.detach(), call.view))


def to_tile(
    spec: TileSpec, parameter: nn.Parameter, source: nn.Parameter, weight: Tensor
) -> tuple[nn.Parameter, nn.Parameter]:
    """The aggregated tile and the alphas of a weight, to be trained as the parameter and its source were."""
    layout = spec.layout
    tile = layout.aggregate(weight).reshape(layout.tile_shape)
    # A copy: with one copy of the tile, the sum is the weight itself.
    tile = tile.clone(memory_format=torch.contiguous_format)
    alpha = alphas_of(source.detach(), layout, spec.num_alphas)
    return nn.Parameter(tile, parameter.requires_grad), nn.Parameter(alpha, source.requires_grad)


def to_weight(record: LayerRecord, tile: nn.Parameter, source: nn.Parameter) -> tuple[nn.Parameter, nn.Parameter]:
    """A weight and an alpha source that give a tile and its alphas; the weight as its parameter holds it."""
    spec = record.spec
    assert spec is not None
    layout = spec.layout
    weight = layout.replicate(tile.detach().reshape(-1)) / layout.p
    if record.view == TRANSPOSED:
        weight = weight.t().contiguous()
    alpha = alphas_of(source.detach(), layout, spec.num_alphas)
    full = layout.scale(torch.ones(layout.shape, dtype=alpha.dtype, device=alpha.device), alpha).contiguous()
    return nn.Parameter(weight, tile.requires_grad), nn.Parameter(full, source.requires_grad)


def _retrain(
    gm: fx.GraphModule, record: LayerRecord, calls: list[LayerCall], weight: nn.Parameter, source: nn.Parameter
) -> None:
    """Put parameters in the places of a weight and its alpha source, and let the calls read them."""
    tied = record.tied if record.trained == record.parameter else ()
    places = dict.fromkeys((record.trained, *tied), weight) | {alpha_source_key(record.weight): source}
    for key, parameter in places.items():
        path, name = split_key(key)
        gm.get_submodule(path)._parameters[name] = parameter
    nodes: dict[fx.Node, None] = {}
    for call in calls:
        chain = weight_chain(call.weight_node)
        nodes[call.node if chain is None else chain[1]] = None
    for node in nodes:
        with gm.graph.inserting_before(node):
            read: Any = gm.graph.get_attr(record.trained)
            if record.view == TRANSPOSED and record.spec is not None and record.spec.latent == "weight":
                read = gm.graph.call_method("t", (read,))
            alpha = gm.graph.get_attr(alpha_source_key(record.weight))
        if training_call(node) is not None:
            node.args = (node.args[0], read, alpha, *node.args[3:])
        elif node.target is torch.ops.tbn.train_weight.default:
            node.args = (read, alpha, *node.args[2:])
        else:
            _replace_chain(gm, node, record, read, alpha)


def _replace_chain(gm: fx.GraphModule, scale: fx.Node, record: LayerRecord, weight: fx.Node, source: fx.Node) -> None:
    assert record.spec is not None
    layout, k = record.spec.layout, record.spec.num_alphas
    options: dict[str, Any] = {"p_in": layout.p_in, "shift": layout.shift, "batch": layout.batch}
    options["hadamard"] = layout.hadamard
    options["binary"] = record.spec.tile_dtype == "binary"
    usual = {"p_in": 1, "shift": 0, "batch": 1, "hadamard": False, "binary": True}
    options = {name: value for name, value in options.items() if value != usual[name]}
    operands = (weight, source, layout.shape, layout.p, k)
    with gm.graph.inserting_before(scale):
        new = gm.graph.call_function(torch.ops.tbn.train_weight.default, operands, options)
    copy_meta(scale, new)
    scale.replace_all_uses_with(new)
    gm.graph.erase_node(scale)


def convert_parameters(module: nn.Module, latent: Latent, scope: Scope) -> bool:
    """Let the parameters that a module's code reads tiled, and whose forms say so, train tiles; or weights again.

    Returns:
        Whether there were any to convert. The module is changed in place.
    """
    forms = read_forms(module)
    done: dict[str, LayerRecord] = {}
    for form in forms:
        record = form.record
        if form.lowered or record.spec is None or record.spec.latent == "weight":
            continue
        parameter, source = module._parameters[record.parameter], module._parameters[alpha_source_key(record.weight)]
        assert parameter is not None
        assert source is not None
        if latent == "tile" and source.numel() == record.spec.num_alphas:
            continue  # it holds the tile already
        key = (id(parameter), record.view)
        if key not in scope.latents and latent == "tile":
            weight = parameter.detach().t() if record.view else parameter.detach()
            scope.latents[key] = to_tile(record.spec, parameter, source, weight)
        elif key not in scope.latents:
            scope.latents[key] = to_weight(record, parameter, source)
        module._parameters[record.parameter], module._parameters[alpha_source_key(record.weight)] = scope.latents[key]
        done[record.weight] = _with_latent(record, latent)
    if not done:
        return False
    records = [done.get(record.weight, record) for record in own_records(module) or ()]
    attach_records(module, records)
    read_tiled(module, [ReadForm(done.get(f.record.weight, f.record), f.lowered, f.gradual) for f in forms])
    return True
