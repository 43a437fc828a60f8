"""What can be true of a graph between two passes: passes require and ensure it, and it is checked."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum

import torch
from torch import fx

from tbn_compiler.graph.attention import attention_layer
from tbn_compiler.graph.calls import attribute, tiled_call
from tbn_compiler.graph.layers import blend_strength, find_record, layer_calls
from tbn_compiler.graph.records import get_records
from tbn_compiler.packing import packed_size


class Fact(Enum):
    """Something that holds for a whole graph."""

    RECORDED = "every layer with a weight of its own has a record"
    DECOMPOSED = "every attention is decomposed into linears"
    UNBLENDED = "no weight is blended with its float form"
    STORED = "no layer is in training form"


def violations(gm: fx.GraphModule, fact: Fact) -> Iterator[str]:
    """The nodes for which a fact does not hold, in words."""
    if fact is Fact.DECOMPOSED:
        yield from (f"node {node.name} is not" for node in gm.graph.nodes if node.target is attention_layer)
        return
    if fact is Fact.UNBLENDED:
        yield from (f"node {node.name} blends" for node in gm.graph.nodes if blend_strength(node) is not None)
        return
    records = get_records(gm) or ()
    for call in layer_calls(gm):
        if fact is Fact.STORED and call.form == "tiled":
            yield f"node {call.node.name} uses weight {call.weight!r} in training form"
        if fact is Fact.RECORDED and find_record(records, call) is None:
            yield f"node {call.node.name} uses weight {call.weight!r}, which has no record"


def malformed(gm: fx.GraphModule) -> Iterator[str]:
    """What no pass may leave behind, in words: a node that breaks the rules of torch.fx, a tile of another size."""
    try:
        gm.graph.lint()
    except RuntimeError as error:
        yield str(error)
        return
    for node in gm.graph.nodes:
        call = tiled_call(node)
        tile = None if call is None else attribute(gm, call.arguments["tile"])
        alpha = None if call is None else attribute(gm, call.arguments["alpha"])
        if call is None or tile is None:
            continue
        size = call.layout.tile_size
        expected = packed_size(size) if tile.dtype == torch.uint8 else size
        if tuple(tile.shape) != (expected,):
            yield f"node {node.name}: a tile of {size} elements in a tensor {tuple(tile.shape)} of {tile.dtype}"
        if alpha is not None and not call.layout.allows_alphas(alpha.numel()):
            yield f"node {node.name}: {alpha.numel()} alphas on {call.layout}"
