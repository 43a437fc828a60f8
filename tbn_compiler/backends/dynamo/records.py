"""Layer records of a graph that Dynamo captured: it has lost those that ``transform`` made, but the graph tells all."""

from __future__ import annotations

import itertools
from collections.abc import Container
from dataclasses import dataclass

from torch import Tensor, fx, nn

from tbn_compiler.config import Latent
from tbn_compiler.errors import TBNError
from tbn_compiler.graph.calls import attribute, named_arguments, tiled_call, training_call
from tbn_compiler.graph.layers import (
    LayerCall,
    apply_view,
    blend_strength,
    function_arguments,
    layer_calls,
    parameter_view,
    view_text,
    weight_chain,
)
from tbn_compiler.graph.records import LayerRecord, alpha_source_key, layer_name, split_key
from tbn_compiler.ops.schemas import make_layout
from tbn_compiler.passes.blend_weights import strength_keys
from tbn_compiler.tiling import TileSpec
from tbn_compiler.torch_private import differentiated


class _RefusedError(TBNError):
    """A call in training form that cannot be lowered."""


@dataclass(frozen=True)
class _Tiling:
    """How a call in training form tiles its weight; ``source`` is the key of the alpha source, or of the weight."""

    spec: TileSpec
    source: str
    shape: tuple[int, ...]
    groups: int


def make_records(gm: fx.GraphModule) -> tuple[list[LayerRecord], dict[fx.Node, str]]:
    """Describe the tiled layers of a graph.

    Args:
        gm: a graph whose weights are attributes. The alpha sources are also registered under the names that lowering
            looks for.

    Returns:
        A record for each weight; and for each call in training form that has none the reason.
    """
    records: dict[str, LayerRecord] = {}
    refusals: dict[fx.Node, str] = {}
    tilings: dict[tuple[str, str], tuple[_Tiling, list[LayerCall]]] = {}
    inside = differentiated(gm.graph)
    trained = {call.weight for call in layer_calls(gm) if call.node in inside}
    for call in layer_calls(gm):
        if call.form == "lowered":
            record = _lowered_record(gm, call)
            records.setdefault(record.weight, record)
        elif call.form == "tiled":
            try:
                if call.weight in trained:
                    raise _RefusedError("torch.func differentiates a call of it, and packed tiles have no gradient")
                tiling = _read_tiling(gm, call)
                first, calls = tilings.setdefault((str(call.weight), call.view_text), (tiling, []))
                if first != tiling:
                    raise _RefusedError("another call tiles its weight in another way")
                calls.append(call)
            except TBNError as error:
                refusals[call.node] = str(error)
    for (parameter, view), (tiling, calls) in tilings.items():
        weight = _name_weight(gm, parameter, view, tiling, records)
        record = LayerRecord(
            name=layer_name(weight),
            kind=calls[0].kind,
            weight=weight,
            shape=tiling.shape,
            groups=tiling.groups,
            view=view,
            parameter=parameter,
            spec=tiling.spec,
        )
        records[weight] = record
    return list(records.values()), refusals


def _lowered_record(gm: fx.GraphModule, call: LayerCall) -> LayerRecord:
    found = tiled_call(call.node)
    assert found is not None
    alpha = found.tensor(gm, "alpha")
    spec = TileSpec(found.layout, 1 if alpha is None else alpha.numel())
    name = layer_name(str(call.weight))
    return LayerRecord(name, call.kind, str(call.weight), found.layout.shape, found.groups, spec=spec)


def _read_tiling(gm: fx.GraphModule, call: LayerCall) -> _Tiling:
    """The tiling of a call from its ``tile`` and ``scale`` nodes."""
    _check_strength(gm, call)
    trained, chain = training_call(call.node), weight_chain(call.weight_node)
    if trained is not None:
        tile = scale = dict(trained.arguments)
    else:
        assert chain is not None
        tile, scale = (named_arguments(node) for node in chain)
    weight = _parameter(gm, tile["weight"], "weight")
    held = tuple(apply_view(weight.detach(), call.view).shape)
    if trained is not None:
        layout = trained.layout
    else:  # an operator that may read a tile says which weight it stands for
        shape = tile.get("shape", held)
        layout = make_layout(shape, tile["p"], tile["p_in"], tile["shift"], tile["batch"], tile["hadamard"])
    _parameter(gm, scale["source"], "alpha source")
    found = parameter_view(scale["source"])
    assert found is not None
    source, view = str(found[0].target), view_text(found[1])
    own = (source, view) == (call.weight, call.view_text)
    if view and not own:
        raise _RefusedError(f"its alpha source is a view, {source}{view}")
    latent: Latent = "weight" if held == layout.shape else "tile"
    spec = TileSpec(layout, scale["num_alphas"], "W" if own else "A", "binary" if tile["binary"] else "float", latent)
    arguments = function_arguments(call.node) if trained is None else trained.arguments
    groups = 1 if call.kind == "linear" else arguments.get("groups", 1)
    return _Tiling(spec, source, layout.shape, groups)


def _check_strength(gm: fx.GraphModule, call: LayerCall) -> None:
    if blend_strength(call.weight_node) is None:
        return
    strengths = [float(gm.get_buffer(key)) for key in strength_keys(gm)]
    if min(strengths) < 1:
        raise _RefusedError(f"gradual tiling is at strength {min(strengths):g}, not at 1")


def _parameter(gm: fx.GraphModule, node: fx.Node, what: str) -> Tensor:
    found = parameter_view(node)
    value = None if found is None else attribute(gm, found[0])
    if not isinstance(value, nn.Parameter):
        raise _RefusedError(f"its {what} is not a parameter that only tiled layers read")
    return value


def _name_weight(gm: fx.GraphModule, parameter: str, view: str, tiling: _Tiling, taken: Container[str]) -> str:
    """A name for a weight, under which its alpha source is found too; numbered if it is a view of a parameter."""
    numbered = (f"{parameter}_{number}" for number in itertools.count())
    for name in numbered if view else itertools.chain([parameter], numbered):
        path, key = split_key(alpha_source_key(name))
        owner, source = gm.get_submodule(path), gm.get_parameter(tiling.source)
        if name in taken or (tiling.spec.alpha_source == "A" and getattr(owner, key, source) is not source):
            continue
        if tiling.spec.alpha_source == "A":
            owner.register_parameter(key, source)
        return name
    raise AssertionError("the numbers do not end")
