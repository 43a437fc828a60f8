"""The contract of a pass: rewrite a graph in place, say truthfully whether anything changed."""

from __future__ import annotations

import copy
import functools
import itertools
import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.overrides import get_overridable_functions

from tbn_compiler.errors import TBNError
from tbn_compiler.passes.facts import Fact, malformed, violations
from tbn_compiler.tiling import TileLayout
from tbn_compiler.torch_private import OpOverload, OpOverloadPacket, operator_schema

_DUMP = "TBN_DUMP_GRAPHS"  # a folder, for debugging
_dumped = itertools.count()

# Python's operators that write into their first argument, by name.
_WRITING_OPERATORS = frozenset(
    {*("setitem", "delitem", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow")}
    | {*("iand", "ior", "ixor", "ilshift", "irshift", "iconcat")}
)
_PURE_BUILTINS = frozenset({getattr, len, int, float, bool, max, min, sum, abs, round, slice, tuple, list})


class GraphPass(PassBase):
    """Base of every pass.

    A subclass implements :meth:`run`; this class then removes dead nodes, checks the graph and recompiles it, so
    that a pass cannot forget to. A pass that is run a second time on its own result reports ``modified=False``.

    With the environment variable ``TBN_DUMP_GRAPHS=FOLDER`` every pass that changes a graph writes it there after.

    Attributes:
        after: passes that have to stand before this one in a pipeline that has both.
        assumes: what has to be true of the graph.
        establishes: what is true of it afterwards.
    """

    after: ClassVar[tuple[type[GraphPass], ...]] = ()
    assumes: tuple[Fact, ...] = ()
    establishes: tuple[Fact, ...] = ()

    @abstractmethod
    def run(self, gm: fx.GraphModule) -> bool:
        """Rewrite ``gm.graph`` and the module tree in place; return whether anything changed."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass and leave a clean, checked, recompiled graph.

        Raises:
            TBNError: the graph lacks what the pass assumes, or the pass left what it must not.
        """
        name = type(self).__name__
        for fact in self.assumes:
            for problem in violations(graph_module, fact):
                raise TBNError(f"pass {name} requires that {fact.value}: {problem}")
        modified = self.run(graph_module)
        if modified:
            remove_dead_nodes(graph_module.graph)
            for problem in malformed(graph_module):
                raise TBNError(f"pass {name} left a malformed graph: {problem}")
            graph_module.recompile()
            _dump(graph_module, name)
        for fact in self.establishes:
            for problem in violations(graph_module, fact):
                raise TBNError(f"pass {name} has to ensure that {fact.value}: {problem}")
        return PassResult(graph_module, modified)


def _dump(gm: fx.GraphModule, name: str) -> None:
    folder = os.environ.get(_DUMP)
    if folder:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        path.joinpath(f"{next(_dumped):04d}_{type(gm).__name__}_{name}.py").write_text(gm.code)


def remove_dead_nodes(graph: fx.Graph) -> bool:
    """Remove the nodes that nothing reads and that do nothing but compute; return whether there were any.

    What is not known to be so stays: writes into a tensor, modules with buffers, which they may update, or with hooks,
    the calls by which Dynamo begins and ends a context or a ``vmap``, functions of the user's. Bodies of higher-order
    operators, whose graphs others share, stay as they are.
    """
    # Not Graph.eliminate_dead_code, which takes all these for dead, in bodies as well.
    found = False
    for node in reversed(graph.nodes):
        if not node.users and not _has_effect(node):
            graph.erase_node(node)
            found = True
    return found


def _has_effect(node: fx.Node) -> bool:
    if node.is_impure():
        return True
    if node.op == "call_module":
        root = node.graph.owning_module
        if root is None:
            return True
        module = root.get_submodule(str(node.target))
        return any(getattr(part, "inplace", False) or part._buffers or has_hooks(part) for part in module.modules())
    if node.op not in ("call_method", "call_function"):
        return False
    return _writes(node) or not (isinstance(node.target, str) or _only_computes(node.target))


def _writes(node: fx.Node) -> bool:
    """Whether a call writes into one of its arguments, by the names that torch gives such calls."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if (name.endswith("_") and not name.endswith("__")) or name.strip("_") in _WRITING_OPERATORS:
        return True
    code = getattr(node.target, "__code__", None)
    parameters = () if code is None else code.co_varnames[: code.co_argcount]
    in_place = node.kwargs.get("inplace", "inplace" in parameters and any(value is True for value in node.args))
    return "out" in node.kwargs or bool(in_place)


def _only_computes(function: Any) -> bool:
    """Whether a function is known to give a value and to do nothing else: Python's operators, torch's on tensors."""
    if isinstance(function, OpOverload):
        return bool(operator_schema(function).returns)  # fx.Node.is_impure has looked at the rest of the schema
    return (
        isinstance(function, OpOverloadPacket)
        or function in _PURE_BUILTINS
        or getattr(function, "__module__", None) in ("_operator", "math")
        or function in _tensor_functions()
    )


@functools.cache
def _tensor_functions() -> frozenset[Any]:
    """The functions of torch that take tensors; others begin and end contexts, or set what holds for all."""
    return frozenset(function for group in get_overridable_functions().values() for function in group)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than its ``forward``, which a call of its parts would skip."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in hooks)


def run_passes(gm: fx.GraphModule, passes: Sequence[GraphPass]) -> fx.GraphModule:
    """Run a pipeline in order on ``gm``, in place, and return it.

    Raises:
        TBNError: the pipeline has a pass before another one that it has to come after, or a pass fails; the error
            names the passes that ran before it.
    """
    check_order(passes)
    done: list[str] = []
    try:
        for graph_pass in passes:
            graph_pass(gm)
            done.append(type(graph_pass).__name__)
    except TBNError as error:
        if done and hasattr(error, "add_note"):
            error.add_note(f"passes that ran before {type(passes[len(done)]).__name__}: {', '.join(done)}")
        raise
    return gm


def check_order(passes: Sequence[GraphPass]) -> None:
    """Check that every pass stands behind those that it has to come after.

    Raises:
        TBNError: one does not.
    """
    for index, graph_pass in enumerate(passes):
        for later in passes[index + 1 :]:
            if isinstance(later, graph_pass.after):
                raise TBNError(f"pass {type(graph_pass).__name__} has to come after {type(later).__name__}")


def copy_meta(source: fx.Node, *targets: fx.Node) -> None:
    """Give new nodes the metadata (module stack, stack trace) of the node that they replace."""
    for target in targets:
        target.meta = copy.copy(source.meta)


def normalize_sizes(value: Any, dims: int) -> tuple[int, ...]:
    """A size option of a convolution as one integer per spatial dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def padding_sizes(
    padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Padding before and after each spatial dimension; "same" puts the odd element after, as PyTorch does."""
    if padding == "valid":
        padding = 0
    if padding == "same":
        total = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        before = tuple(size // 2 for size in total)
        return before, tuple(size - left for size, left in zip(total, before, strict=True))
    sizes = normalize_sizes(padding, len(kernel))
    return sizes, sizes


def pad_input(graph: fx.Graph, x: Any, before: tuple[int, ...], after: tuple[int, ...], mode: str) -> fx.Node:
    """Pad the spatial dimensions of a convolution's input."""
    # F.pad counts from the last dimension: (left, right, top, bottom, ...).
    pads = [size for pair in zip(reversed(before), reversed(after), strict=True) for size in pair]
    return graph.call_function(F.pad, (x, pads), {"mode": mode})


def layout_options(layout: TileLayout) -> dict[str, Any]:
    """The operator options that a layout needs beyond ``p``; none for the paper's."""
    options = (("p_in", layout.p_in, 1), ("shift", layout.shift, 0), ("hadamard", layout.hadamard, False))
    return {name: value for name, value, usual in options if value != usual}
