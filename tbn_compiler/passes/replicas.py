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
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import statically_known_true

from tbn_compiler.passes.base import has_hooks
from tbn_compiler.passes.deployment import describe, rank

_aten = torch.ops.aten


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


_Rule = Callable[[fx.GraphModule, fx.Node, Replicas], Replicas]


def carry(gm: fx.GraphModule, node: fx.Node, replicas: Mapping[fx.Node, Replicas]) -> Replicas | str:
    """The copies in the result of ``node``, of which at least one input is replicated, or why there are none."""
    key = _operation(gm, node)
    if key in _ADDITIONS:
        return _add(gm, node, replicas)
    value = node.args[0] if node.args else None
    if not isinstance(value, fx.Node) or node.all_input_nodes[0] is not value or value not in replicas:
        return _stopped(gm, node, "does not take them as its first argument")
    rule = _RULES.get(key)
    if rule is None:
        return _stopped(gm, node, "is not known to keep them")
    try:
        return rule(gm, node, replicas[value])
    except _Stop as stop:
        return _stopped(gm, node, str(stop))


def is_size_query(node: fx.Node, value: fx.Node, replicas: Replicas) -> bool:
    """Whether ``node`` only asks for sizes of ``value`` that do not depend on the number of copies."""
    dims = rank(value)
    if dims is None:
        return False
    axis = dims + replicas.axis
    one = (node.op == "call_method" and node.target == "size") or node.target is _aten.sym_size.int
    if one and len(node.args) == 2:
        return _is_other_axis(node.args[1], dims, axis)
    whole = (node.op == "call_method" and node.target == "size" and len(node.args) == 1 and not node.kwargs) or (
        node.target is getattr and node.args[1] == "shape"
    )
    return whole and all(
        user.target is operator.getitem and _is_other_axis(user.args[1], dims, axis) for user in node.users
    )


def _is_other_axis(dim: Any, dims: int, axis: int) -> bool:
    return isinstance(dim, int) and -dims <= dim < dims and dim % dims != axis


def _stopped(gm: fx.GraphModule, node: fx.Node, why: str) -> str:
    return "its result is an output" if node.op == "output" else f"{describe(gm, node)} {why}"


def _operation(gm: fx.GraphModule, node: fx.Node) -> Any:
    """What the rules are listed under: a module's type, a function, or a method's name."""
    if node.op != "call_module":
        return node.target
    module = gm.get_submodule(str(node.target))
    return None if has_hooks(module) else type(module)


