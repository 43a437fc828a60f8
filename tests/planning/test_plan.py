"""Plans: the config gives what was chosen, costs are those of the model, and no other choice is better."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig
from tbn_compiler.planning import LayerPlan
from tbn_compiler.planning.costs import COSTS, stored_bytes
from tbn_compiler.planning.options import parse_options

pytest.importorskip("scipy")

CANDIDATES: list[Any] = ["float", "binary", {"p": 4, "alpha": "tile"}]


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)]
    return nn.Sequential(*layers).eval()


@pytest.fixture(scope="module")
def measured(model: nn.Sequential) -> tbn.Sensitivity:
    torch.manual_seed(1)
    return tbn.sensitivity(model, [(torch.randn(64, 24), torch.randint(8, (64,)))], candidates=CANDIDATES)


X = torch.randn(1, 24)


def costs_of(model: nn.Module, config: TilingConfig) -> dict[str, int]:
    """By the summary of what transform gives."""
    rows = tbn.summary(tbn.transform(model, config), X).layers
    return {"bytes": sum(map(stored_bytes, rows)), "macs": sum(row.macs_tiled or 0 for row in rows)}


def every(measured: tbn.Sensitivity) -> list[tuple[dict[str, str], float, TilingConfig]]:
    """All choices with their predicted change and a config that a user would write for each."""
    options = {option.name: dict(option.options) for option in measured.options}
    found = []
    for names in itertools.product(*([name for name, _ in layer.changes] for layer in measured.layers)):
        choice = {layer.name: name for layer, name in zip(measured.layers, names, strict=True)}
        change = sum(measured[layer][name] for layer, name in choice.items())
        tiled = {layer: options[name] for layer, name in choice.items() if name != "float"}
        if tiled:
            floats = tuple(layer for layer, name in choice.items() if name == "float")
            found.append((choice, change, TilingConfig(overrides=tiled, float_layers=floats)))
    return found


def test_no_choice_is_better(model: nn.Sequential, measured: tbn.Sensitivity) -> None:
    all_choices = [(choice, change, costs_of(model, config)) for choice, change, config in every(measured)]
    assert len(all_choices) == 3**3 - 1  # all float is no tiling
    budgets: list[dict[str, float]] = [
        *({"bytes": limit} for limit in (150, 800, 5000)),
        *({"macs": limit} for limit in (500, 1200)),
        *({"bytes": 700, "macs": limit} for limit in (1000,)),
    ]
    for budget in budgets:
        fitting = [change for _, change, costs in all_choices if all(costs[k] <= v for k, v in budget.items())]
        found = tbn.plan(model, budget=budget, sensitivity=measured, example_inputs=X)
        assert found.change == pytest.approx(min(fitting), abs=1e-9), budget
        assert all(dict(found.costs)[name] <= limit for name, limit in budget.items())
    for name, loss in (("bytes", 0.0), ("macs", 0.0)):
        fitting = [costs[name] for _, change, costs in all_choices if change <= loss]
        found = tbn.plan(model, budget={"loss": loss}, objective=name, sensitivity=measured, example_inputs=X)
        assert dict(found.costs)[name] == min(fitting), (name, loss)
        cheapest = [c for _, c, costs in all_choices if costs[name] == min(fitting) and c <= loss]
        assert found.change == pytest.approx(min(cheapest), abs=1e-9)
        assert found.change <= loss


def test_the_config_gives_what_was_chosen(model: nn.Sequential, measured: tbn.Sensitivity) -> None:
    for limit in (300, 2000, 4500):
        found = tbn.plan(model, budget=limit, sensitivity=measured)
        qat = tbn.transform(model, found.config)
        rows = {row.name: row for row in tbn.summary(qat).layers}
        assert rows.keys() == found.choice.keys()
        options = {option.name: dict(option.options) for option in parse_options(CANDIDATES)}
        for layer in found.layers:
            row, option = rows[layer.name], options[layer.option.name]
            assert row.p == option.get("p") == layer.p
            assert row.alphas == (None if not option else 4 if "alpha" in option else 1)
            assert dict(layer.costs)["bytes"] == stored_bytes(row)
        assert dict(found.costs) == {"bytes": costs_of(model, found.config)["bytes"]}
        packed = tbn.lower(qat)
        assert packed(torch.randn(2, 24)).shape == (2, 8)
        assert TilingConfig(**json.loads(json.dumps(found.to_dict()["config"]))) == found.config


def test_bytes_are_those_of_the_stored_tensors(model: nn.Sequential) -> None:
    found = tbn.plan(model, budget=400, candidates=[2, {"p": 4, "alpha": "tile"}])
    state = tbn.lower(tbn.transform(model, found.config)).state_dict()
    stored = sum(value.nbytes for key, value in state.items() if key.endswith(("_tile", "_alpha")))
    assert dict(found.costs)["bytes"] == stored


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x)[0]
        return self.head(y)


def test_views_of_one_parameter_are_float_together() -> None:
    torch.manual_seed(0)
    model = Attention()
    found = tbn.plan(model, budget=2500, candidates=["float", 4])
    parts = {option for name, option in found.choice.items() if "in_proj" in name}
    assert parts == {"p=4"}  # one or two of the three in float would fit
    assert set(found.choice.values()) == {"float", "p=4"}
    roomy = tbn.plan(model, budget=4500, candidates=["float", 4])
    rows = {row.name: row.tiled for row in tbn.summary(tbn.transform(model, roomy.config)).layers}
    assert rows == {name: option != "float" for name, option in roomy.choice.items()}
    assert {option for name, option in roomy.choice.items() if "in_proj" in name} == {"float"}


def test_options_of_the_users_own_stay(model: nn.Sequential) -> None:
    config = TilingConfig(alpha="tile", overrides={"0": {"p": 8}}, float_layers=("4",))
    found = tbn.plan(model, budget=1000, config=config)
    assert found.choice.keys() == {"0", "2"}
    rows = tbn.summary(tbn.transform(model, found.config)).layers
    assert (rows[0].p, rows[0].alphas, rows[2].p) == (8, 8, None)
    assert dict(found.costs)["bytes"] == sum(map(stored_bytes, rows))  # with the float layer of 512 bytes


C_CANDIDATES: list[Any] = ["binary", 4]


def test_costs_in_c_are_those_of_the_written_file(model: nn.Sequential, tmp_path: Path) -> None:
    """Every choice is planned by the C backend here; the plan finds one that keeps the budget, and its figures."""
    measured = tbn.sensitivity(model, candidates=C_CANDIDATES)
    real = []
    for choice, change, config in every(measured):
        plan = tbn.export_c(tbn.transform(model, config), X, tmp_path / "net.c", target="cortex-m4")
        figures = {"flash": plan.weight_bytes, "ram": plan.scratch_bytes, "instructions": plan.cost}
        real.append((choice, change, figures))
    flash = sorted(figures["flash"] for *_, figures in real)
    ram = sorted(figures["ram"] for *_, figures in real)
    work = sorted(figures["instructions"] for *_, figures in real)
    for budget in (
        {"flash": flash[5], "instructions": work[4]},
        {"ram": ram[4], "flash": flash[6]},
    ):
        found = tbn.plan(
            model, budget=budget, sensitivity=measured, example_inputs=X, target="cortex-m4", candidates=C_CANDIDATES
        )
        (figures,) = (figures for choice, _, figures in real if choice == found.choice)
        costs = dict(found.costs)
        assert {name: costs[name] for name in budget} == {name: figures[name] for name in budget}
        fitting = [change for _, change, f in real if all(f[name] <= limit for name, limit in budget.items())]
        assert found.change == pytest.approx(min(fitting)), budget
    least = tbn.plan(model, objective="instructions", sensitivity=measured, example_inputs=X, target="cortex-m4")
    assert dict(least.costs)["instructions"] == work[0]


def test_what_cannot_be_reached(model: nn.Sequential, measured: tbn.Sensitivity) -> None:
    least = min(costs_of(model, config)["bytes"] for *_, config in every(measured))
    with pytest.raises(tbn.TBNError, match=rf"keeps the budget: bytes at most 10, and the least is {least}\. Raise it"):
        tbn.plan(model, budget=10, sensitivity=measured)
    best = sum(min(dict(layer.changes).values()) for layer in measured.layers)
    with pytest.raises(tbn.TBNError, match=rf"loss at most -9, and the least is {best:.6f}"):
        tbn.plan(model, budget={"loss": -9}, objective="bytes", sensitivity=measured)
    with pytest.raises(tbn.TBNError, match=f"keeps all budgets together: bytes at most {least}, and the least is"):
        tbn.plan(model, budget={"bytes": least, "loss": best}, sensitivity=measured)
    assert tbn.plan(model, budget={"bytes": least}, sensitivity=measured).costs == (("bytes", least),)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "the least loss needs a budget of a cost"),
        ({"budget": {"loss": 1}}, "the least loss needs a budget of a cost"),
        ({"budget": {"byte": 1}}, "budget of 'byte': there are loss, bytes, macs"),
        ({"budget": {"bytes": "1"}}, "the budget of bytes must be a finite number, got '1'"),
        ({"budget": {"bytes": math.nan}}, "must be a finite number, got nan"),
        ({"budget": 1, "objective": "speed"}, "objective='speed' is not one of"),
        ({"budget": {"macs": 1}}, r"the cost 'macs' \(multiply-adds\) is that of an input: give example_inputs"),
        ({"budget": 1, "target": "avr"}, "target='avr' is not one of generic"),
        ({"budget": 1, "sensitivity": 3}, "must be what tbn_compiler.sensitivity returned, got int"),
        ({"budget": 1, "candidates": ["float", 16]}, r"layer '0' has no 'p=16' \(p=16, 1 alpha from W\)"),
        ({"budget": 1, "config": TilingConfig(replicate="hadamard")}, r"has no 'p=4 alpha=tile' \(p=4, replicate='ha"),
    ],
)
def test_what_is_refused(model: nn.Sequential, measured: tbn.Sensitivity, options: dict[str, Any], told: str) -> None:
    with pytest.raises(tbn.ConfigError, match=told):
        tbn.plan(model, **({"sensitivity": measured} | options))


def test_a_tiling_is_known_by_what_it_is(model: nn.Sequential, measured: tbn.Sensitivity) -> None:
    """Not by its name or place: candidates may have another order, and overrides may come later."""
    found = tbn.plan(model, budget=1000, sensitivity=measured, candidates=[{"p": 4, "alpha": "tile"}, "float"])
    assert set(found.choice.values()) <= {"p=4 alpha=tile", "float"}
    config = TilingConfig(overrides={"4": {"p": 1}})
    kept = tbn.plan(model, budget=1000, sensitivity=measured, config=config, candidates=[{"alpha": "tile", "p": 4}, 1])
    assert kept.layers[2].p == 1
    assert kept.layers[2].change == measured["4"]["binary"]


def test_a_sensitivity_of_another_model(model: nn.Sequential, measured: tbn.Sensitivity) -> None:
    with pytest.raises(tbn.ConfigError, match=r"is not of this model: it has no layer '0' of \(32, 25\)"):
        tbn.plan(nn.Sequential(nn.Linear(25, 32)), budget=1000, sensitivity=measured)


def test_uses_that_nobody_can_count() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    assert tbn.plan(Product(), budget=40).choice == {"w_0": "binary"}
    with pytest.raises(tbn.ConfigError, match="how often the weight 'w_0' is used is not known"):
        tbn.plan(Product(), budget={"macs": 100}, example_inputs=torch.zeros(1, 16))


def test_tables_and_picture(model: nn.Sequential, measured: tbn.Sensitivity, tmp_path: Path) -> None:
    found = tbn.plan(model, budget={"bytes": 800, "macs": 1200}, sensitivity=measured, example_inputs=X)
    lines = str(found).splitlines()
    assert lines[0].split() == ["layer", "kind", "shape", "option", "p", "loss", "bytes", "macs"]
    assert "least loss; bytes at most 800, macs at most 1,200" in lines[-1]
    markdown = found.to_markdown().splitlines()
    assert len(markdown) == 2 + 3 + 1 + 2
    assert isinstance(found, LayerPlan)
    assert found.to_dict()["costs"].keys() <= COSTS.keys()
    pytest.importorskip("matplotlib")
    found.draw(tmp_path / "plan.svg")
    text = (tmp_path / "plan.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("0", "2", "4", "bytes", "macs"))


def test_the_model_stays_as_it_is(model: nn.Sequential) -> None:
    state, random_state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    tbn.plan(model, budget={"bytes": 800, "flash": 3000}, example_inputs=X, candidates=[4])
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("budget", ["bytes", [3], {"bytes": float("inf")}, float("nan")])
def test_budgets_that_are_none(budget: Any) -> None:
    with pytest.raises(tbn.ConfigError, match=r"budget must be a number of bytes|must be a finite number"):
        tbn.plan(nn.Linear(64, 64), budget=budget)
