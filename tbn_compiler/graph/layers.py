"""What counts as a layer, and where a graph calls one.

A :class:`LayerCall` is one place in a graph where a linear or convolution runs, in any of its three forms: a
module or function on a float weight, a function on a ``tile -> scale`` subgraph, or an inference operator on a
stored tile. An attention is four calls of linears, one for each of its weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tbn_compiler.graph.attention import ATTENTION_ARGUMENTS, ATTENTION_WEIGHTS, attention_layer
from tbn_compiler.graph.records import LayerRecord, alpha_key, join_key, split_key, tile_key
from tbn_compiler.ops.reference import dense_weight

_aten, _tbn = torch.ops.aten, torch.ops.tbn

MODULE_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
FUNCTION_KINDS: dict[Any, str] = {
    F.linear: "linear",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
    _aten.linear.default: "linear",
    _aten.conv1d.default: "conv1d",
    _aten.conv2d.default: "conv2d",
    _aten.conv3d.default: "conv3d",
    _aten.conv1d.padding: "conv1d",  # padding="same"
    _aten.conv2d.padding: "conv2d",
    _aten.conv3d.padding: "conv3d",
    _aten.conv_transpose1d.default: "conv_transpose1d",
    _aten.conv_transpose2d.input: "conv_transpose2d",
    _aten.conv_transpose3d.input: "conv_transpose3d",
}
# The function of torch.nn.functional for each kind of convolution.
CONV_FUNCTIONS: dict[str, Any] = {
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "conv_transpose1d": F.conv_transpose1d,
    "conv_transpose2d": F.conv_transpose2d,
    "conv_transpose3d": F.conv_transpose3d,
}
# The inference operator that each kind of layer is lowered to.
INFERENCE_OPS: dict[str, Any] = {
    "linear": _tbn.linear.default,
    "conv1d": _tbn.conv1d.default,
    "conv2d": _tbn.conv2d.default,
    "conv3d": _tbn.conv3d.default,
    "conv_transpose1d": _tbn.conv_transpose1d.default,
    "conv_transpose2d": _tbn.conv_transpose2d.default,
    "conv_transpose3d": _tbn.conv_transpose3d.default,
}
_INFERENCE_KINDS = {op: kind for kind, op in INFERENCE_OPS.items()}

# Modules with weights that are listed in a summary, and why no pass tiles them.
UNSUPPORTED_MODULES: dict[type[nn.Module], str] = {
    nn.Bilinear: "bilinear layers are not supported",
    nn.MultiheadAttention: "attention with hooks, parametrizations or a forward of its own is not decomposed",
    nn.Embedding: "embeddings are looked up, not multiplied",
    nn.EmbeddingBag: "embeddings are looked up, not multiplied",
    nn.RNNBase: "recurrent layers use their weights inside one fused operator",
    nn.RNNCellBase: "recurrent cells use their weights inside one fused operator",
}
UNSUPPORTED_FUNCTIONS: dict[Any, str] = {
    F.bilinear: "bilinear",
}


@dataclass(frozen=True)
class LayerCall:
    """One call of a linear or convolution in a graph.

    Attributes:
        node: the calling node.
        kind: ``"linear"``, ``"conv2d"``, ...
        weight: ``state_dict`` key of the parameter, or the record's weight name in a lowered call; ``None`` if the
            weight is computed in the graph.
        form: ``"float"``, ``"tiled"`` (on a ``tile -> scale`` subgraph) or ``"lowered"``.
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
        return function_arguments(self.node).get(self.argument)

    @property
    def view_text(self) -> str:
        """The view in words, equal for equal views."""
        return view_text(self.view)


def view_text(view: Iterable[fx.Node]) -> str:
    """View nodes in words, equal for equal views."""
    return "".join(_view_text(node) for node in view)


# Operations that give a view of their first argument, by name; all other arguments must be constants.
_VIEWS = frozenset(
    {
        *("t", "T", "mT", "transpose", "swapaxes", "permute", "movedim", "view", "reshape", "flatten", "unflatten"),
        *("squeeze", "unsqueeze", "narrow", "select", "chunk", "split", "getitem", "contiguous"),
    }
)


def _view_name(node: fx.Node) -> str:
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        if node.target is getattr:
            return str(node.args[1])
        if isinstance(node.target, torch._ops.OpOverload):
            return node.target._schema.name.rpartition("::")[2]
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
    return _view_name(node) in _VIEWS and bool(node.args) and len(node.all_input_nodes) == 1


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
    return value


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is one of PyTorch's quantised linear or convolution layers."""
    return type(module).__module__.startswith("torch.ao.nn.quantized") and hasattr(module, "weight")


def is_transposed(kind: str) -> bool:
    """Whether layers of this kind have a weight row for each input channel instead of each output."""
    return kind.startswith("conv_transpose")


def function_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a functional linear, convolution or attention call by name."""
    names: tuple[str, ...] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    if is_transposed(FUNCTION_KINDS.get(node.target, "")):
        names = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
    elif node.target is attention_layer:
        names = ATTENTION_ARGUMENTS
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def weight_arguments(node: fx.Node) -> tuple[str, ...]:
    """Names of the arguments of a function call that are weights of layers; none if it is no layer."""
    if node.op != "call_function":
        return ()
    if node.target is attention_layer:
        return tuple(ATTENTION_WEIGHTS)
    return ("weight",) if node.target in FUNCTION_KINDS else ()


def module_kind(module: nn.Module) -> str | None:
    """Kind of a layer module. A subclass that overrides ``forward`` is not the layer that it derives from."""
    for cls, kind in MODULE_KINDS.items():
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return kind
    return None


def _is_call(value: Any, target: Any) -> TypeGuard[Any]:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target is target


def blend_strength(node: Any) -> fx.Node | None:
    """The strength that ``lerp(weight, scale, strength)`` blends float and tiled weight with, else ``None``."""
    if not _is_call(node, torch.lerp) or len(node.args) != 3 or not _is_call(node.args[1], _tbn.scale.default):
        return None
    strength: fx.Node = node.args[2].args[0]  # behind its cast to the weight's dtype
    return strength


def weight_chain(weight: Any) -> tuple[fx.Node, fx.Node] | None:
    """The ``tile`` and ``scale`` nodes that compute a weight, blended or not; ``None`` for any other weight."""
    scale = weight
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
            kind = FUNCTION_KINDS.get(node.target, "linear")
            yield LayerCall(node, kind, key, "tiled" if chain else "float", view, argument)
        if node.op == "call_function" and node.target in _INFERENCE_KINDS:
            tile: Any = node.args[1]
            key = str(tile.target).removesuffix("_tile")
            yield LayerCall(node, _INFERENCE_KINDS[node.target], key, "lowered")


def decoded_weight(module: nn.Module, record: LayerRecord) -> Tensor:
    """The float weight ``alpha * B`` of a lowered layer, decoded from the tensors that its module stores."""
    assert record.spec is not None
    tile, alpha = (getattr(module, split_key(key(record.weight))[1]) for key in (tile_key, alpha_key))
    return dense_weight(tile, alpha, record.spec.layout, alpha.dtype)


def find_record(records: Iterable[LayerRecord], call: LayerCall) -> LayerRecord | None:
    """The record of the weight that a call uses."""
    for record in records:
        if call.form == "lowered":
            if record.weight == call.weight:
                return record
        elif call.weight is None:
            if record.parameter == f"{call.node.name}.{call.argument}":
                return record
        elif record.view == call.view_text and call.weight in (record.parameter, *record.tied):
            return record
    return None
