"""What counts as a layer, and where a graph calls one.

A :class:`LayerCall` is one place in a graph where a linear or convolution runs, in any of its three forms: a
module or function on a float weight; in training form, a function on a ``tile -> scale`` subgraph or the operator that
stands for both; or an inference operator on a stored tile. An attention is four calls of linears, one for each of its
weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn

from tbn_compiler.graph.attention import ATTENTION_WEIGHTS, attention_layer
from tbn_compiler.graph.calls import tiled_call, training_call
from tbn_compiler.graph.operations import OPERATIONS, VIEWS, bind, module_operation, operation_of
from tbn_compiler.graph.records import LayerRecord, join_key
from tbn_compiler.ops.calls import OPERATORS
from tbn_compiler.torch_private import OpOverload, operator_schema

_tbn = torch.ops.tbn

# The kinds of layers: names of their functions in torch.nn.functional, and of the inference operators.
LAYER_KINDS = frozenset(OPERATORS)
_LAYER_CLASSES = {cls: kind.name for kind in OPERATIONS if kind.name in LAYER_KINDS for cls in kind.modules}

# Modules with weights that are listed in a summary, and why no pass tiles them.
UNSUPPORTED_MODULES: dict[type[nn.Module], str] = {
    nn.Bilinear: "bilinear layers are not supported",
    nn.MultiheadAttention: "attention with hooks, parametrizations or a forward of its own is not decomposed",
    nn.Embedding: "embeddings are looked up, not multiplied",
    nn.EmbeddingBag: "embeddings are looked up, not multiplied",
    nn.RNNBase: "recurrent layers keep their weights in a list for one fused operator; cells (nn.GRUCell) are tiled",
    nn.RNNCellBase: "recurrent cells in a graph use their weights inside one fused operator",
}


@dataclass(frozen=True)
class LayerCall:
    """One call of a linear or convolution in a graph.

    Attributes:
        node: the calling node.
        kind: ``"linear"``, ``"conv2d"``, ...
        weight: ``state_dict`` key of the parameter, or the record's weight name in a lowered call; ``None`` if the
            weight is computed in the graph.
        form: ``"float"``, ``"tiled"`` (on a ``tile -> scale`` subgraph, or an operator that trains) or ``"lowered"``.
        view: the view nodes between parameter and layer, first to last.
        argument: name of the argument of a function that the weight is.
    """

    node: fx.Node
    kind: str
    weight: str | None
    form: str
    view: tuple[fx.Node, ...] = ()
    argument: str = "weight"

    @property
    def weight_node(self) -> Any:
        """What the call of a function takes as its weight."""
        trained = training_call(self.node)
        return (function_arguments(self.node) if trained is None else trained.arguments).get(self.argument)

    @property
    def view_text(self) -> str:
        """The view in words, equal for equal views."""
        return view_text(self.view)


def view_text(view: Iterable[fx.Node]) -> str:
    """View nodes in words, equal for equal views."""
    return "".join(_view_text(node) for node in view)


def _view_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        if node.target is getattr:
            return str(node.args[1])
        if isinstance(node.target, OpOverload):
            return operator_schema(node.target).name.rpartition("::")[2]
        return getattr(node.target, "__name__", "")
    return ""


def _view_text(node: fx.Node) -> str:
    name = _view_name(node)
    rest = [*node.args[1:], *(f"{key}={value}" for key, value in node.kwargs.items())]
    if name == "getitem":
        return f"[{rest[0]}]"
    return f".{name}" if node.target is getattr else f".{name}({', '.join(map(str, rest))})"


def is_view(node: fx.Node) -> bool:
    """Whether a node takes a view of its first argument, by constants."""
    return _view_name(node) in VIEWS and bool(node.args) and len(node.all_input_nodes) == 1


def parameter_view(node: Any) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The ``get_attr`` node behind a weight and the view nodes in between; ``None`` if it is computed otherwise."""
    view: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op != "get_attr":
        if not is_view(node):
            return None
        view.append(node)
        node = node.args[0]
    return (node, tuple(reversed(view))) if isinstance(node, fx.Node) else None


def apply_view(tensor: Tensor, view: Iterable[fx.Node]) -> Tensor:
    """The view of ``tensor`` that the nodes take."""
    value: Any = tensor
    for node in view:
        if node.op == "call_method":
            value = getattr(value, str(node.target))(*node.args[1:], **node.kwargs)
        else:
            assert callable(node.target)
            value = node.target(value, *node.args[1:], **node.kwargs)
    result: Tensor = value
    return result


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's quantised linear or convolution layers."""
    return type(module).__module__.startswith("torch.ao.nn.quantized") and hasattr(module, "weight")