def _option(gm: fx.GraphModule, node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An option of an operation: an attribute of a module, an argument of a function or method."""
    if node.op == "call_module":
        return getattr(gm.get_submodule(str(node.target)), name, default)
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _add(gm: fx.GraphModule, node: fx.Node, replicas: Mapping[fx.Node, Replicas]) -> Replicas | str:
    found = [replicas.get(value) for value in node.args if isinstance(value, fx.Node)]
    if len(node.args) != 2 or len(found) != 2 or node.kwargs:
        return _stopped(gm, node, "is not a plain sum of two values")
    left, right = found
    if left is None or right is None:
        return _stopped(gm, node, "adds a value without copies")
    if (left.count, left.axis, left.factors) != (right.count, right.axis, right.factors):
        return _stopped(gm, node, "adds copies with other factors")
    return left


def _keep(gm: fx.GraphModule, node: fx.Node, value: Replicas) -> Replicas:
    return value


def _elementwise(gm: fx.GraphModule, node: fx.Node, value: Replicas) -> Replicas:
    if value.factors is not None:
        raise _Stop("does not commute with their factors")
    if len(node.all_input_nodes) > 1:
        raise _Stop("reads further values")
    return value


def _pool(dims: int) -> _Rule:
    def rule(gm: fx.GraphModule, node: fx.Node, value: Replicas) -> Replicas:
        if value.axis >= -dims:
            raise _Stop("pools over their axis")
        # The functional forms that return indices are functions of their own.
        if node.op == "call_module" and _option(gm, node, 0, "return_indices", False):
            raise _Stop("also returns indices")
        return value

    return rule


def _first_result(gm: fx.GraphModule, node: fx.Node, value: Replicas) -> Replicas:
    source, index = node.args
    assert isinstance(source, fx.Node)
    if source.target not in _MAX_WITH_INDICES:
        raise _Stop("may take a part of them")
    if index != 0 and node.users:
        raise _Stop("also returns indices")
    return value


def _pad(gm: fx.GraphModule, node: fx.Node, value: Replicas) -> Replicas:
    pads = _option(gm, node, 1, "pad", None)
    mode, fill = _option(gm, node, 2, "mode", "constant"), _option(gm, node, 3, "value", None)
    if not isinstance(pads, tuple | list) or len(pads) // 2 >= -value.axis:
        raise _Stop("pads their axis")
    if mode == "constant" and fill not in (None, 0) and value.factors is not None:
        raise _Stop("pads with a number that is not scaled")
    return value


def _flatten(gm: fx.GraphModule, node: fx.Node, value: Replicas) -> Replicas:
    return _flattened(node, value, _option(gm, node, 1, "start_dim", 0), _option(gm, node, 2, "end_dim", -1))


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


def _view(gm: fx.GraphModule, node: fx.Node, value: Replicas) -> Replicas:
    sizes = node.args[1] if len(node.args) == 2 else node.args[1:]
    if not isinstance(sizes, tuple | list) or len(sizes) != 2 or sizes[1] != -1:
        raise _Stop("may mix them")
    if not _is_first_size(sizes[0], node.all_input_nodes[0]):
        raise _Stop("may mix them")
    return _flattened(node, value, 1, -1)


def _is_first_size(size: Any, value: fx.Node) -> bool:
    """Whether ``size`` is ``value.size(0)`` or ``value.shape[0]``, or known to be equal in an exported graph."""
    exported = value.meta.get("val")
    if isinstance(exported, Tensor) and exported.dim():
        known = size.meta.get("val") if isinstance(size, fx.Node) else size
        return isinstance(known, int | torch.SymInt) and statically_known_true(known == exported.shape[0])
    if not isinstance(size, fx.Node):
        return False
    if size.target == "size":
        return size.args == (value, 0)
    if size.target is not operator.getitem or size.args[1] != 0 or not isinstance(size.args[0], fx.Node):
        return False
    whole = size.args[0]
    if whole.target is getattr:
        return whole.args == (value, "shape")
    return whole.target == "size" and whole.args == (value,)


def _mean(gm: fx.GraphModule, node: fx.Node, value: Replicas) -> Replicas:
    axes, dims = _option(gm, node, 1, "dim", None), rank(node.all_input_nodes[0])
    axes = (axes,) if isinstance(axes, int) else axes
    if not isinstance(axes, tuple | list) or not axes or not all(isinstance(axis, int) for axis in axes):
        raise _Stop("takes the mean over all axes")
    if dims is None and max(axes) >= 0:
        raise _Stop("takes axes of a value of unknown rank: give example_inputs")
    axes = [axis - dims if dims is not None and axis >= 0 else axis for axis in axes]
    if value.axis in axes:
        raise _Stop("takes the mean over their axis")
    if _option(gm, node, 2, "keepdim", False):
        return value
    return replace(value, axis=value.axis + sum(axis > value.axis for axis in axes))


_ADDITIONS = frozenset({operator.add, operator.iadd, torch.add, "add", "add_", _aten.add.Tensor, _aten.add_.Tensor})

_KEEP = (
    *(nn.ReLU, F.relu, torch.relu, torch.relu_, "relu", "relu_", _aten.relu.default, _aten.relu_.default),
    *(nn.LeakyReLU, F.leaky_relu, _aten.leaky_relu.default, _aten.leaky_relu_.default),
    *("contiguous", _aten.contiguous.default, "clone", torch.clone, _aten.clone.default),
)
_ELEMENTWISE = (
    *(nn.Sigmoid, F.sigmoid, torch.sigmoid, "sigmoid", _aten.sigmoid.default),
    *(nn.Tanh, F.tanh, torch.tanh, "tanh", _aten.tanh.default),
    *(nn.ReLU6, F.relu6, nn.Hardtanh, F.hardtanh, _aten.hardtanh.default),
    *(nn.GELU, F.gelu, _aten.gelu.default, nn.SiLU, F.silu, _aten.silu.default),
    *(nn.ELU, F.elu, _aten.elu.default, nn.Softplus, F.softplus, _aten.softplus.default),
    *(nn.Hardswish, F.hardswish, _aten.hardswish.default, nn.Hardsigmoid, F.hardsigmoid, _aten.hardsigmoid.default),
)
_POOLINGS: dict[int, tuple[Any, ...]] = {
    1: (
        *(nn.MaxPool1d, F.max_pool1d, torch.max_pool1d, _aten.max_pool1d.default),
        *(nn.AvgPool1d, F.avg_pool1d, _aten.avg_pool1d.default),
        *(nn.AdaptiveMaxPool1d, F.adaptive_max_pool1d, nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d),
        _aten.adaptive_avg_pool1d.default,
    ),
    2: (
        *(nn.MaxPool2d, F.max_pool2d, torch.max_pool2d, _aten.max_pool2d.default),
        *(nn.AvgPool2d, F.avg_pool2d, _aten.avg_pool2d.default),
        *(nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d, nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d),
        _aten.adaptive_avg_pool2d.default,
    ),
    3: (
        *(nn.MaxPool3d, F.max_pool3d, torch.max_pool3d, _aten.max_pool3d.default),
        *(nn.AvgPool3d, F.avg_pool3d, _aten.avg_pool3d.default),
        *(nn.AdaptiveMaxPool3d, F.adaptive_max_pool3d, nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d),
        _aten.adaptive_avg_pool3d.default,
    ),
}
# Operators that always return indices, too.
_MAX_WITH_INDICES = {
    _aten.adaptive_max_pool1d.default: 1,
    _aten.adaptive_max_pool2d.default: 2,
    _aten.adaptive_max_pool3d.default: 3,
}
_FLATTEN = (nn.Flatten, torch.flatten, "flatten", _aten.flatten.using_ints)
_RULES: dict[Any, _Rule] = {
    **dict.fromkeys(_KEEP, _keep),
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **{target: _pool(dims) for dims, targets in _POOLINGS.items() for target in targets},
    **{target: _pool(dims) for target, dims in _MAX_WITH_INDICES.items()},
    operator.getitem: _first_result,
    **dict.fromkeys(_FLATTEN, _flatten),
    **dict.fromkeys(("view", "reshape", torch.reshape, _aten.view.default, _aten.reshape.default), _view),
    **dict.fromkeys(("mean", torch.mean, _aten.mean.dim), _mean),
    **dict.fromkeys((F.pad, torch._C._nn.pad, _aten.pad.default), _pad),
}
