from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig
from tbn_compiler.planning import Sweep


class Trainer:
    """A step of training, and a count of its calls."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, module: nn.Module) -> float:
        self.names.append(type(module).__name__)
        x = torch.randn(8, 16)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        loss = (module(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())


@pytest.fixture
def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))


POINTS: list[Any] = ["float", TilingConfig(p=4, min_size=0), TilingConfig(p=(2, 2), min_size=0)]


def test_points(model: nn.Sequential) -> None:
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = tbn.sweep(model, POINTS, Trainer(), metric="loss")
    assert [point.name for point in found.points] == ["float", "p=4", "p=2x2"]
    assert [point.bytes for point in found.points] == [2048, 24, 24]
    assert [point.bits_per_weight for point in found.points] == [32, 0.25, 0.25]
    assert found["float"].config is None
    assert found["p=4"].config == {"min_size": 0}
    assert found["p=2x2"].config == {"min_size": 0, "p": [2, 2]}
    assert all(math.isfinite(point.metric) and point.seconds >= 0 for point in found.points)
    # Nothing of the user's has changed, and every point had the same start.
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    alone = tbn.sweep(model, POINTS[2:], Trainer())
    assert alone["p=2x2"].metric == found["p=2x2"].metric
    assert tbn.sweep(model, POINTS[2:], Trainer(), seed=1)["p=2x2"].metric != found["p=2x2"].metric


def test_train_and_evaluate(model: nn.Sequential) -> None:
    seen: list[nn.Module] = []

    def evaluate(module: nn.Module) -> torch.Tensor:
        seen.append(module)
        return torch.tensor(0.5)

    found = tbn.sweep(model, {"mine": POINTS[1]}, seen.append, evaluate)
    assert seen[0] is seen[1]
    assert tbn.summary(seen[0]).totals["tiled_layers"] == 2
    assert (found["mine"].metric, found.metric) == (0.5, "accuracy")


def test_plans_and_budgets(model: nn.Sequential) -> None:
    pytest.importorskip("scipy")
    plan = tbn.plan(model, budget={"bytes": 60, "macs": 200}, example_inputs=torch.zeros(1, 16))
    found = tbn.sweep(model, [plan, {"bytes": 60}, {"bytes": 1100}], Trainer())
    assert [point.name for point in found.points] == ["bytes <= 60, macs <= 200", "bytes <= 60", "bytes <= 1,100"]
    assert [point.bytes for point in found.points][:2] == [dict(plan.costs)["bytes"], 56]
    assert found["bytes <= 1,100"].config is not None
    assert found["bytes <= 1,100"].config["float_layers"] in (["0"], ["2"])


def test_it_goes_on_where_it_stopped(model: nn.Sequential, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    trainer = Trainer()

    def stop(module: nn.Module) -> float:
        if trainer.names:
            raise KeyboardInterrupt
        return trainer(module)

    with pytest.raises(KeyboardInterrupt):
        tbn.sweep(model, POINTS, stop, path=path)
    first = Sweep.from_dict(json.loads(path.read_text()))
    assert [point.name for point in first.points] == ["float"]
    found = tbn.sweep(model, POINTS, trainer, path=path)
    assert len(trainer.names) == 3
    assert found.points[0] == first.points[0]
    assert Sweep.from_dict(json.loads(path.read_text())) == found
    # What was not asked for stays in the file.
    fewer = tbn.sweep(model, POINTS[:1], trainer, path=path)
    assert fewer.points == found.points[:1]
    assert len(trainer.names) == 3
    assert len(json.loads(path.read_text())["points"]) == 3


def test_two_sweeps_on_one_file_keep_each_others_points(model: nn.Sequential, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"

    def train(module: nn.Module) -> float:
        tbn.sweep(model, POINTS[1:2], Trainer(), path=path)  # another one writes meanwhile
        return 0.5

    tbn.sweep(model, {"mine": POINTS[0]}, train, path=path)
    assert {point["name"] for point in json.loads(path.read_text())["points"]} == {"mine", "p=4"}


def test_a_file_that_became_another_ones_costs_no_training(model: nn.Sequential, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"

    def train(module: nn.Module) -> float:
        tbn.sweep(model, POINTS[1:2], Trainer(), metric="loss", path=path)
        return 0.5

    with pytest.raises(tbn.ConfigError, match=r"holds the metric 'loss', .* this sweep are in .*sweep-kept\.json"):
        tbn.sweep(model, {"mine": POINTS[0]}, train, path=path)
    assert Sweep.read(tmp_path / "sweep-kept.json")["mine"].metric == 0.5


def test_what_a_file_holds_is_not_mistaken(model: nn.Sequential, tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    tbn.sweep(model, {"a": POINTS[1]}, Trainer(), path=path)
    for point in (POINTS[1].replace(alpha="tile"), "float", POINTS[1].replace(filter=lambda _: True)):
        with pytest.raises(tbn.ConfigError, match="has a point 'a' of another model, tiling or seed"):
            tbn.sweep(model, {"a": point}, Trainer(), path=path)
    with pytest.raises(tbn.ConfigError, match="holds the metric 'accuracy', not 'loss'"):
        tbn.sweep(model, {"a": POINTS[1]}, Trainer(), metric="loss", path=path)
    for text, told in (("{", "is no JSON file"), ("{}", "not the data of a Sweep"), ('{"version": 9}', "version 9")):
        path.write_text(text)
        with pytest.raises(tbn.ConfigError, match=told):
            tbn.sweep(model, {"a": POINTS[1]}, Trainer(), path=path)


def test_what_is_refused(model: nn.Sequential) -> None:
    for points, told in (
        ([POINTS[1], POINTS[1].replace(alpha="tile")], "two points are called 'p=4'"),
        ([], "there are no points"),
        ("float", "must be a mapping or a sequence"),
        ([4], "point 4 is no TilingConfig"),
        (["binary"], "point 'binary' is no TilingConfig"),
    ):
        with pytest.raises(tbn.ConfigError, match=told):
            tbn.sweep(model, points, Trainer())
    with pytest.raises(tbn.ConfigError, match="train must return the metric of point 'float' as a number, got None"):
        tbn.sweep(model, ["float"], lambda _: None)
    with pytest.raises(tbn.ConfigError, match="evaluate must return the metric"):
        tbn.sweep(model, ["float"], lambda _: 1.0, lambda _: "high")


def test_a_training_that_diverges(model: nn.Sequential, tmp_path: Path) -> None:
    found = tbn.sweep(model, ["float"], lambda _: math.inf, path=tmp_path / "sweep.json")
    assert math.isnan(found["float"].metric)
    assert math.isnan(Sweep.from_dict(json.loads((tmp_path / "sweep.json").read_text()))["float"].metric)
    assert "nan" in str(found)


def test_tables_and_picture(model: nn.Sequential, tmp_path: Path) -> None:
    found = tbn.sweep(model, POINTS, lambda _: 0.75)
    assert found.to_markdown().splitlines()[0] == "| point | bytes | bits/weight | accuracy | seconds |"
    assert str(found).splitlines()[2].split()[:4] == ["float", "2,048", "32.000", "0.75"]
    with pytest.raises(KeyError):
        found["p=8"]
    pytest.importorskip("matplotlib")
    found.draw(tmp_path / "sweep.svg")
    text = (tmp_path / "sweep.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("float", "p=4", "p=2x2", "accuracy"))


def test_points_of_another_model_or_seed_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    points = ["float", tbn.TilingConfig(p=4)]
    tbn.sweep(nn.Linear(64, 64), points, lambda module: 1.0, path=path)
    assert [point.seed for point in tbn.Sweep.read(path).points] == [0, 0]
    for model, seed in ((nn.Linear(640, 640), 0), (nn.Linear(64, 64), 1)):
        with pytest.raises(tbn.ConfigError, match="has a point 'float' of another model, tiling or seed"):
            tbn.sweep(model, points, lambda module: 2.0, path=path, seed=seed)


def test_a_plan_of_floats_is_the_float_model() -> None:
    plan = tbn.plan(nn.Linear(64, 64), budget=10**6)
    assert set(plan.choice.values()) == {"float"}
    (point,) = tbn.sweep(nn.Linear(64, 64), [plan], lambda module: float(type(module) is nn.Linear)).points
    assert (point.metric, point.config) == (1.0, None)
