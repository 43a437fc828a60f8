"""The contract of a pass: rewrite a graph in place, say truthfully whether anything changed."""

from __future__ import annotations

import copy
from abc import abstractmethod
from typing import Any

from torch import fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from tbn_compiler.errors import TBNError
from tbn_compiler.tiling import TileLayout


class GraphPass(PassBase):
    """Base of every pass.

    A subclass implements :meth:`run`; this class then removes dead nodes, checks the graph and recompiles it, so
    that a pass cannot forget to. A pass that is run a second time on its own result reports ``modified=False``.
    """

    @abstractmethod
    def run(self, gm: fx.GraphModule) -> bool:
        """Rewrite ``gm.graph`` and the module tree in place; return whether anything changed."""

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Run the pass and leave a clean, checked, recompiled graph."""
        modified = self.run(graph_module)
        if modified:
            remove_dead_nodes(graph_module.graph)
            try:
                graph_module.graph.lint()
            except RuntimeError as error:
                raise TBNError(f"pass {type(self).__name__} left a malformed graph: {error}") from error
            graph_module.recompile()
        return PassResult(graph_module, modified)


def remove_dead_nodes(graph: fx.Graph) -> bool:
    """Remove the nodes that nothing reads; return whether there were any.

    Writes into a tensor stay, and modules with buffers, which they may update: torch.fx counts neither as an effect.
    """
    return graph.eliminate_dead_code(_has_effect)


def _has_effect(node: fx.Node) -> bool:
    if node.is_impure():
        return True
    if node.op == "call_module":
        root = node.graph.owning_module
        return root is None or any(True for _ in root.get_submodule(str(node.target)).buffers())
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place = name.endswith("_") and not name.endswith("__")
    return node.op in ("call_method", "call_function") and (in_place or name == "setitem" or "out" in node.kwargs)


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module runs more than its ``forward``, which a call of its parts would skip."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, name, None) for name in hooks)


def run_passes(gm: fx.GraphModule, passes: list[GraphPass]) -> fx.GraphModule:
    """Run a pipeline in order on ``gm``, in place, and return it."""
    for graph_pass in passes:
        graph_pass(gm)
    return gm


def copy_meta(source: fx.Node, *targets: fx.Node) -> None:
    """Give new nodes the metadata (module stack, stack trace) of the node that they replace."""
    for target in targets:
        target.meta = copy.copy(source.meta)


def normalize_sizes(value: Any, dims: int) -> tuple[int, ...]:
    """A size option of a convolution as one integer per spatial dimension."""
    return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)


def layout_options(layout: TileLayout) -> dict[str, Any]:
    """The operator options that a layout needs beyond ``p``; none for the paper's."""
    return {
        name: value for name, value, usual in (("p_in", layout.p_in, 1), ("shift", layout.shift, 0)) if value != usual
    }
