"""Call ``nn.MultiheadAttention`` as a function of its weights, so that they can be tiled like those of linears.

Before::

    out, weights = attn(query, key, value, ...)            # one nn.MultiheadAttention

After::

    wq, wk, wv = chunk(attn.in_proj_weight, 3)             # or attn.q_proj_weight, attn.k_proj_weight, ...
    out, weights = attention_layer(query, key, value, wq, wk, wv, attn.in_proj_bias, attn.out_proj.weight, ...)

:func:`~tbn_compiler.graph.attention.attention_layer` computes what PyTorch's general path does, with the same results
and gradients, bit for bit: ``cat(chunk(W)) = W``. The parameters stay where they are, under their own names; in the
module tree a plain holder takes the attention's place. Dropout follows ``train()`` and ``eval()``. PyTorch's fused
inference kernels (the "fast path") round differently, take nested tensors, which are refused here, and may zero padded
positions in an ``nn.TransformerEncoder``.

Left alone, see :func:`why_not_decomposed`: a subclass with a ``forward`` of its own, parametrized weights, and, in a
graph, an attention with hooks or one that also belongs to a module that the graph calls as a whole.

In a model, as in the layers of ``nn.Transformer``, the attention is called as a submodule. There the graph module that
:func:`attention_module` builds takes its place; :func:`disable_fast_paths` has them call it always. For inference
:mod:`~tbn_compiler.passes.decompose_attention` takes the function apart.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils import parametrize

from tbn_compiler.errors import TransformError
from tbn_compiler.graph.attention import attention_layer
from tbn_compiler.graph.copying import share_tensors_copy
from tbn_compiler.graph.layer_graph import TRAINING_FLAG, TrainingFlag, adopt, layer_graph_class
from tbn_compiler.graph.records import join_key
from tbn_compiler.passes.base import GraphPass, copy_meta, has_hooks

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


class ExposeAttention(GraphPass):
    """Rewrite every call of an ``nn.MultiheadAttention`` to one of ``attention_layer``."""

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        calls = [node for node in gm.graph.nodes if node.op == "call_module"]
        called = [gm.get_submodule(str(node.target)) for node in calls]
        inside = {part for module in called for part in module.modules() if part is not module}
        work = [
            (node, module)
            for node, module in zip(calls, called, strict=True)
            if isinstance(module, nn.MultiheadAttention)
            and not (why_not_decomposed(module) or has_hooks(module))  # hooks are not called by its parts
            and module not in inside
        ]
        for module in dict.fromkeys(module for _, module in work):
            _replace(gm, module, AttentionWeights(module))
        for node, module in work:
            _rewrite(gm.graph, node, module)
        return bool(work)


class AttentionWeights(nn.Module):
    """Holds the tensors of an attention under their own names; it has no ``forward`` of its own."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        _take_tensors(self, attention)
        _add_training_flag(self, attention)
        self.description = f"embed_dim={attention.embed_dim}, num_heads={attention.num_heads}"

    def extra_repr(self) -> str:
        """Size of the attention."""
        return self.description


def _take_tensors(target: nn.Module, source: nn.Module) -> None:
    """Give ``target`` the parameters, buffers, submodules and mode of ``source``."""
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        setattr(target, name, getattr(source, name).copy())
    target.training = source.training


def _add_training_flag(target: nn.Module, attention: nn.MultiheadAttention) -> None:
    """Let the function of an attention that has dropout know its mode."""
    if attention.dropout > 0:
        target.add_module(TRAINING_FLAG, TrainingFlag().train(attention.training))


