"""Markdown tables, and the blocks of pages that are filled with them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.documents import fill, markdown

ROOT = Path(__file__).parents[2]
PAGE = """text
<!-- one -->
old
<!-- end -->
between
<!-- two -->
<!-- end -->
behind
"""


def test_table() -> None:
    """The first column is aligned left unless others are named, wherever they are."""
    rows = [["a", "1"], ["b", "2"]]
    assert markdown(["name", "size"], rows) == "| name | size |\n| --- | ---: |\n| a | 1 |\n| b | 2 |"
    assert markdown(["name", "size"], rows, left=["size"]).splitlines()[1] == "| ---: | --- |"
    assert markdown(["name", "size"], [], left=()) == "| name | size |\n| ---: | ---: |"


def test_bars_inside_cells_do_not_end_them() -> None:
    assert markdown(["|w|", "n"], [["a | b", "1"]]).splitlines()[::2] == ["| \\|w\\| | n |", "| a \\| b | 1 |"]


def test_fill() -> None:
    filled = fill(PAGE, {"two": "second\nblock", "one": "first"})
    assert filled == PAGE.replace("old", "first").replace("<!-- two -->\n", "<!-- two -->\nsecond\nblock\n")
    assert fill(filled, {"two": "second\nblock", "one": "first"}) == filled
    assert fill(PAGE, {}) == PAGE


@pytest.mark.parametrize("page", ["", "<!-- one --><!-- end -->\n", PAGE.replace("one", "ones")])
def test_missing_mark(page: str) -> None:
    with pytest.raises(ValueError, match="no mark <!-- one -->"):
        fill(page, {"one": "text"})


@pytest.mark.parametrize("page", ["<!-- one -->\nold\n", PAGE.replace("<!-- end -->", "", 1)])
def test_missing_end(page: str) -> None:
    """The end of the next block is not taken for the missing one: what stands between would be lost."""
    with pytest.raises(ValueError, match="no <!-- end --> for <!-- one -->"):
        fill(page, {"one": "text"})


def test_both_ways_to_import(tmp_path: Path) -> None:
    """Scripts have this folder on their path and save results; benchmarks have the root on theirs."""
    result = tmp_path / "new" / "result.json"
    save = f"import documents, pathlib; documents.save({{}}, pathlib.Path({str(result)!r}))"
    alone = "import examples.documents, sys; assert 'torch' not in sys.modules"
    for folder, code in (("examples", save), (".", alone)):
        subprocess.run([sys.executable, "-c", code], cwd=ROOT / folder, check=True, env={"PYTHONPATH": str(ROOT)})
    assert result.read_text() == "{}\n"
