"""The integer program against trying every choice."""

from __future__ import annotations

import itertools
import math
import random
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tbn_compiler as tbn
from tbn_compiler.planning.solve import Problem, Term, solve

pytest.importorskip("scipy")


def every(problem: Problem) -> list[dict[str, str]]:
    names = list(problem.options)
    choices = (dict(zip(names, options, strict=True)) for options in itertools.product(*problem.options.values()))
    return [choice for choice in choices if problem.allows(choice)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_no_choice_is_better(seed: int) -> None:
    draw = random.Random(seed)
    options = {f"l{i}": tuple(["float", "a", "b", "c"][: draw.randint(1, 4)]) for i in range(draw.randint(1, 4))}
    items = [(layer, option) for layer, taken in options.items() for option in taken]
    scale = draw.choice([1e-6, 1.0, 1e7])

    def term(largest: bool) -> Term:
        values = {item: float(draw.randint(-3 if scale < 1 else 0, 9)) * scale for item in items}
        if draw.random() < 0.2:
            values[draw.choice(items)] = math.inf
        return Term(values, largest, draw.choice([0.0, 2 * scale]))

    limits = [(term(draw.random() < 0.3), draw.randint(0, 25) * scale) for _ in range(draw.randint(0, 3))]
    together = [draw.sample(list(options), 2)] if len(options) > 1 and draw.random() < 0.4 else []
    problem = Problem(options, together, limits)
    if draw.random() < 0.5:
        problem = Problem(options, together, limits, draw.sample(every(problem), min(3, len(every(problem)))))
    objective = term(draw.random() < 0.3)
    found = solve(problem, objective)
    values = [objective.of(choice) for choice in every(problem)]
    best = min((value for value in values if math.isfinite(value)), default=None)
    if best is None:
        assert found is None
    else:
        assert found is not None
        assert problem.allows(found)
        assert objective.of(found) == pytest.approx(best, rel=1e-9, abs=1e-9 * scale)


def test_the_last_byte_counts() -> None:
    """Limits hold exactly, also where they are large and the solver's own tolerance is not."""
    options = {"a": ("x", "y"), "b": ("x", "y")}
    size = 10**8
    cost = Term({("a", "x"): size, ("a", "y"): size - 1, ("b", "x"): size, ("b", "y"): size - 2})
    loss = Term({("a", "x"): 0.0, ("a", "y"): 1e-7, ("b", "x"): 0.0, ("b", "y"): 3e-7})
    wanted = {0: "xx", 1: "yx", 2: "xy", 3: "yy"}
    for saved, choice in wanted.items():
        found = solve(Problem(options, (), [(cost, 2.0 * size - saved)]), loss)
        assert found == dict(zip("ab", choice, strict=True))
    assert solve(Problem(options, (), [(cost, 2.0 * size - 4)]), loss) is None


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("huge", [1e9, 1e15, 1e30])
def test_small_differences_count_beside_a_huge_one(huge: float, largest: bool) -> None:
    """As one layer whose change of the loss is enormous makes of all others."""
    names = [f"l{i}" for i in range(8)]
    options = dict.fromkeys(names, ("a", "b", "c"))
    values = {(name, option): value for name in names for option, value in (("a", 0.003), ("b", 0.001), ("c", 0.002))}
    values["l0", "a"] = huge
    cost = {(name, option): 1.0 + (option == "b") for name in names for option in "abc"}
    found = solve(Problem(options, (), [(Term(cost), 12.0)]), Term(values, largest))
    assert found is not None
    best = 0.002 if largest else 4 * 0.001 + 4 * 0.002
    assert Term(values, largest).of(found) == pytest.approx(best, rel=1e-12)


def test_a_limit_beside_huge_values() -> None:
    """Options that are far over a limit do not blur it."""
    options = dict.fromkeys("xyz", ("a", "b", "c"))
    loss = {(name, option): value for name in "xyz" for option, value in (("a", 1e-9), ("b", 3e-9), ("c", 1e12))}
    size = {(name, option): value for name in "xyz" for option, value in (("a", 3.0), ("b", 1.0), ("c", 0.5))}
    assert solve(Problem(options, (), [(Term(loss), 5e-9)]), Term(size)) is not None
    found = solve(Problem(options, (), [(Term(loss), 5.5e-9)]), Term(size))
    assert found is not None
    assert sorted(found.values()) == ["a", "a", "b"]
    assert solve(Problem(options, (), [(Term(loss), 2.5e-9)]), Term(size)) is None


def test_a_limit_that_a_choice_just_keeps() -> None:
    """As a budget that is what an earlier plan costs, whatever rounding made of that."""
    values = {
        ("a", "x"): -0.5569784496877912,
        ("a", "float"): 0.0,
        ("b", "float"): 0.0,
        ("b", "y"): 2.2112450009068706e-07,
    }
    options = {"a": ["float", "x"], "b": ["float", "y"]}
    cost = Term({("a", "float"): 9, ("a", "x"): 1, ("b", "float"): 9, ("b", "y"): 1})
    limit = Term(values).of({"a": "x", "b": "y"})
    assert solve(Problem(options, limits=[(Term(values), limit)]), cost) == {"a": "x", "b": "y"}
    one = Term({("l", "float"): 0.1}, rest=5.0)
    assert solve(Problem({"l": ["float"]}, limits=[(one, 5.1)]), Term({("l", "float"): 1.0})) == {"l": "float"}


def test_scipy_is_asked_for(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(tbn.TBNError, match=r"scipy is not installed: pip install 'tbn-compiler\[plan\]'"):
        solve(Problem({"a": ("x",)}), Term({("a", "x"): 0.0}))
