"""Which function chooses the kernels for which kind of operation, and what it may ask."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.costs import Work, instructions
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.plan import Call, Implementation


class Context:
    """What the choice of kernels for one program may ask.

    Attributes:
        options: what the user chose.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self._prepared: dict[tuple[ir.Constant, str, bytes], ir.Constant] = {}
        self._computed: dict[tuple[object, ...], ir.Constant] = {}

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

    def constant(self, name: str, array: np.ndarray) -> ir.Constant:
        """A constant computed for one layer; equal arrays of that name are stored once."""
        key = (name, array.dtype.name, array.shape, array.tobytes())
        if key not in self._computed:
            stored = np.array(array, order="C")
            stored.flags.writeable = False
            self._computed[key] = ir.Constant(name, stored)
        return self._computed[key]

    def implementation(self, title: str, calls: tuple[Call, ...], work: Work, choice: str = "") -> Implementation:
        """An implementation whose cost is that of its work and calls on the target."""
        work = {**work, "call": sum(call.repeat * call.inner for call in calls)}
        return Implementation(title, calls, instructions(work, self.options.processor.costs), choice, work=work)

    def fastest(self, small: Implementation, *others: Implementation) -> Implementation:
        """The implementation with the fewest estimated instructions, and why.

        Args:
            small: the one with the least code and memory; it is taken to save those, and where another one is hardly
                faster.
            others: what else there is.
        """
        if self.options.optimize == "size":
            return replace(small, choice="least code") if others else small
        best = min(others, key=lambda other: other.cost, default=small)
        if best.cost > _WORTHWHILE * small.cost:
            best = small
        if not others:
            return best
        second = min((other for other in (small, *others) if other is not best), key=lambda other: other.cost)
        choice = f"about {best.cost:,} instructions; {second.calls[0].kernel} takes {second.cost:,}"
        return replace(best, choice=choice)


# More code has to save a tenth of the instructions.
_WORTHWHILE = 0.9

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
