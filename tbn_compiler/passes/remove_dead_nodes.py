"""Remove what a graph computes and nothing reads.

Before, where code reads no more than the dtype of a layer's weight::

    w = tbn.unpack(tile, alpha, [m, n], p)
    y = tbn.linear(x, tile, alpha, bias, n, m, p)

After::

    y = tbn.linear(x, tile, alpha, bias, n, m, p)

The other passes then find no readers that read nothing. Left alone: what does more than compute, as
:func:`~tbn_compiler.passes.base.remove_dead_nodes` says.
"""

from __future__ import annotations

from torch import fx

from tbn_compiler.passes.base import GraphPass, remove_dead_nodes


class RemoveDeadNodes(GraphPass):
    """Remove the nodes that nothing reads."""

    def run(self, gm: fx.GraphModule) -> bool:
        """Remove them."""
        return remove_dead_nodes(gm.graph)
