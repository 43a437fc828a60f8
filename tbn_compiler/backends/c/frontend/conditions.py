"""Comparisons, logic, and the choice between elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.elementwise import binary, with_number
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.registry import Arguments, Converter, converts

_aten = torch.ops.aten

# Each with the one that compares the other way round.
_COMPARISONS = {
    "eq": ("equal", "equal"),
    "ne": ("not_equal", "not_equal"),
    "lt": ("less", "greater"),
    "le": ("less_equal", "greater_equal"),
    "gt": ("greater", "less"),
    "ge": ("greater_equal", "less_equal"),
}


def _comparison(function: str, turned: str) -> Converter:
    functions = (function, f"{function}_scalar", f"{turned}_scalar")

    def convert(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
        a, b = args["self"], args["other"]
        both = torch.result_type(*(x.meta["val"] if isinstance(x, fx.Node) else x for x in (a, b)))
        return with_number(importer, node, functions, a, b, "float32" if both.is_floating_point else "int32")

    return convert


for _name, _functions in _COMPARISONS.items():
    converts(*(getattr(getattr(_aten, _name), kind) for kind in ("Tensor", "Scalar")))(_comparison(*_functions))


def _kind(function: str) -> Converter:
    """The converter of a question about each number."""
    return lambda importer, node, args: ir.Unary(
        **importer.typed_head(node, "float32", args["self"]), function=function
    )


converts(_aten.isnan.default)(_kind("is_nan"))
converts(_aten.isinf.default)(_kind("is_infinite"))


def _logic(function: str) -> Converter:
    def convert(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
        return binary(importer, node, f"logical_{function}", args["self"], args["other"], "bool")

    return convert


def _bits(function: str) -> Converter:
    """The converter of what is logic on booleans, and an operation on bits of integers."""

    def convert(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
        kind = "logical" if importer.value_of(node).dtype == "bool" else "bitwise"
        return binary(importer, node, f"{kind}_{function}", args["self"], args["other"])

    return convert


for _name in ("and", "or", "xor"):
    converts(getattr(_aten, f"logical_{_name}").default)(_logic(_name))
    _targets = getattr(_aten, f"bitwise_{_name}"), getattr(_aten, f"__{_name}__")
    converts(*(getattr(target, kind) for target in _targets for kind in ("Tensor", "Scalar")))(_bits(_name))


@converts(_aten.logical_not.default)
def _not(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return ir.Unary(**importer.typed_head(node, "bool", args["self"]), function="logical_not")


@converts(_aten.bitwise_not.default)
def _bitwise_not(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    dtype = importer.value_of(node).dtype
    function = "logical_not" if dtype == "bool" else "bitwise_not"
    return ir.Unary(**importer.typed_head(node, dtype, args["self"]), function=function)


@converts(_aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar)
def _where(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return _select(importer, node, args["condition"], args["self"], args["other"])


@converts(_aten.masked_fill.Scalar, _aten.masked_fill.Tensor)
def _masked_fill(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return _select(importer, node, args["mask"], args["value"], args["self"])


def _select(importer: Importer, node: fx.Node, shown: Any, a: Any, b: Any) -> ir.Operation:
    return importer.select(node, shown, a, b, importer.value_of(node))
