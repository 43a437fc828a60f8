"""Figures of the whole model that are not the sum of its layers': what is chosen keeps the budget all the same."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from torch import nn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig
from tbn_compiler.planning.costs import Costs
from tbn_compiler.planning.layers import PlannableLayer
from tbn_compiler.planning.options import parse_options
from tbn_compiler.planning.search import LOSS, Search
from tbn_compiler.planning.solve import Term

pytest.importorskip("scipy")

OPTIONS = parse_options(["binary", 2, 4])
NAMES = ("a", "b", "c")


class Interacting(Costs):
    """Costs of a model that is not there: the sum of the layers', and something for each choice."""

    def __init__(self, term: Term, extra: dict[tuple[int, ...], int]) -> None:
        super().__init__(nn.Identity(), ("flash",), example_inputs=())
        self.__dict__.update(term=term, extra=extra, calls=0)

    def of(self, config: TilingConfig) -> dict[str, int]:
        copies = tuple(config.for_layer(name).p for name in NAMES)
        choice = {name: "binary" if p == 1 else f"p={p}" for name, p in zip(NAMES, copies, strict=True)}
        self.__dict__["calls"] += 1
        return {"flash": round(self.__dict__["term"].of(choice)) + self.__dict__["extra"][copies]}


def searched(seed: int, spread: tuple[int, int]) -> tuple[list[tuple[float, int]], Any, Interacting]:
    """Loss and real cost of every choice, how to search under a limit, and the costs."""
    draw = random.Random(seed)
    items = list(itertools.product(NAMES, [option.name for option in OPTIONS]))
    loss, cost = (Term({item: float(draw.randint(0, top)) for item in items}) for top in (50, 400))
    extra = {copies: draw.randint(*spread) for copies in itertools.product((1, 2, 4), repeat=3)}
    costs = Interacting(cost, extra)
    layers = [PlannableLayer(n, "linear", (8, 8), "", dict.fromkeys([o.name for o in OPTIONS])) for n in NAMES]

    def search(limit: float) -> tuple[float, int]:
        terms, limits = {LOSS: loss, "flash": cost}, {"flash": limit}
        found = Search(layers, OPTIONS, TilingConfig(), costs, terms, limits, LOSS)
        choice = found.best()
        return loss.of(choice), costs.of(found.config_of(choice))["flash"]

    every = []
    for copies in extra:
        choice = {name: "binary" if p == 1 else f"p={p}" for name, p in zip(NAMES, copies, strict=True)}
        every.append((loss.of(choice), round(cost.of(choice)) + extra[copies]))
    return every, search, costs


@pytest.mark.parametrize("seed", range(8))
def test_the_real_figure_keeps_the_budget(seed: int) -> None:
    every, search, costs = searched(seed, (-30, 60))
    limit = sorted(cost for _, cost in every)[8]
    loss, cost = search(limit)
    assert cost <= limit
    assert loss >= min(change for change, real in every if real <= limit)
    # No worse than what is found where every layer is taken to need all that any choice does.
    careful = [change for change, real in every if real + 90 <= limit]
    assert not careful or loss <= min(careful)
    assert costs.__dict__["calls"] <= 20


@pytest.mark.parametrize("seed", range(4))
def test_sums_are_exact_at_once(seed: int) -> None:
    every, search, costs = searched(seed, (0, 0))
    limit = sorted(cost for _, cost in every)[8]
    assert search(limit)[0] == min(change for change, real in every if real <= limit)
    assert costs.__dict__["calls"] == 2  # the choice's own figures, and this test's


def test_nothing_keeps_the_budget() -> None:
    every, search, _ = searched(0, (20, 20))
    least = min(cost for _, cost in every)
    with pytest.raises(tbn.TBNError, match=f"flash at most {least - 1}, and the least is {least}"):
        search(least - 1)
    assert search(least)[1] == least
