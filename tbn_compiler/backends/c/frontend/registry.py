"""Which function converts which operator of an exported program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from tbn_compiler.backends.c import ir

if TYPE_CHECKING:
    from tbn_compiler.backends.c.frontend.importer import Importer

# All arguments of the operator's call by name, defaults included.
Arguments = dict[str, Any]
# One operation, or several of which the last one gives the node's value.
Converter = Callable[["Importer", fx.Node, Arguments], ir.Operation | Sequence[ir.Operation]]
# For an operator that returns several tensors: as above, for the result with this index.
ResultConverter = Callable[["Importer", fx.Node, Arguments, int], ir.Operation | Sequence[ir.Operation]]

CONVERTERS: dict[Any, Converter] = {}
RESULT_CONVERTERS: dict[Any, ResultConverter] = {}

# Checks: of shapes and types, which are fixed here anyway, and of elements, which C does not stop for.
SKIPPED = {torch.ops.aten._assert_tensor_metadata.default, torch.ops.aten._assert_async.msg}


def converts(*targets: Any) -> Callable[[Converter], Converter]:
    """Register the converter of operators that return one tensor."""

    def register(function: Converter) -> Converter:
        CONVERTERS.update(dict.fromkeys(targets, function))
        return function

    return register


def converts_results(*targets: Any) -> Callable[[ResultConverter], ResultConverter]:
    """Register the converter of operators that return several tensors: it is asked for each result in use."""

    def register(function: ResultConverter) -> ResultConverter:
        RESULT_CONVERTERS.update(dict.fromkeys(targets, function))
        return function

    return register


def supported_operators() -> list[str]:
    """Names of the operators that the C backend accepts."""
    return sorted(map(str, (*CONVERTERS, *RESULT_CONVERTERS)))
