"""Attention between bound layers, by a kernel of the native library.

Before::

    y = F.scaled_dot_product_attention(q, k, v)

After::

    y = tbn_cpu.attention(q, k, v, 1.0, True, False)

It has no tiles, but stands between tiled layers, and a network's time is in what they leave. Levels without such a
kernel, dropout and other dtypes stay with PyTorch. What is added to scores, and masks of what is left out, go to
``tbn_cpu::masked_attention``.
"""

from __future__ import annotations

import math
import types
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx

from tbn_compiler.backends.cpu import bound, library
from tbn_compiler.graph.calls import all_among
from tbn_compiler.graph.operations import BoundCall, bind
from tbn_compiler.passes.base import copy_meta
from tbn_compiler.passes.deployment import dtype, rank
from tbn_compiler.torch_private import differentiated, mapped

# by_width: the products are divided by the root of the width, beside `scale`.
bound.define("attention(Tensor query, Tensor key, Tensor value, float scale, bool by_width, bool causal) -> Tensor")
bound.define(
    "masked_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale, bool by_width) -> Tensor"
)

_OPERANDS = ("query", "key", "value")


def bind_attention(gm: fx.GraphModule, layers: Container[fx.Node]) -> None:
    """Let the kernel compute attention where it can, in place.

    Args:
        gm: a graph whose values' ranks and dtypes were noted.
        layers: the tiled layers on the CPU. Where there is none, or one elsewhere, nothing is known of the devices of
            other values, and they stay.
    """
    if not library.has_attention(library.level()) or bound.unavailable() or not all_among(gm.graph, layers):
        return
    inside = mapped(gm.graph) | differentiated(gm.graph)
    calls = [call for node in gm.graph.nodes if node not in inside and (call := bind(node)) is not None]
    found = [call for call in calls if call.name == "scaled_dot_product_attention" and _fits(call)]
    for call in found:
        scale = call.arguments["scale"]
        options = (1.0, True) if scale is None else (float(scale), False)
        operands, mask = tuple(call.arguments[name] for name in _OPERANDS), call.arguments["attn_mask"]
        with gm.graph.inserting_before(call.node):
            if mask is None:
                arguments = (*operands, *options, call.arguments["is_causal"])
                result = gm.graph.call_function(torch.ops.tbn_cpu.attention.default, arguments)
            else:
                if dtype(mask) == torch.bool:
                    mask = gm.graph.call_function(torch.where, (mask, 0.0, -math.inf))
                    mask = gm.graph.call_method("to", (mask, torch.float32))
                arguments = (*operands, mask, *options)
                result = gm.graph.call_function(torch.ops.tbn_cpu.masked_attention.default, arguments)
        copy_meta(call.node, result)
        call.node.replace_all_uses_with(result)
        gm.graph.erase_node(call.node)


def _fits(call: BoundCall) -> bool:
    """Whether the kernel computes a call."""
    arguments = call.arguments
    operands = [arguments[name] for name in _OPERANDS]
    if not all(isinstance(node, fx.Node) and dtype(node) == torch.float32 for node in (*operands, call.node)):
        return False
    axes = rank(operands[0])
    return (
        axes in (3, 4)
        and all(rank(node) == axes for node in operands)
        and _is_mask(arguments["attn_mask"], arguments["is_causal"], axes)
        and arguments["dropout_p"] == 0
        and arguments["enable_gqa"] is False
        and isinstance(arguments["is_causal"], bool)
        and isinstance(arguments["scale"], int | float | types.NoneType)
    )


def _is_mask(mask: Any, causal: Any, most: int | None) -> bool:
    """Whether it is none, or one that the kernel takes."""
    if mask is None:
        return True
    if not isinstance(mask, fx.Node) or dtype(mask) not in (torch.float32, torch.bool) or causal is not False:
        return False
    axes = rank(mask)
    return axes is not None and most is not None and 2 <= axes <= most


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float, by_width: bool, causal: bool) -> Tensor:
    samples = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    length, width = query.shape[-2], value.shape[-1]
    # It lies as PyTorch's own does: like queries, where these, keys and values have the same samples, heads and width.
    alike = query.dim() == 4 and query.shape[-1] == width
    alike = alike and all(x.shape[:-2] == query.shape[:-2] for x in (key, value))
    if alike and query.stride(1) < query.stride(2):
        return query.new_empty((*samples[:-1], length, samples[-1], width)).transpose(-2, -3)
    return torch.empty((*samples, length, width), dtype=query.dtype, device=query.device)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, by_width: bool) -> Tensor:
    return _attention(query, key, value, scale, by_width, False)


bound.define_fake("attention", _attention)
bound.define_fake("masked_attention", _masked_attention)
