"""From an ``nn.Module`` to a graph module that shares its tensors and keeps its module tree."""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from tbn_compiler.errors import TransformError
from tbn_compiler.graph.code_reads import CodeReads, code_reads
from tbn_compiler.graph.layers import (
    MODULE_KINDS,
    UNSUPPORTED_MODULES,
    decoded_weight,
    get_records,
    is_quantized,
    is_transposed,
    join_key,
    module_kind,
    nested_records,
    set_records,
)

_logger = logging.getLogger(__name__)
TRAINING_FLAG = "tbn_training_flag"


class TrainingFlag(nn.Module):
    """Returns whether the module is in training mode, so that a graph can follow ``train()`` and ``eval()``."""

    def forward(self) -> bool:
        """The module's ``training`` flag."""
        return self.training


class LayerGraph(fx.GraphModule):
    """The graph of a model part that is one layer. Once lowered it decodes ``weight`` for code that still reads it."""

    @property
    def weight(self) -> torch.Tensor:
        """The layer's parameter; after lowering the weight that the stored tile stands for, decoded at each call."""
        parameter = self._parameters.get("weight")
        if parameter is not None:
            return parameter
        if "weight_tile" in self._buffers:
            return decoded_weight(self, (get_records(self) or ())[0])
        raise AttributeError("weight")

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        return _copy_graph_module(self, memo)

    def __reduce__(self) -> Any:
        restore, arguments, *_ = super().__reduce__()  # which gives a plain graph module back
        return _restore_layer_graph, (restore, arguments)


def _restore_layer_graph(restore: Callable[..., fx.GraphModule], arguments: Any) -> LayerGraph:
    gm = restore(*arguments)
    result = LayerGraph(gm, gm.graph, type(gm).__name__)
    result.__dict__.update({key: value for key, value in gm.__dict__.items() if key != "_graph"})
    return result


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
    # torch.export puts a train and an eval that only raise on its modules.
    shell.__dict__ = {key: value for key, value in gm.__dict__.items() if key not in ("_graph", "train", "eval")}
    shell = copy.deepcopy(shell, memo)
    # Every graph module has a class of its own below the one that it was made from; PyTorch's have no constructor.
    made_from = next(cls for cls in type(gm).__mro__ if not cls.__qualname__.endswith("GraphModuleImpl"))
    graph_class = fx.GraphModule if made_from.__module__.startswith("torch.") else made_from
    result: fx.GraphModule = graph_class(shell, copy.deepcopy(gm.graph), type(gm).__name__)
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


class _Tracer(fx.Tracer):
    """Steps into torch.nn modules that are made of layers, such as ``nn.TransformerEncoderLayer``."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a call of ``m`` stays one node."""
        is_layer = isinstance(m, (*MODULE_KINDS, nn.MultiheadAttention))
        is_leaf = super().is_leaf_module(m, module_qualified_name)
        return is_quantized(m) or (is_leaf and (is_layer or not any(map(_has_layers, m.children()))))


def _trace_in_mode(model: nn.Module, training: bool, concrete_args: dict[str, Any] | None) -> fx.Graph:
    with _mode(model, training):
        return _Tracer().trace(model, concrete_args)


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
    target = join_key(path, TRAINING_FLAG)
    owner = model.get_submodule(path)
    if not hasattr(owner, TRAINING_FLAG):
        owner.add_module(TRAINING_FLAG, TrainingFlag())
        owner.get_submodule(TRAINING_FLAG).training = owner.training
    with node.graph.inserting_before(node):
        return node.graph.call_module(target)


def value_in_training(training: Any, value: float) -> Any:
    """``value if training else 0.0``, as one node of a graph (a dropout probability)."""
    if isinstance(training, fx.Proxy):  # unpickling a graph module traces its code again
        return training.tracer.create_proxy("call_function", value_in_training, (training, value), {})
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
    graph_class = LayerGraph if module_kind(root) else fx.GraphModule
    gm = graph_class(root, graph, type(root).__name__)
    constants = {name: value for name, value in gm._buffers.items() if name not in root._buffers}
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        setattr(gm, name, getattr(root, name))
    # Attributes that callers read, such as in_features or config.
    for name, value in root.__dict__.items():
        if name.startswith(("_forward_", "_backward_")):  # hooks
            gm.__dict__[name] = value
        gm.__dict__.setdefault(name, value)
    # Plain tensors that the graph reads move with the module, but are no new state_dict keys.
    for name, value in constants.items():
        gm.__dict__.pop(name, None)
        gm.register_buffer(name, value, persistent=False)
    gm.training = root.training
    return gm


