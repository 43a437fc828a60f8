"""Remove what does nothing in evaluation mode.

Before::

    flag = tbn_training_flag()                      # tracing.TrainingFlag, False in evaluation mode
    y = F.dropout(x, 0.5, training=flag)
    z = identity(y).detach()

After::

    z = x

Removed: ``nn.Identity``; dropout of every kind that is off; ``detach`` (nothing is differentiated through a module
for deployment). The training flags that tracing put into the graph become the constant ``False``, and
``value_in_training`` of them 0.

Left alone: dropout that is on (``training=True`` in the call, or a module that was left in training mode), modules
with hooks, and everything that PyTorch removes itself: dead code and constant subgraphs. PyTorch's own
``torch.fx.experimental.optimization.remove_dropout`` traces the model anew (and so loses the layer records), knows
``nn.Dropout`` only, and removes it in any mode.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tbn_compiler.graph.tracing import TrainingFlag, value_in_training
from tbn_compiler.passes.base import GraphPass, has_hooks
from tbn_compiler.passes.deployment import remove_unused

_aten = torch.ops.aten

_DROPOUT_MODULES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
# Whether the dropout is on: position and name of that argument, and its default (None: it must be given).
_DROPOUT_FUNCTIONS: dict[Any, tuple[int, str, bool | None]] = {
    F.dropout: (2, "training", True),
    F.dropout1d: (2, "training", True),
    F.dropout2d: (2, "training", True),
    F.dropout3d: (2, "training", True),
    F.alpha_dropout: (2, "training", False),
    F.feature_alpha_dropout: (2, "training", False),
    torch.dropout: (2, "train", None),
    _aten.dropout.default: (2, "train", None),
}
_DETACH = (torch.detach, _aten.detach.default)


class RemoveNoOps(GraphPass):
    """Fold the training flags to ``False``, then remove dropout, identities and ``detach``."""

    def run(self, gm: fx.GraphModule) -> bool:
        """Match and rewrite; whatever does not match is left alone."""
        removed = [node for node in gm.graph.nodes if _fold_flag(gm, node)]
        for node in gm.graph.nodes:
            if _is_noop(gm, node):
                node.replace_all_uses_with(_input(node))
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
    # The flag stands before its users, so it is a constant by now.
    if node.op == "call_function" and node.target is value_in_training and node.args[0] is False:
        _replace_by_constant(node, 0.0)
        return True
    return False


def _replace_by_constant(node: fx.Node, value: Any) -> None:
    for user in list(node.users):
        user.args = fx.map_arg(user.args, lambda argument: value if argument is node else argument)
        user.kwargs = fx.map_arg(user.kwargs, lambda argument: value if argument is node else argument)


def _is_noop(gm: fx.GraphModule, node: fx.Node) -> bool:
    if not isinstance(_input(node), fx.Node):
        return False
    if node.op == "call_module":
        module = gm.get_submodule(str(node.target))
        off = type(module) in _DROPOUT_MODULES and not module.training
        return (off or type(module) is nn.Identity) and not has_hooks(module)
    if node.op == "call_function" and node.target in _DROPOUT_FUNCTIONS:
        position, name, default = _DROPOUT_FUNCTIONS[node.target]
        on = node.args[position] if len(node.args) > position else node.kwargs.get(name, default)
        return on is False
    detach = node.target == "detach" if node.op == "call_method" else node.target in _DETACH
    return detach and not gm.training


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")
