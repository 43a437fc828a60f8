"""Which function chooses the kernels for which kind of operation, and what it may ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.plan import Implementation


class Context:
    """What the choice of kernels for one program may ask.

    Attributes:
        options: what the user chose.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._prepared: dict[tuple[ir.Constant, str, bytes], ir.Constant] = {}

    def prepare(self, source: ir.Constant, name: str, make: Callable[[], np.ndarray], key: bytes = b"") -> ir.Constant:
        """A constant made from another one at export time, such as a tile in another order.

        Args:
            source: what it is made from.
            name: tells apart what is made from the same source; layers that share the source share the result.
            make: returns the array; it is called once.
            key: tells apart what has the same source and name, where the name does not.
        """
        found = (source, name, key)
        if found not in self._prepared:
            array = np.ascontiguousarray(make())
            array.flags.writeable = False
            self._prepared[found] = ir.Constant(f"{source.name}_{name}", array, packed=array.dtype == np.uint8)
        return self._prepared[found]


_Operation = TypeVar("_Operation", bound=ir.Operation)
_Implement = Callable[[Any, Context], Implementation]
_IMPLEMENTATIONS: dict[type[ir.Operation], _Implement] = {}


def implements(kind: type[_Operation]) -> Callable[[Callable[[_Operation, Context], Implementation]], _Implement]:
    """Register a function that chooses the kernels for one kind of operation."""

    def register(function: Callable[[_Operation, Context], Implementation]) -> _Implement:
        _IMPLEMENTATIONS[kind] = function
        return function

    return register


def implement(operation: ir.Operation, context: Context) -> Implementation:
    """Choose the kernels for an operation."""
    return _IMPLEMENTATIONS[type(operation)](operation, context)
