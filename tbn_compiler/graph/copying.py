"""Copies of a module that share its tensors and nothing else.

``copy.deepcopy`` alone copies every weight, refuses tensors that a training step has left in an attribute, and takes
functions as they are: a closure over ``self`` that a model keeps (``self.f = lambda x: self.fc(x)``, a hook) would go
on calling the original. Here such functions are bound to the copy. Nor does it know of the ``__slots__`` of modules.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import functools
import types
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import fx, nn

from tbn_compiler.graph.records import LayerRecord

GENERATED = "tbn_generated"  # says of a class that it was made for the code of a graph

_Module = TypeVar("_Module", bound=nn.Module)
_SHARED = (torch.Tensor, LayerRecord)  # tensors, and what cannot change
# Nothing that these hold is part of a model's structure.
_ATOMIC = (type, types.ModuleType, types.BuiltinFunctionType, str, bytes, int, float, complex, bool, type(None))


def share_tensors_copy(module: _Module) -> _Module:
    """Copy a module's structure; the copy holds the very same parameters, buffers and other tensors.

    Nothing that is then done to the copy's module tree or attributes is seen by the original, and no weight is
    duplicated. Closures, partial functions and bound methods over the module or its submodules, hooks included, are
    bound to the copy.
    """
    found = list(reachable(module))
    return _copy(module, found, {id(value): value for value in found if isinstance(value, _SHARED)})


def copy_with_tensors(module: _Module) -> _Module:
    """Copy a module and its tensors: nothing that the copy does when it is called is seen by the original."""
    found = list(reachable(module))
    memo: dict[int, Any] = {id(value): value for value in found if isinstance(value, LayerRecord)}
    # Which copy.deepcopy refuses.
    computed = (value for value in found if isinstance(value, torch.Tensor) and not value.is_leaf)
    return _copy(module, found, memo | {id(value): value.detach().clone() for value in computed})


def _copy(module: _Module, found: list[Any], memo: dict[int, Any]) -> _Module:
    # Every module has a dozen of them, which copy.deepcopy takes apart and puts together one by one.
    memo |= {id(value): type(value)() for value in found if type(value) is collections.OrderedDict and not value}
    forwards = {id(type(value).forward) for value in found if isinstance(value, fx.GraphModule)}
    wrapped = {id(value) for value in found if id(value) in forwards}
    copied = {id(value) for value in found if isinstance(value, nn.Module)} | wrapped
    functions = [value for value in found if isinstance(value, types.FunctionType) and id(value) not in wrapped]
    rebound = _unbound_copies(functions, copied)
    memo |= {id(function): new for function, new, _ in rebound}
    memo |= dict.fromkeys(wrapped, _present_forward)
    wrappers = [value for value in found if _is_wrapper(value, wrapped)]
    memo |= {id(wrapper): object.__new__(type(wrapper)) for wrapper in wrappers}
    graphs = [part for part in reversed(list(module.modules())) if isinstance(part, fx.GraphModule)]
    memo |= {id(part): _empty_copy(part) for part in graphs}
    # copy.deepcopy takes the function of a method as it is.
    memo |= {
        id(value): types.MethodType(_present_forward, memo[id(value.__self__)])
        for value in found
        if isinstance(value, types.MethodType) and id(value.__func__) in wrapped and id(value.__self__) in memo
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own copy of an exported graph
        for part in graphs:  # children come before their parents
            copy_graph_module(part, memo)
        result = copy.deepcopy(module, memo)
        for wrapper in wrappers:
            vars(memo[id(wrapper)]).update(copy.deepcopy(vars(wrapper), memo))
        for function, new, cells in rebound:
            for cell, content in cells:
                cell.cell_contents = copy.deepcopy(content, memo)
            new.__defaults__ = copy.deepcopy(function.__defaults__, memo)
            new.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
            new.__dict__.update(copy.deepcopy(vars(function), memo))
        _copy_slots(found, memo)
    _rebind_attributes(found, memo)
    return result


def _present_forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """The ``forward`` of a graph module's class.

    It stands in copies for that of the original, which wrappers on the instance call (of mixed precision, say): the
    class of a copy has another one as soon as a pass rewrites its graph.
    """
    return type(self).forward(self, *args, **kwargs)


def _is_wrapper(value: Any, functions: Collection[int]) -> bool:
    """Whether a value is a callable object around one of the functions; some of them cannot be copied or pickled."""
    kinds = (nn.Module, types.FunctionType, types.MethodType, functools.partial)
    if not functions or isinstance(value, kinds) or not callable(value) or not hasattr(value, "__dict__"):
        return False
    return any(id(held) in functions for held in reachable(value))


def _shares_code(gm: fx.GraphModule) -> bool:
    return getattr(type(gm), "tbn_shares_code", False)


def _empty_copy(gm: fx.GraphModule) -> Any:
    """What is to become a copy of a graph module."""
    return object.__new__(type(gm)) if _shares_code(gm) else fx.GraphModule.__new__(graph_class(gm))


def copy_graph_module(gm: fx.GraphModule, memo: dict[int, Any]) -> fx.GraphModule:
    """Copy a graph module with all that it holds, and note the copy in ``memo``.

    Its own copy drops attributes and submodules that the graph does not name, and makes every buffer persistent.
    """
    # What it holds may be bound to it: the copy has to exist before.
    if id(gm) not in memo:
        memo[id(gm)] = _empty_copy(gm)
    result = memo[id(gm)]
    shell = nn.Module()
    # torch.export puts a train and an eval that only raise on its modules.
    shell.__dict__ = {key: value for key, value in gm.__dict__.items() if key not in ("_graph", "train", "eval")}
    shell = copy.deepcopy(shell, memo)
    graph = copy.deepcopy(gm.graph)
    if _shares_code(gm):  # its class has the code of this graph already
        result.__dict__.update(shell.__dict__, _graph=graph)
        graph.owning_module = result
    else:
        result.__init__(shell, graph, type(gm).__name__)
        result.__dict__.update(shell.__dict__)
    return cast("fx.GraphModule", result)


def graph_class(gm: fx.GraphModule) -> type[fx.GraphModule]:
    """The class that a graph module was made from.

    Every graph module has a class of its own below it; PyTorch's further ones have no constructor.
    """
    generated = (cls for cls in type(gm).__mro__ if not vars(cls).get(GENERATED))
    made_from = next(cls for cls in generated if not cls.__qualname__.endswith("GraphModuleImpl"))
    return fx.GraphModule if made_from.__module__.startswith("torch.") else made_from


def reachable(root: Any) -> Iterator[Any]:
    """Everything that a module holds, itself included, however deep in containers, objects and closures."""
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if isinstance(value, _ATOMIC) or id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        stack.extend(_held(value))


def _held(value: Any) -> Iterator[Any]:
    """What a value holds."""
    if isinstance(value, torch.Tensor | fx.Graph | LayerRecord):
        return
    if isinstance(value, dict | types.MappingProxyType | collections.UserDict):  # others may read files
        yield from value.keys()
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | collections.deque):
        yield from value
    elif isinstance(value, types.FunctionType):
        yield from (cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell))
        yield from (value.__defaults__, value.__kwdefaults__, *vars(value).values())
        return
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    yield from getattr(value, "__dict__", {}).values()
    yield from (held for _, held in _slots(value))


def _is_filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True


_Rebound = list[tuple[types.FunctionType, types.FunctionType, list[tuple[types.CellType, Any]]]]


def _unbound_copies(functions: list[types.FunctionType], copied: Collection[int]) -> _Rebound:
    """For each function that leads to a copied module: itself, a new one, and its new cells with what they held."""
    bound = {id(f) for f in functions if any(id(value) in copied for value in reachable(f))}
    cells: dict[int, types.CellType] = {}
    result: _Rebound = []
    for function in functions:
        if id(function) not in bound:
            continue
        closure, contents = [], []
        for cell in function.__closure__ or ():
            held = not _is_filled(cell) or not any(id(value) in copied for value in reachable(cell.cell_contents))
            if held:
                closure.append(cell)  # a counter, say, goes on counting for both
                continue
            new_cell = cells.setdefault(id(cell), types.CellType())
            closure.append(new_cell)
            contents.append((new_cell, cell.cell_contents))
        new = types.FunctionType(function.__code__, function.__globals__, function.__name__, None, tuple(closure))
        functools.update_wrapper(new, function, updated=("__dict__",))
        new.__dict__.pop("__wrapped__", None)
        result.append((function, new, contents))
    return result


def _copy_slots(found: list[Any], memo: dict[int, Any]) -> None:
    """Copy what modules hold in ``__slots__``, of which ``nn.Module`` gives away nothing to be copied."""
    for value in found:
        copied = memo.get(id(value)) if isinstance(value, nn.Module) else None
        if copied is None:
            continue
        own = {slot for slot, _ in _slots(copied)}  # filled by a copy method of the class
        for slot, held in _slots(value):
            if slot not in own:
                slot.__set__(copied, _rebound(copy.deepcopy(held, memo), memo))


def _slots(value: Any) -> Iterator[tuple[types.MemberDescriptorType, Any]]:
    """The slots of an object with what they hold; by their descriptors, since private names are other ones there."""
    for cls in type(value).__mro__:
        for slot in vars(cls).values() if cls.__dict__.get("__slots__") else ():
            if isinstance(slot, types.MemberDescriptorType):
                with contextlib.suppress(AttributeError):  # it may be empty
                    yield slot, slot.__get__(value)


def _rebind_attributes(found: list[Any], memo: Mapping[int, Any]) -> None:
    """Let the weak references among the copies' attributes point to copies, and methods be made of new functions."""
    for value in found:
        copied = memo.get(id(value))
        if copied is None or copied is value or not hasattr(copied, "__dict__"):
            continue
        for name, held in vars(copied).items():
            rebound = _rebound(held, memo)
            if rebound is not held:
                copied.__dict__[name] = rebound


def _rebound(held: Any, memo: Mapping[int, Any]) -> Any:
    """A copied attribute itself, or what stands for it in the copy."""
    if type(held) is weakref.ref:
        target = held()
        return weakref.ref(memo[id(target)]) if target is not None and id(target) in memo else held
    if isinstance(held, types.MethodType) and id(held.__func__) in memo:
        return types.MethodType(memo[id(held.__func__)], held.__self__)
    return held
