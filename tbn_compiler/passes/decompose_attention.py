"""Decompose ``nn.MultiheadAttention`` into linears around a scaled-dot-product attention.

Before::

    out, weights = attn(query, key, value, ...)            # one nn.MultiheadAttention

After::

    wq, wk, wv = chunk(attn.in_proj_weight, 3)             # or attn.q_proj_weight, attn.k_proj_weight, ...
    bq, bk, bv = chunk(attn.in_proj_bias, 3)
    q, k, v = linear(query, wq, bq), linear(key, wk, bk), linear(value, wv, bv)
    context, weights = attention_core(q, k, v, num_heads, ...)
    out = linear(context, attn.out_proj.weight, attn.out_proj.bias)

The projections act on the last dimension only, so they commute with the transposes of ``batch_first`` and with the
batch dimension of an unbatched input: all layouts are dealt with in :func:`attention_core`, and so are ``bias_k`` and
``bias_v``, which join the sequence behind the projections. The parameters stay where they are, under their own names;
in the module tree a plain holder takes the attention's place. Dropout follows ``train()`` and ``eval()``.

Results are those of PyTorch's general path in both modes. Its fused inference kernels (the "fast path") agree with it
except on nested tensors, which are refused here, and at padded positions, which an ``nn.TransformerEncoder`` may zero.

Left alone, see :func:`why_not_decomposed`: a subclass with a ``forward`` of its own, modules with hooks,
parametrized weights, and an attention that also belongs to a module that the graph calls as a whole.

Modules that cannot be traced, such as the layers of ``nn.Transformer``, call their attention as a submodule. There the
graph module that :func:`attention_module` builds takes its place; :func:`disable_fast_paths` has them call it always.
"""

from __future__ import annotations

import copy
import inspect
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.overrides import handle_torch_function, has_torch_function

from tbn_compiler.errors import TransformError
from tbn_compiler.graph.layers import join_key
from tbn_compiler.graph.tracing import TRAINING_FLAG, TrainingFlag, share_tensors_copy
from tbn_compiler.passes.base import GraphPass, copy_meta, has_hooks

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


class DecomposeAttention(GraphPass):
    """Rewrite every call of an ``nn.MultiheadAttention`` to linears and :func:`attention_core`."""

    def run(self, gm: fx.GraphModule) -> bool:
        """Match, check, rewrite."""
        calls = [node for node in gm.graph.nodes if node.op == "call_module"]
        called = [gm.get_submodule(str(node.target)) for node in calls]
        inside = {part for module in called for part in module.modules() if part is not module}
        work = [
            (node, module)
            for node, module in zip(calls, called, strict=True)
            if isinstance(module, nn.MultiheadAttention) and not why_not_decomposed(module) and module not in inside
        ]
        for module in dict.fromkeys(module for _, module in work):
            _replace(gm, module, AttentionWeights(module))
        for node, module in work:
            _rewrite(gm.graph, node, module)
        return bool(work)


class AttentionWeights(nn.Module):
    """Holds the tensors of a decomposed attention under their own names; it has no ``forward`` of its own."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        _take_tensors(self, attention)
        _add_training_flag(self, attention)
        self.description = f"embed_dim={attention.embed_dim}, num_heads={attention.num_heads}"

    def extra_repr(self) -> str:
        """Size of the attention."""
        return self.description


class AttentionModule(fx.GraphModule):
    """The graph module of one attention. Unlike those of its base, its copies keep plain attributes."""

    _qkv_same_embed_dim: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> AttentionModule:
        """Copy graph and tensors as a graph module does, and the attributes that it would drop."""
        result: Any = super().__deepcopy__(memo)
        _register_absent(result, self._absent())
        result._non_persistent_buffers_set = set(self._non_persistent_buffers_set)
        for name, value in vars(self).items():
            if name not in vars(result):
                vars(result)[name] = copy.deepcopy(value, memo)
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a graph module does; :func:`_restore` gives the class back."""
        return _restore, (*super().__reduce__(), self._absent())

    def _absent(self) -> list[str]:
        return [name for name, parameter in self._parameters.items() if parameter is None]


def _restore(rebuild: Any, arguments: tuple[Any, ...], absent: list[str]) -> AttentionModule:
    plain = rebuild(*arguments)
    _register_absent(plain, absent)
    return _adopt(plain, plain.graph)


def _register_absent(module: nn.Module, names: list[str]) -> None:
    """Register parameters that are ``None``, such as an absent bias: callers ask for them, graph modules drop them."""
    for name in names:
        module.register_parameter(name, None)