def trace_whole(model: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.GraphModule:
    """Trace a module symbolically; the result takes over its module tree.

    The result follows ``train()`` and ``eval()`` also where the model passes ``self.training`` to a function.

    Raises:
        TransformError: the module cannot be traced without a risk of being wrong; the cause is chained.
    """
    name = type(model).__name__
    try:
        _check_signature(model, concrete_args or {})
        graph = _trace_in_mode(model, True, concrete_args)
        _merge_modes(graph, _trace_in_mode(model, False, concrete_args), model)
        gm = _adopt(model, graph)
    except Exception as error:
        raise TransformError(f"torch.fx cannot trace {name} as a whole: {error}") from error
    records = nested_records(model)
    if records:  # parts of the model are transformed already
        set_records(gm, records)
    return gm


def _check_signature(model: nn.Module, fixed: dict[str, Any]) -> None:
    """Refuse arguments that default to ``None``: tracing would take the branch in which they are given, always."""
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.name in fixed:
            continue
        if parameter.default is None or parameter.kind is inspect.Parameter.VAR_KEYWORD:
            raise TransformError(f"its forward takes the optional argument {parameter}")


def trace(
    model: nn.Module,
    concrete_args: dict[str, Any] | None = None,
    build: Callable[[nn.Module], fx.GraphModule | None] = lambda module: None,
) -> nn.Module:
    """Trace a model as a whole or, where that is not possible, part by part; the result shares the model's tensors.

    Args:
        model: any module. A ``GraphModule`` is copied as it is.
        concrete_args: arguments to fix, as in :func:`torch.fx.symbolic_trace`; the model is then traced as a whole.
        build: makes a graph module for a module that tracing alone cannot take apart, or returns ``None``.

    Returns:
        A ``GraphModule``, or a copy of the model in which the largest submodules that could be traced are graph
        modules: it keeps its class, its call signature and its ``state_dict`` keys.

    Raises:
        TransformError: the model cannot be copied, or not traced with ``concrete_args``.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    try:
        copied: nn.Module = share_tensors_copy(model)
    except Exception as error:
        raise TransformError(f"cannot copy the structure of {type(model).__name__}: {error}") from error
    if isinstance(copied, fx.GraphModule):
        return copied
    whole = build(copied)
    if whole is not None:
        return whole
    try:
        return trace_whole(copied, concrete_args)
    except TransformError as error:
        if concrete_args:
            raise
        _logger.info("%s; its parts are traced one by one", error)
    _trace_parts(copied, build, {})
    return copied


def _trace_parts(
    module: nn.Module,
    build: Callable[[nn.Module], fx.GraphModule | None],
    done: dict[nn.Module, nn.Module],
    outside: CodeReads | None = None,
) -> None:
    """Replace the largest submodules with layers that can be traced alone, each in every place where it stands.

    ``outside`` is what code outside ``module`` reads of its submodules. A layer whose weight is read stays as it is,
    and so does a container that is indexed: only what it holds is replaced.
    """
    reads = code_reads(module) | (outside or CodeReads())
    for name, child in module._modules.items():
        if child is None or (reads.reads_weight(name) and module_kind(child)):
            continue
        if child not in done:
            done[child] = child
            if not isinstance(child, fx.GraphModule) and _has_layers(child):
                part = build(child)
                # An attention uses the weights of its parts without calling them.
                if part is None and not isinstance(child, nn.MultiheadAttention):
                    part = None if reads.opens(name, child) else _trace_part(child)
                    if part is None:
                        _trace_parts(child, build, done, reads.inside(name))
                if part is not None:
                    done[child] = part
        module._modules[name] = done[child]


def _trace_part(module: nn.Module) -> fx.GraphModule | None:
    """The graph of a model part, or ``None`` if it cannot be traced alone."""
    # Of a layer alone, the optional argument can only be one that callers leave out.
    fixed = {"output_size": None} if is_transposed(module_kind(module) or "") else None
    try:
        return trace_whole(module, fixed)
    except TransformError:
        return None


def _has_layers(module: nn.Module) -> bool:
    """Whether a module holds a matrix that a linear or convolution may use."""
    other = tuple(cls for cls in UNSUPPORTED_MODULES if cls is not nn.MultiheadAttention)
    return any(
        parameter is not None and parameter.dim() >= 2
        for submodule in module.modules()
        if not isinstance(submodule, other)
        for parameter in submodule._parameters.values()
    )
