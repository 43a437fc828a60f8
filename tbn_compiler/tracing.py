"""From an ``nn.Module`` to a graph module that shares its tensors and keeps its module tree."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from tbn_compiler.errors import TransformError
from tbn_compiler.layers import join_key, nested_records, set_records

_FLAG = "tbn_training_flag"


class TrainingFlag(nn.Module):
    """Returns whether the module is in training mode, so that a graph can follow ``train()`` and ``eval()``."""

    def forward(self) -> bool:
        """The module's ``training`` flag."""
        return self.training


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for submodule in module.modules():
        for value in (*submodule.__dict__.values(), *submodule._parameters.values(), *submodule._buffers.values()):
            if isinstance(value, torch.Tensor):
                yield value


def share_tensors_copy(module: nn.Module) -> Any:
    """Copy a module's structure; the copy holds the very same parameters and buffers.

    Nothing that a pass then does to the copy's module tree is seen by the original, and no weight is duplicated.
    """
    memo: dict[int, Any] = {id(tensor): tensor for tensor in _tensors(module)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own copy of an exported graph
        for submodule in reversed(list(module.modules())):  # children come after their parents
            if isinstance(submodule, fx.GraphModule):
                memo[id(submodule)] = _copy_graph_module(submodule, memo)
        return copy.deepcopy(module, memo)


def _copy_graph_module(gm: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    """Copy a graph module with all that it holds: its own copy drops what the graph does not name, and attributes."""
    shell = nn.Module()
    shell.__dict__ = {key: value for key, value in gm.__dict__.items() if key != "_graph"}
    shell = copy.deepcopy(shell, memo)
    result = fx.GraphModule(shell, copy.deepcopy(gm.graph), type(gm).__name__)
    result.__dict__.update(shell.__dict__)
    return result


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Put every submodule into one mode and restore each one's own mode after."""
    before = {submodule: submodule.training for submodule in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for submodule, mode in before.items():
            submodule.training = mode


def _trace_in_mode(model: nn.Module, training: bool, concrete_args: dict[str, Any] | None) -> fx.Graph:
    with _mode(model, training):
        return fx.Tracer().trace(model, concrete_args)


def _merge_modes(train: fx.Graph, eval_: fx.Graph, model: nn.Module) -> None:
    """Make ``train`` right in both modes, given the graph that the model has in eval mode.

    Tracing turns ``self.training`` into a constant. Where the two graphs differ only in such constants
    (``F.dropout(x, p, training=self.training)``), they are computed from a flag of the module that asked.
    """
    if len(train.nodes) != len(eval_.nodes):
        raise TransformError("its operations differ between training and evaluation mode")
    twin = dict(zip(eval_.nodes, train.nodes, strict=True))
    for b, a in list(twin.items()):
        if a.op != b.op or (a.target != b.target and not _same_constant(a, b, model)):
            raise TransformError(f"{a.format_node()} becomes {b.format_node()} in evaluation mode")
        a.args, a.kwargs = (_merge(x, y, a, twin, model) for x, y in ((a.args, b.args), (a.kwargs, b.kwargs)))


def _merge(a: Any, b: Any, node: fx.Node, twin: dict[fx.Node, fx.Node], model: nn.Module) -> Any:
    """An argument of ``node`` that is ``a`` in training mode and ``b`` in evaluation mode."""
    if isinstance(a, tuple | list) and isinstance(b, tuple | list) and len(a) == len(b):
        return type(a)(_merge(x, y, node, twin, model) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return {key: _merge(a[key], b[key], node, twin, model) for key in a}
    if isinstance(a, slice) and isinstance(b, slice):
        parts = zip((a.start, a.stop, a.step), (b.start, b.stop, b.step), strict=True)
        return slice(*(_merge(x, y, node, twin, model) for x, y in parts))
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        same = a is twin.get(b)
    else:
        same = type(a) is type(b) and (a == b or a != a)  # the last is NaN
    if same:
        return a
    if a is True and b is False:
        return _training_flag(node, model)
    if isinstance(a, float) and b == 0:  # p if self.training else 0
        flag = _training_flag(node, model)
        with node.graph.inserting_before(node):
            return node.graph.call_function(value_in_training, (flag, a))
    raise TransformError(f"argument {a!r} of {node.format_node()} becomes {b!r} in evaluation mode")


def _training_flag(node: fx.Node, model: nn.Module) -> fx.Node:
    """A node for the training flag of the module whose ``forward`` made ``node``."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    target = join_key(path, _FLAG)
    owner = model.get_submodule(path)
    if not hasattr(owner, _FLAG):
        owner.add_module(_FLAG, TrainingFlag())
        owner.get_submodule(_FLAG).training = owner.training
    with node.graph.inserting_before(node):
        return node.graph.call_module(target)


def value_in_training(training: bool, value: float) -> float:
    """``value if training else 0.0``, as one node of a graph (a dropout probability)."""
    return value if training else 0.0


def _same_constant(a: fx.Node, b: fx.Node, model: nn.Module) -> bool:
    """Whether two graphs refer to equal tensors that tracing stored as constants of the root."""
    if a.op != "get_attr":
        return False
    left, right = (getattr(model, str(node.target), None) for node in (a, b))
    return isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor) and torch.equal(left, right)


def _adopt(root: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph module with the whole module tree of ``root``: every ``state_dict`` key survives, in order."""
    for node in graph.nodes:
        if isinstance(node.type, str):
            node.type = None  # an annotation that was not evaluated would be code that cannot be unpickled
    gm = fx.GraphModule(root, graph, type(root).__name__)
    constants = {name: value for name, value in gm._buffers.items() if name not in root._buffers}
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        setattr(gm, name, getattr(root, name))
    # Plain tensors that the graph reads move with the module, but are no new state_dict keys.
    for name, value in constants.items():
        gm.__dict__.pop(name, None)
        gm.register_buffer(name, value, persistent=False)
    gm.training = root.training
    return gm


def trace(model: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.GraphModule:
    """Trace a model symbolically, or copy a graph module; either way the result shares the model's tensors.

    The result follows ``train()`` and ``eval()`` also where the model passes ``self.training`` to a function.

    Args:
        model: any module that ``torch.fx`` can trace, or a ``GraphModule``.
        concrete_args: arguments to fix, as in :func:`torch.fx.symbolic_trace`.

    Raises:
        TransformError: the model cannot be copied or traced; the cause is chained.
    """
    name = type(model).__name__
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    try:
        model = share_tensors_copy(model)
    except Exception as error:
        raise TransformError(f"cannot copy the structure of {name}: {error}") from error
    if isinstance(model, fx.GraphModule):
        return model
    try:
        graph = _trace_in_mode(model, True, concrete_args)
        _merge_modes(graph, _trace_in_mode(model, False, concrete_args), model)
        gm = _adopt(model, graph)
    except Exception as error:
        raise TransformError(
            f"torch.fx cannot trace {name} as a whole: {error}. Transform the submodules that hold the layers "
            "instead, or fix arguments with concrete_args."
        ) from error
    records = nested_records(model)
    if records:  # parts of the model are transformed already
        set_records(gm, records)
    return gm
