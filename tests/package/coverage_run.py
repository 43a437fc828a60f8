"""Run the test suite and measure which lines of the package it executes, by room.

    python -m tests.package.coverage_run             # writes benchmarks/results/coverage.json
    python -m tests.package.coverage_run --docs      # writes the table of docs/stability.md from that file

On Python 3.12 and newer Python itself tells coverage.py what runs (``COVERAGE_CORE=sysmon``), which costs next to
nothing: half an hour on two cores, and twice that on older ones. Lines that run in other processes than the tests' own
do not count, nor do the bodies of Triton kernels, which Triton or its interpreter compile for themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.machine import machine
from examples.documents import fill, markdown

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "coverage.json"
DOCUMENT = ROOT / "docs" / "stability.md"


def by_room(files: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Statements and executed ones of each folder of the package (``.`` for its own files), from coverage.py's JSON."""
    rooms: dict[str, dict[str, int]] = {}
    for name, file in sorted(files.items()):
        if not name.startswith("tbn_compiler/"):  # what tests put beside it
            continue
        inside = Path(name).relative_to("tbn_compiler").parts[:-1]
        room = rooms.setdefault("/".join(inside[:2]) or ".", {"statements": 0, "executed": 0})
        room["statements"] += file["summary"]["num_statements"]
        room["executed"] += file["summary"]["covered_lines"]
    return rooms


def counts(junit: str) -> dict[str, int]:
    """How many tests passed, failed and were skipped, from pytest's XML."""
    (suite,) = ElementTree.fromstring(junit).iter("testsuite")
    every, skipped = int(suite.attrib["tests"]), int(suite.attrib["skipped"])
    failed = int(suite.attrib["failures"]) + int(suite.attrib["errors"])
    return {"passed": every - failed - skipped, "failed": failed, "skipped": skipped}


def table(results: Mapping[str, Any]) -> str:
    """The rooms as a Markdown table, with their sum."""
    rooms = results["rooms"]
    total = {key: sum(room[key] for room in rooms.values()) for key in ("statements", "executed")}
    rows = [
        [f"`tbn_compiler/{name}`" if name != "." else "`tbn_compiler`", *_cells(room)] for name, room in rooms.items()
    ]
    found = markdown(["room", "statements", "executed by tests"], [*rows, ["together", *_cells(total)]], left=["room"])
    tests, machine = results["tests"], results["machine"]
    return (
        f"{found}\n\n{tests['passed']:,} tests passed, {tests['failed']} failed, {tests['skipped']} were skipped; "
        f"Python {machine['python']}, PyTorch {machine['torch']}, {machine['date']}."
    )


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
        report, outcome = Path(folder) / "coverage.json", Path(folder) / "tests.xml"
        options = ["--cov=tbn_compiler", f"--cov-report=json:{report}", f"--junit-xml={outcome}", "-q"]
        command = [sys.executable, "-m", "pytest", *options, *(arguments.pytest or ["-n", "auto"])]
        # Before 3.12 coverage.py has one way only.
        core = {"COVERAGE_CORE": "sysmon"} if sys.version_info >= (3, 12) else {}
        status = subprocess.run(command, cwd=ROOT, env=os.environ | core).returncode
        files = json.loads(report.read_text())["files"]
        tests = counts(outcome.read_text())
    RESULTS.write_text(json.dumps({"machine": machine(), "tests": tests, "rooms": by_room(files)}, indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    print(table(results))
    return status


if __name__ == "__main__":
    sys.exit(main())
