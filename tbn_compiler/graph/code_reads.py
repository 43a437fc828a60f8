"""What the code of a model does with its parameters and with the weights of its layers, read from its source.

Nothing is run and nothing is decided here that a result could depend on: a weight that is read tiled is read tiled
everywhere. The source only tells *which* weights are worth tiling (a matrix in a product, not a position embedding), in
which orientation, and which layers have a ``weight`` that other code computes with.

From each method the reads of ``self.a.b`` are followed through local names, loops over submodules, properties, and
calls of the model's own methods and helper functions.
"""

from __future__ import annotations

import ast
import fnmatch
import functools
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from tbn_compiler.graph.function_reads import (
    HARMLESS,
    WRITTEN,
    Code,
    FunctionReads,
    OwnClass,
    Use,
    bound_to_self,
    closure_of,
    namespace_of,
    parse_code,
    plain_function,
)

# Methods that do not run in forward, by the beginning of their name.
_OUTSIDE = ("__init__", "_init", "init", "reset", "_reset", "tie", "_tie", "extra_repr", "load", "_load", "save")


@dataclass
class ParameterUses:
    """What the code of a model does with its parameters.

    Attributes:
        roles: by module (its id) and name of the parameter, what it is used for: ``"linear"``, ``"conv2d"``, ...,
            ``"right operand"`` (of a matrix product), ``"product"``, ``"elementwise"`` (added to an activation, or
            multiplied with it), ``"written"`` (in place), ``"read"`` (anything else).
        from_outside: the parameters that code of other modules reads.
    """

    roles: dict[tuple[int, str], set[str]] = field(default_factory=dict)
    from_outside: set[tuple[int, str]] = field(default_factory=set)

    def read_from_outside(self, module: nn.Module, name: str) -> bool:
        """Whether code of another module reads one parameter; code that only writes to it does not."""
        return (id(module), name) in self.from_outside

    def of(self, module: nn.Module, name: str) -> frozenset[str]:
        """The roles of one parameter; empty if no code reads it."""
        return frozenset(self.roles.get((id(module), name), ()))


def parameter_uses(root: nn.Module) -> ParameterUses:
    """What the code of all modules below ``root`` does with parameters."""
    uses = ParameterUses()
    places = {id(module): path for path, module in root.named_modules()}
    for module in root.modules():
        found = [(root, use) for use in _uses_in_object(module, root, places)]
        # What PyTorch's own modules read is known: see the decomposition of attention and disable_fast_paths.
        for cls in type(module).__mro__:
            if not cls.__module__.startswith("torch.") and cls is not object:
                found += [(module, use) for use in _uses_in_class(cls, type(module))]  # type: ignore[arg-type]
        for start, use in found:
            for owner, name in _resolve(start, use.path.split("."), use.alias):
                uses.roles.setdefault((id(owner), name), set()).add(use.role)
                if owner is not module and use.role != WRITTEN:
                    uses.from_outside.add((id(owner), name))
    return uses


def _resolve(value: Any, parts: list[str], alias: bool) -> Iterator[tuple[nn.Module, str]]:
    """The parameters that a path from a module names; ``*`` stands for any entry."""
    if not isinstance(value, nn.Module):
        return
    pattern, *rest = parts
    names = [pattern] if "*" not in pattern else fnmatch.filter(value._modules, pattern)
    if pattern != "*" or isinstance(value, nn.ParameterList | nn.ParameterDict):
        names += fnmatch.filter(value._parameters, pattern)
    for entry in dict.fromkeys(names):
        if isinstance(value._parameters.get(entry), Tensor):
            if not rest or (alias and rest[0] not in HARMLESS):
                yield value, entry
        elif entry in value._modules and rest:
            yield from _resolve(value._modules[entry], rest, alias)


@functools.lru_cache(maxsize=4096)
def _uses_in_class(cls: type, own: type) -> frozenset[Use]:
    """What the methods of a class do with parameters, in an object of the class ``own``."""
    owner = OwnClass(own, set())
    for name, member in vars(cls).items():
        for function in _functions(name, member) if _runs(cls, own, name) else ():
            for method in parse_code(function.__code__):
                read: list[Code] = [method]
                if name.startswith(_OUTSIDE):  # but functions that it makes and keeps do run
                    read = [node for node in ast.walk(method) if isinstance(node, Code) and node is not method]
                bound = {} if isinstance(member, staticmethod) else bound_to_self(method)
                for code in read:
                    FunctionReads(code, dict(bound), {}, owner, namespace_of(function), 0).read()
    return frozenset(owner.found)


def _runs(cls: type, own: type, name: str) -> bool:
    """Whether the method of a class runs in an object of the class ``own``, which may have another by that name."""
    for derived in own.__mro__[: own.__mro__.index(cls)]:
        if name in vars(derived):
            functions = _functions(name, vars(derived)[name])
            return any("super" in function.__code__.co_names for function in functions)
    return True


def _uses_in_object(module: nn.Module, root: nn.Module, places: Mapping[int, str]) -> Iterator[Use]:
    """What functions that a module has for attributes do, as seen from ``root``: a ``forward`` that was replaced, say.

    ``places`` are the paths of all modules, by id.
    """
    for value in vars(module).values():
        function = plain_function(getattr(value, "__func__", value))
        if function is None:
            continue
        for code in parse_code(function.__code__):
            held = dict(closure_of(function))
            if isinstance(value, types.MethodType):
                held |= dict.fromkeys(bound_to_self(code), value.__self__)
            bound = {name: {places[id(found)]} for name, found in held.items() if id(found) in places}
            owner = OwnClass(type(root), set())
            FunctionReads(code, bound, {}, owner, namespace_of(function), 0).read()
            yield from owner.found


def _functions(name: str, member: Any) -> Iterator[types.FunctionType]:
    """The Python functions behind an entry of a class: of a method or property, or what a decorator put around one."""
    if isinstance(member, property):
        members = [member.fget, member.fset]
    elif isinstance(member, functools.cached_property | functools.partialmethod):
        members = [member.func]
    else:
        members = [member.__func__ if isinstance(member, classmethod | staticmethod) else member]
    for function in filter(None, map(plain_function, members)):
        yield function
        if function.__name__ != name:
            yield from filter(None, (plain_function(held) for _, held in closure_of(function)))
