"""Take ``attention_layer`` apart into linears around a scaled-dot-product attention.

Before::

    out, weights = attention_layer(query, key, value, wq, wk, wv, in_proj_bias, wo, bo, num_heads, ...)

After::

    bq, bk, bv = chunk(in_proj_bias, 3)
    q, k, v = linear(query, wq, bq), linear(key, wk, bk), linear(value, wv, bv)
    context, weights = attention_core(q, k, v, num_heads, ...)
    out = linear(context, wo, bo)

The projections act on the last dimension only, so they commute with the transposes of ``batch_first`` and with the
batch dimension of an unbatched input: all layouts are dealt with in
:func:`~tbn_compiler.graph.attention.attention_core`, and so are ``bias_k`` and ``bias_v``, which join the sequence
behind the projections.

Results are equal up to rounding, so this is for inference, where each linear is lowered, and for attentions that train
on weights whose rows repeat. Nothing else is left alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from tbn_compiler.graph.attention import attention_core, attention_layer
from tbn_compiler.graph.layers import function_arguments
from tbn_compiler.passes.base import GraphPass, copy_meta
from tbn_compiler.passes.facts import Fact


class DecomposeAttention(GraphPass):
    """Rewrite calls of ``attention_layer`` to linears and ``attention_core``.

    Args:
        where: which calls; default: all.
    """

    def __init__(self, where: Callable[[fx.GraphModule, fx.Node], bool] | None = None) -> None:
        self.where = where
        if where is None:
            self.establishes = (Fact.DECOMPOSED,)

    def run(self, gm: fx.GraphModule) -> bool:
        """Match and rewrite."""
        nodes = gm.graph.find_nodes(op="call_function", target=attention_layer)
        nodes = [node for node in nodes if self.where is None or self.where(gm, node)]
        for node in nodes:
            _decompose(gm.graph, node)
        return bool(nodes)


def _decompose(graph: fx.Graph, node: fx.Node) -> None:
    before = set(graph.nodes)
    with graph.inserting_before(node):
        results = _emit(graph, node)
    copy_meta(node, *(new for new in graph.nodes if new not in before))
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], int):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        else:
            user.args = fx.node.map_aggregate(user.args, lambda value: results if value is node else value)
            user.kwargs = fx.node.map_aggregate(user.kwargs, lambda value: results if value is node else value)
    graph.erase_node(node)


def _emit(graph: fx.Graph, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Append the linears and the core; return the nodes of output and attention weights."""
    arguments = function_arguments(node)
    biases: list[Any] = [None, None, None]
    if arguments["in_proj_bias"] is not None:
        parts = graph.call_function(torch.chunk, (arguments["in_proj_bias"], 3))
        biases = [graph.call_function(operator.getitem, (parts, i)) for i in range(3)]
    operands = zip(("query", "key", "value"), ("q_weight", "k_weight", "v_weight"), biases, strict=True)
    projected = [graph.call_function(F.linear, (arguments[x], arguments[w], bias)) for x, w, bias in operands]
    options = {name: value for name, value in node.kwargs.items() if name != "packed"}
    core = graph.call_function(attention_core, tuple(projected), options)
    context, scores = (graph.call_function(operator.getitem, (core, i)) for i in range(2))
    out = graph.call_function(F.linear, (context, arguments["out_weight"], arguments["out_bias"]))
    return out, scores
