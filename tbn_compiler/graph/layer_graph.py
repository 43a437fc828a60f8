"""Graph modules that stand in the place of a layer, or of a graph that a user handed over.

A :class:`TiledGraph` is an ``fx.GraphModule`` that loses nothing: copies and files keep its attributes, hooks, modules
and the persistence of its buffers, and its ``state_dict`` says how its weights are tiled. A :class:`LayerGraph` is one
that stands for one layer of a model, and is still an instance of the layer's class, with its attributes and methods.

``torch.fx`` gives each graph module a class of its own, which holds its ``forward``. Here graph modules with the same
code share one, so that ``torch.compile`` compiles equal layers once; and the code of equal layers is written once.
"""

from __future__ import annotations

import copy
import functools
import pickle
import types
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.graph import PythonCode

from tbn_compiler.graph.copying import GENERATED, copy_graph_module, graph_class
from tbn_compiler.graph.records import TRANSPOSED, CarriesTilings, own_records
from tbn_compiler.graph.tiled_parameters import decoded_weight
from tbn_compiler.torch_private import TRACER, BufferTracer, OpOverload, has_usual_code, input_structure

TRAINING_FLAG = "tbn_training_flag"

# What a graph module keeps of its graph.
_GRAPH_STATE = frozenset(
    {"_graph", "_code", "_lineno_map", "_prologue_start", "_in_spec", "_out_spec", TRACER, "graph"}
)
# The classes of living graph modules, by the class below them, their code and what it calls.
_classes: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()
# The same by the class below them and their nodes, which are told in less time than their code is written.
_classes_by_nodes: weakref.WeakValueDictionary[Any, type] = weakref.WeakValueDictionary()
# What fx.GraphModule.recompile sets.
_COMPILED = ("_code", "_lineno_map", "_prologue_start")
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType)
_WRITTEN_AS_REPR = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.memory_format)


class TrainingFlag(nn.Module):
    """Returns whether the module is in training mode, so that a graph can follow ``train()`` and ``eval()``."""

    def forward(self) -> bool:
        """The module's ``training`` flag."""
        return self.training


def _nodes(graph: fx.Graph) -> tuple[Any, ...] | None:
    """All that the code of a graph is made from; ``None`` where more may stand in it than is looked at here."""
    if not has_usual_code(graph):
        return None
    nodes = list(graph.nodes)
    if any(node.meta or node.type is not None for node in nodes):
        return None
    places = {node: place for place, node in enumerate(nodes)}
    parts = ((node.target, node.args, node.kwargs) for node in nodes)
    try:
        return tuple((node.op, node.name, _value(part, places)) for node, part in zip(nodes, parts, strict=True))
    except NotImplementedError:
        return None


def _value(value: Any, places: Mapping[fx.Node, int]) -> Any:
    """What the code of an argument or target is made from; numbers that are equal may be written in different ways."""
    if isinstance(value, fx.Node):
        return fx.Node, places.get(value)
    if isinstance(value, dict):
        return dict, *((_value(key, places), _value(item, places)) for key, item in value.items())
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return list if isinstance(value, list) else tuple, *(_value(item, places) for item in value)
    if type(value) in _WRITTEN_AS_REPR:
        return type(value), repr(value)
    if type(value) in _FUNCTIONS:
        return id(value)  # which the code refers to and keeps alive; a key that held it could keep a model alive
    if isinstance(value, OpOverload):
        return OpOverload, str(value)
    raise NotImplementedError


class TiledGraph(CarriesTilings, fx.GraphModule):
    """A graph module that holds tiled weights."""

    tbn_shares_code = True  # copies have the same class
    tbn_compiled: tuple[PythonCode, dict[str, Any]]

    def recompile(self) -> PythonCode:
        """Compile the graph, on a class of its own first: others with the former code may share the present one."""
        made_from, name = graph_class(self), type(self).__name__
        nodes = None if any(isinstance(child, fx.GraphModule) for child in self.children()) else _nodes(self._graph)
        known: Any = _classes_by_nodes.get((made_from, name, nodes)) if nodes is not None else None
        if known is not None:
            code, compiled = known.tbn_compiled
            self.__dict__.update(compiled)
            self.__class__ = known
            return cast("PythonCode", code)
        # Not torch's "GraphModuleImpl": accelerate patches the class where it reads that, here one that others share.
        names = {"__module__": made_from.__module__, "__qualname__": name, GENERATED: True}
        self.__class__ = type(name, (made_from,), names)
        code = super().recompile()
        # The names of the globals stand in the code; equal names may mean other objects.
        key = (made_from, name, code.src, tuple(sorted((name, id(value)) for name, value in code.globals.items())))
        cls: Any = _classes.setdefault(key, type(self))
        self.__class__ = cls
        cls.tbn_compiled = (code, {name: self.__dict__[name] for name in _COMPILED if name in self.__dict__})
        if nodes is not None:
            _classes_by_nodes[made_from, name, nodes] = cls
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own copy of an exported graph
            return copy_graph_module(self, memo)

    def __reduce__(self) -> Any:
        # A method of the module among what it is made from again would be pickled without end.
        held = {name for name, value in vars(self).items() if getattr(value, "__self__", None) is self}
        if _has_its_own_forward(self):
            held.remove("forward")
        if held:
            raise pickle.PicklingError(
                f"cannot pickle {type(self).__name__}: its attribute {min(held)!r} is a method of the module itself, "
                "as hooks of other libraries keep it (accelerate.hooks.remove_hook_from_module takes them away)"
            )
        flat, structure = _flat_twin(self)
        restore, arguments = fx.GraphModule.__reduce__(flat)  # a plain graph module, without much of this
        return _restore, (graph_class(self), type(self).__name__, restore, arguments, structure)


