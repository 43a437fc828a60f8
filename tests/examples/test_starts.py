"""The study of ways to start: it runs, resumes, and its page shows what the result file holds."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import documents
import starts


def test_trains_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "starts.json"
    arguments = ["--data", "synthetic", "--quick", "--only", "mnist", "--seeds", "1", "--p", "4", "--table"]
    arguments += ["--results", str(path)]
    assert starts.main(arguments) == 0
    found = json.loads(path.read_text())
    assert [run["start"] for run in found["runs"]] == list(starts.STARTS)
    table = capsys.readouterr().out
    assert all(f"| {start.title} |" in table for start in starts.STARTS.values())
    last = found["runs"].pop()
    path.write_text(json.dumps(found))
    assert starts.main(arguments) == 0
    assert json.loads(path.read_text())["runs"] == [*found["runs"], last]
    assert capsys.readouterr().out.count("seed 0") == 1


@pytest.mark.parametrize("arguments", [["--quick"], ["--seeds", "0"], ["--only", "text"]])
def test_refuses_what_would_spoil_results(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        starts.main(arguments)


def test_page_shows_the_result_file() -> None:
    text = starts.DOCUMENT.read_text(encoding="utf-8")
    results = documents.load(starts.RESULTS)
    assert documents.fill(text, {"starts": starts.table(results)}) == text
