"""What transform and lower cost: that it is measured, and what is made of the measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import transform_cost
from benchmarks.transform_cost import MODELS, STEPS, goals, growth, measure, summarise, table

FIELDS = {f"{step}_{unit}" for step in STEPS for unit in ("seconds", "memory")}


@pytest.mark.filterwarnings(
    "ignore:the tiled layers keep 1.000 bits"
)  # these models are small for the benchmark's size
@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (lambda: transform_cost.mlp(3), 3),
        (lambda: transform_cost.decoder(64, 1), 7),
        (lambda: transform_cost.encoder(64, 1), 6),  # an attention counts as four
    ],
)
def test_measures_a_model(build: Any, layers: int) -> None:
    found = measure(build)
    assert found.keys() == {"parameters", "layers"} | FIELDS
    assert found["layers"] == layers
    assert found["parameters"] == sum(parameter.numel() for parameter in build().parameters())
    assert all(found[f"{step}_seconds"] > 0 for step in STEPS)


def test_models_have_layers_and_parameters_as_their_names_say() -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in model.build().parameters()) for name, model in MODELS.items() if model.grows
        }
    assert [round(size / 1e6) for size in sizes.values()] == [11, 99, 299]
    assert sum(model.small_weights for model in MODELS.values()) == 2
    x = torch.randn(1, 5, 64)
    assert transform_cost.decoder(64, 2)(x).shape == transform_cost.encoder(64, 2)(x).shape == x.shape


def run(seconds: float, memory: float, layers: int = 10, parameters: int = 1000) -> dict[str, Any]:
    found = {f"{step}_{unit}": value for step in STEPS for unit, value in (("seconds", seconds), ("memory", memory))}
    return {"layers": layers, "parameters": parameters, **found}


def test_a_row_has_medians_and_largest_peaks() -> None:
    row = summarise("MLP, 64 layers", [run(0.01, 2.1), run(0.5, 2.3), run(0.02, 2.0)])
    assert (row["runs"], row["transform_seconds"], row["lower_memory"]) == (3, 0.02, 2.3)
    assert row["lower_milliseconds_a_layer"] == 2.0
    assert table([row]).splitlines()[-1] == (
        "| MLP, 64 layers | 10 | 0.0 M | 3 | 0.02 | 2.00 | 2.30 | 0.02 | 2.00 | 2.30 |"
    )


def test_growth_and_goals() -> None:
    rows = [summarise("MLP, 64 layers", [run(0.014, 3)])]
    rows += [summarise("decoder, 6 blocks", [run(n**1.5, 2.1, parameters=n)]) for n in (2, 4, 8)]
    assert growth(rows[1:], "lower") == pytest.approx(1.5, abs=0.01)
    largest = summarise("decoder, 24 blocks", [run(19, 2.1, parameters=3 * 10**8)])
    assert list(goals([*rows, largest])) == [
        "under 1.5 ms a layer where weights are small",
        "under 20 s at 300 M parameters",
        "under 2.2 times the parameters at 300 M parameters",
    ]
    assert all(goals([*rows, largest]).values())
    slow, late, full = summarise("MLP, 512 layers", [run(0.016, 2)]), {**largest}, {**largest}
    late["lower_seconds"], full["transform_memory"] = 21, 2.3
    assert list(goals([*rows, largest, slow]).values()) == [False, True, True]
    assert list(goals([*rows, late]).values()) == [True, False, True]
    assert list(goals([*rows, full]).values()) == [True, True, False]


def test_writes_a_result_of_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the smallest model is run; the others would take minutes."""
    model = MODELS["MLP, 64 layers"]
    first = transform_cost._measure_apart("MLP, 64 layers")
    assert first["layers"] == 64
    monkeypatch.setattr(transform_cost, "_measure_apart", lambda name: {**first, "parameters": 8 + len(name)})
    monkeypatch.setattr(transform_cost, "RESULT", tmp_path / "cost.json")
    monkeypatch.setattr("sys.argv", ["transform_cost"])
    assert transform_cost.main() in (0, 1)
    result = json.loads((tmp_path / "cost.json").read_text())
    assert result.keys() == {"machine", "rows", "growth_exponents", "goals_met"}
    assert [row["model"] for row in result["rows"]] == list(MODELS)
    assert result["rows"][0]["runs"] == model.runs
    assert table(result["rows"]) in capsys.readouterr().out
