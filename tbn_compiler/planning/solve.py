"""Choosing one option for each layer by an integer program.

With ``x[l, o] = 1`` where layer ``l`` takes option ``o``::

    minimise    sum objective[l, o] x[l, o]                     or z, the largest of them
    subject to  sum_o x[l, o] = 1                               each layer
                sum cost[l, o] x[l, o] <= limit                 each cost that adds up
                sum_o cost[l, o] x[l, o] <= limit               each layer, and each cost of which the largest counts
                x[i, float] = x[j, float]                       views of one parameter
                sum of x over a choice <= number of layers - 1  each choice that is excluded

HAWQ-V3 (arXiv 2011.10680) and AdaQuant (arXiv 2006.10518) allocate bit widths so. The solver is HiGHS, through
``scipy.optimize.milp``; it proves that no choice is better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tbn_compiler.errors import TBNError

Choice = Mapping[str, str]
"""The option of each layer, by name."""
Values = Mapping[tuple[str, str], float]
"""A number for each layer and option."""

# What objectives and rows are scaled to: the solver takes differences under 1e-6 for none.
_RANGE, _ROW_RANGE = 1e4, 1e5


@dataclass(frozen=True)
class Term:
    """A figure of a choice.

    Attributes:
        values: of each layer and option that is allowed.
        largest: the largest of the layers' values counts, instead of their sum.
        rest: what all else adds, or is at least.
    """

    values: Values
    largest: bool = False
    rest: float = 0.0

    def of(self, choice: Choice) -> float:
        """The figure of a choice."""
        parts = [self.values[item] for item in choice.items()]
        return max([self.rest, *parts]) if self.largest else self.rest + math.fsum(parts)


@dataclass(frozen=True)
class Problem:
    """What to choose from, and under which limits.

    Attributes:
        options: of each layer, in order of preference where all is equal.
        together: groups of layers that are float together or not at all.
        limits: figures with the largest value that they may have.
        excluded: choices that are not to be taken.
    """

    options: Mapping[str, Sequence[str]]
    together: Sequence[Sequence[str]] = ()
    limits: Sequence[tuple[Term, float]] = ()
    excluded: Sequence[Choice] = ()

    def allows(self, choice: Choice) -> bool:
        """Whether a choice keeps all limits, in exact arithmetic."""
        apart = any(len({choice[name] == "float" for name in group}) > 1 for group in self.together)
        within = all(term.of(choice) <= limit for term, limit in self.limits)
        return within and not apart and not any(dict(choice) == dict(other) for other in self.excluded)


def solve(problem: Problem, objective: Term) -> dict[str, str] | None:
    """The choice with the least objective, proven; ``None`` if no choice keeps the limits.

    Raises:
        TBNError: scipy is not installed, or the solver gives up.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp  # only a plan needs it
        from scipy.sparse import csr_array
    except ImportError as error:
        raise TBNError(
            "a plan is found by scipy.optimize.milp, and scipy is not installed: pip install 'tbn-compiler[plan]'"
        ) from error
    excluded = list(problem.excluded)
    while True:
        rows = _Rows(problem, objective, excluded)
        if rows.empty_layer:
            return None
        matrix = csr_array((rows.data, (rows.at, rows.columns)), shape=(len(rows.lower), rows.width))
        bounds = Bounds([0.0] * len(rows.items) + [-math.inf] * (rows.width - len(rows.items)), rows.upper_bounds)
        result: Any = milp(
            rows.costs,
            integrality=[1] * len(rows.items) + [0] * (rows.width - len(rows.items)),
            bounds=bounds,
            constraints=LinearConstraint(matrix, rows.lower, rows.upper),
            options={"mip_rel_gap": 0.0},
        )
        if result.status == 2:  # infeasible
            return None
        if result.status != 0:
            raise TBNError(f"the solver found no plan: {result.message}")
        choice = {layer: option for (layer, option), x in zip(rows.items, result.x, strict=False) if x > 0.5}
        if problem.allows(choice) and choice not in excluded:
            return choice
        excluded.append(choice)  # over a limit by less than the solver's tolerance


class _Rows:
    """The program as rows of a sparse matrix."""

    def __init__(self, problem: Problem, objective: Term, excluded: Sequence[Choice]) -> None:
        caps = [(term, limit) for term, limit in problem.limits if term.largest]
        self.items = [
            (layer, option)
            for layer, options in problem.options.items()
            for option in options
            if math.isfinite(objective.values[layer, option])
            and all(math.isfinite(term.values[layer, option]) for term, _ in problem.limits)
            and all(term.values[layer, option] <= limit for term, limit in caps)
        ]
        layers = {layer for layer, _ in self.items}
        self.empty_layer = len(layers) < len(problem.options) or any(term.rest > limit for term, limit in caps)
        self.number = {item: index for index, item in enumerate(self.items)}
        self.width = len(self.items) + objective.largest
        self.data: list[float] = []
        self.at: list[int] = []
        self.columns: list[int] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        top = max([1e-300, *(abs(objective.values[item]) for item in self.items)])
        scaled = {item: objective.values[item] * _RANGE / top for item in self.items}
        self.costs = [0.0] * len(self.items) + [1.0] if objective.largest else list(scaled.values())
        self.upper_bounds = [1.0] * len(self.items) + [math.inf] * objective.largest
        for layer in problem.options:
            self._add({item: 1.0 for item in self.items if item[0] == layer}, 1.0, 1.0)
        for term, limit in problem.limits:
            if not term.largest:
                room = limit - term.rest
                unit = max([1e-300, abs(room), *(abs(term.values[item]) for item in self.items)]) / _ROW_RANGE
                self._add({i: term.values[i] / unit for i in self.items}, -math.inf, room / unit)
        for group in problem.together:
            for name in group[1:]:
                self._add({(group[0], "float"): 1.0, (name, "float"): -1.0}, 0.0, 0.0)
        for choice in excluded:
            self._add(dict.fromkeys(choice.items(), 1.0), -math.inf, len(choice) - 1.0)
        if objective.largest:
            for layer in problem.options:
                row = {item: scaled[item] for item in self.items if item[0] == layer}
                self._add(row, -math.inf, 0.0, {len(self.items): -1.0})

    def _add(
        self, row: Mapping[tuple[str, str], float], lower: float, upper: float, more: Mapping[int, float] | None = None
    ) -> None:
        entries = {self.number[item]: value for item, value in row.items() if item in self.number} | dict(more or {})
        self.at += [len(self.lower)] * len(entries)
        self.columns += entries
        self.data += entries.values()
        self.lower.append(lower)
        self.upper.append(upper)
