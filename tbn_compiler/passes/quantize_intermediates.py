"""Bring what passes between layers into int8, each value with one scale.

Before::

    y = tbn.conv2d(x, ..., activation="int8")
    z = y + shortcut

After::

    y  = tbn.conv2d(x, ..., activation="int8")
    y8 = tbn.quantize_input(y, "int8", 1, scale)
    z  = y8 + shortcut8

so that a backend keeps ``y`` in a quarter of the memory, and adds integers. The scale is that of the layer which reads
the value, if one does, through views and maxima; otherwise that with the least mean square error over batches
(:func:`~tbn_compiler.compiler.deploy` finds it, and puts it in). This changes results within the rounding of int8.

Results of the model stay floats, unless they are wanted in int8, too: then each is rounded behind whatever makes it.

Which values: results of tiled layers on int8, and of sums, products, means, joins and functions of such, that one of
these but a layer reads. What only layers read they quantise themselves, and a clamp's input is left to the clamp's
result. Left alone: everything that anything else reads as a float, such as a softmax, stays a float for that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.operations import VIEWS, bind
from tbn_compiler.passes.base import GraphPass
from tbn_compiler.passes.deployment import dtype


@dataclass
class Intermediates:
    """What is wanted in int8 beside the inputs of layers, and what was found.

    Attributes:
        between: whether values between layers are.
        results: whether the model's results are.
        found: the scales, by graph and name of the buffer, in the order of the graph.
    """

    between: bool
    results: bool
    found: dict[tuple[fx.GraphModule, str], None] = field(default_factory=dict)


_CLAMPS = frozenset({"relu", "relu6", "hardtanh"})
_FUNCTIONS = frozenset({"hardswish", "hardsigmoid", "sigmoid", "silu", "gelu", "tanh"})
_MEANS = frozenset({"mean", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"})
_MOVES = VIEWS | {"max_pool1d", "max_pool2d", "clone", "identity", "detach"}


class QuantizeIntermediates(GraphPass):
    """Insert a quantisation behind values, with scales that are not known yet.

    Args:
        intermediates: what is wanted; takes what was found.
    """

    def __init__(self, intermediates: Intermediates) -> None:
        self.intermediates = intermediates

    def run(self, gm: fx.GraphModule) -> bool:
        """Match and rewrite."""
        output = gm.graph.output_node()
        asked = self.intermediates
        results = [node for node in output.all_input_nodes if asked.results and _is_float_result(node)]
        wanted = [node for node in gm.graph.nodes if asked.between and _wanted(gm, node)]
        for node in dict.fromkeys((*wanted, *results)):
            name = f"{node.name}_scale"
            while hasattr(gm, name):
                name = f"_{name}"
            gm.register_buffer(name, torch.full((1,), torch.nan))
            users = [user for user in node.users if (node in results if user is output else node in wanted)]
            with gm.graph.inserting_after(node):
                rounded = gm.graph.call_function(_QUANTIZE, (node, "int8", 1))
            with gm.graph.inserting_before(rounded):
                rounded.args = (*rounded.args, gm.graph.get_attr(name))
            rounded.meta = dict(node.meta)
            for user in users:
                user.replace_input_with(node, rounded)
            asked.found[gm, name] = None
        return bool(wanted or results)


_QUANTIZE = torch.ops.tbn.quantize_input.default


def _is_float_result(node: fx.Node) -> bool:
    return node.op != "placeholder" and node.target is not _QUANTIZE and dtype(node) in (None, torch.float32)


def set_scale(gm: fx.GraphModule, name: str, scale: float | None) -> None:
    """Set the scale of a value; ``None``, or 0 for a value that was always 0, leaves it a float.

    The scale of a layer that reads the value goes before ``scale``: both are of the same numbers, or of the largest of
    them, and where they are equal nothing has to be rescaled.
    """
    (attribute,) = gm.graph.find_nodes(op="get_attr", target=name)
    (node,) = attribute.users
    if scale:
        readers = (_layer_scale(gm, user) for user in _readers(gm, node))
        gm.get_buffer(name).fill_(next((found for found in readers if found is not None), scale))
        return
    node.replace_all_uses_with(node.args[0])
    for unused in (node, attribute):
        gm.graph.erase_node(unused)
    delattr(gm, name)
    gm.recompile()


def _layer_scale(gm: fx.GraphModule, node: fx.Node) -> float | None:
    call = tiled_call(node)
    if call is None or call.arguments.get("input_scale") is None:
        return None
    scale = call.tensor(gm, "input_scale")
    return float(scale) if isinstance(scale, Tensor) and scale.isfinite().all() else None


def _wanted(gm: fx.GraphModule, node: fx.Node) -> bool:
    if dtype(node) not in (None, torch.float32):
        return False
    kind = _kind(gm, node)
    if kind is None or kind == "move":
        return False
    if [_kind(gm, user) for user in node.users] == ["clamp"]:
        return False
    return any(_kind(gm, user) in ("sum", "product", "mean", "join", "function") for user in _readers(gm, node))


def _readers(gm: fx.GraphModule, node: fx.Node) -> list[fx.Node]:
    """What reads a value, itself or moved."""
    found = []
    for user in node.users:
        found += _readers(gm, user) if _kind(gm, user) == "move" else [user]
    return found


def _kind(gm: fx.GraphModule, node: fx.Node) -> str | None:
    """What a node does with int8; ``None`` for what computes in floating point."""
    call = tiled_call(node)
    if call is not None:
        integers = call.arguments.get("activation") == "int8" and call.arguments.get("input_scale") is not None
        return "layer" if integers else None
    bound = bind(node, gm)
    if bound is None:
        return None
    if bound.name == "cat":
        return "join"
    if bound.name == "add":
        numbers = isinstance(bound.arguments["other"], fx.Node) and bound.arguments["alpha"] == 1
        return "sum" if numbers else None
    if bound.name == "mul":
        return "product" if isinstance(bound.arguments["other"], fx.Node) else None
    for kind, names in (("clamp", _CLAMPS), ("function", _FUNCTIONS), ("mean", _MEANS), ("move", _MOVES)):
        if bound.name in names:
            return kind
    return None
