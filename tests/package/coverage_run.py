"""Run the test suite and measure which lines of the package it executes, by room.

    python -m tests.package.coverage_run             # some 30 minutes; writes benchmarks/results/coverage.json
    python -m tests.package.coverage_run --docs      # writes the table of docs/stability.md from that file

Lines that run inside other processes that the tests start count where coverage.py follows them; code for a GPU that is
compiled, not run, counts as executed where Triton's interpreter runs it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from examples.documents import fill, markdown

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
DOCUMENT = ROOT / "docs" / "stability.md"


def by_room(files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Statements and executed ones of each folder of the package (``.`` for its own files), from coverage.py's JSON."""
    rooms: dict[str, dict[str, int]] = {}
    for name, file in sorted(files.items()):
        inside = Path(name).relative_to("tbn_compiler").parts[:-1]
        room = rooms.setdefault("/".join(inside[:2]) or ".", {"statements": 0, "executed": 0})
        room["statements"] += file["summary"]["num_statements"]
        room["executed"] += file["summary"]["covered_lines"]
    return rooms


def table(results: Mapping[str, Any]) -> str:
    """The rooms as a Markdown table, with their sum."""
    rooms = results["rooms"]
    total = {key: sum(room[key] for room in rooms.values()) for key in ("statements", "executed")}
    rows = [
        [f"`tbn_compiler/{name}`" if name != "." else "`tbn_compiler`", *_cells(room)] for name, room in rooms.items()
    ]
    return markdown(["room", "statements", "executed by tests"], [*rows, ["together", *_cells(total)]], left=["room"])


def _cells(room: Mapping[str, int]) -> list[str]:
    return [f"{room['statements']:,}", f"{room['executed'] / max(room['statements'], 1):.1%}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, or fill the document; the exit status is that of the tests."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--docs", action="store_true", help=f"only fill docs/{DOCUMENT.name} from {RESULTS.name}")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest (default: -n auto)")
    arguments = parser.parse_args(argv)
    if arguments.docs:
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), {"coverage": table(json.loads(RESULTS.read_text()))}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        options = ["--cov=tbn_compiler", f"--cov-report=json:{report}", "-q"]
        command = [sys.executable, "-m", "pytest", *options, *(arguments.pytest or ["-n", "auto"])]
        status = subprocess.run(command, cwd=ROOT).returncode
        files = json.loads(report.read_text())["files"]
    results = {"machine": machine(), "passed": status == 0, "rooms": by_room(files)}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return status


if __name__ == "__main__":
    sys.exit(main())
