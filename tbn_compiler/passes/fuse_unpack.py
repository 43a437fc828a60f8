"""Let a layer on a decoded weight run on the stored tile itself.

Before::

    w = tbn.unpack(tile, alpha, [m, n], p)          # a weight that code reads, see graph/tiled_parameters.py
    y = linear(x, w, bias)

After::

    y = tbn.linear(x, tile, alpha, bias, n, m, p)

So for convolutions and transpose convolutions, and for matrix products that :class:`ExposeLinears` has written as
linear layers. The results are equal; the weight is no longer decoded, and only its unique rows are multiplied.

Left alone, with the reason in the note of the weight's record: a weight that anything else reads, for which it is still
decoded at each call; so a batch of weights, and a weight that is computed with before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tbn_compiler.graph.calls import named_arguments
from tbn_compiler.graph.layers import function_arguments, function_kind, is_transposed, is_view
from tbn_compiler.ops.calls import OPERATORS
from tbn_compiler.passes.base import GraphPass, copy_meta, normalize_sizes, pad_input, padding_sizes
from tbn_compiler.passes.deployment import describe, record_refusal
from tbn_compiler.passes.expose_linears import ExposeLinears


class FuseUnpack(GraphPass):
    """Turn linear layers and convolutions on decoded weights into inference operators."""

    after = (ExposeLinears,)

    def run(self, gm: fx.GraphModule) -> bool:
        """Match and rewrite."""
        modified = False
        for node in list(gm.graph.nodes):
            kind = function_kind(node)
            stored = None if kind is None else _stored(node, kind)
            if kind is not None and stored is not None:
                _replace(gm, node, kind, stored)
                modified = True
        for node in gm.graph.nodes:
            if node.target is torch.ops.tbn.unpack.default:
                for reader in _readers(node):
                    weight = str(named_arguments(node)["tile"].target).removesuffix("_tile")
                    record_refusal(gm, weight, f"its weight is decoded at each call for {describe(gm, reader)}")
        return modified


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What reads a value, or a view of it."""
    for user in node.users:
        if is_view(user):
            yield from _readers(user)
        else:
            yield user


def _stored(node: fx.Node, kind: str) -> dict[str, Any] | None:
    """The arguments of the ``tbn::unpack`` behind a layer's weight, or ``None``."""
    arguments = function_arguments(node)
    weight = arguments["weight"]
    if not isinstance(weight, fx.Node) or weight.target is not torch.ops.tbn.unpack.default:
        return None
    stored = named_arguments(weight)
    dims = 2 + OPERATORS[kind].dims
    if stored["batch"] != 1 or len(stored["shape"]) != dims or (is_transposed(kind) and stored["p_in"] != 1):
        return None
    return stored


def _replace(gm: fx.GraphModule, node: fx.Node, kind: str, stored: dict[str, Any]) -> None:
    arguments, shape = function_arguments(node), list(stored["shape"])
    groups = arguments.get("groups", 1)  # a linear layer has none
    sizes = OPERATORS[kind].channels(shape, groups)
    x = arguments["input"]
    if isinstance(arguments.get("padding"), str):
        dilation = normalize_sizes(arguments["dilation"], len(shape) - 2)
        before, after = padding_sizes(arguments["padding"], tuple(shape[2:]), dilation)
        if before != after:
            with gm.graph.inserting_before(node):
                x = pad_input(gm.graph, x, before, after, "constant")
            before = (0,) * len(before)
        arguments["padding"] = before
    operands: list[Any] = [x, stored["tile"], stored["alpha"], arguments["bias"], *sizes]
    names = OPERATORS[kind].layout_options
    options = {name: stored[name] for name in names if stored[name] != OPERATORS[kind].defaults[name]}
    if kind != "linear":
        operands.append(shape[2:])
        for name in ("stride", "padding", "output_padding", "dilation"):
            if name in arguments:
                value = arguments[name]
                options[name] = value if isinstance(value, fx.Node) else normalize_sizes(value, len(shape) - 2)
        options["groups"] = groups
    with gm.graph.inserting_before(node):
        new = gm.graph.call_function(OPERATORS[kind].overload, (*operands, stored["p"]), options)
    copy_meta(node, new)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)
