"""What one function of a model does with parameters, read from its source: see :mod:`tbn_compiler.graph.code_reads`.

An expression such as ``self.a.b`` is a *path* from the module whose code it is in. The role of a parameter is found by
going outwards from the expression that names it, through views, casts and functions of weights alone, to what uses it.
"""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import linecache
import types
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeGuard

from torch import Tensor

# Attributes and methods of a tensor that do not read its values.
HARMLESS = frozenset(
    {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_meta", "size", "dim", "numel", "grad", "name"}
    | {"requires_grad_", "is_floating_point", "is_contiguous", "stride", "element_size"}
)
# What leaves a matrix as it is, what transposes it, and what gives another view of it; the arguments are no weights.
_COPIES = frozenset({"to", "type_as", "float", "double", "half", "bfloat16", "contiguous", "clone", "repeat"})
_CASTS = (_COPIES - {"repeat"}) | {"data", "detach"}
_TRANSPOSES = frozenset({"t", "T", "mT", "H", "mH", "transpose", "swapaxes", "adjoint"})
_VIEWS = _COPIES | _CASTS | _TRANSPOSES | {"view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "expand"}
_VIEWS |= {"expand_as", "unsqueeze", "squeeze", "permute", "movedim", "chunk", "split", "unbind", "narrow", "select"}
_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "multiply", "divide", "subtract", "where", "lerp", "addcmul"})

# Roles of a parameter in an expression. The first three make a weight worth tiling.
LINEAR, RIGHT, PRODUCT = "linear", "right operand", "product"
READ, ELEMENTWISE, WRITTEN = "read", "elementwise", "written"
_LAYERS = frozenset({"linear", *(f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3))})
_WITH_ADDEND = frozenset({"addmm", "baddbmm", "addbmm", "addmv"})  # their first argument is added to the product
_PRODUCTS = _WITH_ADDEND | {"matmul", "mm", "bmm", "einsum", "tensordot", "mv", "dot", "inner", "bilinear"}
_PRODUCTS |= {"_grouped_mm", "grouped_mm", "_scaled_mm", "chain_matmul", "multi_dot"}
_ASK_KIND = frozenset({"isinstance", "hasattr", "type", "id", "len"})
_LOOPS = frozenset({"zip", "enumerate", "reversed", "list", "tuple", "iter"})  # what they go over gets a name there
_THAT_OF_THE_RESULT = "that of the result"  # of a function of weights alone
_MAX_DEPTH = 4  # of calls that are followed

Code = ast.FunctionDef | ast.Lambda
_BINDING = (ast.Assign, ast.AnnAssign, ast.NamedExpr, ast.For, ast.comprehension)
_USING = (ast.AugAssign, ast.Attribute, ast.Subscript, ast.Name, ast.Call)


class Use(NamedTuple):
    """A path from a module that its code names, and the role of what it names.

    ``alias`` is set for a local name, whose path may go on behind the parameter: ``w = self.w.data[0]``.
    """

    path: str
    role: str
    alias: bool


