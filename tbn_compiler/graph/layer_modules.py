"""Graphs of single layer modules: what their ``forward`` computes, written down once for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.overrides import handle_torch_function, has_torch_function

from tbn_compiler.graph.layers import is_transposed, module_kind
from tbn_compiler.ops.calls import OPERATORS

# Attributes of a graph module, which a layer with such an attribute of its own cannot be.
_GRAPH_NAMES = frozenset(dir(fx.GraphModule)) - frozenset(dir(nn.Module)) | {"meta", "_graph", "_code"}


def float_kind(module: nn.Module) -> str | None:
    """Kind of a layer module that computes what its class does; ``None`` for any other module."""
    if "forward" in vars(module) or isinstance(module, fx.GraphModule) or not _GRAPH_NAMES.isdisjoint(vars(module)):
        return None
    weight = module._parameters.get("weight")  # absent where a parametrization computes it
    if weight is None or isinstance(weight, nn.parameter.UninitializedParameter):
        return None
    return module_kind(module) or ("linear" if is_huggingface_conv1d(module) else None)


def float_graph(module: nn.Module) -> fx.Graph:
    """The graph of a layer module that has a :func:`float_kind`.

    It has the arguments of the module's ``forward`` and reads its ``weight`` and ``bias``.
    """
    kind = module_kind(module)
    return _transposed_linear(module) if kind is None else _graph(module, kind)


def is_huggingface_conv1d(module: nn.Module) -> bool:
    """Whether a module is ``transformers.pytorch_utils.Conv1D``: a linear layer with ``weight [in, out]``."""
    found = next((c for c in type(module).__mro__ if c.__module__ == "transformers.pytorch_utils"), None)
    return found is not None and found.__name__ == "Conv1D" and type(module).forward is found.forward  # type: ignore[attr-defined]


def _graph(module: Any, kind: str) -> fx.Graph:
    graph = fx.Graph()
    x: Any = graph.placeholder("input")
    output_size = graph.placeholder("output_size", default_value=None) if is_transposed(kind) else None
    weight = graph.get_attr("weight")
    bias = None if module.bias is None else graph.get_attr("bias")
    if kind == "linear":
        graph.output(graph.call_function(F.linear, (x, weight, bias)))
        return graph
    stride, padding, dilation, groups = module.stride, module.padding, module.dilation, module.groups
    if is_transposed(kind):
        extra = graph.call_function(
            output_padding, (x, output_size, module.output_padding, stride, padding, module.kernel_size, dilation)
        )
        geometry: tuple[Any, ...] = (stride, padding, extra, groups, dilation)
    else:
        if module.padding_mode != "zeros":
            x = graph.call_function(F.pad, (x, module._reversed_padding_repeated_twice), {"mode": module.padding_mode})
            padding = (0,) * len(stride)
        geometry = (stride, padding, dilation, groups)
    graph.output(graph.call_function(OPERATORS[kind].function, (x, weight, bias, *geometry)))
    return graph


def _transposed_linear(module: Any) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    weight = graph.call_function(torch.t, (graph.get_attr("weight"),))
    bias = None if module.bias is None else graph.get_attr("bias")
    graph.output(graph.call_function(F.linear, (x, weight, bias)))
    return graph


def output_padding(
    input: Tensor,
    output_size: Sequence[int] | None,
    default: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """What a transpose convolution adds at the end of each axis for its result to have ``output_size``.

    Args:
        input: ``[N, C, *sizes]`` or ``[C, *sizes]``.
        output_size: the sizes wanted, with or without batch and channels; ``None`` takes ``default``.
        default: the module's own ``output_padding``.
        stride: one integer for each axis, as are the further arguments.
        padding: taken away on both sides.
        kernel_size: size of the kernel.
        dilation: distance between its elements.

    Raises:
        ValueError: the layer cannot give this size.
    """
    if has_torch_function((input,)):  # unpickling a graph module traces its code again
        options = (output_size, default, stride, padding, kernel_size, dilation)
        traced: list[int] = handle_torch_function(output_padding, (input,), input, *options)
        return traced
    if output_size is None:
        return list(default)
    d = len(stride)
    sizes = list(output_size)[-d:]
    if len(output_size) not in (d, d + 1, d + 2):
        raise ValueError(f"output_size must have {d} sizes, with or without batch and channels, got {len(output_size)}")
    smallest = [
        (size - 1) * step - 2 * pad + dil * (kernel - 1) + 1
        for size, step, pad, kernel, dil in zip(input.shape[-d:], stride, padding, kernel_size, dilation, strict=True)
    ]
    if any(not low <= size < low + step for size, low, step in zip(sizes, smallest, stride, strict=True)):
        largest = [low + step - 1 for low, step in zip(smallest, stride, strict=True)]
        raise ValueError(
            f"requested an output size of {sizes}, but valid sizes range from {smallest} to {largest} (for an input "
            f"of {list(input.shape[-d:])})"
        )
    return [size - low for size, low in zip(sizes, smallest, strict=True)]
