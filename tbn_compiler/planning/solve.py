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
_TRIES = 1000


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
    excluded, best, bound = list(problem.excluded), None, math.inf
    for _ in range(_TRIES):
        rows = _Rows(problem, objective, excluded, bound)
        if rows.empty_layer:
            return best
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
            return best
        if result.status != 0:
            raise TBNError(f"the solver found no plan: {result.message}")
        choice = {layer: option for (layer, option), x in zip(rows.items, result.x, strict=False) if x > 0.5}
        if not problem.allows(choice) or choice in excluded:
            excluded.append(choice)  # over a limit by less than the solver's tolerance
            continue
        value = objective.of(choice)
        if best is None or value < bound:
            best, bound = choice, value
        # What is dear beyond this choice is left out; differences that were too small beside it count then.
        if _Rows(problem, objective, excluded, bound).top > rows.top / 10:
            return best
    raise TBNError(f"the solver found no plan in {_TRIES} tries: all were over a limit by less than it can tell")


class _Rows:
    """The program as rows of a sparse matrix.

    Options that no choice within the limits can take are left out, as are those that make the objective larger than
    ``bound``. Of each layer's numbers the least is taken off: what is left is small where it decides.
    """

    def __init__(self, problem: Problem, objective: Term, excluded: Sequence[Choice], bound: float = math.inf) -> None:
        caps = [(term, limit) for term, limit in problem.limits if term.largest]
        items = [
            (layer, option)
            for layer, options in problem.options.items()
            for option in options
            if math.isfinite(objective.values[layer, option])
            and all(math.isfinite(term.values[layer, option]) for term, _ in problem.limits)
            and all(term.values[layer, option] <= limit for term, limit in [*caps, *_cap(objective, bound)])
        ]
        sums = [(term, limit) for term, limit in [*problem.limits, (objective, bound)] if not term.largest]
        self.items = _possible(items, sums)
        layers = {layer for layer, _ in self.items}
        self.empty_layer = len(layers) < len(problem.options) or any(term.rest > limit for term, limit in caps)
        self.number = {item: index for index, item in enumerate(self.items)}
        self.width = len(self.items) + objective.largest
        self.data: list[float] = []
        self.at: list[int] = []
        self.columns: list[int] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        least = dict.fromkeys(layers, 0.0) if objective.largest else _least(self.items, objective)
        excess = {item: objective.values[item] - least[item[0]] for item in self.items}
        self.top = max([1e-300, *map(abs, excess.values())])
        scaled = {item: value * _RANGE / self.top for item, value in excess.items()}
        self.costs = [0.0] * len(self.items) + [1.0] if objective.largest else list(scaled.values())
        self.upper_bounds = [1.0] * len(self.items) + [math.inf] * objective.largest
        for layer in problem.options:
            self._add({item: 1.0 for item in self.items if item[0] == layer}, 1.0, 1.0)
        for term, limit in problem.limits:
            if not term.largest:
                least = _least(self.items, term)
                room = limit - term.rest - math.fsum(least.values()) + _slack(term, limit, self.items)
                taken = {item: term.values[item] - least[item[0]] for item in self.items}
                unit = max([1e-300, abs(room), *map(abs, taken.values())]) / _ROW_RANGE
                self._add({item: value / unit for item, value in taken.items()}, -math.inf, room / unit)
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


def _cap(objective: Term, bound: float) -> list[tuple[Term, float]]:
    return [(objective, bound)] if objective.largest else []


def _least(items: Sequence[tuple[str, str]], term: Term) -> dict[str, float]:
    """The least value of each layer."""
    least: dict[str, float] = {}
    for item in items:
        least[item[0]] = min(term.values[item], least.get(item[0], math.inf))
    return least


def _slack(term: Term, limit: float, items: Sequence[tuple[str, str]]) -> float:
    """So that rounding does not take what is just within a limit; what is over it is excluded when it is found."""
    return 1e-12 * max([abs(limit), abs(term.rest), *(abs(term.values[item]) for item in items)])


def _possible(items: Sequence[tuple[str, str]], limits: Sequence[tuple[Term, float]]) -> list[tuple[str, str]]:
    """The items that keep every limit if all other layers take their least."""
    kept, count = list(items), -1
    while len(kept) != count:
        count = len(kept)
        for term, limit in limits:
            if not math.isfinite(limit) or not kept:
                continue
            least = _least(kept, term)
            room = limit - term.rest - math.fsum(least.values())
            room += _slack(term, limit, kept)
            kept = [item for item in kept if term.values[item] - least[item[0]] <= room]
    return kept