def closure_of(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """The names that a function takes from the functions around it, with their values."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not set yet
            yield name, cell.cell_contents


def namespace_of(function: types.FunctionType) -> Mapping[str, Any]:
    """What names mean in a function that are none of its own."""
    held = dict(closure_of(function))
    return ChainMap(held, function.__globals__) if held else function.__globals__


def bound_to_self(method: Code) -> dict[str, set[str]]:
    """What the first argument of a method stands for: the module itself, whatever its name."""
    arguments = [*method.args.posonlyargs, *method.args.args]
    return {arguments[0].arg: {""}} if arguments else {}


def parse_code(code: types.CodeType) -> tuple[Code, ...]:
    """The source of a function, or all lambdas that begin in its line; empty where there is none."""
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename)
    stamp = linecache.cache.get(code.co_filename, ())[:2]
    found = _parse_file(code.co_filename, stamp, len(lines)).get(code.co_firstlineno, ())
    kind = ast.Lambda if code.co_name == "<lambda>" else ast.FunctionDef
    return tuple(node for node in found if isinstance(node, kind))


@functools.lru_cache(maxsize=512)
def _parse_file(path: str, stamp: Any, lines: int) -> dict[int, list[Code]]:
    """The functions of a source file by their line, or that of their first decorator."""
    try:
        tree = ast.parse("".join(linecache.getlines(path)))
    except (SyntaxError, ValueError):
        return {}
    found: dict[int, list[Code]] = {}
    for node in ast.walk(tree):
        if isinstance(node, Code):
            line = min(part.lineno for part in (node, *getattr(node, "decorator_list", ())))
            found.setdefault(line, []).append(node)
    return found


def _parse_function(function: types.FunctionType | None) -> Code | None:
    """The source of a function; ``None`` where there is none: builtin, made by a program, or one of several lambdas."""
    found = parse_code(function.__code__) if function is not None else ()
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class _Tree:
    """The source of a function, prepared for reading.

    Attributes:
        parents: of each node but the first.
        binding: statements that give names to values.
        using: expressions that may be parameters, and places that are written.
        returning: the expressions that are returned.
        local: local names.
    """

    parents: dict[ast.AST, ast.AST]
    binding: list[ast.AST]
    using: list[Any]
    returning: list[ast.expr]
    local: set[str]


@functools.lru_cache(maxsize=16384)
def _tree(function: Code) -> _Tree:
    nodes = list(ast.walk(function))
    using = [n for n in nodes if isinstance(n, _USING) and not (isinstance(n, ast.Name) and _is_written(n))]
    return _Tree(
        {child: node for node in nodes for child in ast.iter_child_nodes(node)},
        [node for node in nodes if isinstance(node, _BINDING)],
        using,
        [node.value for node in nodes if isinstance(node, ast.Return) and node.value is not None]
        + ([function.body] if isinstance(function, ast.Lambda) else []),
        {node.arg for node in nodes if isinstance(node, ast.arg)}
        | {node.id for node in nodes if isinstance(node, ast.Name) and _is_written(node)},
    )


def _is_written(node: ast.Name | ast.Attribute | ast.Subscript) -> bool:
    return not isinstance(node.ctx, ast.Load)


@dataclass
class OwnClass:
    """The class whose methods are read, what was found in them, and what its methods and properties return."""

    cls: type
    found: set[Use]
    returned: dict[Any, set[str]] = field(default_factory=dict)


class FunctionReads:
    """The reads of one function, given what its arguments stand for.

    Attributes:
        paths: what local names are: paths of modules or parameters. ``""`` is the module itself.
        derived: local names that were computed from parameters and constants, with the paths of those.
        texts: local names that are one of some texts.
    """

    def __init__(
        self,
        function: Code,
        paths: dict[str, set[str]],
        derived: dict[str, set[str]],
        owner: OwnClass,
        namespace: Mapping[str, Any],
        depth: int,
    ) -> None:
        self.paths, self.derived, self.owner, self.namespace, self.depth = paths, derived, owner, namespace, depth
        self.texts: dict[str, set[str]] = {}
        self.tree = _tree(function)
        self.parents = self.tree.parents
        for node in 2 * self.tree.binding:  # a name may be used above the place where a loop sets it
            self._bind(node)

    def read(self) -> None:
        """Add what the function does."""
        for node in self.tree.using:
            if isinstance(node, ast.AugAssign):
                self._add_write(node.target)
            elif isinstance(node, ast.Attribute | ast.Subscript) and _is_written(node):
                if not (isinstance(node, ast.Attribute) and node.attr in HARMLESS):
                    self._add_write(node.value)
            else:
                self._add_reads(node)
                if isinstance(node, ast.Call):
                    self._follow(node)

    def returned(self) -> set[str]:
        """The parameters that the function's result is computed from, if from nothing else."""
        results = self.tree.returning
        return set().union(*map(self._inside, results)) if all(map(self._is_of_weights, results)) else set()

    # What names and expressions stand for

    def _paths(self, node: ast.AST) -> set[str]:
        """The paths that an expression is, without any computation."""
        if isinstance(node, ast.Name):
            return self.paths.get(node.id, set())
        if isinstance(node, ast.Attribute):
            return _joined(self._paths(node.value), [node.attr])
        if isinstance(node, ast.Subscript):
            return _joined(self._paths(node.value), self._entries(node.slice))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and node.args:
            return _joined(self._paths(node.args[0]), self._entries(node.args[1]) if len(node.args) > 1 else ["*"])
        if isinstance(node, ast.IfExp):
            return self._paths(node.body) | self._paths(node.orelse)
        return set()

    def _entries(self, node: ast.expr) -> Iterable[str]:
        """An index or attribute name as patterns: ``layer*`` for ``f"layer{i}"``, ``*`` for what is not known."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str | int):
            return [str(node.value)]
        if isinstance(node, ast.JoinedStr):
            parts = (str(part.value) if isinstance(part, ast.Constant) else "*" for part in node.values)
            return ["".join(parts).replace(".", "?")]
        return (self.texts.get(node.id) if isinstance(node, ast.Name) else None) or ["*"]

    def _derived(self, node: ast.AST) -> set[str]:
        """The parameters that a name, or the result of an own method or property, was computed from."""
        if isinstance(node, ast.Name):
            return self.derived.get(node.id, set())
        called = node.func if isinstance(node, ast.Call) else node
        if self.depth >= _MAX_DEPTH or not self._is_self(called):
            return set()
        assert isinstance(called, ast.Attribute)
        function = self._function(called) if called is not node else self._getter(called)
        body = _parse_function(function)
        if function is None or body is None:
            return set()
        paths, derived = self._arguments(node, body) if isinstance(node, ast.Call) else (bound_to_self(body), {})
        key = (function, *((name, frozenset(held)) for name, held in (*paths.items(), *derived.items())))
        if key not in self.owner.returned:
            self.owner.returned[key] = set()  # for a function that calls itself
            inner = FunctionReads(body, paths, derived, self.owner, namespace_of(function), self.depth + 1)
            self.owner.returned[key] = inner.returned()
        return self.owner.returned[key]

    def _inside(self, value: ast.AST) -> set[str]:
        """The parameters anywhere in an expression whose values it uses."""
        if isinstance(value, ast.Attribute) and value.attr in HARMLESS:
            return set()
        found = {path for path in (*self._paths(value), *self._derived(value)) if path}
        parts: Iterable[ast.AST] = ast.iter_child_nodes(value)
        if isinstance(value, ast.Subscript):
            parts = [value.value]
        elif isinstance(value, ast.Call) and self._is_view(value):
            parts = [value.func]
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id in _ASK_KIND:
            parts = []
        return found.union(*map(self._inside, parts))

    def _is_of_weights(self, node: ast.AST) -> bool:
        """Whether an expression computes with weights and constants alone, and is no product of them.

        The sum of an activation and a parameter is no weight, and what a module of its own makes of one is none.
        """
        if isinstance(node, ast.Name):
            if node.id in self.tree.local:
                return bool(self.paths.get(node.id)) or node.id in self.derived
            return bool(self.paths.get(node.id)) or node.id in self.namespace or hasattr(builtins, node.id)
        if isinstance(node, ast.Attribute):
            return node.attr in HARMLESS or self._is_of_weights(node.value)
        if isinstance(node, ast.Subscript):
            return self._is_of_weights(node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
            return False
        if isinstance(node, ast.IfExp):
            return self._is_of_weights(node.body) and self._is_of_weights(node.orelse)
        if isinstance(node, ast.Call):
            if _called_name(node.func) in (_PRODUCTS | _LAYERS):
                return False
            if self._is_view(node):
                return self._is_of_weights(node.func)
            if self._is_module(node.func):
                return bool(self._derived(node))
        return all(map(self._is_of_weights, ast.iter_child_nodes(node)))

    def _is_view(self, call: ast.Call) -> bool:
        """Whether a call is one of a method that gives a view or the shape of its object, whatever the arguments."""
        root: ast.expr = call.func
        while isinstance(root, ast.Attribute):
            root = root.value
        library = isinstance(root, ast.Name) and isinstance(self.namespace.get(root.id), types.ModuleType)
        return isinstance(call.func, ast.Attribute) and call.func.attr in (_VIEWS | HARMLESS) and not library

    def _is_module(self, called: ast.expr) -> bool:
        """Whether a call is one of a submodule or an own method, as far as its name tells."""
        return self._is_self(called) or (bool(self._paths(called)) and not hasattr(Tensor, _called_name(called)))

    def _bind(self, node: ast.AST) -> None:
        """What a statement makes of local names."""
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            self._assign(node.target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            self._bind_loop(node.target, node.iter)

    def _bind_loop(self, target: ast.expr, values: ast.expr) -> None:
        """What a loop over ``values`` makes of its names."""
        call = _called_name(values.func) if isinstance(values, ast.Call) else ""
        names = target.elts if isinstance(target, ast.Tuple | ast.List) else []
        if isinstance(values, ast.Call) and isinstance(values.func, ast.Attribute) and call in ("values", "items"):
            self._bind_loop(names[1] if call == "items" and len(names) == 2 else target, values.func.value)
        elif isinstance(values, ast.Call) and call in _LOOPS and values.args:
            if call == "zip" and len(names) == len(values.args):
                for name, value in zip(names, values.args, strict=True):
                    self._bind_loop(name, value)
            else:
                self._bind_loop(names[1] if call == "enumerate" and len(names) == 2 else target, values.args[0])
        else:
            held, constant = _joined(self._inside(values), ["*"]), self._is_of_weights(values)
            texts = {part.value for part in ast.walk(values) if isinstance(part, ast.Constant)}
            for part in ast.walk(target):
                if isinstance(part, ast.Name):
                    self.paths.setdefault(part.id, set()).update(held)
                    self.texts.setdefault(part.id, set()).update(text for text in texts if isinstance(text, str))
                    if constant and not held:  # a number
                        self.derived.setdefault(part.id, set())

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            same = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
            for index, element in enumerate(target.elts):
                self._assign(element, value.elts[index] if same else value)  # type: ignore[attr-defined]
        elif isinstance(target, ast.Name) and "" not in self.paths.get(target.id, ()):
            paths = self._paths(value)
            self.paths.setdefault(target.id, set()).update(paths)
            if not paths and self._is_of_weights(value):
                self.derived.setdefault(target.id, set()).update(self._inside(value))

    # What they are used for

    def _add_reads(self, node: ast.expr) -> None:
        alias = isinstance(node, ast.Name)
        for path in self._paths(node):
            if path:
                turned = alias and sum(part in _TRANSPOSES for part in path.split(".")) % 2 == 1
                self._add(path, self._role(node, turned), alias)
        for path in self._derived(node):
            self._add(path, self._role(node, None), True)

    def _add(self, path: str, role: str | None, alias: bool) -> None:
        if role is not None:
            self.owner.found.add(Use(path, role, alias))

    def _add_write(self, node: ast.expr) -> None:
        for path in self._paths(node):
            if path:
                self.owner.found.add(Use(path, WRITTEN, isinstance(node, ast.Name)))

    def _role(self, node: ast.expr, turned: bool | None) -> str | None:
        """What the value of an expression is used for; ``None`` if its values are not used, or used under a name.

        ``turned`` says whether the expression is a parameter's transpose; ``None`` if it was computed in another way.
        """
        value: ast.AST = node
        shared = turned is not None  # whether writing to the value writes to the parameter
        while True:
            parent = self.parents.get(value)
            if isinstance(parent, ast.BinOp) and isinstance(parent.op, ast.MatMult):
                return _operand(turned) if parent.right is value else PRODUCT
            if isinstance(parent, ast.Call) and parent.func is not value:
                role = self._role_in_call(parent, value, turned)
                if role != _THAT_OF_THE_RESULT:
                    return role
                value, turned, shared = parent, None, False
            elif isinstance(parent, ast.Attribute | ast.Subscript) and _is_written(parent):
                return None  # the place in it is listed as written
            elif isinstance(parent, ast.Attribute):
                name, call = parent.attr, self.parents.get(parent)
                method = isinstance(call, ast.Call) and call.func is parent
                if name in HARMLESS:
                    return None
                if method and shared and _is_in_place(name):
                    return WRITTEN
                if method and name in _PRODUCTS:
                    return ELEMENTWISE if name in _WITH_ADDEND else PRODUCT
                if name in _TRANSPOSES:
                    turned = None if turned is None else not turned
                elif name not in _CASTS:
                    turned = None
                shared &= name in _VIEWS and name not in _COPIES
                value = parent
                if method:
                    assert isinstance(call, ast.Call)
                    if name not in _VIEWS and not all(map(self._is_of_weights, [*call.args, *call.keywords])):
                        return ELEMENTWISE if name in _ARITHMETIC else READ
                    value = call
            elif isinstance(parent, ast.BinOp):
                if not self._is_of_weights(parent):
                    return ELEMENTWISE
                value, turned, shared = parent, None, False
            elif isinstance(parent, ast.AugAssign):
                return ELEMENTWISE
            elif _passes_on(parent, value):
                value = parent
            else:
                return None if self._gives_names(parent) else READ

    def _role_in_call(self, call: ast.Call, value: ast.AST, turned: bool | None) -> str | None:
        """The role of an argument; ``None`` if its values are not used, or used under a name."""
        name = _called_name(call.func)
        position = next((index for index, argument in enumerate(call.args) if argument is value), None)
        keyword = next((k.arg for k in call.keywords if k is value or k.value is value), None)
        if (isinstance(call.func, ast.Name) and name in (_ASK_KIND | _LOOPS | {"getattr"})) or name.endswith("_like"):
            return None
        if (_is_in_place(name) and position == 0) or keyword == "out":
            return WRITTEN
        if name in _PRODUCTS:
            if name in _WITH_ADDEND and position == 0:
                return ELEMENTWISE
            last = {"matmul": (1,), "mm": (1,), "addmm": (2,)}.get(name, ())
            method = isinstance(call.func, ast.Attribute) and name in ("matmul", "mm") and len(call.args) == 1
            return _operand(turned) if position in last or method else PRODUCT
        if name in _LAYERS and not self._is_module(call.func):
            if position != 1 and keyword != "weight":
                return READ
            return RIGHT if turned and name == "linear" else name
        if self._is_module(call.func):
            return READ
        if self._is_of_weights(call):
            return _THAT_OF_THE_RESULT
        return ELEMENTWISE if name in _ARITHMETIC else READ

    def _gives_names(self, statement: ast.AST | None) -> bool:
        """Whether a statement gives its value to local names, whose use tells, or only asks what it is."""
        if isinstance(statement, ast.Compare):
            return all(isinstance(op, ast.Is | ast.IsNot) for op in statement.ops)
        if isinstance(statement, ast.For | ast.comprehension):
            return _is_name(statement.target)
        if not isinstance(statement, ast.Assign | ast.AnnAssign) or statement.value is None:
            return False
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        one_by_one = isinstance(statement.value, ast.Tuple | ast.List) and not any(map(_is_plain_name, targets))
        known = bool(self._paths(statement.value)) or self._is_of_weights(statement.value)
        return all(map(_is_name, targets)) and (known or one_by_one)

    # Calls

    def _follow(self, call: ast.Call) -> None:
        """Read a function of the model's own that takes a module or parameter as an argument."""
        function = self._function(call.func)
        body = _parse_function(function)
        if function is None or body is None or self.depth >= _MAX_DEPTH:
            return
        paths, derived = self._arguments(call, body)
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        if any(map(self._paths, given)) or any(derived.values()):
            FunctionReads(body, paths, derived, self.owner, namespace_of(function), self.depth + 1).read()

    def _arguments(self, call: ast.Call, body: Code) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
        """What the arguments of a function stand for in a call: paths, and what they were computed from."""
        names = [argument.arg for argument in (*body.args.posonlyargs, *body.args.args)]
        paths: dict[str, set[str]] = {}
        if self._is_self(call.func) and names:
            assert isinstance(call.func, ast.Attribute)
            if not isinstance(inspect.getattr_static(self.owner.cls, call.func.attr, None), staticmethod):
                paths[names[0]], names = {""}, names[1:]
        given = dict(zip(names, call.args, strict=False))
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        paths |= {name: set(self._paths(value)) for name, value in given.items()}
        return paths, {
            name: self._inside(value) for name, value in given.items() if not paths[name] and self._is_of_weights(value)
        }

    def _is_self(self, node: ast.AST) -> bool:
        """Whether an expression is an attribute of the module itself."""
        value = node.value if isinstance(node, ast.Attribute) else None
        return isinstance(value, ast.Name) and "" in self.paths.get(value.id, ())

    def _function(self, node: ast.expr) -> types.FunctionType | None:
        """The Python function that an expression calls, unless it is PyTorch's."""
        found: Any = None
        if isinstance(node, ast.Name):
            found = self.namespace.get(node.id) if node.id not in self.tree.local else None
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if self._is_self(node):
                found = inspect.getattr_static(self.owner.cls, node.attr, None)
            else:
                found = getattr(self.namespace.get(node.value.id), node.attr, None)
        return plain_function(found)

    def _getter(self, node: ast.Attribute) -> types.FunctionType | None:
        """The function behind a property of the module itself."""
        found = inspect.getattr_static(self.owner.cls, node.attr, None)
        if isinstance(found, functools.cached_property):
            return plain_function(found.func)
        return plain_function(found.fget) if isinstance(found, property) else None


def plain_function(value: Any) -> types.FunctionType | None:
    """The Python function that a value is, below decorators; ``None`` for any other, and for PyTorch's."""
    value = inspect.unwrap(value) if callable(value) else value
    if not isinstance(value, types.FunctionType) or value.__module__ is None:  # a graph module's
        return None
    return None if value.__module__.partition(".")[0] in ("torch", "tbn_compiler") else value


def _joined(paths: Iterable[str], names: Iterable[str]) -> set[str]:
    return {f"{path}.{name}".lstrip(".") for path in paths for name in names}


def _operand(turned: bool | None) -> str:
    """The role of a right operand: ``x @ w`` has a row of ``w`` for each input, ``x @ w.t()`` is a linear layer."""
    return PRODUCT if turned is None else LINEAR if turned else RIGHT


def _is_in_place(name: str) -> bool:
    return name.endswith("_") and not name.startswith("_")


def _passes_on(parent: ast.AST | None, value: ast.AST) -> TypeGuard[ast.AST]:
    """Whether an expression is a part of it, or holds it."""
    if isinstance(parent, ast.Subscript):
        return parent.value is value
    if isinstance(parent, ast.IfExp):
        return parent.test is not value
    return isinstance(parent, ast.UnaryOp | ast.keyword | ast.Tuple | ast.List | ast.Starred | ast.NamedExpr)


def _is_name(target: ast.expr) -> bool:
    """Whether a target of an assignment is a name, or several."""
    return all(map(_is_name, target.elts)) if isinstance(target, ast.Tuple | ast.List) else _is_plain_name(target)


def _is_plain_name(target: ast.expr) -> bool:
    return isinstance(target, ast.Name)


def _called_name(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