def _adopt(source: nn.Module, graph: fx.Graph) -> AttentionModule:
    """A graph module with the tensors, submodules, attributes and mode of ``source``."""
    gm = AttentionModule(source, graph, "AttentionModule")
    _take_tensors(gm, source)
    for name, value in vars(source).items():
        vars(gm).setdefault(name, value)
    return gm


def _take_tensors(target: nn.Module, source: nn.Module) -> None:
    """Give ``target`` the parameters, buffers, submodules and mode of ``source``."""
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        setattr(target, name, getattr(source, name).copy())
    target.training = source.training


def _add_training_flag(target: nn.Module, attention: nn.MultiheadAttention) -> None:
    """Let the decomposed form of an attention that has dropout know its mode."""
    if attention.dropout > 0:
        target.add_module(TRAINING_FLAG, TrainingFlag().train(attention.training))


def why_not_decomposed(attention: nn.MultiheadAttention) -> str | None:
    """Why an attention has to stay as it is, or ``None``."""
    if parametrize.is_parametrized(attention):
        return "its weights are computed by a parametrization"
    if type(attention).forward is not nn.MultiheadAttention.forward or "forward" in vars(attention):
        return "it has a forward of its own"
    if has_hooks(attention):
        return "it has hooks, which its parts would not call"
    return None


