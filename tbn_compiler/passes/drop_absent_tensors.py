"""Let a graph not read a parameter or buffer that a user has set to ``None`` since it was traced, such as a bias.

Before, ``fc.bias`` being ``None``::

    b = fc.bias
    y = linear(x, w, b)

After::

    y = linear(x, w, None)

The graph then computes what the module would if it were traced again. Left alone: every tensor that is there, and a
name that the module does not have at all, which is an error of the graph and not a wish of the user.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from tbn_compiler.graph.records import split_key
from tbn_compiler.passes.base import GraphPass


class DropAbsentTensors(GraphPass):
    """Put ``None`` in place of the tensors that are ``None``."""

    def run(self, gm: fx.GraphModule) -> bool:
        """Match and rewrite."""
        absent = [node for node in gm.graph.find_nodes(op="get_attr") if _is_absent(gm, node)]
        for node in absent:
            for user in list(node.users):
                user.args, user.kwargs = (_without(arguments, node) for arguments in (user.args, user.kwargs))
            gm.graph.erase_node(node)
        return bool(absent)


def _is_absent(gm: fx.GraphModule, node: fx.Node) -> bool:
    path, name = split_key(str(node.target))
    owner = gm.get_submodule(path)
    return any(name in tensors and tensors[name] is None for tensors in (owner._parameters, owner._buffers))


def _without(arguments: Any, node: fx.Node) -> Any:
    return fx.node.map_aggregate(arguments, lambda value: None if value is node else value)
