"""Operators that combine elements: along axes, in windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.elementwise import arithmetic_type
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.registry import Arguments, Converter, converts, converts_results
from tbn_compiler.backends.c.frontend.shapes import moved

_aten = torch.ops.aten


def _axis(importer: Importer, node: fx.Node, shape: tuple[int, ...], dim: int) -> ir.Axis:
    if not shape:
        raise importer.unsupported(node, "its input has no dimensions")
    dim %= len(shape)
    return ir.Axis(math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]))


@converts(_aten.softmax.int, _aten._softmax.default)
def _softmax(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    head = importer.head(node, args["self"])
    return ir.Softmax(**head, axis=_axis(importer, node, head["output"].shape, args["dim"]))


@converts(_aten.log_softmax.int, _aten._log_softmax.default)
def _log_softmax(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    head = importer.head(node, args["self"])
    return ir.Softmax(**head, axis=_axis(importer, node, head["output"].shape, args["dim"]), log=True)


def reduce(
    importer: Importer, node: fx.Node, function: str, value: Any, dims: Any, parameters: tuple[float, ...] = ()
) -> Sequence[ir.Operation]:
    """A reduction over some axes, or over all (``None`` or none); axes that are not neighbours are brought together."""
    function, dtype = _of_type(importer, node, function, value)
    head = importer.typed_head(node, dtype, value)
    (source,) = head["inputs"]
    rank = len(source.shape)
    dims = [dims] if isinstance(dims, int) else dims
    axes = sorted(dim % max(rank, 1) for dim in dims) if dims else list(range(rank))
    operations: list[ir.Operation] = []
    if axes and axes != list(range(axes[0], axes[-1] + 1)):
        order = [d for d in range(rank) if d not in axes] + axes
        strides = ir.row_major(source.shape)
        access = ir.Access(tuple(source.shape[d] for d in order), tuple(strides[d] for d in order))
        together = importer.temporary(node, "axes", access.sizes, dtype)
        operations.append(moved(together.name, head["layer"], source, together, access))
        source, axes = together, list(range(rank - len(axes), rank))
    outer = math.prod(source.shape[: axes[0]]) if axes else 1
    size = math.prod(source.shape[d] for d in axes)
    axis = ir.Axis(outer, size, math.prod(source.shape) // (outer * size))
    return *operations, ir.Reduce(**head | {"inputs": (source,)}, function=function, axis=axis, parameters=parameters)


def _of_type(importer: Importer, node: fx.Node, function: str, value: Any) -> tuple[str, ir.DType]:
    """The kernel that reduces a value, and the type that it reads."""
    own = importer.operand(node, value).dtype
    if own == "bool" or function in ("any", "all"):
        function = {"maximum": "any", "minimum": "all"}.get(function, function)
        if function in ("any", "all") or (function == "sum" and importer.value_of(node).dtype == "int32"):
            return function, "bool"
        own = "int32"
    if function in ("argmax", "argmin", "maximum", "minimum"):
        return function, "int32" if own == "int32" else "float32"
    dtype = arithmetic_type(importer, node)
    if function not in ("sum", "prod") and dtype != "float32":
        raise importer.unsupported(node, f"{function} of {dtype} has no kernel")
    return function, dtype


def _convert_reduction(function: str) -> Converter:
    def convert(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
        return reduce(importer, node, function, args["self"], args.get("dim"))

    return convert


converts(_aten.mean.dim, _aten.mean.default)(_convert_reduction("mean"))
converts(_aten.sum.dim_IntList, _aten.sum.default)(_convert_reduction("sum"))
converts(_aten.prod.dim_int, _aten.prod.default)(_convert_reduction("prod"))
converts(_aten.amax.default, _aten.max.default)(_convert_reduction("maximum"))
converts(_aten.amin.default, _aten.min.default)(_convert_reduction("minimum"))
converts(_aten.any.default, _aten.any.dim, _aten.any.dims)(_convert_reduction("any"))
converts(_aten.all.default, _aten.all.dim, _aten.all.dims)(_convert_reduction("all"))
converts(_aten.logsumexp.default)(_convert_reduction("logsumexp"))
converts(_aten.argmax.default)(_convert_reduction("argmax"))
converts(_aten.argmin.default)(_convert_reduction("argmin"))


@converts_results(_aten.max.dim)
def _max_dim(importer: Importer, node: fx.Node, args: Arguments, index: int) -> Sequence[ir.Operation]:
    return reduce(importer, node, ("maximum", "argmax")[index], args["self"], args["dim"])


@converts_results(_aten.min.dim)
def _min_dim(importer: Importer, node: fx.Node, args: Arguments, index: int) -> Sequence[ir.Operation]:
    return reduce(importer, node, ("minimum", "argmin")[index], args["self"], args["dim"])


@converts_results(_aten.var_mean.correction)
def _variance_and_mean(importer: Importer, node: fx.Node, args: Arguments, index: int) -> Sequence[ir.Operation]:
    if index:
        return reduce(importer, node, "mean", args["self"], args["dim"])
    return _variance(importer, node, args)


def _variance(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    value, dims = args["self"], args["dim"]
    shape = importer.operand(node, value).shape
    count = math.prod(shape[dim] for dim in dims) if dims else math.prod(shape)
    correction = 1 if args["correction"] is None else args["correction"]
    return reduce(importer, node, "variance", value, dims, (max(float(count - correction), 0.0),))


converts(_aten.var.correction)(_variance)


def _scan(function: str) -> Converter:
    """The converter of a running sum or product."""

    def convert(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
        head = importer.typed_head(node, arithmetic_type(importer, node), args["self"])
        shape = head["output"].shape or (1,)
        return ir.Scan(**head, function=function, axis=_axis(importer, node, shape, args["dim"]))

    return convert


converts(_aten.cumsum.default)(_scan("running_sum"))
converts(_aten.cumprod.default)(_scan("running_product"))


@converts(_aten.linalg_vector_norm.default)
def _vector_norm(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    return _norm_of_order(importer, node, args["self"], args["ord"], args["dim"])


@converts(_aten.norm.ScalarOpt_dim)
def _norm(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    return _norm_of_order(importer, node, args["self"], 2 if args["p"] is None else args["p"], args["dim"])


def _norm_of_order(importer: Importer, node: fx.Node, value: Any, order: float, dim: Any) -> Sequence[ir.Operation]:
    """The root of the sum of powers of magnitudes; their extreme for an infinite order, what is not 0 for order 0."""
    importer.head(node, value)  # floats alone
    shape = importer.operand(node, value).shape
    first, last = _NORMS.get(order, (("abs", ()), ()))
    terms = _before(importer, node, "magnitudes", first, value, shape)
    if order not in _NORMS and not math.isinf(order):
        terms = _before(importer, node, "terms", ("pow_scalar", (float(order),)), terms, shape)
        last = ("pow_scalar", (1 / order,))
    function = "sum" if not math.isinf(order) else "maximum" if order > 0 else "minimum"
    *moves, reduction = reduce(importer, node, function, terms, dim)
    if not last:
        return *moves, reduction
    total = importer.temporary(node, "total", reduction.output.shape)
    root = ir.Unary(node.name, reduction.layer, (total,), reduction.output, *last)
    return *moves, replace(reduction, name=total.name, output=total), root


# What becomes of the elements, and of their sum.
_NORMS: dict[float, tuple[tuple[str, tuple[float, ...]], Any]] = {
    0: (("not_equal_scalar", (0.0,)), ()),
    1: (("abs", ()), ()),
    2: (("square", ()), ("sqrt", ())),
}


def _before(
    importer: Importer, node: fx.Node, name: str, function: tuple[str, tuple[float, ...]], value: Any, shape: Any
) -> ir.Value:
    """A function of each element, which runs before what the node becomes."""
    dtype: ir.DType = "bool" if function[0] == "not_equal_scalar" else "float32"
    output = importer.temporary(node, name, shape, dtype)
    head = importer.head(node, value)
    return importer.add_before(ir.Unary(output.name, head["layer"], head["inputs"], output, *function))


@converts(_aten.layer_norm.default)
def _layer_norm(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return _norm_rows(importer, node, args["input"], args, math.prod(args["normalized_shape"]))


@converts_results(_aten.native_layer_norm.default)
def _native_layer_norm(importer: Importer, node: fx.Node, args: Arguments, index: int) -> ir.Operation:
    return _norm_rows(importer, node, args["input"], args, math.prod(args["normalized_shape"]))


def _norm_rows(importer: Importer, node: fx.Node, value: Any, args: Arguments, columns: int) -> ir.Operation:
    weight, bias = (importer.optional_constant(node, args[name]) for name in ("weight", "bias"))
    head = importer.head(node, value)
    return ir.Norm(**head, columns=columns, eps=float(args["eps"]), weight=weight, bias=bias)


@converts(_aten.group_norm.default)
def _group_norm(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    return _norm_groups(importer, node, args, args["num_groups"])


@converts(_aten.instance_norm.default)
def _instance_norm(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    if not args["use_input_stats"]:
        raise importer.unsupported(node, "it uses running statistics")
    return _norm_groups(importer, node, args, importer.operand(node, args["input"]).shape[1])


def _norm_groups(importer: Importer, node: fx.Node, args: Arguments, groups: int) -> Sequence[ir.Operation]:
    """Rows of whole groups are normalised; then each channel has its factor and addend."""
    head = importer.head(node, args["input"])
    _, channels, *image = head["output"].shape
    columns = channels // groups * math.prod(image)
    weight, bias = (importer.optional_constant(node, args[name]) for name in ("weight", "bias"))
    eps = float(args["eps"])
    if weight is None and bias is None:
        return (ir.Norm(**head, columns=columns, eps=eps, weight=None, bias=None),)
    plain = importer.temporary(node, "plain", head["output"].shape)
    norm = ir.Norm(plain.name, head["layer"], head["inputs"], plain, columns, eps, None, None)
    weight = weight or importer.new_constant(f"{head['layer']}.ones", np.ones(channels, np.float32))
    bias = bias or importer.new_constant(f"{head['layer']}.zeros", np.zeros(channels, np.float32))
    affine = ir.ChannelAffine(**head | {"inputs": (plain,)}, scale=weight, shift=bias, inner=math.prod(image))
    return norm, affine


def _pool(function: str, dims: int) -> Converter:
    """The converter of a pooling in one or two dimensions."""

    def convert(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
        head = importer.head(node, args["self"])
        (source,), output = head["inputs"], head["output"]
        stride = args["stride"] or args["kernel_size"]
        window = ir.Window(
            input=pair(source.shape[-dims:]),
            output=pair(output.shape[-dims:]),
            kernel=pair(args["kernel_size"], dims),
            stride=pair(stride, dims),
            padding=pair(args["padding"], dims, missing=0),
            dilation=pair(args.get("dilation", (1,)), dims),
        )
        return ir.Pool(
            **head,
            function=function,
            planes=math.prod(source.shape[:-dims]),
            window=window,
            include_padding=args.get("count_include_pad", True),
            divisor=args.get("divisor_override") or 0,
        )

    return convert


converts(_aten.max_pool1d.default)(_pool("max_pool", 1))
converts(_aten.max_pool2d.default)(_pool("max_pool", 2))
converts(_aten.avg_pool1d.default)(_pool("avg_pool", 1))
converts(_aten.avg_pool2d.default)(_pool("avg_pool", 2))


def _adaptive(function: str, reduction: str, dims: int) -> Callable[..., ir.Operation]:
    """The converter of an adaptive pooling; to one pixel it is a plain reduction."""

    def convert(importer: Importer, node: fx.Node, args: Arguments, index: int = 0) -> ir.Operation:
        if index:
            raise importer.unsupported(node, "the indices of a pooling are not supported")
        head = importer.head(node, args["self"])
        (source,), output = head["inputs"], head["output"]
        planes, size = math.prod(source.shape[:-dims]), math.prod(source.shape[-dims:])
        if output.size == planes:
            return ir.Reduce(**head, function=reduction, axis=ir.Axis(planes, size, 1))
        sizes = (pair(source.shape[-dims:]), pair(output.shape[-dims:]))
        return ir.Resample(**head, function=function, planes=planes, input_size=sizes[0], output_size=sizes[1])

    return convert


converts(_aten.adaptive_avg_pool1d.default)(_adaptive("adaptive_avg_pool", "mean", 1))
converts(_aten.adaptive_avg_pool2d.default)(_adaptive("adaptive_avg_pool", "mean", 2))
converts_results(_aten.adaptive_max_pool1d.default)(_adaptive("adaptive_max_pool", "maximum", 1))
converts_results(_aten.adaptive_max_pool2d.default)(_adaptive("adaptive_max_pool", "maximum", 2))


def pair(sizes: Sequence[int], dims: int | None = None, missing: int = 1) -> tuple[int, int]:
    """Sizes as (height, width): a single one is that of all ``dims``, and 1-D has the height ``missing``."""
    sizes = [sizes] if isinstance(sizes, int) else list(sizes)
    if dims is not None and len(sizes) == 1:
        sizes *= dims
    height, width = sizes if len(sizes) == 2 else (missing, sizes[0])
    return height, width
