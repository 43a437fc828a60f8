"""Result files of studies, and the Markdown tables that are generated from them into the pages under ``docs``."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from paper.runs import write_atomically


def load(path: Path) -> dict[str, Any]:
    """Read a result file; one that is not there yet is empty."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return results


def save(results: Mapping[str, Any], path: Path) -> None:
    """Write a result file at once, so that a study that is stopped leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=1) + "\n")


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> str:
    """A Markdown table; columns with a title in ``left`` are aligned left, the others right."""
    rule = ["---" if title in left else "---:" for title in header]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def show_or_write(name: str, table: str, document: Path, *, show: bool, write: bool) -> None:
    """Print a table, or write it between the marks of its name into a page."""
    if show:
        print(table)
    if write:
        text = fill(document.read_text(encoding="utf-8"), {name: table})
        document.write_text(text, encoding="utf-8")


def fill(document: str, tables: Mapping[str, str]) -> str:
    """``document`` with its tables, between ``<!-- table: NAME -->`` and ``<!-- end -->``, replaced."""
    for name, table in tables.items():
        before, begin, rest = document.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        document = f"{before}{begin}{table}\n{end}{after}"
    return document
