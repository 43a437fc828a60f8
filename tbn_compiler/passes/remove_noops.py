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

import torch
import torch.nn.functional as F
from torch import fx, nn

from tbn_compiler.graph.layer_graph import TrainingFlag
from tbn_compiler.passes.base import GraphPass, has_hooks
from tbn_compiler.passes.deployment import remove_unused
from tbn_compiler.torch_private import differentiated

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
    **{
        function: (2, "train", None)
        for kind in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
        for name in (kind, f"{kind}_")  # which writes into its input: nothing, if it is off
        for function in (getattr(torch, name), getattr(_aten, name).default)
    },
}
_DETACH = (torch.detach, _aten.detach.default)


class RemoveNoOps(GraphPass):
    """Fold the training flags to ``False``, then remove dropout, identities and ``detach``."""

    def run(self, gm: fx.GraphModule) -> bool:
        """Match and rewrite; whatever does not match is left alone."""
        removed = [node for node in gm.graph.nodes if _fold_flag(gm, node)]
        inside = differentiated(gm.graph)
        for node in gm.graph.nodes:
            if _is_noop(gm, node) or (_is_detach(node) and not gm.training and node not in inside):
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
    return False


def _is_detach(node: fx.Node) -> bool:
    if not isinstance(_input(node), fx.Node):
        return False
    return node.target == "detach" if node.op == "call_method" else node.target in _DETACH


def _input(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")
