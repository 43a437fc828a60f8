"""The paper's tables beside ours: every one prints, from committed results alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "examples" / "results"
NAMES = [f"table{number}" for number in range(1, 8)] + [f"figure{number}" for number in range(5, 9)]


@pytest.fixture(autouse=True)
def _examples_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")


@pytest.fixture
def program():
    import reproduce

    return reproduce


@pytest.fixture
def committed():
    from paper.committed import Committed

    return Committed.read()


def rows_of(found, part=0):
    """Rows of a table as dictionaries."""
    header = found.parts[part].header
    assert len(set(header)) == len(header)
    return [dict(zip(header, row, strict=True)) for row in found.parts[part].rows]


def test_all_tables_and_figures_are_there(program, capsys):
    assert list(program.TABLES) == NAMES
    assert program.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_page_holds_every_table(program, committed, name):
    """Renew it with ``python examples/reproduce.py --docs``."""
    text = program.as_markdown(program.TABLES[name](committed))
    assert f"<!-- {name} -->\n{text}\n<!-- end -->" in program.DOCUMENT.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_each_of_ours_says_where_it_is_from(program, committed, name):
    """Data set, epochs, seeds and machine of trainings; each run is in a row, and each row's run is there."""
    found = program.TABLES[name](committed)
    numbers = [row["run"] for part in range(len(found.parts)) for row in rows_of(found, part) if row.get("run")]
    assert sorted(set(map(int, numbers))) == list(range(1, len(found.runs) + 1))
    for run in found.runs:
        if run.startswith("`benchmarks/"):
            continue
        assert re.fullmatch(r"`\S+`[^:]*: [A-Za-z].*; \d+ epochs.*; seeds? [\d, ]+; .*(torch \d|gcc).*", run), run
    for part in range(len(found.parts)):
        for row in rows_of(found, part):
            if "run" in row and "ours" in row:
                assert bool(row["run"]) == (row["ours"] != "no run")


@pytest.mark.parametrize("name", NAMES)
def test_without_results_there_is_no_run(program, tmp_path, name):
    from paper.committed import Committed

    found = program.TABLES[name](Committed.read(tmp_path / "a", tmp_path / "b"))
    assert not found.runs
    for part in range(len(found.parts)):
        for row in rows_of(found, part):
            ours = {row[title] for title in ("ours", "measured", "stored [KB], ours", "instructions") if title in row}
            assert ours <= {"no run"}, row


def test_table_1_shows_the_committed_runs(program, committed):
    found = rows_of(program.TABLES["table1"](committed))
    for name, weights in (("float", "float"), ("tbn4", "p = 4"), ("tbn4-hadamard", "p = 4, hadamard")):
        result = json.loads((RESULTS / f"train-resnet18-cifar10-{name}.json").read_text())["result"]
        expected = ("ResNet18, CIFAR", weights, f"accuracy {result['trained']['accuracy']:.2f}")
        rows = [row for row in found if (row["network"], row["weights"], row["ours"]) == expected]
        assert [row["M-bit of ours"] for row in rows] == [f"{result['stored_bits'] / 1e6:.3f}"]
    recipes = {"resnet18-cifar10": "ResNet18, CIFAR", "resnet8-cifar10": "ResNet8, CIFAR"}
    for recipe, network in recipes.items():
        files = list(RESULTS.glob(f"train-{recipe}-*.json"))
        assert len([row for row in found if row["network"] == network and row["run"]]) <= len(files)
    shown = {(row["network"], row["weights"]): row for row in found}
    assert shown["ResNet20, CIFAR", "IR-Net, 1 bit"]["paper"] == "accuracy 90.8"
    assert shown["ResNet18, CIFAR", "p = 16"]["M-bit, paper"] == "0.77"
    assert {row["paper"] for row in found} == {"not at hand", "not in the paper", "accuracy 90.8"}


def test_table_2_by_its_rule(program, committed):
    """Deduplication alone cannot exceed p; the published savings do."""
    found = rows_of(program.TABLES["table2"](committed))
    ours = {(row["network"], row["p"], row["lambda"]): (row["saving, paper"], row["saving, ours"]) for row in found}
    assert ours == {
        ("ResNet18, CIFAR", "4", "64,000"): ("6.7x", "2.19x"),
        ("ResNet18, CIFAR", "4", "0"): ("6.7x", "4.00x"),
        ("VGG-small", "4", "64,000"): ("7.9x", "4.00x"),
        ("ResNet34, ImageNet", "2", "150,000"): ("6.1x", "1.39x"),
    }
    for row in found:
        assert float(row["saving, ours"][:-1]) <= int(row["p"]) < float(row["saving, paper"][:-1])


