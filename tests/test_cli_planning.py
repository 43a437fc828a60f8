"""``tbn-compiler plan`` and ``sweep``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tbn_compiler as tbn
from tbn_compiler.cli import main
from tbn_compiler.planning import Sensitivity

pytest.importorskip("scipy")

FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

def train(module):
    x = torch.randn(8, 16)
    module(x).square().mean().backward()
    return float(sum(p.grad.abs().sum() for p in module.parameters() if p.grad is not None))

def score(module):
    return 0.25
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: Any) -> Iterator[str]:
    """A user's module in the current folder, with data beside it; its name is returned."""
    name = f"planned_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(FACTORY)
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((20, 16))
    np.savez(tmp_path / "data.npz", inputs=inputs, targets=rng.integers(0, 8, 20))
    np.savez(tmp_path / "values.npz", inputs=inputs, targets=rng.standard_normal((20, 8)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield name
    sys.modules.pop(name, None)


def run(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_plan(capsys: Any, factory: str, tmp_path: Path) -> None:
    command = ("plan", f"{factory}:net", "--data", "data.npz", "--batch-size", 8, "--sensitivity", "found.json")
    candidates = ("--candidate", "float", "--candidate", "2x2", "--candidate", "4,replicate=hadamard")
    budget = ("--budget", 1200, "--budget", "macs=700", "--input", "1,16")
    status, out, err = run(capsys, *command, *candidates, *budget, "-o", "plan.json", "--json")
    assert status == 0, err
    data = json.loads(out)
    assert data == json.loads((tmp_path / "plan.json").read_text())
    assert data["budget"] == {"bytes": 1200, "macs": 700}
    model = __import__(factory).net()
    measured = Sensitivity.from_dict(json.loads((tmp_path / "found.json").read_text()))
    # The file says what Python says.
    arrays = np.load(tmp_path / "data.npz")
    inputs, targets = torch.from_numpy(arrays["inputs"]).float(), torch.from_numpy(arrays["targets"])
    batches = list(zip(inputs.split(8), targets.split(8), strict=True))
    given: list[Any] = ["float", (2, 2), {"p": 4, "replicate": "hadamard"}]
    assert measured == tbn.sensitivity(model, batches, candidates=given)
    budgets = {"bytes": 1200, "macs": 700}
    found = tbn.plan(model, budget=budgets, sensitivity=measured, example_inputs=torch.zeros(1, 16))
    assert found.to_dict()["layers"] == data["layers"]
    assert tbn.TilingConfig(**data["config"]) == found.config
    # It is read where it is there, and neither data nor another measurement is taken for it.
    status, out, _ = run(capsys, *command[:2], *command[6:], *budget, "--markdown")
    assert (status, out.splitlines()[0].split(" | ")[4:]) == (0, ["p", "loss", "bytes", "macs |"])
    status, _, err = run(capsys, *command, *budget)
    assert (status, "found.json holds what was measured already" in err) == (1, True)


def test_plan_without_data(capsys: Any, factory: str) -> None:
    status, out, _ = run(
        capsys, "plan", f"{factory}:net", "--objective", "flash", "--budget", "loss=1.5", "--input", "1,16",
        "--target", "cortex-m0plus", "--keep-float", "2", "--alpha", "tile", "--candidate", "binary", "--candidate", 4,
    )  # fmt: skip
    assert status == 0
    assert out.splitlines()[0].split() == ["layer", "kind", "shape", "option", "p", "error", "flash", "bytes"]
    assert "least flash; loss at most 1.5" in out
    assert [line.split()[0] for line in out.splitlines()[2:4]] == ["0", "total"]


def test_plan_of_a_checkpoint_and_numbers(capsys: Any, factory: str, tmp_path: Path) -> None:
    model = __import__(factory).net()
    torch.nn.init.zeros_(model[2].weight)
    torch.save(model.state_dict(), "float.pt")
    command = ("plan", f"{factory}:net", "--budget", 1000, "--data", "values.npz", "--json")
    status, out, err = run(capsys, *command, "--checkpoint", "float.pt")
    assert status == 0, err
    assert json.loads(out)["layers"][1]["change"] == 0  # a layer of zeros loses nothing
    assert json.loads(run(capsys, *command)[1])["layers"][1]["change"] != 0
    torch.save(tbn.transform(model).state_dict(), "tiled.pt")
    tbn.save(tbn.lower(tbn.transform(model)), "packed.safetensors")
    for name, told in (("tiled.pt", "is of a tiled model"), ("packed.safetensors", "is a packed file")):
        status, _, err = run(capsys, *command, "--checkpoint", name)
        assert (status, told in err) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), "the least loss needs a budget"),
        (("--budget", 1), "no plan of these candidates keeps the budget: bytes at most 1, and the least is"),
        (("--budget", "speed=1"), "budget of 'speed'"),
        (("--budget", "macs=1"), "give example_inputs"),
        (("--budget", 1000, "--data", "values.npz", "--batch-size", 0), "--batch-size must be at least 1"),
        (("--budget", 1000, "--data", "wrong.npz"), "is not an .npz file with arrays 'inputs' and 'targets'"),
        (("--budget", 1000, "--data", "uneven.npz"), "one for each"),
        (("--budget", 1000, "--sensitivity", "wrong.json"), "wrong.json: not the data of a Sensitivity"),
        (("--budget", 1000, "--candidate", "4,min_size=3"), "it must name p"),
    ],
)
def test_plan_errors(capsys: Any, factory: str, tmp_path: Path, arguments: tuple[object, ...], told: str) -> None:
    np.savez(tmp_path / "wrong.npz", x=np.ones(3))
    np.savez(tmp_path / "uneven.npz", inputs=np.ones((3, 16)), targets=np.ones(2))
    (tmp_path / "wrong.json").write_text("{}")
    status, _, err = run(capsys, "plan", f"{factory}:net", *arguments)
    assert status == 1
    assert told in err


