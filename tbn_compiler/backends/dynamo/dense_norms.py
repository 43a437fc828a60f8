"""Norms of values whose order was changed, as patches of an image are, read them from memory in their new order.

Before::

    y = layer_norm(image.permute(0, 2, 4, 3, 5, 1).flatten(3))

After::

    y = layer_norm(tbn_cpu.dense(image.permute(0, 2, 4, 3, 5, 1)).flatten(3))

Inductor makes one loop of the change of order and the norm's sums, element by element with a division each, where a
copy and a norm of its result are loops on vectors.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import fx

from tbn_compiler.backends.cpu import bound
from tbn_compiler.graph.calls import all_among
from tbn_compiler.graph.operations import bind, node_name
from tbn_compiler.passes.base import copy_meta
from tbn_compiler.passes.deployment import dtype

_KEEPING = ("reshape", "flatten", "contiguous", "unflatten", "clone")
"""Operations that keep the order of what they are given."""

_CHANGING = ("permute", "transpose", "swapaxes", "movedim")


def densify_norms(gm: fx.GraphModule, layers: Container[fx.Node]) -> None:
    """Let norms read dense values, in place.

    Args:
        gm: a graph whose values' dtypes were noted.
        layers: the tiled layers on the CPU; nothing is done where one is elsewhere.
    """
    if bound.unavailable() or not all_among(gm.graph, layers):
        return
    for node in gm.graph.nodes:
        call = bind(node)
        changed = _changed(call.input) if call is not None and call.name == "layer_norm" else None
        if changed is None or dtype(changed) != torch.float32 or not _undisturbed(changed, node):
            continue
        with gm.graph.inserting_after(changed):
            dense = gm.graph.call_function(torch.ops.tbn_cpu.dense.default, (changed,))
        copy_meta(changed, dense)
        (reader,) = [user for user in changed.users if user is not dense]
        reader.replace_input_with(changed, dense)


def _undisturbed(changed: fx.Node, norm: fx.Node) -> bool:
    """Whether nothing computes between the two, and so could change in place what is copied."""
    node = changed.next
    while node is not norm:
        if node.op not in ("get_attr", "placeholder") and node_name(node) not in _KEEPING:
            return False
        node = node.next
    return True


def _changed(value: Any) -> fx.Node | None:
    """The node that changes the order of a value that nothing else reads, if it is reshaped behind that."""
    reshaped = False
    while isinstance(value, fx.Node) and len(value.users) == 1 and value.args:
        name = node_name(value)
        if name in _CHANGING:
            return value if reshaped else None
        if name not in _KEEPING:
            return None
        reshaped = True
        value = value.args[0]
    return None
