"""What a module's own code does with its submodules besides calling them, read from its source.

A submodule that is traced alone becomes a graph: it can be called, but no longer indexed, and code that uses the
``weight`` of a layer in it as a tensor would go on with the float weight, silently. torch.fx could not trace that
code, so its source has to tell.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

# Attributes and methods of a tensor that do not read its values.
_HARMLESS = {"dtype", "device", "shape", "ndim", "requires_grad", "is_cuda", "is_meta", "size", "dim", "numel"}
# Methods that do not run in forward, by the beginning of their name.
_OUTSIDE = ("__init__", "_init", "init", "reset", "_reset", "tie", "_tie", "extra_repr", "load", "_load", "save")


@dataclass(frozen=True)
class CodeReads:
    """Paths of submodules, from the module whose code reads them; ``*`` stands for any name (``layers.*.proj``).

    Attributes:
        weights: submodules whose ``weight`` is used as a tensor.
        containers: submodules that are indexed or iterated over.
    """

    weights: frozenset[str] = frozenset()
    containers: frozenset[str] = frozenset()

    def __or__(self, other: CodeReads) -> CodeReads:
        return CodeReads(self.weights | other.weights, self.containers | other.containers)

    def inside(self, name: str) -> CodeReads:
        """The paths below the submodule ``name``, as seen from there."""
        return CodeReads(frozenset(_below(self.weights, name)), frozenset(_below(self.containers, name)))

    def reads_weight(self, name: str) -> bool:
        """Whether the weight of the direct submodule ``name`` is read."""
        return name in self.weights or "*" in self.weights

    def opens(self, name: str, child: nn.Module) -> bool:
        """Whether ``child``, the direct submodule ``name``, is used as a container, or a submodule of it is read."""
        below = self.inside(name)
        first = {path.partition(".")[0] for path in below.weights | below.containers}
        # ``conv.stride[0]`` opens nothing: only names of submodules count.
        return bool({name, "*"} & self.containers or first & {*child._modules, "*"})


def _below(paths: frozenset[str], name: str) -> Iterator[str]:
    for path in paths:
        first, _, rest = path.partition(".")
        if rest and first in (name, "*"):
            yield rest


def code_reads(module: nn.Module) -> CodeReads:
    """What the code of a module's class reads of its submodules."""
    # What PyTorch's own modules read is known: see the decomposition of attention and disable_fast_paths.
    classes = [cls for cls in type(module).__mro__ if not cls.__module__.startswith("torch.")]
    reads = CodeReads()
    for cls in classes:
        reads |= _reads_of_class(cls)
    return reads


@lru_cache(maxsize=4096)
def _reads_of_class(cls: type) -> CodeReads:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError, SyntaxError):  # no source: builtin, or defined at a prompt
        return CodeReads()
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    nodes = [node for f in functions if not f.name.startswith(_OUTSIDE) for node in ast.walk(f)]
    return CodeReads(frozenset(_weights(nodes)), frozenset(_containers(nodes)))


def _weights(nodes: list[ast.AST]) -> Iterator[str]:
    harmless = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in _HARMLESS}
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = _path(node.value)
            if path and id(node) not in harmless:
                yield path


def _containers(nodes: list[ast.AST]) -> Iterator[str]:
    opened: list[ast.AST] = [node.value for node in nodes if isinstance(node, ast.Subscript)]
    for node in nodes:
        if isinstance(node, ast.For | ast.comprehension):
            opened += ast.walk(node.iter)  # self.layers, enumerate(self.layers), zip(self.a, self.b)
    yield from filter(None, map(_path, opened))


def _path(node: ast.AST) -> str:
    """The path of ``self.a[0].b`` as ``a.0.b``; empty if the expression is no such path."""
    if not isinstance(node, ast.Attribute | ast.Subscript):
        return ""
    root, _, path = ast.unparse(node).partition(".")
    path = re.sub(r"\[([^\]]*)\]", lambda match: f".{match[1]}" if match[1].isdigit() else ".*", path)
    return path if root == "self" and re.fullmatch(r"[\w.*]+", path) else ""