def test_table_6_counts_memory_as_the_paper(program, committed):
    found = program.TABLES["table6"](committed)
    rows = {row["weights"]: row for row in reversed(rows_of(found))}
    for weights, stored, memory in (("binary", "12.71", "16.20"), ("p = 4", "3.32", "6.40")):
        assert rows[weights]["stored [KB], ours"] == stored
        assert rows[weights]["counted"] == memory
        assert float(memory) <= float(rows[weights]["most memory of a layer [KB], paper"])
    cases = json.loads((ROOT / "benchmarks" / "results" / "mcu.json").read_text())["cases"]
    for case in cases:
        if case["model"] == "784-128-10":
            shown = [
                row for row in rows_of(found, 1) if (row["kernels"], row["core"]) == (case["kernels"], case["cpu"])
            ]
            assert f"{max(case['instructions']):,}" in {row["instructions"] for row in shown}


def test_table_7_is_the_counted_one(program, committed):
    from benchmarks import memory

    found = rows_of(program.TABLES["table7"](committed))
    assert [row["weights"] for row in found] == list(memory.PAPER)
    for row in found:
        peak, parameters = memory.PAPER[row["weights"]]
        assert (float(row["peak [MiB], paper"]), float(row["parameters [MiB], paper"])) == (peak, parameters)
        assert float(row["counted"]) < peak


def test_figure_7_and_8_take_runs_with_other_options(program, tmp_path):
    """A run with another lambda or other alphas gets a row, or fills its own."""
    from paper.committed import Committed

    document = json.loads((RESULTS / "train-resnet18-cifar10-tbn4.json").read_text())
    document["result"]["lowered"]["accuracy"] = 74.79
    for name, changes in (("a", {"min_size": 100_000}), ("b", {"alpha": "layer", "alpha_source": "W"})):
        document["header"]["tiling"].update({"min_size": 64_000, "alpha": "tile", "alpha_source": "A", **changes})
        (tmp_path / f"train-{name}.json").write_text(json.dumps(document))
    found = Committed.read(tmp_path, tmp_path)
    rows = rows_of(program.TABLES["figure7"](found))
    assert {row["network"] for row in rows} == {"ResNet18, CIFAR"}  # the other one has the rows of its runs only
    ours = {row["lambda"]: row["ours"] for row in rows}
    assert list(ours) == ["0", "36,864", "64,000", "100,000", "150,000"]
    assert [value for value in ours.values() if value != "no run"] == ["accuracy 74.79"]
    rows = [row for row in rows_of(program.TABLES["figure8"](found)) if row["network"] == "ResNet18, CIFAR"]
    ours = {(row["trained"], row["alphas"]): row["ours"] for row in rows}
    assert [key for key, value in ours.items() if value != "no run"] == [("W", "one a layer")]


def test_seeds_are_one_run(tmp_path):
    from paper.committed import read_runs

    document = json.loads((RESULTS / "train-mnist-mlp-tbn4.json").read_text())
    document["header"]["settings"]["epochs"] = 5
    document["header"]["changes"] = {"epochs": [20, 5]}
    for seed, accuracy in enumerate((95.0, 96.0, 97.0)):
        document["header"]["seed"] = seed
        document["result"]["lowered"]["accuracy"] = accuracy
        (tmp_path / f"train-{seed}.json").write_text(json.dumps(document))
    (run,) = read_runs(tmp_path)
    assert run.score == "accuracy 96.00 (95.00 to 97.00)"
    assert "MNIST; 5 epochs of the recipe's 20; lambda 64,000; one alpha a copy from A; seeds 0, 1, 2; " in str(run)


def test_what_a_run_says(tmp_path):
    """A subset, a changed setting, mixed precision and a failure are said."""
    from paper.committed import read_runs

    document = json.loads((RESULTS / "train-mnist-mlp-tbn4.json").read_text())
    header = document["header"]
    header.update(amp="bf16", fast=True, changes={"lr": [0.001, 0.002], "subset": ["all", 500]})
    header["settings"]["epochs"] = 20
    header["data"].update(train=500, note="")
    document["result"].update(lowered=None, failure="no memory")
    (tmp_path / "train-a.json").write_text(json.dumps(document))
    (run,) = read_runs(tmp_path)
    assert str(run).startswith(
        "`mnist-mlp`, p = 4: MNIST; 500 of 60,000 training examples; 20 epochs; lr 0.001 -> 0.002; lambda 64,000; "
        "one alpha a copy from A; tf32; bf16; not lowered; seed 0; "
    )
    assert run.score == f"accuracy {document['result']['trained']['accuracy']:.2f}"


def test_printing(program, capsys):
    assert program.main(["table2", "figure5", "table2"]) == 0
    text = capsys.readouterr().out
    assert text.count("Table 2: bit-operations") == 1
    assert "[1e9 bit-operations]" in text  # not taken for markup
    assert program.main(["table2", "--format", "markdown"]) == 0
    assert capsys.readouterr().out.strip() in program.DOCUMENT.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "name a table or figure"), (["table8"], "there is no table8, only table1")]
)
def test_wrong_arguments(program, capsys, arguments, message):
    with pytest.raises(SystemExit):
        program.main(arguments)
    assert message in capsys.readouterr().err
