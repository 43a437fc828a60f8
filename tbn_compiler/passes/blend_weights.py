"""Blend each tiled weight with its float weight, so that training can move from one to the other.

Before::

    used = tbn.scale(tbn.tile(weight, p), alpha_source, k)      # alpha * B
    y = linear(x, used, bias)

:class:`BlendWeights`, for training::

    s = tiling_strength.type_as(weight)                         # 0: float, 1: tiled
    blend = lerp(weight, used, s)                               # (1 - s) * weight + s * alpha * B
    y = linear(x, blend, bias)

``tiling_strength`` is one scalar buffer of the graph module, under that name in its ``state_dict``: a checkpoint
resumes where the schedule stood. It starts at 0. ``lerp`` returns its first argument at 0 and its second at 1, bit
by bit, so that both ends are exact: the float model, and the tiled one.

A gradient ``g`` of the blend reaches ``weight`` by both paths, ``(1 - s) * g`` directly and ``s * alpha * g``
straight through the tile (Eq. 6), and ``alpha_source`` with the factor ``s``.

:class:`RemoveBlends`, before lowering, is the inverse at ``s = 1``::

    lerp(weight, used, 1)  ->  used

It is required, and raises at any other strength: the trained network is then not the tiled one. Layers left in float
have no blend and are not touched; a weight that has one keeps it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from tbn_compiler.errors import LoweringError, TransformError
from tbn_compiler.graph.layers import blend_strength, layer_calls, parameter_view, weight_chain
from tbn_compiler.graph.records import split_key
from tbn_compiler.graph.tiled_parameters import STRENGTH
from tbn_compiler.passes.base import GraphPass, copy_meta, remove_dead_nodes
from tbn_compiler.passes.facts import Fact


class BlendWeights(GraphPass):
    """Insert a blend behind every tiled weight that has none."""

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        chains = [weight_chain(call.weight_node) for call in layer_calls(gm) if call.form == "tiled"]
        found = dict.fromkeys(chain[1] for chain in chains if chain is not None)
        scales = [scale for scale in found if not any(blend_strength(user) is not None for user in scale.users)]
        if scales:
            _register_strength(gm, scales[0])
        for scale in scales:
            _insert_blend(gm, scale)
        return bool(scales)


class RemoveBlends(GraphPass):
    """Replace each blend, at strength 1, by the tiled weight alone; the strength goes with the last one."""

    establishes = (Fact.UNBLENDED,)

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        keys = strength_keys(gm)
        for key in keys:
            check_strength(type(gm).__name__, gm.get_buffer(key))
        for node in list(gm.graph.nodes):
            if blend_strength(node) is not None:
                node.replace_all_uses_with(node.args[1])
                gm.graph.erase_node(node)
        remove_dead_nodes(gm.graph)
        for key in keys:
            path, name = split_key(key)
            del gm.get_submodule(path)._buffers[name]
        return bool(keys)


def check_strength(owner: str, strength: Tensor) -> None:
    """Refuse to lower what is not fully tiled."""
    if not strength.is_meta and strength != 1:
        raise LoweringError(
            f"{STRENGTH} of {owner} is at {float(strength):g}; set it to 1 (set_tiling_strength) and finish training "
            "before lowering"
        )


def strength_keys(gm: fx.GraphModule) -> list[str]:
    """Names of the buffers that hold the strength of the graph's blends; more than one if it took in other graphs."""
    found = [blend_strength(node) for node in gm.graph.nodes]
    return list(dict.fromkeys(str(strength.target) for strength in found if strength is not None))


def _register_strength(gm: fx.GraphModule, scale: fx.Node) -> None:
    """Create the buffer on the device of the first weight, unless earlier blends of this module read it already."""
    if STRENGTH in strength_keys(gm):
        return
    if hasattr(gm, STRENGTH):
        raise TransformError(
            f"{type(gm).__name__} has an attribute {STRENGTH!r}, the name under which gradual tiling keeps its state: "
            "rename it"
        )
    source = parameter_view(scale.args[1])
    assert source is not None
    device = gm.get_parameter(str(source[0].target)).device
    gm.register_buffer(STRENGTH, torch.zeros((), device=device))


def _insert_blend(gm: fx.GraphModule, scale: fx.Node) -> None:
    tile = scale.args[0]
    assert isinstance(tile, fx.Node)
    weight = tile.args[0]
    with gm.graph.inserting_after(scale):
        strength = gm.graph.get_attr(STRENGTH)
    with gm.graph.inserting_after(strength):
        # Weights of one module may differ in dtype and device.
        cast = gm.graph.call_method("type_as", (strength, weight))
    with gm.graph.inserting_after(cast):
        blend = gm.graph.call_function(torch.lerp, (weight, scale, cast))
    copy_meta(scale, strength, cast, blend)
    scale.replace_all_uses_with(blend, delete_user_cb=lambda user: user is not blend)
