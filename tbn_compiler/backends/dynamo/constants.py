"""Parameters and buffers of a graph that Dynamo captured, where the passes can see their values.

Dynamo passes every parameter and buffer to the backend as an input, because it calls a compiled function again after
they change, and for other layers with the same code. The passes read weights, so they work on a graph in which these
inputs are attributes. This module goes from the one form to the other and back::

    f(x, weight, bias)                Dynamo's graph
        -> GraphTemplate              the same, with get_attr nodes where layers read weights, without values
        -> GraphModule                with the values of one call, for the passes
        -> f(x, bias, tile, alpha)    what is compiled: the inputs that are left, then what the passes computed
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.backends.dynamo.image_formats import note_format
from tbn_compiler.graph.layers import is_view
from tbn_compiler.graph.operations import bind
from tbn_compiler.ops.calls import OPERATORS, TRAINING_OPERATORS
from tbn_compiler.passes.deployment import note_value
from tbn_compiler.torch_private import (
    STATIC_MARK,
    capture_meta,
    input_marks,
    input_path,
    input_source,
    make_input,
    mark_as_captured,
)

_tbn = torch.ops.tbn
_TRAINED_LAYERS = {layer.overload for layer in TRAINING_OPERATORS.values()}
_TRAINING = {_tbn.tile.default, _tbn.scale.default, _tbn.train_weight.default, *_TRAINED_LAYERS}
_LAYERS = {layer.overload for layer in OPERATORS.values()}
_STORED = {*_LAYERS, _tbn.unpack.default}
# User code that calls torch.ops.tbn.tile and not .default gives nodes of these; the passes know overloads only.
_OVERLOADS = {op.overloadpacket: op for op in (*_TRAINING, *_STORED)}
# Everything that may read a weight for it to become an attribute: nothing here writes to it.
_READERS = {*_TRAINING, *_STORED, torch.lerp, "type_as"}


def is_tiled(node: fx.Node) -> bool:
    """Whether a node belongs to a tiled layer: one of the operators of the training form, or on a stored tile."""
    return _target(node) in _OVERLOADS.values()


def _target(node: fx.Node) -> Any:
    return _OVERLOADS.get(node.target, node.target)


def is_static(placeholder: fx.Node) -> bool:
    """Whether an input of a graph from Dynamo is a parameter or buffer."""
    return not STATIC_MARK.keys().isdisjoint(input_marks(placeholder))


@dataclass(frozen=True)
class LoweredGraph:
    """A graph to compile.

    Attributes:
        module: takes the kept inputs of Dynamo's graph, then the computed tensors.
        kept: positions of the kept inputs.
        computed: tensors that the passes computed.
    """

    module: fx.GraphModule
    kept: tuple[int, ...]
    computed: tuple[Tensor, ...]

    @property
    def signature(self) -> tuple[Any, ...]:
        """Equal for graphs that one compiled function serves."""
        forms = tuple((value.shape, value.stride(), value.dtype, value.device) for value in self.computed)
        return str(self.module.graph), self.kept, forms


class GraphTemplate:
    """A graph from Dynamo in which the weights of layers and norms are attributes.

    Attributes:
        constants: position of each such weight among the inputs, by its name.
        owners: positions of the weights of tiled layers; of all weights if none is an input of such a layer.
        notes: what kept weights from being among them.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        placeholders = gm.graph.find_nodes(op="placeholder")
        self._attributes = {
            str(node.target): operator.attrgetter(str(node.target))(gm)
            for node in gm.graph.nodes
            if node.op in ("get_attr", "call_module")
        }
        constants: dict[fx.Node, int] = {}
        opaque: Counter[str] = Counter()
        for index, (node, value) in enumerate(zip(placeholders, example_inputs, strict=True)):
            if isinstance(value, Tensor) and is_static(node) and _only_read_by_layers(node):
                reason = _why_opaque(value)
                if reason is None:
                    constants[node] = index
                else:
                    opaque[reason] += 1
        self.notes = tuple(f"nothing is computed in advance from {n} weights: {why}" for why, n in opaque.items())
        static = {index: node for index, node in enumerate(placeholders) if is_static(node)}
        self.owners = [index for index, node in static.items() if _is_tiled_weight(node)] or list(static)
        names = _names(constants, self._attributes)
        self.constants = {names[node]: index for node, index in constants.items()}
        self._graph = _copy(gm.graph, lambda graph, node: graph.get_attr(names[node]) if node in names else None)
        self._inputs = [(str(node.target), input_marks(node), input_source(node)) for node in placeholders]
        self._meta = capture_meta(gm)

    def with_values(self, inputs: Sequence[Any]) -> fx.GraphModule:
        """A graph module that holds the weights among ``inputs``, in evaluation mode."""
        root = {name: inputs[index] for name, index in self.constants.items()} | self._attributes
        gm = fx.GraphModule(root, _copy(self._graph))
        gm.training = False
        return gm

    def finish(self, gm: fx.GraphModule) -> LoweredGraph:
        """The graph to compile from what the passes made of the result of :meth:`with_values`."""
        tensors: dict[str, Tensor] = {}
        for node in gm.graph.find_nodes(op="get_attr"):
            value = operator.attrgetter(str(node.target))(gm)
            if isinstance(value, Tensor):
                tensors[str(node.target)] = value
        names = {index: name for name, index in self.constants.items()}
        kept = tuple(index for index in range(len(self._inputs)) if names.get(index) in {None, *tensors})
        computed = [name for name in tensors if name not in self.constants]

        graph = fx.Graph()
        inputs: dict[tuple[str, str], fx.Node] = {}
        for index in kept:
            name, marks, source = self._inputs[index]
            key = ("get_attr", names[index]) if index in names else ("placeholder", name)
            inputs[key] = make_input(graph, name, marks, source)
        for number, name in enumerate(computed):
            inputs["get_attr", name] = make_input(graph, f"tbn_computed_{number}", STATIC_MARK, None)
        graph = _copy(gm.graph, lambda _, node: inputs.get((node.op, str(node.target))), graph)
        module = fx.GraphModule(gm, graph)
        if all(source is not None for _, _, source in self._inputs):
            mark_as_captured(module, self._meta)
        return LoweredGraph(module, kept, tuple(tensors[name] for name in computed))


