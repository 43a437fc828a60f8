"""Calls that PyTorch's exporter or ONNX itself takes for something else, written such that they mean the same.

* An average with a divisor of its own, which the exporter drops, is the average of an image padded before, times
  ``window / divisor``.
* ``ceil_mode`` is turned off where it gives no further window, because that would begin in the padding behind the
  image: ONNX computes another size with it. Where only some dimensions have a further window, the image of a maximum
  is padded, and an average refused.
* Attention gives 0 for a query whose keys are all masked. The softmax that opsets before 23 get instead gives NaN, or
  the mean of all values: such rows are set to 0 behind it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from tbn_compiler.errors import ExportError
from tbn_compiler.graph.calls import named_arguments

_aten = torch.ops.aten
_DIMS = {
    getattr(_aten, f"{pool}{dims}d{suffix}").default: dims
    for dims in (1, 2, 3)
    for pool, suffix in (("avg_pool", ""), ("max_pool", ""), ("max_pool", "_with_indices"))
}
_ATTENTION_OPSET = 23  # has an operator for attention


def write_exactly(program: ExportedProgram, opset: int) -> None:
    """Rewrite such calls of a traced program for an opset, in place."""
    for node in list(program.graph.nodes):
        if node.target in _DIMS:
            _rewrite_pool(node)
        elif node.target is _aten.scaled_dot_product_attention.default and opset < _ATTENTION_OPSET:
            _zero_masked_rows(program, node)
    program.graph.lint()


def _rewrite_pool(node: fx.Node) -> None:
    arguments, dims = named_arguments(node), _DIMS[node.target]
    kernel, padding, dilation = (
        _sizes(arguments.get(name), dims, default)
        for name, default in (("kernel_size", 1), ("padding", 0), ("dilation", 1))
    )
    stride = _sizes(arguments["stride"] or kernel, dims, 1)
    whole = isinstance(node.meta["val"], Tensor)  # else with indices
    result = node.meta["val"] if whole else node.meta["val"][0]
    sizes = zip(result.shape[-dims:], stride, dilation, kernel, strict=True)
    covered = [(size - 1) * step + dil * (width - 1) + 1 for size, step, dil, width in sizes]
    image = arguments["self"].meta["val"].shape[-dims:]
    # Rows behind the image that the last window reaches; negative if it ends inside.
    behind = [end - before - size for end, before, size in zip(covered, padding, image, strict=True)]
    further = [rows > pad for rows, pad in zip(behind, padding, strict=True)]  # a window that only ceil_mode gives
    dropped = [rows < pad for rows, pad in zip(behind, padding, strict=True)]  # a window that only ONNX would have
    if not any(further):
        arguments["ceil_mode"] = False
    # constant_pad_nd counts dimensions from the last one.
    pads = [rows for pair in zip(padding[::-1], behind[::-1], strict=True) for rows in (pair[0], max(pair[1], 0))]
    divisor = arguments.get("divisor_override")
    if divisor is not None:
        _pad_before(node, arguments, pads, 0.0)
        arguments["divisor_override"] = None
        with node.graph.inserting_after(node):
            scaled = node.graph.call_function(_aten.mul.Scalar, (node, math.prod(kernel) / divisor))
        _put_behind(node, scaled)
    elif arguments["ceil_mode"] and any(dropped):
        if "dilation" not in arguments or not whole:
            raise ExportError(
                f"{node.target} of an image {list(image)}: ceil_mode=True adds a window along some dimensions, along "
                "others in ONNX only: pad the image, and leave ceil_mode out"
            )
        _pad_before(node, arguments, pads, -math.inf)
    node.args, node.kwargs = tuple(arguments.values()), {}


def _pad_before(node: fx.Node, arguments: dict[str, Any], pads: list[int], value: float) -> None:
    """Let a pooling read an image that is padded as far as its windows reach."""
    with node.graph.inserting_before(node):
        arguments["self"] = node.graph.call_function(_aten.constant_pad_nd.default, (arguments["self"], pads, value))
    arguments |= {"padding": [0] * (len(pads) // 2), "ceil_mode": False}


def _sizes(value: Any, dims: int, default: int) -> list[int]:
    """An argument of a pooling with a number for each dimension."""
    sizes = [value] if isinstance(value, int) else list(value or [default])
    return sizes * dims if len(sizes) == 1 else sizes


def _zero_masked_rows(program: ExportedProgram, node: fx.Node) -> None:
    mask = named_arguments(node)["attn_mask"]
    stored = None if mask is None else _stored(program, mask)
    if mask is None or (stored is not None and bool(_shown(stored).any(-1).all())):
        return
    graph = node.graph
    with graph.inserting_after(node):
        result = graph.call_function(_aten.where.ScalarOther, (None, node, 0.0))
    with graph.inserting_before(result):
        boolean = mask.meta["val"].dtype == torch.bool
        shown = mask if boolean else graph.call_function(_aten.ne.Scalar, (mask, -math.inf))
        result.args = (graph.call_function(_aten.any.dim, (shown, -1, True)), node, 0.0)
    _put_behind(node, result)


def _stored(program: ExportedProgram, node: fx.Node) -> Tensor | None:
    """The parameter, buffer or constant that a node of the graph is, or ``None``."""
    for spec in program.graph_signature.input_specs:
        if getattr(spec.arg, "name", None) == node.name and spec.target is not None:
            stored = program.constants.get(spec.target, program.state_dict.get(spec.target))
            return stored if isinstance(stored, Tensor) else None
    return None


def _shown(mask: Tensor) -> Tensor:
    """Where a mask shows a key to a query."""
    return mask if mask.dtype == torch.bool else mask != -math.inf


def _put_behind(node: fx.Node, new: fx.Node) -> None:
    """Let ``new``, which is computed from ``node``, take its place."""
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