def why_not_decomposed(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention has to stay as it is, and its weights in float, or ``None``."""
    if parametrize.is_parametrized(attention):
        return "its weights are computed by a parametrization"
    if type(attention).forward is not nn.MultiheadAttention.forward or "forward" in vars(attention):
        return "it has a forward of its own"
    if isinstance(attention, fx.GraphModule):
        return "it is a graph already"
    return None


def attention_module(attention: nn.MultiheadAttention) -> Any:
    """Build a graph module to use in the place of an attention.

    It is a :class:`~tbn_compiler.graph.layer_graph.LayerGraph` with the ``forward`` signature, tensors (shared),
    ``state_dict`` keys, hooks and attributes of ``attention``, save that ``_qkv_same_embed_dim`` is false:
    ``nn.TransformerEncoderLayer`` then calls it in evaluation mode too, where it would otherwise read the weights
    itself (see also :func:`disable_fast_paths`).

    Raises:
        TransformError: the attention has to stay as it is (see :func:`why_not_decomposed`).
    """
    reason = why_not_decomposed(attention)
    if reason is not None:
        raise TransformError(f"cannot decompose {type(attention).__name__}: {reason}")
    graph = fx.Graph()
    arguments = {
        name: graph.placeholder(name, default_value=parameter.default)
        for name, parameter in _SIGNATURE.parameters.items()
        if name != "self"
    }
    graph.output(_emit(graph, attention, "", arguments))
    source = share_tensors_copy(attention)
    _add_training_flag(source, attention)
    gm = adopt(source, graph, layer_graph_class(type(attention)))
    gm._qkv_same_embed_dim = False
    return gm


def disable_fast_paths(model: nn.Module) -> None:
    """Make the transformer layers of PyTorch call their submodules in evaluation mode too, in place.

    ``nn.TransformerEncoderLayer`` otherwise hands the float weights of its attention and its linears to one fused
    kernel, and ``nn.TransformerEncoder`` turns padded batches into nested tensors for it. Each asks these attributes,
    which it uses for nothing else.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _replace(model: nn.Module, module: nn.Module, replacement: nn.Module) -> None:
    """Put ``replacement`` in every place of the tree where ``module`` is registered."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is module:
                parent._modules[name] = replacement


def _rewrite(graph: fx.Graph, node: fx.Node, attention: nn.MultiheadAttention) -> None:
    """Replace one call by one of the function."""
    bound = _SIGNATURE.bind(attention, *node.args, **node.kwargs)
    bound.apply_defaults()
    before = set(graph.nodes)
    with graph.inserting_before(node):
        result = _emit(graph, attention, str(node.target), bound.arguments)
    copy_meta(node, *(new for new in graph.nodes if new not in before))
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _emit(graph: fx.Graph, attention: nn.MultiheadAttention, path: str, arguments: Mapping[str, Any]) -> fx.Node:
    """Append the function on given arguments of ``forward``; return its node.

    ``graph`` finds the tensors of ``attention``, and its training flag if it has dropout, under ``path``.
    """

    def tensor(name: str) -> fx.Node | None:
        return None if operator.attrgetter(name)(attention) is None else graph.get_attr(join_key(path, name))

    packed = attention.in_proj_weight is not None
    if packed:
        parts = graph.call_function(torch.chunk, (tensor("in_proj_weight"), 3))
        weights: list[Any] = [graph.call_function(operator.getitem, (parts, i)) for i in range(3)]
    else:
        weights = [tensor(f"{x}_proj_weight") for x in "qkv"]
    inputs = (arguments[name] for name in ("query", "key", "value"))
    tensors = (tensor(name) for name in ("in_proj_bias", "out_proj.weight", "out_proj.bias"))
    options = {
        "num_heads": attention.num_heads,
        "batch_first": attention.batch_first,
        "packed": packed,
        "bias_k": tensor("bias_k"),
        "bias_v": tensor("bias_v"),
        "add_zero_attn": attention.add_zero_attn,
        "dropout_p": attention.dropout,
        "training": graph.call_module(join_key(path, TRAINING_FLAG)) if attention.dropout > 0 else False,
    }
    for name in ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"):
        options[name] = arguments[name]
    return graph.call_function(attention_layer, (*inputs, *weights, *tensors), options)
