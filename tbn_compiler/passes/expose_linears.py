"""Write matrix products with a parameter as the linear layers that they are.

Before -> after, for a parameter ``W [in, out]`` (or a view of one)::

    addmm(b, x, W)              ->  linear(x, W.t(), b)        # x [n, in]
    mm(x, W), matmul(x, W), x @ W  ->  linear(x, W.t())        # x [..., in]

``linear(x, V, b) = x V^T + b`` with ``V = W^T``, so the results are equal. This is how Hugging Face's ``Conv1D``
stores its weight, and what ``torch.export`` decomposes a linear layer to.

Left alone: products whose right operand is computed or not a matrix, and ``addmm`` with ``alpha`` or ``beta``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tbn_compiler.graph.layers import apply_view, parameter_view, split_key
from tbn_compiler.passes.base import GraphPass, copy_meta

_aten = torch.ops.aten
_PRODUCTS = (
    torch.mm,
    torch.matmul,
    operator.matmul,
    _aten.mm.default,
    _aten.matmul.default,
)
_ADDED_PRODUCTS = (torch.addmm, _aten.addmm.default)


class ExposeLinears(GraphPass):
    """Turn products with a parameter matrix into calls of ``linear``."""

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        modified = False
        for node in list(gm.graph.nodes):
            operands = _match(node)
            if operands is None or not _is_parameter_matrix(gm, operands[1]):
                continue
            x, weight, bias = operands
            with gm.graph.inserting_before(node):
                transposed = gm.graph.call_function(torch.t, (weight,))
                new = gm.graph.call_function(F.linear, (x, transposed, bias))
            copy_meta(node, transposed, new)
            node.replace_all_uses_with(new)
            gm.graph.erase_node(node)
            modified = True
        return modified


def _match(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Input, weight and bias of a product, or ``None``."""
    if node.kwargs:
        return None
    if node.op == "call_function" and node.target in _ADDED_PRODUCTS and len(node.args) == 3:
        bias, x, weight = node.args
        return x, weight, bias
    is_product = node.op == "call_function" and node.target in _PRODUCTS
    is_method = node.op == "call_method" and node.target in ("mm", "matmul")
    if (is_product or is_method) and len(node.args) == 2:
        return node.args[0], node.args[1], None
    return None


def _is_parameter_matrix(gm: fx.GraphModule, weight: Any) -> bool:
    found = parameter_view(weight)
    if found is None:
        return False
    path, name = split_key(str(found[0].target))
    parameter = gm.get_submodule(path)._parameters.get(name)
    return isinstance(parameter, Tensor) and apply_view(parameter, found[1]).dim() == 2
