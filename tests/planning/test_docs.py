"""The page's code runs as it stands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tbn_compiler as tbn
from tbn_compiler.planning.costs import COSTS

PAGE = Path(__file__).parents[2] / "docs" / "plan.md"


def test_the_pages_code(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    assert isinstance(names["plan"], tbn.LayerPlan)
    assert dict(names["plan"].costs)["bytes"] <= 1_500
    assert dict(names["small"].costs)["ram"] <= 1_024
    assert [point.name for point in names["result"].points][:2] == ["float", "p=4"]
    assert len(json.loads((tmp_path / "sweep.json").read_text())["points"]) == 4
    assert "p=4 hadamard" in capsys.readouterr().out


def test_the_page_lists_all_costs() -> None:
    assert re.findall(r"^\| `(\w+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE) == list(COSTS)
