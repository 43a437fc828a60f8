"""Markdown tables that are generated into the pages under ``docs``."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> str:
    """A Markdown table; columns with a title in ``left`` are aligned left, the others right."""
    rule = ["---" if title in left else "---:" for title in header]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def fill(document: str, tables: Mapping[str, str]) -> str:
    """``document`` with its tables, between ``<!-- table: NAME -->`` and ``<!-- end -->``, replaced."""
    for name, table in tables.items():
        before, begin, rest = document.partition(f"<!-- table: {name} -->\n")
        _, end, after = rest.partition("<!-- end -->")
        document = f"{before}{begin}{table}\n{end}{after}"
    return document
