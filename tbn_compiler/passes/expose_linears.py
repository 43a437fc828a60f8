"""Write matrix products with a parameter as the linear layers that they are.

Before -> after, for a parameter ``W [in, out]`` (or a view of one)::

    addmm(b, x, W)                 ->  linear(x, W.t(), b)     # x [n, in], b [out]
    addmm(y, x, W)                 ->  linear(x, W.t()) + y    # any other y
    mm(x, W), matmul(x, W), x @ W  ->  linear(x, W.t())        # x [..., in]
    linear(x, V.t().t(), b)        ->  linear(x, V, b)

``linear(x, V, b) = x V^T + b`` with ``V = W^T``, so the results are equal. This is how Hugging Face's ``Conv1D``
stores its weight, and what ``torch.export`` decomposes a linear layer to.

A weight that a module reads tiled or decoded counts as a parameter; ``W`` is then mostly the transpose of ``V`` itself,
in any of the ways to write it.

Left alone: products whose right operand is otherwise computed or no matrix, and ``addmm`` with ``alpha`` or ``beta``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from tbn_compiler.graph.calls import attribute, named_arguments
from tbn_compiler.graph.layers import apply_view, is_view, weight_chain
from tbn_compiler.graph.operations import bind
from tbn_compiler.graph.records import split_key
from tbn_compiler.passes.base import GraphPass, copy_meta


class ExposeLinears(GraphPass):
    """Turn products with a parameter matrix into calls of ``linear``."""

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        modified = False
        for node in list(gm.graph.nodes):
            modified |= _remove_transposes(gm, node)
            operands = _match(node)
            if operands is None:
                continue
            matrix, transposed = _untransposed(operands[1])
            if _is_parameter_matrix(gm, matrix):
                _rewrite(gm, node, operands, matrix, transposed)
                modified = True
        return modified


def _remove_transposes(gm: fx.GraphModule, node: fx.Node) -> bool:
    """Let a linear layer read a matrix itself instead of the transpose of its transpose."""
    call = bind(node)
    weight = call.arguments["weight"] if call is not None and call.name == "linear" else None
    matrix, transposed = _untransposed(weight)
    if not isinstance(weight, fx.Node) or matrix is weight or transposed or not _is_parameter_matrix(gm, matrix):
        return False
    node.replace_input_with(weight, matrix)
    return True


def _rewrite(gm: fx.GraphModule, node: fx.Node, operands: tuple[Any, Any, Any], matrix: fx.Node, flip: bool) -> None:
    """Replace a product by a linear layer on ``matrix``, or on its transpose if the product reads it as it is."""
    x, _, added = operands
    vector = attribute(gm, added)
    bias = added if vector is not None and vector.dim() == 1 and vector.numel() > 1 else None
    with gm.graph.inserting_before(node):
        weight = matrix if flip else gm.graph.call_function(torch.t, (matrix,))
        new = gm.graph.call_function(F.linear, (x, weight, bias))
        copy_meta(node, new)
        if added is not bias:
            new = gm.graph.call_function(torch.add, (new, added))
            copy_meta(node, new)
    node.replace_all_uses_with(new)
    gm.graph.erase_node(node)


def _match(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """Input, weight and bias of a product, or ``None``."""
    call = bind(node)
    if call is None:
        return None
    if call.name in ("mm", "matmul"):
        x, weight = call.arguments.values()
        return x, weight, None
    if call.name == "addmm" and call.arguments["alpha"] == call.arguments["beta"] == 1:
        return call.arguments["mat1"], call.arguments["mat2"], call.input
    return None


def _untransposed(node: Any) -> tuple[Any, bool]:
    """The matrix behind any transposes of it, and whether ``node`` is its transpose."""
    flip = False
    while isinstance(node, fx.Node) and _is_transpose(node):
        node, flip = node.args[0], not flip
    return node, flip


def _is_transpose(node: fx.Node) -> bool:
    """Whether a node takes the transpose of a matrix: told by what it does to one."""
    if not is_view(node):
        return False
    try:
        view: Any = apply_view(torch.empty(2, 3, device="meta"), (node,))
    except (RuntimeError, IndexError, ValueError, TypeError):  # no view of a matrix, or of another size
        return False
    return isinstance(view, Tensor) and view.shape == (3, 2) and view.stride() == (1, 3)


def _is_parameter_matrix(gm: fx.GraphModule, matrix: Any) -> bool:
    """Whether an operand is a matrix of trained values: a parameter or its view, a tiled weight or a decoded one."""
    view: list[fx.Node] = []
    source = matrix
    while isinstance(source, fx.Node) and is_view(source):
        view.append(source)
        source = source.args[0]
    if not isinstance(source, fx.Node):
        return False
    if source.target in (torch.ops.tbn.unpack.default, torch.ops.tbn.train_weight.default):
        return not view and len(named_arguments(source)["shape"]) == 2
    chain = weight_chain(source)
    if chain is not None:
        return not view and _is_parameter_matrix(gm, chain[0].args[0])
    if source.op != "get_attr":
        return False
    path, name = split_key(str(source.target))
    parameter = gm.get_submodule(path)._parameters.get(name)
    return isinstance(parameter, Tensor) and apply_view(parameter, reversed(view)).dim() == 2
