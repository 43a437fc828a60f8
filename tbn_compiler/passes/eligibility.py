"""Which weights of a graph can be tiled, whatever the options say, and why the others cannot.

The answers of this module become the reasons in the layer records: nothing is left out of a summary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.graph.layers import (
    UNSUPPORTED_MODULES,
    LayerCall,
    apply_view,
    derived_kind,
    function_arguments,
    is_quantized,
    parameter_view,
    weight_arguments,
)
from tbn_compiler.graph.operations import operation_of
from tbn_compiler.graph.records import LayerRecord, alpha_source_key, join_key, layer_name, split_key
from tbn_compiler.ops.calls import OPERATORS, TRAINING_OPERATORS
from tbn_compiler.passes.base import has_hooks

_TILING_OPS = {
    *(torch.ops.tbn.tile.default, torch.ops.tbn.scale.default, torch.ops.tbn.train_weight.default),
    *(operator.overload for operator in TRAINING_OPERATORS.values()),
}


def calls_by_weight(gm: fx.GraphModule, calls: list[LayerCall]) -> Iterator[list[LayerCall]]:
    """Group the calls by the weight tensor that they use; a computed weight is its own group."""
    groups: dict[Any, list[LayerCall]] = {}
    for call in calls:
        key: Any = (call.node, call.argument)
        if call.weight is not None:
            tensor = _get_tensor(gm, call.weight)
            key = (call.weight if tensor is None else id(tensor), call.view_text)
        groups.setdefault(key, []).append(call)
    yield from groups.values()


def _get_tensor(gm: fx.GraphModule, key: str) -> Tensor | None:
    """The parameter or buffer registered under ``key``, or ``None``."""
    path, name = split_key(key)
    owner = gm.get_submodule(path)
    return owner._parameters.get(name, owner._buffers.get(name))


def names_of(gm: nn.Module, tensor: Tensor) -> list[str]:
    """All keys under which a module holds a parameter."""
    return [key for key, value in gm.named_parameters(remove_duplicate=False) if value is tensor]


def describe_layer(gm: fx.GraphModule, call: LayerCall) -> tuple[str, tuple[int, ...], int]:
    """Name, weight shape and groups of a layer."""
    node = call.node
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        return str(node.target), _shape(module.weight), int(getattr(module, "groups", 1))
    groups = function_arguments(node).get("groups", 1)
    if call.weight is None:
        return node.name, (), groups
    tensor = _get_tensor(gm, call.weight)
    shape = () if tensor is None else _shape(apply_view(tensor, call.view))
    return layer_name(call.weight), shape, groups


def _shape(weight: Any) -> tuple[int, ...]:
    """Shape of a weight; empty for one of a lazy module, which has none yet."""
    return () if isinstance(weight, nn.parameter.UninitializedParameter) else tuple(weight.shape)


def why_unusable(gm: fx.GraphModule, record: LayerRecord, calls: list[LayerCall]) -> str | None:
    """Why a weight cannot be tiled whatever the config says, or ``None``."""
    call = calls[0]
    if call.weight is None:
        return f"its weight is computed in the graph ({call.weight_node}), not a parameter"
    path, name = split_key(call.weight)
    weight = gm.get_submodule(path)._parameters.get(name)
    reason = why_no_weight(weight, record.shape)
    if reason is not None:
        return reason
    assert weight is not None
    if len(record.shape) != 2 + OPERATORS[record.kind].dims:
        return f"its weight has shape {record.shape}"
    path, name = split_key(alpha_source_key(record.weight))
    if hasattr(gm.get_submodule(path), name):
        return f"its module has an attribute {name!r}, the name of the alpha source"
    for other in calls:
        if other.node.op == "call_module":
            module = gm.get_submodule(str(other.node.target))
            if has_hooks(module):
                return "the module has hooks, which a functional call would skip"
            if len(other.node.args) + len(other.node.kwargs) > 1:
                return "it is called with an output_size"
    return _outside_use(gm, weight, calls)


def why_no_weight(weight: Tensor | None, shape: tuple[int, ...]) -> str | None:
    """Why a tensor cannot be tiled whatever uses it, or ``None``; ``shape`` is its shape as it is used."""
    if weight is None:
        return "its weight is not a plain parameter (a buffer, or computed by a parametrization)"
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return "its weight is not initialised yet: run one forward pass of the lazy module first"
    if not weight.is_floating_point() or weight.layout != torch.strided:
        return f"its weight is {weight.layout} {weight.dtype}, not a dense floating-point tensor"
    return None if math.prod(shape) else f"its weight has shape {shape}"


def _outside_use(gm: fx.GraphModule, weight: Tensor, calls: list[LayerCall]) -> str | None:
    """The use of a weight outside linear and convolution layers that needs it in float, if there is one."""
    keys = set(names_of(gm, weight))
    modules = {call.node for call in calls if call.node.op == "call_module"}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target in keys:
            user = _other_reader(node)
            if user is not None:
                return f"its weight is also read by node {user.name}"
        if node.op == "call_module" and node not in modules:
            for path, module in gm.get_submodule(str(node.target)).named_modules():
                if any(parameter is weight for parameter in module._parameters.values()):
                    where = join_key(str(node.target), path) if path else str(node.target)
                    return f"its weight is shared with {type(module).__name__} {where!r}, which needs it in float"
    return None


def _other_reader(node: fx.Node) -> fx.Node | None:
    """A reader of a parameter, or of a view of it, that is no layer using it as its weight."""
    for user in node.users:
        weights = weight_arguments(user)
        if weights:
            if not all(name in weights for name, value in function_arguments(user).items() if value is node):
                return user
        elif user.target in _TILING_OPS:
            continue
        elif parameter_view(user) is None:
            return user
        else:
            other = _other_reader(user)
            if other is not None:
                return other
    return None


def uncovered_layers(gm: fx.GraphModule, covered: list[LayerRecord]) -> Iterator[LayerRecord]:
    """Records of the layers that no supported call covers, so that a summary lists every one."""
    keys = {key for record in covered for key in (record.parameter, *record.tied)}
    targets = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for path, module in gm.named_modules():
        kind = module_kind_or_name(module)
        key = join_key(path, "weight")
        if kind is None or key in keys:
            continue
        weight = next((value for value in module._parameters.values() if value is not None), None)
        parents = [path[:i] for i, char in enumerate(path) if char == "."]
        leaf = next((parent for parent in parents if parent in targets), None)
        if leaf is not None:
            parent = type(gm.get_submodule(leaf)).__name__
            reason = f"inside {parent} {leaf!r}, which is not decomposed"
        else:
            reason = unsupported_reason(module) or "the traced graph does not call it"
        yield LayerRecord(path, kind, key, () if weight is None else tuple(weight.shape), reason=reason)
    for node in gm.graph.nodes:
        called = operation_of(node)
        if called is not None and called.name == "bilinear":
            reason = f"{called.name} is not supported"
            yield LayerRecord(node.name, called.name, f"{node.name}.weight", (), reason=reason)


def module_kind_or_name(module: nn.Module) -> str | None:
    """Kind of a linear or convolution module, or the class name of one that no pass tiles."""
    if isinstance(module, fx.GraphModule):  # it may stand for a layer, and be an instance of its class
        return None
    kind = derived_kind(module)
    return kind if kind or unsupported_reason(module) is None else type(module).__name__


def unsupported_reason(module: nn.Module) -> str | None:
    """Why no pass tiles a module with weights, or ``None`` for any other module."""
    if isinstance(module, fx.GraphModule):
        return None
    if is_quantized(module):
        return "its weights are quantised"
    return next((reason for cls, reason in UNSUPPORTED_MODULES.items() if isinstance(module, cls)), None)