def _why_opaque(value: Tensor) -> str | None:
    """Why the values of a weight cannot be used, or their changes not be seen; ``None`` if they can."""
    if type(value) not in (Tensor, nn.Parameter, nn.Buffer):
        return f"they are of class {type(value).__name__}"
    if value.is_inference():
        return "they were made under torch.inference_mode, and do not count their changes"
    if value.is_meta:
        return "they are on the meta device"
    return None


def _copy(
    source: fx.Graph,
    replace: Callable[[fx.Graph, fx.Node], fx.Node | None] = lambda graph, node: None,
    graph: fx.Graph | None = None,
) -> fx.Graph:
    """Copy a graph, with other nodes in the place of some; it keeps no tensor of Dynamo's alive."""
    graph = fx.Graph() if graph is None else graph
    copies: dict[fx.Node, fx.Node] = {}
    for node in source.nodes:
        copy = replace(graph, node)
        if copy is None:
            copy = graph.node_copy(node, copies.__getitem__)
            value = copy.meta.pop("example_value", None)
            copy.meta.pop("grapharg", None)
            if isinstance(value, Tensor):
                note_value(copy, value)
                note_format(copy, value)
            if copy.op == "call_function":
                copy.target = _target(copy)
        copies[node] = copy
    return graph


def _only_read_by_layers(node: fx.Node) -> bool:
    """Whether a weight is only read, and by operations that the passes know: directly, or through a view."""
    for user in node.users:
        call = bind(user)
        if call is not None and call.name == "batch_norm" and call.arguments["training"] is False:
            continue  # else it may train, and then writes its statistics
        if _is_input_scale(user) or _takes_scale(user, node):
            continue
        if _target(user) not in _READERS and not (is_view(user) and _only_read_by_layers(user)):
            return False
    return bool(node.users)


def _is_input_scale(node: fx.Node) -> bool:
    """Whether a node makes the scale of a layer's inputs from its logarithm, and nothing else reads that."""
    return node.target is torch.exp and all(_takes_scale(user, node) for user in node.users)


def _takes_scale(node: fx.Node, scale: fx.Node) -> bool:
    """Whether a node brings a value into a number format with this scale."""
    return node.target in (_tbn.quantize_input, _tbn.quantize_input.default) and node.args[3:] == (scale,)


def _is_tiled_weight(node: fx.Node) -> bool:
    """Whether an input is a stored tile, or the weight or alpha source of a layer in training form."""
    for user in node.users:
        if _target(user) in _LAYERS:
            found = user.args[1] is node
        elif _target(user) in _STORED:
            found = user.args[0] is node
        elif _target(user) in _TRAINED_LAYERS:
            found = node in user.args[1:3]
        else:
            found = _target(user) in _TRAINING or (is_view(user) and _is_tiled_weight(user))
        if found:
            return True
    return False


def _names(nodes: Iterable[fx.Node], taken: Iterable[str]) -> dict[fx.Node, str]:
    """Attribute names for inputs: the paths of the tensors in the module, as far as Dynamo tells them."""
    names: dict[fx.Node, str] = {}
    # No name may be another's prefix: one would be a tensor, and the module that holds the other.
    used = set(taken)
    prefixes = {prefix for name in used for prefix in _prefixes(name)}
    for node in nodes:
        parts = re.findall(r"\w+", input_path(node) or node.name)
        if parts[:2] == ["L", "fn"]:  # how Dynamo calls a module whose forward is PyTorch's own
            del parts[1]
        parts = [part for part in parts if part not in ("L", "G", "self", "_modules", "_parameters", "_buffers")]
        name = base = ".".join(parts) or node.name
        number = 1
        while name in used or name in prefixes or not used.isdisjoint(_prefixes(name)):
            number += 1
            name = f"copy{number}.{base}"
        names[node] = name
        used.add(name)
        prefixes.update(_prefixes(name))
    return names


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
