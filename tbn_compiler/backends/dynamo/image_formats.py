"""Images in the ``channels_last`` format between convolutions whose kernels read and write them so.

Convolutions that multiply bytes, or floats as they are (``docs/cpu.md``), have the channels of a position side by side;
images in planes are transposed on the way in and out. In a network of several, the values between them stay in that
format: an image is brought into it before the first convolution, and back where anything but pooling and functions of
each element reads it, so that whoever looks at strides finds those of the graph that was captured.

Conversions stand directly before their readers: a value that is changed in place is read as it is then.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import Tensor, fx

from tbn_compiler.backends.cpu import conv, library
from tbn_compiler.graph.calls import InferenceCall, attribute, tiled_call
from tbn_compiler.graph.operations import VIEWS, bind, node_name
from tbn_compiler.ops.calls import TensorCall
from tbn_compiler.passes.base import copy_meta
from tbn_compiler.torch_private import OpOverload, operator_schema

_ELEMENTWISE = (
    *("relu", "leaky_relu", "gelu", "silu", "sigmoid", "tanh", "relu6", "hardtanh", "elu", "softplus", "hardswish"),
    *("hardsigmoid", "dropout", "identity", "detach"),
)
_POOLINGS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d")

_KEEPING = frozenset((*_ELEMENTWISE, *_POOLINGS, "add", "batch_norm"))
"""Operations whose result has the format of their first argument, and of the other one of a sum."""

_IN_PLACE = (operator.setitem, *(getattr(operator, f"i{name}") for name in (
    "add", "sub", "mul", "matmul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift"
)))  # fmt: skip

_PLANES = "tbn_planes"  # in the ``meta`` of nodes

_ALIASES = VIEWS | {"detach", "identity", "dropout"}
"""Operations whose result may share memory with their first argument."""


def keep_channels_last(gm: fx.GraphModule) -> bool:
    """Bring images into the format and keep them there, in place; whether there were such convolutions.

    Left alone: a graph with one convolution, and one in which an image is changed in place by another operation than
    those that keep the format, or after a view of it was made.
    """
    convolutions = [node for node in gm.graph.nodes if _multiplies_bytes(gm, node)]
    if len(convolutions) < 2:
        return False
    images = dict.fromkeys(convolutions)
    for node in gm.graph.nodes:
        if _keeps(node, images):
            images[node] = None
    if any(_by_planes(node) is None for node in images) or _changes_apart(gm, images):
        return False
    for node in convolutions:
        image = node.args[0]
        assert isinstance(image, fx.Node)
        if image not in images:
            _convert_for(gm, node, image, torch.channels_last)
    for node in images:
        if _by_planes(node):
            for reader in [user for user in node.users if user not in images]:
                _convert_for(gm, reader, node, torch.contiguous_format)
    return True


def note_format(node: fx.Node, value: Tensor) -> None:
    """Note the format of an image that was captured."""
    if value.dim() == 4:
        node.meta[_PLANES] = value.is_contiguous()


def _by_planes(node: fx.Node) -> bool | None:
    """Whether an image was captured in planes; ``None`` for another value, or one that is not known."""
    return node.meta.get(_PLANES)


def _multiplies_bytes(gm: fx.GraphModule, node: fx.Node) -> bool:
    call = tiled_call(node)
    level = library.level()
    if call is None or call.kind != "conv2d" or call.groups > 1 or not library.has_dots(level):
        return False
    tile = attribute(gm, call.arguments["tile"])
    if tile is None or tile.device.type != "cpu":
        return False
    return call.activation != "float" or (library.keeps_floats(level) and _multiplies_floats(gm, call))


def _multiplies_floats(gm: fx.GraphModule, call: InferenceCall) -> bool:
    """Whether a layer has enough different filters."""
    found = {name: attribute(gm, value) for name, value in call.arguments.items() if isinstance(value, fx.Node)}
    found["input"] = torch.empty(0, device="meta")
    if any(value is None for value in found.values()):
        return False
    return conv.multiplies_bytes(TensorCall(call.operator, {**call.arguments, **found}))


def _keeps(node: fx.Node, images: dict[fx.Node, None]) -> bool:
    call = bind(node)
    if call is None or call.name not in _KEEPING or call.input not in images or call.arguments.get("return_indices"):
        return False
    other = call.arguments.get("other")
    return not isinstance(other, fx.Node) or other in images


def _changes_apart(gm: fx.GraphModule, images: dict[fx.Node, None]) -> bool:
    """Whether an image is changed in place where a reader, or a view that was made before, would have a copy."""
    first: dict[fx.Node, fx.Node] = {}  # a value to the first one that it may share memory with
    viewed: set[fx.Node] = set()
    shared = {*images}  # images, and what may share memory with them
    for node in gm.graph.nodes:
        for source in _changed(node):
            base = first.get(source, source)
            if source in shared and (node not in images or base in viewed):
                return True
            if source is node.args[0]:
                first[node] = base
        if node_name(node) in _ALIASES and node.args and isinstance(node.args[0], fx.Node):
            base = first[node] = first.get(node.args[0], node.args[0])
            if node.args[0] in shared and node not in images:
                shared.add(node)
                viewed.add(base)
    return False


def _changed(node: fx.Node) -> Iterator[fx.Node]:
    """The values that a node may change in place."""
    if node.op not in ("call_function", "call_method"):
        return
    if isinstance(node.target, OpOverload) and operator_schema(node.target).is_mutable:
        yield from node.all_input_nodes
        return
    given = node.kwargs.get("out")
    yield from (
        value for value in (given if isinstance(given, tuple | list) else [given]) if isinstance(value, fx.Node)
    )
    if node.args and isinstance(node.args[0], fx.Node) and _in_place(node):
        yield node.args[0]


def _in_place(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else str(getattr(node.target, "__name__", ""))
    call = bind(node)
    return (
        (name.endswith("_") and not name.endswith("__"))
        or node.target in _IN_PLACE
        or node.kwargs.get("inplace") is True
        or (call is not None and call.arguments.get("inplace") is True)
    )


def _convert_for(gm: fx.GraphModule, reader: fx.Node, value: fx.Node, form: torch.memory_format) -> None:
    """Let one reader have a value in another format."""
    with gm.graph.inserting_before(reader):
        converted = gm.graph.call_method("contiguous", (value,), {"memory_format": form})
    copy_meta(value, converted)
    reader.replace_input_with(value, converted)
