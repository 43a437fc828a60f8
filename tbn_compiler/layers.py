"""What counts as a layer, and the record that the compiler keeps of each one.

A :class:`LayerCall` is one place in a graph where a linear or convolution runs, in any of its three forms: a
module or function on a float weight, a function on a ``tile -> scale`` subgraph, or an inference operator on a
stored tile. A :class:`LayerRecord` describes one weight for good: how it is tiled, or why it was left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import fx, nn

import tbn_compiler.ops  # noqa: F401  (the operators that the tables below name)
from tbn_compiler.tiling import TileSpec

_aten, _tbn = torch.ops.aten, torch.ops.tbn

MODULE_KINDS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
}
FUNCTION_KINDS: dict[Any, str] = {
    F.linear: "linear",
    F.conv1d: "conv1d",
    F.conv2d: "conv2d",
    F.conv3d: "conv3d",
    _aten.linear.default: "linear",
    _aten.conv1d.default: "conv1d",
    _aten.conv2d.default: "conv2d",
    _aten.conv3d.default: "conv3d",
}
# The inference operator that each kind of layer is lowered to.
INFERENCE_OPS: dict[str, Any] = {
    "linear": _tbn.linear.default,
    "conv1d": _tbn.conv1d.default,
    "conv2d": _tbn.conv2d.default,
    "conv3d": _tbn.conv3d.default,
}
_INFERENCE_KINDS = {op: kind for kind, op in INFERENCE_OPS.items()}

# Linear and convolution layers that are listed in a summary, but that no pass tiles yet.
UNSUPPORTED_MODULES: tuple[type[nn.Module], ...] = (
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RNNCellBase,
)
UNSUPPORTED_FUNCTIONS: dict[Any, str] = {
    F.conv_transpose1d: "conv_transpose1d",
    F.conv_transpose2d: "conv_transpose2d",
    F.conv_transpose3d: "conv_transpose3d",
    F.bilinear: "bilinear",
}

_RECORDS = "tbn_layers"


def split_key(key: str) -> tuple[str, str]:
    """Split a ``state_dict`` key into the owner module's path and the attribute name."""
    path, _, name = key.rpartition(".")
    return path, name


def join_key(path: str, name: str) -> str:
    """The inverse of :func:`split_key`."""
    return f"{path}.{name}" if path else name


def alpha_source_key(weight: str) -> str:
    """Name of the trainable alpha source ``A`` of a weight: ``<layer>.alpha_source``."""
    path, name = split_key(weight)
    return join_key(path, "alpha_source" if name == "weight" else f"{name}_alpha_source")


def tile_key(weight: str) -> str:
    """Name of the stored tile of a weight in a lowered module."""
    return f"{weight}_tile"


def alpha_key(weight: str) -> str:
    """Name of the stored alphas of a weight in a lowered module."""
    return f"{weight}_alpha"


@dataclass(frozen=True)
class LayerRecord:
    """One linear or convolution weight of a model: how it is tiled, or why it is not.

    Attributes:
        name: qualified name of the module, or of the weight where it is used by a function.
        kind: ``"linear"``, ``"conv2d"``, ... or the class name of a module that is left alone.
        weight: ``state_dict`` key of the weight.
        shape: shape of the weight.
        groups: convolution groups.
        spec: the tiling; ``None`` for a layer left alone.
        reason: why the layer was left alone; ``None`` for a tiled one.
        note: what a user should know of a tiled layer, such as a ``p`` that had to be changed.
        tied: other ``state_dict`` keys of the same weight.
    """

    name: str
    kind: str
    weight: str
    shape: tuple[int, ...]
    groups: int = 1
    spec: TileSpec | None = None
    reason: str | None = None
    note: str | None = None
    tied: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """A layer is either tiled or has the reason why not."""
        if (self.spec is None) == (self.reason is None):
            raise ValueError(f"{self.name}: exactly one of spec and reason must be given")


def get_records(module: nn.Module) -> tuple[LayerRecord, ...] | None:
    """The layer records of a transformed or lowered module; ``None`` for any other module."""
    meta = getattr(module, "meta", None)
    found = meta.get(_RECORDS) if isinstance(meta, dict) else None
    return found if found is not None else module.__dict__.get(_RECORDS)


def set_records(module: nn.Module, records: Iterable[LayerRecord]) -> None:
    """Attach layer records to a transformed or lowered module.

    ``copy.deepcopy`` keeps a graph module's ``meta`` and drops its plain attributes, pickling does the opposite: the
    records are held in both places so that they follow the module through either.
    """
    module.__dict__.setdefault("meta", {})[_RECORDS] = module.__dict__[_RECORDS] = tuple(records)


@dataclass(frozen=True)
class LayerCall:
    """One call of a linear or convolution in a graph.

    Attributes:
        node: the calling node.
        kind: ``"linear"``, ``"conv2d"``, ...
        weight: ``state_dict`` key of the weight; ``None`` if the weight is computed in the graph.
        form: ``"float"``, ``"tiled"`` (on a ``tile -> scale`` subgraph) or ``"lowered"``.
    """

    node: fx.Node
    kind: str
    weight: str | None
    form: str


def function_arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a functional linear or convolution call by name."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def module_kind(module: nn.Module) -> str | None:
    """Kind of a layer module. A subclass that overrides ``forward`` is not the layer that it derives from."""
    for cls, kind in MODULE_KINDS.items():
        if isinstance(module, cls) and type(module).forward is cls.forward:
            return kind
    return None


def _is_call(value: Any, target: Any) -> TypeGuard[Any]:
    return isinstance(value, fx.Node) and value.op == "call_function" and value.target is target


def weight_chain(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """The ``(get_attr, tile, scale)`` nodes behind a functional call on a tiled weight, else ``None``."""
    scale = function_arguments(node).get("weight")
    if not _is_call(scale, _tbn.scale.default):
        return None
    tile = scale.args[0]
    if not _is_call(tile, _tbn.tile.default):
        return None
    weight = tile.args[0]
    return (weight, tile, scale) if weight.op == "get_attr" else None


def layer_calls(gm: fx.GraphModule) -> Iterator[LayerCall]:
    """Every linear and convolution call of a graph, in order."""
    for node in gm.graph.nodes:
        if node.op == "call_module":
            kind = module_kind(gm.get_submodule(node.target))
            if kind:
                yield LayerCall(node, kind, join_key(node.target, "weight"), "float")
        elif node.op == "call_function" and node.target in FUNCTION_KINDS:
            kind = FUNCTION_KINDS[node.target]
            chain = weight_chain(node)
            weight: Any = function_arguments(node).get("weight")
            if chain:
                yield LayerCall(node, kind, str(chain[0].target), "tiled")
            else:
                is_attr = isinstance(weight, fx.Node) and weight.op == "get_attr"
                yield LayerCall(node, kind, str(weight.target) if is_attr else None, "float")
        elif node.op == "call_function" and node.target in _INFERENCE_KINDS:
            tile: Any = node.args[1]
            key = str(tile.target).removesuffix("_tile")
            yield LayerCall(node, _INFERENCE_KINDS[node.target], key, "lowered")
