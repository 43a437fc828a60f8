"""The result file of the GPU benchmark: complete and readable after every case, whatever ends the run.

Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# What must agree before rows are added to a file: figures of two machines are not mixed.
SAME = ("gpu", "driver", "cuda", "torch", "triton")


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        name: what it is found by in the file; the first word is the part of the benchmark that it belongs to.
        measure: gives its row.
    """

    name: str
    measure: Callable[[], Row] = field(compare=False)

    @property
    def part(self) -> str:
        """Which part of the benchmark it belongs to."""
        return part_of(self.name)


def part_of(name: str) -> str:
    """The part that a case belongs to, by its name."""
    return name.partition(" ")[0]


class OtherMachineError(Exception):
    """A result file is of another machine or other versions."""


class Results:
    """Rows by the names of their cases, written after every change.

    Args:
        path: the file; its folder is made.
        content: what it holds.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path, self.content = path, content
        path.parent.mkdir(parents=True, exist_ok=True)
        content.setdefault("cases", {})

    @classmethod
    def read(cls, path: Path) -> Results:
        """What a file holds; nothing if there is none."""
        return cls(path, json.loads(path.read_text()) if path.exists() else {})

    @classmethod
    def prepare(cls, path: Path, machine: dict[str, Any], parts: Sequence[str], *, resume: bool) -> Results:
        """A file in which the cases that are to be measured are missing.

        Args:
            path: the file.
            machine: what measures now.
            parts: parts to measure; rows of other parts stay.
            resume: keep the rows that these parts have too, but not failures.

        Raises:
            OtherMachineError: rows that would stay are of another machine.
        """
        found = cls.read(path)
        cases = {
            name: row
            for name, row in found.cases.items()
            if row["part"] not in parts or (resume and "failed" not in row)
        }
        before = found.content.get("machine", {})
        differing = [key for key in SAME if before.get(key) != machine.get(key)]
        if cases and differing:
            key = differing[0]
            raise OtherMachineError(
                f"{path} holds results with {key} {before.get(key)}, and here it is {machine.get(key)}: "
                "give another --output, or measure all parts anew"
            )
        content = {"machine": machine, "cases": cases}
        if cases and "ceilings" in found.content:
            content["ceilings"] = found.content["ceilings"]
        made = cls(path, content)
        made.write()
        return made

    @property
    def cases(self) -> dict[str, Row]:
        """The rows."""
        rows: dict[str, Row] = self.content["cases"]
        return rows

    @property
    def running(self) -> str | None:
        """The case that was begun and has no row yet."""
        return self.content.get("running")

    def begin(self, name: str) -> None:
        """Note what is measured now, so that a crash can be put down to it."""
        self.content["running"] = name
        self.write()

    def record(self, name: str, row: Row) -> None:
        """Keep a row."""
        self.content.pop("running", None)
        self.cases[name] = {"part": part_of(name), **row}
        seconds: dict[str, float] = {}
        for kept in self.cases.values():
            seconds[kept["part"]] = round(seconds.get(kept["part"], 0.0) + kept.get("seconds", 0.0), 1)
        self.content["seconds"] = seconds
        self.write()

    def write(self) -> None:
        """Replace the file at once: it is never half-written."""
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(temporary, self.path)


def said(error: BaseException) -> str:
    """An exception as a row keeps it."""
    return f"{type(error).__name__}: {str(error)[:400]}"


def run(
    results: Results,
    cases: Iterable[Case],
    shares: dict[str, float],
    seconds: float,
    usable: Callable[[], bool] = lambda: True,
    clock: Callable[[], float] = time.monotonic,
) -> bool:
    """Measure the cases that a file lacks, in order; an exception costs its case only.

    Args:
        results: the file.
        cases: what to measure, the parts one behind the other.
        shares: part -> its share of the time. A part that uses up its share waits for the others.
        seconds: nothing is begun after them.
        usable: whether the GPU still answers; asked after a failure.
        clock: seconds.

    Returns:
        Whether the GPU can go on: if not, another process has to.
    """
    start = clock()
    wanted = [case for case in cases if case.name not in results.cases]
    parts = list(dict.fromkeys(case.part for case in wanted))
    whole, ends, passed = sum(shares[part] for part in parts), {}, 0.0
    for part in parts:
        passed += shares[part]
        ends[part] = start + seconds * passed / whole
    waiting: list[Case] = []
    for case in wanted:
        if clock() >= ends[case.part]:
            waiting.append(case)
        elif not _measure(results, case, usable, clock):
            return False
    for case in waiting:
        if clock() >= start + seconds:
            break
        if not _measure(results, case, usable, clock):
            return False
    return True


def _measure(results: Results, case: Case, usable: Callable[[], bool], clock: Callable[[], float]) -> bool:
    results.begin(case.name)
    begun = clock()
    try:
        row = case.measure()
    except Exception as error:  # of a kernel, the library, another package: a finding, not the end of the benchmark
        row = {"failed": said(error)}
    row["seconds"] = round(clock() - begun, 2)
    results.record(case.name, row)
    print(f"{row['seconds']:6.1f} s  {case.name}{'  FAILED' if 'failed' in row else ''}", flush=True)
    return "failed" not in row or usable()