def _has_its_own_forward(gm: TiledGraph) -> bool:
    """Whether a module's attribute ``forward`` is that of its class, as hooks that are taken away put it back."""
    return vars(gm).get("forward") == types.MethodType(type(gm).forward, gm)


def _flat_twin(gm: TiledGraph) -> tuple[fx.GraphModule, Any]:
    """A graph module whose code takes and gives tensors alone, as a pickle can hold it, and what the code is without.

    That of torch.export takes nested inputs apart, which cannot be traced again.
    """
    structure = input_structure(gm.graph)
    twin, graph = object.__new__(type(gm)), copy.deepcopy(gm.graph)
    twin.__dict__.update(gm.__dict__, _graph=graph, **{TRACER: BufferTracer})
    if _has_its_own_forward(gm):
        del twin.__dict__["forward"]
    if structure is not None:
        graph.set_codegen(fx.graph.CodeGen())
    graph.owning_module = twin
    twin.recompile()
    return twin, structure


def _restore(
    cls: type[fx.GraphModule],
    name: str,
    restore: Callable[..., fx.GraphModule],
    arguments: Any,
    structure: fx.graph.CodeGen | None = None,
) -> Any:
    held = dict(arguments[0])
    gm = restore(*arguments)
    if structure is not None:
        gm.graph.set_codegen(structure)
    result = cls(gm, gm.graph, name)
    result.__dict__.update({key: value for key, value in held.items() if key not in _GRAPH_STATE})
    return result


class _PlainInit(nn.Module):
    """Stands before a layer's class, whose constructor would make a new layer."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


class LayerGraph(TiledGraph):
    """The graph of one layer, in its place in a model. Once lowered it decodes weights for code that reads them."""

    def __reduce__(self) -> Any:
        _, (cls, *rest) = super().__reduce__()
        return _restore_layer, (layer_class(cls), *rest)


def _decoding(name: str) -> property:
    """A parameter; after lowering the weight that the stored tiles stand for, decoded at each call."""

    def read(self: LayerGraph) -> Tensor:
        records = [record for record in own_records(self) or () if record.parameter == name and record.spec is not None]
        if name in self._parameters or not records:
            return cast("Tensor", nn.Module.__getattr__(self, name))  # which torch.fx replaces while it traces
        weights = [decoded_weight(self, record) for record in records]
        if len(weights) > 1:
            return torch.cat(weights)  # the parts of the packed weight of an attention, in order
        return weights[0].t() if records[0].view == TRANSPOSED else weights[0]

    return property(read, doc=_decoding.__doc__)


def _restore_layer(layer: type[nn.Module], *rest: Any) -> Any:
    return _restore(layer_graph_class(layer), *rest)


def layer_class(cls: type) -> type[nn.Module]:
    """The class of the layer that a class of :func:`layer_graph_class` stands for."""
    place = cls.__mro__.index(_PlainInit)
    return cls.__mro__[place + 1]


def layer_graph_class(layer: type[nn.Module]) -> type[LayerGraph]:
    """The class of graph modules that stand for layers of a class: they are instances of both."""
    return _layer_graph_class(layer)  # type: ignore[arg-type]  # mypy takes a class of modules for unhashable


@functools.cache
def _layer_graph_class(layer: type[nn.Module]) -> type[LayerGraph]:
    members: dict[str, Any] = {
        "__module__": __name__,
        "__doc__": f"``{layer.__name__}`` as a graph; see :class:`LayerGraph`.",
    }
    attention = issubclass(layer, nn.MultiheadAttention)
    names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight") if attention else ("weight",)
    members |= {name: _decoding(name) for name in names}
    return type(f"Tiled{layer.__name__}", (LayerGraph, _PlainInit, layer), members)


def adopt(root: nn.Module, graph: fx.Graph, cls: type[fx.GraphModule] = TiledGraph, name: str | None = None) -> Any:
    """A graph module that takes over all that ``root`` holds.

    Args:
        root: a module of which the graph reads tensors and calls submodules. It is used up: the result has its very
            dictionaries of parameters, buffers, modules and hooks.
        graph: the graph.
        cls: class of the result.
        name: its name; default: that of the class of ``root``.

    Returns:
        The graph module: every ``state_dict`` key, hook and attribute of ``root`` is there, in order.
    """
    for node in graph.nodes:
        if isinstance(node.type, str):
            node.type = None  # an annotation that was not evaluated would be code that cannot be unpickled
    gm = cls(root, graph, name or type(root).__name__)
    constants = {name: value for name, value in gm._buffers.items() if name not in root._buffers}
    gm.__dict__.update({name: value for name, value in root.__dict__.items() if name not in _GRAPH_STATE})
    # Plain tensors that the graph reads move with the module, but are no new state_dict keys.
    for name, value in constants.items():
        gm.__dict__.pop(name, None)
        gm.register_buffer(name, value, persistent=False)
    return gm


def become(module: nn.Module, gm: fx.GraphModule) -> None:
    """Let a module be what a graph module is, in place: whatever holds the module holds the graph module then."""
    module.__dict__.clear()
    module.__dict__.update(gm.__dict__)
    module.__class__ = type(gm)
    gm.graph.owning_module = module  # type: ignore[assignment]
