"""The comparison of tile layouts: every layout trains, and tables, plot and document come from the result file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tbn_compiler as tbn

ROOT = Path(__file__).parent.parent.parent
NETWORKS = {"mlp": 11, "deep_mlp": 7}  # layouts compared in each


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.mark.parametrize("name", NETWORKS)
def test_every_layout_trains_and_lowers(name):
    from example_data import sklearn_digits
    from layouts import STUDIES, Recipe, standardise, train

    study, recipe = STUDIES[name], Recipe(batch_size=128)
    data = standardise(sklearn_digits().head(512, 64), recipe)
    for layout in study.layouts:
        torch.manual_seed(0)
        qat = tbn.transform(study.build(), study.config(layout))
        before = F.cross_entropy(qat(data.train_x), data.train_y).item()
        train(qat, data, recipe, epochs=4)
        qat.eval()
        assert F.cross_entropy(qat(data.train_x), data.train_y).item() < 0.8 * before, layout
        torch.testing.assert_close(tbn.lower(qat)(data.test_x), qat(data.test_x), rtol=1e-4, atol=1e-4)
        for row in tbn.summary(qat).layers:
            assert row.stored_bits == row.weights // (layout.copies if row.shape == study.shape else 1), layout


def test_shifts_leave_no_rows_equal():
    from layouts import STUDIES

    for study in STUDIES.values():
        for layout in study.layouts:
            if layout.rolled:
                row_size, shift = study.shape[1], study.shift(layout)
                offsets = {copy * shift % row_size for copy in range(layout.copies)}
                assert len(offsets) == layout.copies, layout


def test_quick_run_is_resumed_and_tabulated(tmp_path, capsys):
    from layouts import main

    path, figure = tmp_path / "layouts.json", tmp_path / "layouts.png"
    quick = ["--quick", "--seeds", "1", "--results", str(path)]
    assert main([*quick, "--table"]) == 0
    results = json.loads(path.read_text())
    assert {name: len(runs) for name, runs in results["studies"].items()} == NETWORKS
    assert results["versions"]["torch"] == torch.__version__
    table = capsys.readouterr().out
    for row in (
        "| 4 | two-axis 2 x 2 |",
        "| 16 | rolled |",
        "| 32 | two-axis 4 x 8 |",
        "| 1 | binary |",
        "| 32 | paper |",
    ):
        assert row in table
    assert "| 1 | 0.0625 | 6,272 |" in table  # p = 16, aligned: 8 rows of 784

    del results["studies"]["mlp"][3]  # only what is missing is trained
    path.write_text(json.dumps(results))
    assert main(quick) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    assert len(json.loads(path.read_text())["studies"]["mlp"]) == NETWORKS["mlp"]

    pytest.importorskip("matplotlib")
    assert main([*quick, "--plot", str(figure)]) == 0
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_tables_of_missing_results_are_refused(tmp_path, capsys):
    from layouts import main

    assert main(["--results", str(tmp_path / "none.json"), "--table"]) == 1
    assert "does not hold every layout" in capsys.readouterr().err


def test_results_of_other_images_are_not_extended(tmp_path, capsys):
    from layouts import main

    path = tmp_path / "layouts.json"
    path.write_text(json.dumps({"versions": {}, "data": "other digits", "studies": {}}))
    assert main(["--quick", "--results", str(path)]) == 1
    assert "holds results of other digits" in capsys.readouterr().err


def test_arguments_that_do_not_belong_together(capsys):
    from layouts import main

    for arguments, message in (
        (["--quick"], "--quick needs --results"),
        (["--look-at-shift"], "--look-at-shift needs --data"),
        (["--seeds", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err


def test_gains_are_paired_by_seed():
    from layouts import STUDIES, tables

    study = dataclasses.replace(STUDIES["mlp"], epochs=1)
    run = {"epochs": 1, "p": 4, "stored_bits": 1, "tiled_weights": 4, "macs": 7}
    runs = [
        run | {"layout": layout, "seed": seed, "accuracy": accuracy}
        for layout, seed, accuracy in (
            ("paper", 0, 90.0),
            ("paper", 1, 80.0),
            ("rolled", 1, 82.0),
            ("rolled", 0, 91.0),
        )
    ]
    table = tables({"studies": {"mlp": runs}}, {"mlp": study})["mlp"]
    assert "| 4 | rolled | 86.50 | 82.00 to 91.00 | +1.50 | +1.00 to +2.00 | 2 | 0.2500 | 7 |" in table


def test_document_holds_the_tables_of_the_result_file():
    from layouts import DOCUMENT, RESULTS, STUDIES, fill, load, missing, tables

    document, results = DOCUMENT.read_text(encoding="utf-8"), load(RESULTS)
    assert fill(document, results) == document
    for name in tables(results):
        assert f"<!-- table: {name} -->" in document
    assert not list(missing(results, STUDIES, seeds=5))