@pytest.mark.parametrize("option", [("--budget", "x"), ("--candidate", "p=4"), ("--candidate", "2x2x2"), ("--p", "a")])
def test_what_is_no_option(capsys: Any, factory: str, option: tuple[str, str]) -> None:
    command = "sweep" if option[0] == "--p" else "plan"
    with pytest.raises(SystemExit):
        main([command, f"{factory}:net", *option])
    assert "is not a" in capsys.readouterr().err


def test_sweep(capsys: Any, factory: str, tmp_path: Path) -> None:
    assert run(capsys, "plan", f"{factory}:net", "--budget", 1000, "-o", "chosen.json")[0] == 0
    command = ("sweep", f"{factory}:net", "--train", f"{factory}:train", "--metric", "gradient")
    points = ("--float", "--p", 4, "--p", "2x2", "--budget", 600, "--plan", "chosen.json", "--min-size", 0)
    status, out, err = run(capsys, *command, *points, "--json")
    assert status == 0, err
    data = json.loads(out)
    names = [point["name"] for point in data["points"]]
    assert names == ["float", "p=4", "p=2x2", "bytes <= 600", "chosen"]
    assert data["metric"] == "gradient"
    chosen = json.loads((tmp_path / "chosen.json").read_text())
    assert (data["points"][4]["config"], data["points"][4]["bytes"]) == (chosen["config"], chosen["costs"]["bytes"])
    assert json.loads((tmp_path / "sweep.json").read_text()) == data
    # Again: nothing is trained anew.
    assert json.loads(run(capsys, *command, *points, "--json")[1]) == data
    status, out, _ = run(capsys, *command[:4], "--evaluate", f"{factory}:score", "--float", "-o", "other.json")
    assert (status, out.split("\n")[2].split()[3]) == (0, "0.25")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--train", "nowhere"), "is not of the form module:name"),
        (("--data", "data.npz"), "--data, --sensitivity and --candidate are of budgets"),
        (("--plan", "data.json"), "is not what the command plan has written"),
        (("--p", 4, "--p", 4), "two points have one name: p=4, p=4"),
        ((), "there are no points to train"),
    ],
)
def test_sweep_errors(capsys: Any, factory: str, tmp_path: Path, arguments: tuple[object, ...], told: str) -> None:
    (tmp_path / "data.json").write_text("{}")
    status, _, err = run(capsys, "sweep", f"{factory}:net", "--train", f"{factory}:train", *arguments)
    assert status == 1
    assert told in err


def test_options_in_a_file_and_stored_inputs(capsys: Any, factory: str, tmp_path: Path) -> None:
    np.save("x.npy", np.zeros((3, 16), np.float32))
    (tmp_path / "net.toml").write_text(
        '[tiling]\nfloat_layers = ["2"]\nalpha = "tile"\n[model]\ninputs = "x.npy"\n'
        '[plan]\nbudget = ["macs=2000"]\ncandidate = [2, "4,replicate=hadamard"]\n'
        f'[sweep]\ntrain = "{factory}:train"\np = [4, [2, 2]]\nmin_size = 0\nbudget = [2000]\nseed = 3\n'
    )
    status, out, err = run(capsys, "plan", f"{factory}:net", "--config", "net.toml", "--json")
    assert status == 0, err
    data = json.loads(out)
    assert [row["name"] for row in data["layers"]] == ["0"]
    assert data["costs"]["macs"] == 3 * (16 * 32 // data["layers"][0]["p"] + 32 * 8)  # of three samples
    assert data["config"]["alpha"] == "tile"
    status, out, err = run(capsys, "sweep", f"{factory}:net", "--config", "net.toml", "--json")
    assert status == 0, err
    points = json.loads(out)["points"]
    assert [point["name"] for point in points] == ["p=4", "p=2x2", "bytes <= 2,000"]
    assert {point["seed"] for point in points} == {3}
    assert points[0]["config"]["float_layers"] == ["2"]
    np.save("wrong.npy", np.zeros((3, 15), np.float32))
    command = ("plan", f"{factory}:net", "--budget", "macs=1000", "--inputs", "wrong.npy")
    assert run(capsys, *command)[0] == 1


def test_pictures(capsys: Any, factory: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = ("--draw", "plan.png", "--draw-sensitivity", "found.png")
    assert run(capsys, "plan", f"{factory}:net", "--budget", 1000, *drawn)[0] == 0
    sweep = ("sweep", f"{factory}:net", "--train", f"{factory}:train", "--float", "--p", 2, "--draw", "sweep.png")
    assert run(capsys, *sweep)[0] == 0
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("plan.png", "found.png", "sweep.png"))
