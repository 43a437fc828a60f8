"""Values that are scaled copies of a smaller one, and the operations that keep them so.

A value ``x`` is *replicated* if ``x = cat([a * z for a in factors], axis)``. An operation ``f`` carries the copies
on if ``f(x) = cat([a * f(z) for a in factors], new_axis)``, so that it can run on ``z`` instead. :func:`carry`
answers that for one node:

===================================  ==================================================================
relu, leaky relu                     ``f(a z) = a f(z)`` for ``a >= 0``, element by element
max, average and adaptive pooling    the same (order is kept, averages are linear), over axes behind ``axis``
padding, mean                        linear, over other axes than ``axis``
flatten, ``view(x.size(0), -1)``     with ``axis`` as the first flattened one: each copy stays in one piece
addition                             ``a z + a w = a (z + w)``, for equal factors
contiguous, clone                    the same values
other elementwise functions          only if all factors are 1: the copies are equal
===================================  ==================================================================

Axes are counted from the end, where they hold with and without a batch dimension. Anything else stops the copies.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from tbn_compiler.graph.operations import BoundCall, bind
from tbn_compiler.passes.base import has_hooks
from tbn_compiler.passes.deployment import describe, rank


@dataclass(frozen=True)
class Replicas:
    """``count`` copies along ``axis``, one behind the other.

    Attributes:
        count: number of copies.
        axis: the axis, counted from the end (negative).
        factors: the factor of each copy, all at least 0; ``None`` if all are 1.
        source: the tiled layer's node that the factors come from.
    """

    count: int
    axis: int
    factors: tuple[float, ...] | None
    source: fx.Node


class _Stop(Exception):  # noqa: N818 (no error: the reason why copies stop here)
    pass


_Rule = Callable[[BoundCall, Replicas], Replicas]


def carry(gm: fx.GraphModule, node: fx.Node, replicas: Mapping[fx.Node, Replicas]) -> Replicas | str:
    """The copies in the result of ``node``, of which at least one input is replicated, or why there are none."""
    call = bind(node, gm)
    if call is not None and call.name == "add":
        return _add(gm, call, replicas)
    value = node.args[0] if node.args else None
    if not isinstance(value, fx.Node) or node.all_input_nodes[0] is not value or value not in replicas:
        return _stopped(gm, node, "does not take them as its first argument")
    if call is None or call.name not in _RULES or (call.module is not None and has_hooks(call.module)):
        return _stopped(gm, node, "is not known to keep them")
    try:
        return _RULES[call.name](call, replicas[value])
    except _Stop as stop:
        return _stopped(gm, node, str(stop))


def is_size_query(node: fx.Node, value: fx.Node, replicas: Replicas) -> bool:
    """Whether ``node`` only asks for sizes of ``value`` that do not depend on the number of copies."""
    dims = rank(value)
    if dims is None:
        return False
    axis = dims + replicas.axis
    size = bind(node)
    if size is not None and size.name == "size" and size.arguments["dim"] is not None:
        return _is_other_axis(size.arguments["dim"], dims, axis)
    return _is_shape(node) and all(
        user.target is operator.getitem and _is_other_axis(user.args[1], dims, axis) for user in node.users
    )


def _is_shape(node: fx.Node) -> bool:
    """Whether a node is ``value.size()`` or ``value.shape``, for any value."""
    size = bind(node)
    if size is not None and size.name == "size":
        return size.arguments["dim"] is None
    return node.target is getattr and node.args[1] == "shape"


def _is_other_axis(dim: Any, dims: int, axis: int) -> bool:
    return isinstance(dim, int) and -dims <= dim < dims and dim % dims != axis


def _stopped(gm: fx.GraphModule, node: fx.Node, why: str) -> str:
    return "its result is an output" if node.op == "output" else f"{describe(gm, node)} {why}"


def _add(gm: fx.GraphModule, call: BoundCall, replicas: Mapping[fx.Node, Replicas]) -> Replicas | str:
    operands = [call.input, call.arguments["other"]]
    found = [replicas.get(value) for value in operands if isinstance(value, fx.Node)]
    if len(found) != 2 or call.arguments["alpha"] != 1:
        return _stopped(gm, call.node, "is not a plain sum of two values")
    left, right = found
    if left is None or right is None:
        return _stopped(gm, call.node, "adds a value without copies")
    if (left.count, left.axis, left.factors) != (right.count, right.axis, right.factors):
        return _stopped(gm, call.node, "adds copies with other factors")
    return left


def _keep(call: BoundCall, value: Replicas) -> Replicas:
    return value


def _elementwise(call: BoundCall, value: Replicas) -> Replicas:
    if value.factors is not None:
        raise _Stop("does not commute with their factors")
    if len(call.node.all_input_nodes) > 1:
        raise _Stop("reads further values")
    return value


def _pool(dims: int) -> _Rule:
    def rule(call: BoundCall, value: Replicas) -> Replicas:
        if value.axis >= -dims:
            raise _Stop("pools over their axis")
        if call.arguments.get("return_indices", False):
            raise _Stop("also returns indices")
        return value

    return rule


def _first_result(call: BoundCall, value: Replicas) -> Replicas:
    source, index = bind(call.input), call.arguments["index"]
    if source is None or not source.name.endswith("_with_indices"):
        raise _Stop("may take a part of them")
    if index != 0 and call.node.users:
        raise _Stop("also returns indices")
    return value


def _pad(call: BoundCall, value: Replicas) -> Replicas:
    pads, fill = call.arguments["pad"], call.arguments["value"]
    if not isinstance(pads, tuple | list) or len(pads) // 2 >= -value.axis:
        raise _Stop("pads their axis")
    if call.arguments["mode"] == "constant" and fill not in (None, 0) and value.factors is not None:
        raise _Stop("pads with a number that is not scaled")
    return value


def _flatten(call: BoundCall, value: Replicas) -> Replicas:
    return _flattened(call.node, value, call.arguments["start_dim"], call.arguments["end_dim"])


def _flattened(node: fx.Node, value: Replicas, start: int, end: int) -> Replicas:
    dims = rank(node.all_input_nodes[0])
    if dims is None:
        raise _Stop("takes axes of a value of unknown rank: give example_inputs")
    start, end, axis = start % dims, end % dims, dims + value.axis
    if start < axis <= end:
        raise _Stop("flattens axes before theirs into it")
    merged = end - start
    if axis > end:
        return value
    return replace(value, axis=axis - (dims - merged))


def _reshape(call: BoundCall, value: Replicas) -> Replicas:
    sizes = call.arguments["shape"]
    if not isinstance(sizes, tuple | list) or len(sizes) != 2 or sizes[1] != -1:
        raise _Stop("may mix them")
    if not _is_first_size(sizes[0], call.input):
        raise _Stop("may mix them")
    return _flattened(call.node, value, 1, -1)


def _is_first_size(size: Any, value: fx.Node) -> bool:
    """Whether ``size`` is ``value.size(0)`` or ``value.shape[0]``, or known to be equal in an exported graph."""
    exported = value.meta.get("val")
    if isinstance(exported, Tensor) and exported.dim():
        from torch.fx.experimental.symbolic_shapes import statically_known_true  # it loads sympy

        known = size.meta.get("val") if isinstance(size, fx.Node) else size
        return isinstance(known, int | torch.SymInt) and statically_known_true(known == exported.shape[0])
    if not isinstance(size, fx.Node):
        return False
    call = bind(size)
    if call is not None and call.name == "size":
        return call.input is value and call.arguments["dim"] == 0
    if call is None or call.name != "getitem" or call.arguments["index"] != 0:
        return False
    return isinstance(call.input, fx.Node) and _is_shape(call.input) and call.input.args[0] is value


def _mean(call: BoundCall, value: Replicas) -> Replicas:
    axes, dims = call.arguments["dim"], rank(call.input)
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(axes, tuple | list) or not axes or not all(isinstance(axis, int) for axis in axes):
        raise _Stop("takes the mean over all axes")
    if dims is None and max(axes) >= 0:
        raise _Stop("takes axes of a value of unknown rank: give example_inputs")
    axes = [axis - dims if dims is not None and axis >= 0 else axis for axis in axes]
    if value.axis in axes:
        raise _Stop("takes the mean over their axis")
    if call.arguments["keepdim"]:
        return value
    return replace(value, axis=value.axis + sum(axis > value.axis for axis in axes))


_POOLINGS = ("max_pool{}d", "avg_pool{}d", "adaptive_avg_pool{}d", "adaptive_max_pool{}d")
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("relu", "leaky_relu", "contiguous", "clone"), _keep),
    **dict.fromkeys(("sigmoid", "tanh", "relu6", "hardtanh", "gelu", "silu", "elu", "softplus"), _elementwise),
    **dict.fromkeys(("hardswish", "hardsigmoid"), _elementwise),
    **{name.format(dims): _pool(dims) for name in _POOLINGS for dims in (1, 2, 3)},
    **{f"adaptive_max_pool{dims}d_with_indices": _pool(dims) for dims in (1, 2, 3)},
    "getitem": _first_result,
    "flatten": _flatten,
    "reshape": _reshape,
    "mean": _mean,
    "pad": _pad,
}