def is_transposed(kind: str) -> bool:
    """Whether layers of this kind have a weight row for each input channel instead of each output."""
    return kind.startswith("conv_transpose")


def function_kind(node: fx.Node) -> str | None:
    """Kind of the layer that a node calls as a function on a float weight, or ``None``."""
    found = operation_of(node) if node.op == "call_function" else None
    return found.name if found is not None and found.name in LAYER_KINDS else None


def function_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a functional linear, convolution or attention call by name; none of any other node."""
    call = bind(node)
    return {} if call is None else call.arguments


def weight_arguments(node: fx.Node) -> tuple[str, ...]:
    """Names of the arguments of a function call that are weights of layers; none if it is no layer."""
    if node.op == "call_function" and node.target is attention_layer:
        return tuple(ATTENTION_WEIGHTS)
    return () if function_kind(node) is None else ("weight",)


def module_kind(module: nn.Module) -> str | None:
    """Kind of a layer module. A subclass that overrides ``forward`` is not the layer that it derives from."""
    found = module_operation(module)
    return found.name if found is not None and found.name in LAYER_KINDS else None


def derived_kind(module: nn.Module) -> str | None:
    """Kind of the layer class that a module derives from, whether it computes what that class does or not."""
    return next((_LAYER_CLASSES[cls] for cls in type(module).__mro__ if cls in _LAYER_CLASSES), None)


def _is_call(value: Any, target: Any) -> TypeGuard[Any]:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target is target


def blend_strength(node: Any) -> fx.Node | None:
    """The strength that ``lerp(weight, scale, strength)`` blends float and tiled weight with, else ``None``."""
    if not _is_call(node, torch.lerp) or len(node.args) != 3 or not _is_call(node.args[1], _tbn.scale.default):
        return None
    strength: fx.Node = node.args[2].args[0]  # behind its cast to the weight's dtype
    return strength


def weight_chain(weight: Any) -> tuple[fx.Node, fx.Node] | None:
    """The ``tile`` and ``scale`` nodes that compute a weight, blended or not; ``None`` for any other weight.

    Both are the same node where one operator does it all.
    """
    scale = weight
    if _is_call(scale, _tbn.train_weight.default):
        return scale, scale
    if blend_strength(scale) is not None:
        scale = scale.args[1]
    if not _is_call(scale, _tbn.scale.default):
        return None
    tile = scale.args[0]
    return (tile, scale) if _is_call(tile, _tbn.tile.default) else None


def layer_calls(gm: fx.GraphModule) -> Iterator[LayerCall]:
    """Every linear and convolution call of a graph, in order."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            kind = module_kind(gm.get_submodule(node.target))
            if kind:
                yield LayerCall(node, kind, join_key(node.target, "weight"), "float")
        for argument in weight_arguments(node):
            weight = function_arguments(node).get(argument)
            chain = weight_chain(weight)
            found = parameter_view(chain[0].args[0] if chain else weight)
            key, view = (str(found[0].target), found[1]) if found else (None, ())
            kind = function_kind(node) or "linear"
            yield LayerCall(node, kind, key, "tiled" if chain else "float", view, argument)
        trained = training_call(node)
        if trained is not None:
            found = parameter_view(trained.arguments["weight"])
            key, view = (str(found[0].target), found[1]) if found else (None, ())
            yield LayerCall(node, trained.kind, key, "tiled", view)
        lowered = tiled_call(node)
        if lowered is not None:
            key = str(lowered.arguments["tile"].target).removesuffix("_tile")
            yield LayerCall(node, lowered.operator.name, key, "lowered")


def find_record(records: Iterable[LayerRecord], call: LayerCall) -> LayerRecord | None:
    """The record of the weight that a call uses."""
    for record in records:
        if call.form == "lowered":
            if record.weight == call.weight:
                return record
        elif call.weight is None:
            if record.parameter == f"{call.node.name}.{call.argument}":
                return record
        elif record.spec is not None and record.spec.latent == "tile" and not call.view:
            if call.weight in (record.trained, *record.tied):
                return record
        elif record.view == call.view_text and call.weight in (record.parameter, *record.tied):
            return record
    return None
