"""Images in the ``channels_last`` format between convolutions whose kernels read and write them so.

Convolutions of int8 activations that multiply bytes (``docs/cpu.md``) have the channels of a position side by side;
images in planes are transposed on the way in and out. In a network of several, the values between them stay in that
format: an image is brought into it before the first convolution, and back where anything but pooling and functions of
each element reads it, so that whoever looks at strides finds those of the graph that was captured.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from tbn_compiler.backends.cpu import library
from tbn_compiler.graph.calls import attribute, tiled_call
from tbn_compiler.graph.operations import VIEWS, bind, operation_of

_ELEMENTWISE = (
    *("relu", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "relu6", "hardtanh", "elu", "softplus", "hardswish"),
    *("hardsigmoid", "dropout", "identity", "detach"),
)
_POOLINGS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")

_KEEPING = frozenset((*_ELEMENTWISE, *_POOLINGS, "add", "batch_norm"))
"""Operations whose result has the format of their first argument, and of the other one of a sum."""


def keep_channels_last(gm: fx.GraphModule) -> bool:
    """Bring images into the format and keep them there, in place; whether there were such convolutions.

    Left alone: a graph with one convolution, or with one that changes an image in place through a view of it.
    """
    convolutions = {node for node in gm.graph.nodes if _multiplies_bytes(gm, node)}
    if len(convolutions) < 2:
        return False
    images = set(convolutions)
    for node in gm.graph.nodes:
        call = bind(node)
        if call is not None and call.name in _KEEPING and call.input in images:
            other = call.arguments.get("other")
            if not isinstance(other, fx.Node) or other in images:
                images.add(node)
    if any(_changes_apart(node, images) for node in gm.graph.nodes):
        return False
    into: dict[fx.Node, fx.Node] = {}
    for node in convolutions:
        image = node.args[0]
        assert isinstance(image, fx.Node)
        if image not in images:
            if image not in into:
                into[image] = _insert(gm, image, memory_format=torch.channels_last)
            node.replace_input_with(image, into[image])
    for node in images:
        outside = [user for user in node.users if user not in images]
        if outside:
            back = _insert(gm, node)
            for user in outside:
                user.replace_input_with(node, back)
    return True


def _multiplies_bytes(gm: fx.GraphModule, node: fx.Node) -> bool:
    call = tiled_call(node)
    if call is None or call.kind != "conv2d" or call.activation == "float" or not library.has_dots(library.level()):
        return False
    tile = attribute(gm, call.arguments["tile"])
    return tile is not None and tile.device.type == "cpu" and call.groups == 1


def _changes_apart(node: fx.Node, images: set[fx.Node]) -> bool:
    """Whether a node changes an image in place whose reading would be put into another format."""
    if node in images or not node.args or not isinstance(node.args[0], fx.Node) or not _in_place(node):
        return False
    return any(base in images for base in _bases(node.args[0]))


def _in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    operators = (getattr(operator, f"i{name}") for name in ("add", "sub", "mul", "truediv", "pow", "matmul"))
    return (
        (name.endswith("_") and not name.endswith("__"))
        or node.target in (*operators, operator.setitem)
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
        or _named(node).get("inplace") is True
    )


def _named(node: fx.Node) -> dict[str, Any]:
    call = bind(node)
    return {} if call is None else call.arguments


def _bases(node: fx.Node) -> Iterator[fx.Node]:
    """A value, and the values that it may be a view of."""
    yield node
    while True:
        found = operation_of(node)
        name = found.name if found is not None else str(getattr(node.target, "__name__", node.target))
        if name not in VIEWS or not node.args or not isinstance(node.args[0], fx.Node):
            return
        node = node.args[0]
        yield node


def _insert(gm: fx.GraphModule, value: fx.Node, **options: torch.memory_format) -> fx.Node:
    """The value in another format, computed behind it."""
    last = value
    while last.op == "placeholder" and last.next.op == "placeholder":
        last = last.next
    with gm.graph.inserting_after(last):
        return gm.graph.call_method("contiguous", (value,), dict(options))
