"""Remove what does nothing in evaluation mode.

Before::

    flag = tbn_training_flag()                      # TrainingFlag, False in evaluation mode
    y = F.dropout(x, 0.5, training=flag)
    z = identity(y).detach()

After::

    z = x

Removed: ``nn.Identity``; dropout of every kind that is off; ``detach`` (nothing is differentiated through a module
for deployment). The training flag of a decomposed attention becomes the constant ``False``.

Left alone: ``detach`` inside ``torch.func.grad`` and its like; dropout that is on (``training=True`` in the call, or a
module that was left in training mode), modules with hooks, and everything that PyTorch removes itself: dead code and
constant subgraphs. PyTorch's own ``torch.fx.experimental.optimization.remove_dropout`` traces the model anew (and so
loses the layer records), knows ``nn.Dropout`` only, and removes it in any mode.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tbn_compiler.graph.layer_graph import TrainingFlag
from tbn_compiler.graph.operations import BoundCall, bind
from tbn_compiler.passes.base import GraphPass, has_hooks
from tbn_compiler.passes.deployment import remove_unused
from tbn_compiler.torch_private import differentiated

_DROPOUTS = frozenset(
    {"dropout", "alpha_dropout", "feature_alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d"}
)


class RemoveNoOps(GraphPass):
    """Fold the training flags to ``False``, then remove dropout, identities and ``detach``."""

    def run(self, gm: fx.GraphModule) -> bool:
        """Match and rewrite; whatever does not match is left alone."""
        removed = [node for node in gm.graph.nodes if _fold_flag(gm, node)]
        inside = differentiated(gm.graph)
        for node in gm.graph.nodes:
            call = bind(node, gm)
            if call is None or not isinstance(call.input, fx.Node):
                continue
            if _is_noop(call) or (call.name == "detach" and not gm.training and node not in inside):
                node.replace_all_uses_with(call.input)
                removed.append(node)
        for node in removed:
            gm.graph.erase_node(node)
        remove_unused(gm, [node for node in removed if node.op == "call_module"])
        return bool(removed)


def _fold_flag(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Put a constant in the place of a training flag, or of a value that depends on one; whether there was one."""
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        if isinstance(module, TrainingFlag) and not module.training:
            _replace_by_constant(node, False)
            return True
    return False


def _replace_by_constant(node: fx.Node, value: Any) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda argument: value if argument is node else argument)
        user.kwargs = fx.map_arg(user.kwargs, lambda argument: value if argument is node else argument)


def _is_noop(call: BoundCall) -> bool:
    off = call.name in _DROPOUTS and call.arguments["training"] is False
    return (off or call.name == "identity") and (call.module is None or not has_hooks(call.module))
