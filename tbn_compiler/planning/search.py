"""Solving with the costs as they are estimated, until the figures of the whole model keep the budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import TBNError
from tbn_compiler.planning.costs import Costs
from tbn_compiler.planning.layers import PlannableLayer, exact_pattern, with_options
from tbn_compiler.planning.options import LayerOption
from tbn_compiler.planning.solve import Choice, Problem, Term, solve

LOSS = "loss"  # among limits and objectives, beside the costs: the predicted change
_MOST_TRIES = 12  # plans of the C backend that a search may take


class Search:
    """The search for one plan.

    Args:
        layers: what can be tiled, each with its options.
        options: all of them.
        config: what layers have beside their option.
        costs: of the whole model.
        terms: of each layer and option, of all costs and of the predicted change.
        limits: largest values.
        objective: what is to be least.
    """

    def __init__(
        self,
        layers: Iterable[PlannableLayer],
        options: Iterable[LayerOption],
        config: TilingConfig,
        costs: Costs,
        terms: Mapping[str, Term],
        limits: Mapping[str, float],
        objective: str,
    ) -> None:
        self.named = {option.name: option for option in options}
        self.config, self.costs, self.terms, self.limits, self.objective = config, costs, terms, limits, objective
        self.choices = {layer.name: tuple(layer.specs) for layer in layers}
        parts: dict[str, list[str]] = {}
        for layer in layers:
            if layer.parameter:
                parts.setdefault(layer.parameter, []).append(layer.name)
        self.together = tuple(map(tuple, parts.values()))

    def config_of(self, choice: Choice) -> TilingConfig:
        """The config that gives each layer its option."""
        return with_options(self.config, {exact_pattern(name): self.named[option] for name, option in choice.items()})

    def best(self) -> dict[str, str]:
        """The best choice.

        Raises:
            TBNError: none keeps the budget.
        """
        found: list[tuple[float, float, dict[str, str]]] = []
        refused: list[dict[str, str]] = []
        none = dict.fromkeys(self.costs.names, 0.0)
        corrections = none
        for _ in range(_MOST_TRIES):
            choice = self._solve(corrections, refused)
            if choice is None and not found and corrections != none:
                corrections = none  # they were those of another choice, and too much for this one
                continue
            if choice is None or any(choice == earlier for *_, earlier in found):
                break
            real = self._figures(choice)
            estimated = {name: self.terms[name].of(choice) for name in none}
            if self._fits(real):
                found.append((real[self.objective], real[LOSS], choice))
                if all(math.isclose(real[name], estimated[name], abs_tol=0.5) for name in none):
                    break
            else:
                refused.append(choice)
            corrections = {name: real[name] - estimated[name] for name in none}
        if not found:
            least = self._least()
            found = [(f[self.objective], f[LOSS], choice) for choice, f in least.values() if self._fits(f)]
            if not found:
                raise TBNError(self._why_none({name: figures[name] for name, (_, figures) in least.items()}))
        return min(found, key=lambda item: item[:2])[2]

    def _figures(self, choice: Choice) -> dict[str, float]:
        """What a choice costs, and the change that is predicted for it."""
        return {LOSS: self.terms[LOSS].of(choice), **self.costs.of(self.config_of(choice))}

    def _fits(self, figures: Mapping[str, float]) -> bool:
        return all(figures[name] <= limit for name, limit in self.limits.items())

    def _solve(self, corrections: Mapping[str, float], refused: list[dict[str, str]]) -> dict[str, str] | None:
        limits = [(self.terms[name], limit - corrections.get(name, 0.0)) for name, limit in self.limits.items()]
        problem = Problem(self.choices, self.together, limits, refused)
        choice = solve(problem, self.terms[self.objective])
        if choice is None or self.objective == LOSS:
            return choice
        # Of all that cost least, the one with the least loss. Costs are whole numbers.
        least = (self.terms[self.objective], self.terms[self.objective].of(choice) + 0.5)
        return solve(Problem(self.choices, self.together, [*limits, least], refused), self.terms[LOSS])

    def _least(self) -> dict[str, tuple[dict[str, str], dict[str, float]]]:
        """For each limit the choice with the least of it, within the others where there is one, and its figures."""
        found = {}
        for name in self.limits:
            others = [(self.terms[other], limit) for other, limit in self.limits.items() if other != name]
            alone = solve(Problem(self.choices, self.together), self.terms[name])
            choice = solve(Problem(self.choices, self.together, others), self.terms[name]) or alone
            if choice is not None and alone is not None:
                within = self._figures(choice)
                least = self._figures(alone)
                # What cannot be reached at all is what a user has to know first.
                found[name] = (alone, least) if least[name] > self.limits[name] else (choice, within)
        return found

    def _rest(self, name: str) -> str:
        rest = 0 if self.terms[name].largest else round(self.terms[name].rest)
        return f" ({rest:,} of them beside the layers that can be tiled)" if rest > 0 else ""

    def _why_none(self, least: Mapping[str, float]) -> str:
        """What can be reached where the budget cannot."""
        if not least:
            return "no choice of the candidates has a finite loss: see the sensitivity"
        told = ", ".join(
            f"{name} at most {limit:,.12g}, and the least is {least[name]:,.12g}{self._rest(name)}"
            for name, limit in self.limits.items()
            if least[name] > limit
        )
        told = told or ", ".join(f"{name} at most {limit:,.12g}" for name, limit in self.limits.items())
        which = "the budget" if len(self.limits) == 1 else "all budgets together"
        return f"no plan of these candidates keeps {which}: {told}. Raise it, or add candidates with a larger p"
