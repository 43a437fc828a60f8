"""The study of training tiles: it runs, resumes, and its page shows what the result file holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import documents
import latents
from example_data import sklearn_digits


def test_forms_of_a_seed_start_as_one_network() -> None:
    x = torch.randn(5, 784)
    models = [latents.build(latents.Run("Adam 2e-3", 4, exponent, seed=0)) for exponent in latents.STARTS]
    for model in models[1:]:
        torch.testing.assert_close(model(x), models[0](x))
        assert model.get_parameter("0.weight").shape == (32, 784)


@pytest.mark.parametrize("optimizer", latents.OPTIMIZERS)
def test_every_optimizer_moves_every_parameter(optimizer: str) -> None:
    run = latents.Run(optimizer, 4, 0.5, seed=0)
    model = latents.build(run)
    before = {name: value.clone() for name, value in model.named_parameters()}
    latents.train(model, sklearn_digits().head(1024, 8), run, epochs=1)
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())


def test_trains_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latents, "OPTIMIZERS", {"Adam 2e-3": latents.OPTIMIZERS["Adam 2e-3"]})
    monkeypatch.setattr(latents, "COPIES", (4,))
    path = tmp_path / "latents.json"
    arguments = ["--quick", "--results", str(path), "--seeds", "1", "--table"]
    assert latents.main(arguments) == 0
    found = json.loads(path.read_text())
    assert [run["exponent"] for run in found["runs"]] == list(latents.STARTS)
    assert "| Adam 2e-3 | 4 | tile, e = 0.5 |" in capsys.readouterr().out
    found["runs"].pop()
    path.write_text(json.dumps(found))
    assert latents.main(arguments) == 0
    assert len(json.loads(path.read_text())["runs"]) == len(latents.STARTS)
    assert capsys.readouterr().out.count("seed 0") == 1


@pytest.mark.parametrize("arguments", [["--quick"], ["--seeds", "0"]])
def test_refuses_what_would_spoil_results(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        latents.main(arguments)


def test_page_shows_the_result_file() -> None:
    results: Any = documents.load(latents.RESULTS)
    text = latents.DOCUMENT.read_text(encoding="utf-8")
    assert documents.fill(text, {"latents": latents.table(results)}) == text
    assert len(results["runs"]) == sum(1 for _ in latents.runs(3))
