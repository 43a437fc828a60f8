"""The study of tile layouts: its list of runs, that it goes on where it was stopped, and its tables."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import documents
import layout_studies
import layout_tables
import layouts
from layout_studies import STUDIES, Layout, misfit, quick, summary
from paper.tasks import synthetic_task

COPIES = (4, 8, 16, 32)


class Killed(BaseException):
    """Ends the study as SIGKILL does: nothing of its own handles it."""


def few(*kept: Layout) -> dict[str, layout_studies.Study]:
    return {"mnist": dataclasses.replace(quick(STUDIES["mnist"]), layouts=kept)}


def start(path: Path, studies: dict[str, layout_studies.Study], seeds: int = 1, workers: int = 1) -> None:
    layouts.run_all(path, studies, seeds, "synthetic", "cpu", workers, threads=1)


def scored(layout: Layout, seed: int, score: float, task: str = "mnist") -> dict[str, Any]:
    key = layouts.Job(task, STUDIES[task], layout, seed).key
    return {
        **key,
        "score": score,
        "weights": 400,
        "stored_bits": 100,
        "bytes": 1234,
        "macs": 5678,
        "step_ms": 10 + seed,
    }


# The list


def test_every_task_has_every_layout_at_every_p() -> None:
    for name, study in STUDIES.items():
        found = Counter((layout.copies, layout.family) for layout in study.layouts)
        for copies in COPIES:
            assert all(found[copies, family] for family in ("paper", "two-axis", "rolled", "Hadamard")), name
        assert found[0, "float"] == found[1, "binary"] == 1
        titles = [(layout.copies, layout.title) for layout in study.layouts]
        assert len(set(titles)) == len(titles)  # the result file tells runs by them


def test_seeds_are_the_outer_loop() -> None:
    listed = list(layouts.missing({}, STUDIES, seeds=3))
    rounds = [[(job.name, job.layout) for job in listed if job.seed == seed] for seed in range(3)]
    assert [job.seed for job in listed] == sorted(job.seed for job in listed)
    assert rounds[0] == rounds[1] == rounds[2]
    left_out = {
        (name, layout.title, layout.copies): misfit(study, layout)
        for name, study in STUDIES.items()
        for layout in study.layouts
        if (name, layout) not in rounds[0]
    }
    assert left_out == {("mnist", "Hadamard", 32): {"1": 16}}  # 784 inputs


def test_layouts_of_one_p_store_the_same_bits() -> None:
    for name, study in STUDIES.items():
        task = synthetic_task(study.settings)
        for layout in study.layouts:
            if layout.copies not in (4, 32) or misfit(study, layout):
                continue
            rows, paper = (summary(study, kind, task).layers for kind in (layout, Layout(layout.copies)))
            assert [row.stored_bits for row in rows] == [row.stored_bits for row in paper], (name, layout)
            if layout.family != "rolled":
                assert [row.macs_tiled for row in rows] == [row.macs_tiled for row in paper], (name, layout)
            outputs = layout.p[0] if isinstance(layout.p, tuple) else layout.p
            assert {row.alphas for row in rows if (row.p or 1) > 1} == {outputs}, (name, layout)


def test_rolled_rows_differ() -> None:
    for name, study in STUDIES.items():
        for layout in study.layouts:
            if layout.family != "rolled" or layout.shift:
                continue
            config = study.options(layout).config()
            assert config is not None
            sizes = layout_studies.row_sizes(study, layout.copies)
            assert sizes
            for layer, size in sizes.items():
                shift = config.for_layer(layer).shift
                assert shift == size // layout.copies, (name, layer)
                assert size // math.gcd(size, shift) >= layout.copies, (name, layer)  # no two copies start alike


def test_list_says_what_became_of_each_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    documents.save({"runs": [scored(Layout(4), 0, 90.0)]}, path)
    assert layouts.main(["--list", "--only", "mnist", "--seeds", "1", "--results", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(STUDIES["mnist"].layouts)
    assert "mnist   p=4   paper           seed 0 there" in lines
    assert "mnist   p=4   rolled          seed 0 to be trained" in lines
    assert "mnist   p=32  Hadamard        seed 0 impossible, 1 takes 16" in lines


# Running


@pytest.mark.parametrize("name", STUDIES)
def test_a_run_of_two_steps(name: str) -> None:
    job = layouts.Job(name, quick(STUDIES[name]), Layout(4, "hadamard"), seed=0)
    common, result = layouts.train(job, "synthetic")
    assert common["steps"] == 2
    assert common["data"]["name"] == "synthetic"
    assert result["weights"] / 4 <= result["stored_bits"] < result["weights"]  # some layers may be binary
    assert result["macs"] > 0
    assert result["step_ms"] > 0


def test_a_float_run() -> None:
    _, result = layouts.train(layouts.Job("mnist", quick(STUDIES["mnist"]), Layout(0), seed=0), "synthetic")
    assert (result["weights"], result["stored_bits"], result["macs"]) == (101_632, 32 * 101_632, 101_632)


def test_a_killed_study_goes_on_with_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    studies, path, trained = few(Layout(1), Layout(4), Layout((2, 2))), tmp_path / "results.json", []
    train = layouts.train

    def counted(job: layouts.Job, data: str, device: str) -> Any:
        trained.append((job.layout.title, job.seed))
        if len(trained) == 3:
            raise Killed
        return train(job, data, device)

    monkeypatch.setattr(layouts, "train", counted)
    with pytest.raises(Killed):
        start(path, studies, seeds=2)
    assert len(documents.load(path)["runs"]) == 2
    start(path, studies, seeds=2)
    expected = [(title, seed) for seed in range(2) for title in ("binary", "paper", "two-axis 2 x 2")]
    assert trained == [*expected[:3], *expected[2:]]
    assert [(run["layout"], run["seed"]) for run in documents.load(path)["runs"]] == expected
    start(path, studies, seeds=2)
    assert len(trained) == 7


def test_a_run_that_diverges_does_not_end_the_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    studies, path, train = few(Layout(1), Layout(4)), tmp_path / "results.json", layouts.train

    def diverges(job: layouts.Job, data: str, device: str) -> Any:
        if job.layout.copies == 1:
            raise layouts.RunError("the loss is nan")
        return train(job, data, device)

    monkeypatch.setattr(layouts, "train", diverges)
    assert layouts.run_all(path, studies, 1, "synthetic", "cpu", workers=1, threads=1) == 1
    assert [run["layout"] for run in documents.load(path)["runs"]] == ["paper"]
    assert "binary          seed 0 failed: the loss is nan" in capsys.readouterr().err


def test_workers_find_the_same_results(tmp_path: Path) -> None:
    studies = few(Layout(0), Layout(4))
    start(tmp_path / "one.json", studies)
    start(tmp_path / "two.json", studies, workers=2)
    one, two = (documents.load(tmp_path / f"{name}.json")["runs"] for name in ("one", "two"))
    for run in (*one, *two):
        del run["step_ms"]
    assert sorted(map(json.dumps, one)) == sorted(map(json.dumps, two))


def test_results_of_other_settings_are_not_extended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "results.json"
    start(path, few(Layout(4)))
    content = path.read_text()
    longer = {"mnist": dataclasses.replace(few(Layout(1))["mnist"], subset=24)}
    with pytest.raises(layouts.DataError, match=r"mnist with another data; name another file"):
        start(path, longer)
    assert path.read_text() == content


def test_arguments_that_do_not_belong_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["--quick"], "--quick needs --results"),
        (["--seeds", "0"], "0 is less than 1"),
        (["--only", "speech"], "invalid choice"),
    ):
        with pytest.raises(SystemExit):
            layouts.main(arguments)
        assert message in capsys.readouterr().err
    missing = ["--data", str(tmp_path), "--results", str(tmp_path / "results.json")]
    assert layouts.main(missing) == 1
    assert "layouts.py: no train-images" in capsys.readouterr().err


# Tables


def test_gains_are_paired_by_seed() -> None:
    runs = [
        scored(layout, seed, score)
        for layout, seed, score in (
            (Layout(8), 0, 90.0),
            (Layout(8), 1, 80.0),
            (Layout(8, "roll"), 1, 82.0),
            (Layout(8, "roll"), 0, 91.0),
            (Layout(8, "roll"), 2, 99.0),
            (Layout(8, "hadamard"), 2, 97.0),
        )
    ]
    table = layout_tables.tables({"runs": runs}, STUDIES)["mnist"].splitlines()
    assert (
        "| 8 | rolled | 90.67 | 82.00 to 99.00 | +1.50 | +1.00 to +2.00 | 3 | 0.2500 | 1,234 | 5,678 | 10.0 |" in table
    )
    assert "| 8 | paper | 85.00 | 80.00 to 90.00 |  |  | 2 | 0.2500 | 1,234 | 5,678 | 10.0 |" in table
    assert "| 8 | Hadamard | 97.00 |  |  |  | 1 | 0.2500 | 1,234 | 5,678 | 12.0 |" in table
    assert "| 16 | Hadamard |  |  |  |  | 0 |  |  |  |  |" in table
    assert "| 32 | Hadamard: impossible, at most p = 16 |  |  |  |  |  |  |  |  |  |" in table


def test_docs_are_filled_from_the_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    path, page, figure = (tmp_path / name for name in ("results.json", "page.md", "figure.png"))
    runs = [
        scored(layout, seed, 3 + layout.copies / 100 + seed / 10, "text")
        for layout in (Layout(0), Layout(1), Layout(4), Layout((2, 2)), Layout(4, "hadamard"))
        for seed in range(2)
    ]
    documents.save({"runs": runs}, path)
    page.write_text(layouts.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(layouts, "DOCUMENT", page)
    monkeypatch.setattr(layouts, "FIGURE", figure)
    assert layouts.main(["--docs", "--results", str(path)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| 4 | Hadamard | 3.090 | 3.040 to 3.140 | +0.000 | +0.000 to +0.000 | 2 | 0.2500 |" in text
    assert "bits per character | 3.050 (2) | 3.060 (2) | 4 | 3.090 (2) | 3.090 (2) |  | 3.090 (2) |" in text
    assert "|  |  |  | 32 |  |  |  | impossible |" in text  # MNIST
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_document_holds_the_tables_of_the_result_file() -> None:
    document, results = layouts.DOCUMENT.read_text(encoding="utf-8"), documents.load(layouts.RESULTS)
    made = layout_tables.tables(results, STUDIES)
    assert documents.fill(document, made) == document
    for name in made:
        assert f"<!-- {name} -->" in document


def test_committed_results_are_of_the_studies_as_they_are() -> None:
    results = documents.load(layouts.RESULTS)
    known = {tuple(job.key.values()) for job in layouts.jobs(STUDIES, 5)}
    for run in results["runs"]:
        assert tuple(run[name] for name in ("task", "layout", "p", "seed")) in known
    for name, common in results["tasks"].items():
        settings = json.loads(json.dumps(dataclasses.asdict(STUDIES[name].settings)))
        assert common["settings"] == {key: settings[key] for key in common["settings"]}
        assert common["data"]["name"] != "synthetic"
