"""``nn.MultiheadAttention`` as functions of its weights: the whole layer, and what stands between its projections.

A graph calls :func:`attention_layer` while it trains. It is PyTorch's own function on weights that are arguments, so
that results, gradients, memory and dropout masks are those of the float layer. For inference it is taken apart into
linears around :func:`attention_core`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import handle_torch_function, has_torch_function

# The positional arguments of attention_layer.
ATTENTION_ARGUMENTS = (
    *("query", "key", "value"),
    *("q_weight", "k_weight", "v_weight", "in_proj_bias"),
    *("out_weight", "out_bias"),
)
# Its weights, each with an input that has as many positions as the weight is multiplied with.
ATTENTION_HEADS = ("q_weight", "k_weight", "v_weight")  # their rows are those of the heads, one behind the other
ATTENTION_WEIGHTS = {"q_weight": "query", "k_weight": "key", "v_weight": "value", "out_weight": "query"}


def attention_layer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    v_weight: Tensor,
    in_proj_bias: Tensor | None,
    out_weight: Tensor,
    out_bias: Tensor | None,
    *,
    num_heads: int,
    batch_first: bool,
    packed: bool,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    training: bool,
    key_padding_mask: Tensor | None,
    need_weights: bool,
    attn_mask: Tensor | None,
    average_attn_weights: bool,
    is_causal: bool,
) -> tuple[Tensor, Tensor | None]:
    """What ``nn.MultiheadAttention.forward`` computes without its fast path, bit for bit.

    In a compiled graph through which no gradient flows it is linears around :func:`attention_core`, so that a backend
    finds the layers to lower. Symbolic tracing sees one node.

    Args:
        query: ``[L, N, E]``, ``[N, L, E]`` if ``batch_first``, or unbatched ``[L, E]``.
        key: the same with length ``S`` and ``kdim`` features.
        value: the same with length ``S`` and ``vdim`` features.
        q_weight: ``[E, E]``.
        k_weight: ``[E, kdim]``.
        v_weight: ``[E, vdim]``.
        in_proj_bias: ``[3 * E]``, of query, key and value in this order.
        out_weight: ``[E, E]``, of the output projection.
        out_bias: ``[E]``.
        num_heads: as in the module, as are ``batch_first``, ``bias_k``, ``bias_v`` and ``add_zero_attn``.
        batch_first: layout of batched inputs.
        packed: the first three weights are parts of one, which the module multiplies with as a whole.
        bias_k: appended to the keys.
        bias_v: appended to the values.
        add_zero_attn: append a zero key and value.
        dropout_p: dropout probability of the attention weights, applied if ``training``.
        training: whether dropout is on.
        key_padding_mask: as in the module's ``forward``, as are the further ones.
        need_weights: return the attention weights.
        attn_mask: which keys each query may attend to.
        average_attn_weights: average the returned weights over the heads.
        is_causal: hint that ``attn_mask``, which must be given, is the causal mask.

    Returns:
        The output in the layout of ``query``, and the attention weights, ``None`` without ``need_weights``.

    Raises:
        RuntimeError: nested tensors, for which there is only the fast path.
    """
    inputs = (query, key, value)
    weights: tuple[Any, ...] = (q_weight, k_weight, v_weight, in_proj_bias, out_weight, out_bias)
    options: dict[str, Any] = {
        "num_heads": num_heads,
        "bias_k": bias_k,
        "bias_v": bias_v,
        "add_zero_attn": add_zero_attn,
        "dropout_p": dropout_p,
        "training": training,
        "key_padding_mask": key_padding_mask,
        "need_weights": need_weights,
        "attn_mask": attn_mask,
        "average_attn_weights": average_attn_weights,
        "is_causal": is_causal,
    }
    # Not has_torch_function: a tensor subclass shall see what it sees of the float layer.
    if any(isinstance(x, fx.Proxy) for x in inputs):
        traced: tuple[Tensor, Tensor | None] = handle_torch_function(
            attention_layer, inputs, *inputs, *weights, batch_first=batch_first, packed=packed, **options
        )
        return traced
    if any(x.is_nested for x in inputs):
        raise RuntimeError("attention on tiled weights takes no nested tensors: pass padded ones, with a mask")
    if torch.compiler.is_compiling() and not _differentiated(*inputs, *weights):
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (F.linear(x, w, b) for x, w, b in zip(inputs, weights[:3], biases, strict=True))
        context, scores = attention_core(q, k, v, batch_first=batch_first, **options)
        return F.linear(context, out_weight, out_bias), scores
    transposed = batch_first and query.dim() == 3
    if transposed:
        # One tensor must stay one: those that are the same are projected together.
        if key is value:
            if query is key:
                query = key = value = query.transpose(1, 0)
            else:
                query, key = (x.transpose(1, 0) for x in (query, key))
                value = key
        else:
            query, key, value = (x.transpose(1, 0) for x in inputs)
    output, scores = F.multi_head_attention_forward(
        query,
        key,
        value,
        embed_dim_to_check=out_weight.shape[1],
        in_proj_weight=torch.cat((q_weight, k_weight, v_weight)) if packed else None,
        in_proj_bias=in_proj_bias,
        out_proj_weight=out_weight,
        out_proj_bias=out_bias,
        use_separate_proj_weight=not packed,
        q_proj_weight=None if packed else q_weight,
        k_proj_weight=None if packed else k_weight,
        v_proj_weight=None if packed else v_weight,
        **options,
    )
    return output.transpose(1, 0) if transposed else output, scores


def _differentiated(*tensors: Tensor | None) -> bool:
    """Whether gradients flow through a function of these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


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
