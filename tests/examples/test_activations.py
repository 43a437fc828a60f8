"""The study of int8 and binary inputs: it runs, resumes, and its page shows what the result file holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import activations
import documents


def test_trains_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "activations.json"
    arguments = ["--data", "synthetic", "--quick", "--only", "mnist", "--seeds", "1", "--table"]
    arguments += ["--results", str(path)]
    assert activations.main(arguments) == 0
    found = json.loads(path.read_text())
    assert [(run["activation"], run["input_scale"]) for run in found["runs"]] == list(activations.INPUTS)
    assert list(found["runs"][0]["after"]) == [" ".join(kind) for kind in activations.INPUTS[1:]]
    assert all("after" not in run for run in found["runs"][1:])
    assert capsys.readouterr().out.count("| MNIST, 784-128-10") == len(activations.INPUTS)
    found["runs"].pop()
    path.write_text(json.dumps(found))
    assert activations.main(arguments) == 0
    assert json.loads(path.read_text())["runs"][:-1] == found["runs"]
    assert capsys.readouterr().out.count("seed 0") == 1


@pytest.mark.parametrize("arguments", [["--quick"], ["--seeds", "0"], ["--only", "nothing"]])
def test_refuses_what_would_spoil_results(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        activations.main(arguments)


def test_page_shows_the_result_file() -> None:
    text = activations.DOCUMENT.read_text(encoding="utf-8")
    results = documents.load(activations.RESULTS)
    assert documents.fill(text, {"activations": activations.table(results)}) == text
