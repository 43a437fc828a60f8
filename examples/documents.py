"""Result files of studies and benchmarks, and the Markdown that is made from them for the pages.

The scripts beside this file import it as ``documents``, benchmarks and tests as ``examples.documents``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

END = "<!-- end -->"


def load(path: Path) -> dict[str, Any]:
    """Read a result file; one that is not there yet is empty."""
    results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return results


def save(results: Mapping[str, Any], path: Path) -> None:
    """Write a result file at once, so that a study that is stopped leaves a whole one."""
    # Only the scripts save; the others that import this module need not have ``paper`` on their path.
    from paper.runs import write_atomically

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(results, indent=1) + "\n")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[str] | None = None) -> str:
    """A Markdown table, without a line break behind it.

    Args:
        header: titles of the columns.
        rows: texts of the cells.
        left: titles of the columns that are aligned left, the others right; by default the first column alone.
    """
    left = header[:1] if left is None else left
    rule = ["---" if title in left else "---:" for title in header]
    return "\n".join(map(_line, (header, rule, *rows)))


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def show_or_write(name: str, table: str, document: Path, *, show: bool, write: bool) -> None:
    """Print a table, or write it between the marks of its name into a page."""
    if show:
        print(table)
    if write:
        text = fill(document.read_text(encoding="utf-8"), {name: table})
        document.write_text(text, encoding="utf-8")


def fill(document: str, texts: Mapping[str, str]) -> str:
    """``document`` with what stands between ``<!-- NAME -->`` and the next ``<!-- end -->`` replaced, for each name.

    Raises:
        ValueError: a mark is not in the document, or no end follows it before the next mark.
    """
    for name, text in texts.items():
        before, begin, rest = document.partition(f"<!-- {name} -->\n")
        if not begin:
            raise ValueError(f"the document has no mark <!-- {name} -->")
        replaced, end, after = rest.partition(END)
        # Without the second condition, another block and all that stands before it would be lost.
        if not end or "<!-- " in replaced:
            raise ValueError(f"the document has no {END} for <!-- {name} -->")
        document = f"{before}{begin}{text}\n{end}{after}"
    return document
