"""What a training step costs: that all forms of a network are measured, and what is made of the measurements."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import training
from benchmarks.training import CASES, FORMS, Case, goals, measure, steps, table


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), (4, 16), {"min_size": 0}, 1.5)
    monkeypatch.setattr(training, "CASES", {"small": case})


def test_measures_all_forms_of_a_network(small: None) -> None:
    row = measure("small", 4, repeats=1)
    assert row.keys() == {"network", "p", *FORMS}
    assert all(row[form]["milliseconds"] > 0 and row[form]["kept_bytes"] > 0 for form in FORMS)
    weights, biases = 16 * 32 + 32 * 8, 32 + 8
    assert row["float"]["state_bytes"] == 12 * (weights + biases)
    assert row["weight"]["state_bytes"] == 12 * (2 * weights + biases)  # W and A
    assert row["tile"]["state_bytes"] == 12 * (weights // 4 + 2 + biases)  # the tile, and an alpha for each layer
    assert table([row]).count("small") == 1


def test_a_step_trains(small: None) -> None:
    for step in steps(training.CASES["small"], 4).values():
        before = [parameter.clone() for parameter in step.model.parameters()]
        step()
        assert any(not torch.equal(old, new) for old, new in zip(before, step.model.parameters(), strict=True))


def test_goals(small: None) -> None:
    def row(p: int, speedup: float) -> dict[str, Any]:
        return {"network": "small", "p": p, "tile": {"speedup": speedup}}

    assert goals([row(4, 1.5), row(8, 1.0)]) == {"small: 1.50x": True}
    assert goals([row(4, 1.49)]) == {"small: 1.50x": False}


@pytest.mark.parametrize("name", CASES)
def test_networks_take_their_inputs(name: str) -> None:
    case = CASES[name]
    with torch.device("meta"):
        model = case.build()
        assert training.first_tensor(model(torch.empty(case.shape))).shape[0] == case.shape[0]