def attention_module(attention: nn.MultiheadAttention) -> AttentionModule:
    """Build the decomposed form of an attention as a graph module to use in its place.

    It has the ``forward`` signature, tensors (shared), ``state_dict`` keys and attributes of ``attention``, save that
    ``_qkv_same_embed_dim`` is false: ``nn.TransformerEncoderLayer`` then calls it in evaluation mode too, where it
    would otherwise read the weights itself (see also :func:`disable_fast_paths`).

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
    gm = _adopt(source, graph)
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
    """Replace one call by its decomposed form."""
    bound = _SIGNATURE.bind(attention, *node.args, **node.kwargs)
    bound.apply_defaults()
    before = set(graph.nodes)
    with graph.inserting_before(node):
        results = _emit(graph, attention, str(node.target), bound.arguments)
    copy_meta(node, *(new for new in graph.nodes if new not in before))
    for user in list(node.users):
        if user.target is operator.getitem and isinstance(user.args[1], int):
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        else:
            user.args = fx.node.map_aggregate(user.args, lambda value: results if value is node else value)
            user.kwargs = fx.node.map_aggregate(user.kwargs, lambda value: results if value is node else value)
    graph.erase_node(node)


def _emit(
    graph: fx.Graph, attention: nn.MultiheadAttention, path: str, arguments: dict[str, Any]
) -> tuple[fx.Node, fx.Node]:
    """Append the decomposed form on given arguments of ``forward``; return the nodes of output and weights.

    ``graph`` finds the tensors of ``attention``, and its training flag if it has dropout, under ``path``.
    """

    def tensor(name: str) -> fx.Node | None:
        return None if operator.attrgetter(name)(attention) is None else graph.get_attr(join_key(path, name))

    def thirds(name: str) -> list[fx.Node | None]:
        whole = tensor(name)
        if whole is None:
            return [None, None, None]
        parts = graph.call_function(torch.chunk, (whole, 3))
        return [graph.call_function(operator.getitem, (parts, i)) for i in range(3)]

    packed = attention.in_proj_weight is not None
    weights = thirds("in_proj_weight") if packed else [tensor(f"{x}_proj_weight") for x in "qkv"]
    inputs = [arguments[name] for name in ("query", "key", "value")]
    projected = [
        graph.call_function(F.linear, operands)
        for operands in zip(inputs, weights, thirds("in_proj_bias"), strict=True)
    ]
    options = {
        "bias_k": tensor("bias_k"),
        "bias_v": tensor("bias_v"),
        "batch_first": attention.batch_first,
        "add_zero_attn": attention.add_zero_attn,
        "dropout_p": attention.dropout,
        "training": graph.call_module(join_key(path, TRAINING_FLAG)) if attention.dropout > 0 else False,
    }
    for name in ("key_padding_mask", "need_weights", "attn_mask", "average_attn_weights", "is_causal"):
        options[name] = arguments[name]
    core = graph.call_function(attention_core, (*projected, attention.num_heads), options)
    context, scores = (graph.call_function(operator.getitem, (core, i)) for i in range(2))
    out = graph.call_function(F.linear, (context, tensor("out_proj.weight"), tensor("out_proj.bias")))
    return out, scores


def attention_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_heads: int,
    *,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    bias_k: Tensor | None = None,
    bias_v: Tensor | None = None,
    batch_first: bool = False,
    add_zero_attn: bool = False,
    dropout_p: float = 0.0,
    training: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What ``nn.MultiheadAttention`` computes between its input and output projections.

    The options are those of the module and of its ``forward``, with the same meaning. Symbolic tracing sees one node.

    Args:
        q: projected query ``[L, N, E]``, ``[N, L, E]`` if ``batch_first``, or unbatched ``[L, E]``.
        k: projected key, the same with length ``S``.
        v: projected value, of the shape of ``k``.
        num_heads: number of heads ``H``; head ``h`` owns features ``h * E / H`` to ``(h + 1) * E / H``.
        key_padding_mask: ``[N, S]`` or ``[S]``, boolean (true: ignore) or added to the scores.
        need_weights: return the attention weights; otherwise the fused kernels of PyTorch may be used.
        attn_mask: ``[L, S]`` or ``[N * H, L, S]``, boolean (true: ignore) or added to the scores.
        average_attn_weights: average the returned weights over the heads.
        is_causal: hint that ``attn_mask``, which must be given, is the causal mask.
        bias_k: ``[1, 1, E]``, appended to the keys of every sample.
        bias_v: ``[1, 1, E]``, appended to the values.
        batch_first: layout of batched inputs.
        add_zero_attn: append a zero key and value to every sample.
        dropout_p: dropout probability of the attention weights, applied if ``training``.
        training: whether dropout is on.

    Returns:
        The context in the layout of ``q``, and the weights ``[N, L, S]``, or ``[N, H, L, S]`` if not averaged,
        without ``N`` for an unbatched query; ``None`` without ``need_weights``. ``S`` counts appended keys.

    Raises:
        RuntimeError: a shape or mask type that does not fit, or ``is_causal`` without ``attn_mask``.
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(
            attention_core,
            (q, k, v),
            q,
            k,
            v,
            num_heads,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            bias_k=bias_k,
            bias_v=bias_v,
            batch_first=batch_first,
            add_zero_attn=add_zero_attn,
            dropout_p=dropout_p,
            training=training,
        )
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
    batched = q.dim() == 3
    if q.dim() not in (2, 3) or not q.dim() == k.dim() == v.dim():
        raise RuntimeError(f"query, key and value must all be 2-D or all 3-D, got {_shapes(q, k, v)}")
    if not batched:
        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    if k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise RuntimeError(
            f"batch and length of key and value, and batch of query, must agree: {_shapes(q, k, v)} "
            "after projection, batch first"
        )
    # Only where nothing else needs the mask is it left to the kernel, which then skips half of the work.
    causal = is_causal and key_padding_mask is None and not need_weights
    batch, length, source = q.shape[0], q.shape[1], k.shape[1]
    mask = None
    if not causal:
        mask = _merge_masks(attn_mask, key_padding_mask, (batch, num_heads, length, source), q.dtype)
    if bias_k is not None and bias_v is not None:
        k, v = (torch.cat((x, bias.expand(batch, 1, -1)), dim=1) for x, bias in ((k, bias_k), (v, bias_v)))
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    if mask is not None:
        mask = F.pad(mask, (0, k.shape[1] - source))  # every query may attend to appended keys
    q, k, v = (x.unflatten(-1, (num_heads, -1)).transpose(1, 2) for x in (q, k, v))  # [N, H, L or S, E / H]
    if not training:
        dropout_p = 0.0
    weights = None
    if need_weights:
        scores = q * math.sqrt(1 / q.shape[-1]) @ k.mT
        weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        if dropout_p > 0:
            weights = F.dropout(weights, dropout_p)
        context = weights @ v
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        context = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, causal)
    context = context.transpose(1, 2).flatten(2)  # [N, L, E]
    if not batched:
        return context.squeeze(0), None if weights is None else weights.squeeze(0)
    return context if batch_first else context.transpose(0, 1), weights


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(tensor.shape)) for tensor in tensors)


def _merge_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> Tensor | None:
    """Both masks as one to add to scores of ``shape`` ``(N, H, L, S)``, with size 1 where it would repeat."""
    batch, heads, length, source = shape
    mask = None
    if attn_mask is not None:
        expected = (length, source) if attn_mask.dim() == 2 else (batch * heads, length, source)
        mask = _additive(attn_mask, "attn_mask", expected, dtype)
        mask = mask.unflatten(0, (batch, heads)) if mask.dim() == 3 else mask[None, None]
    if key_padding_mask is not None:
        padding = _additive(key_padding_mask, "key_padding_mask", (batch, source), dtype)[:, None, None]
        mask = padding if mask is None else mask + padding
    return mask


def _additive(mask: Tensor, name: str, expected: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A mask as numbers to add to the scores: minus infinity where a boolean one is true."""
    if mask.shape != expected:
        raise RuntimeError(f"{name} has shape {list(mask.shape)}, but should have {list(expected)}")
    if mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise RuntimeError(f"{name} must be boolean or floating-point, not {mask.dtype}")
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
