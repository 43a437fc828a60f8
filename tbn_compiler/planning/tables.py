"""One table in three forms: ``rich``, plain text and Markdown."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_WIDEST = 10_000  # columns; wider than any name


@dataclass(frozen=True)
class PlainTable:
    """A table of text.

    Attributes:
        titles: of the columns.
        rows: cells as text.
        caption: a line below.
        left: number of columns, from the first on, that are aligned to the left.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str
    left: int = 1

    def rich(self) -> RenderableType:
        """For a terminal."""
        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, pad_edge=False, collapse_padding=False)
        for index, title in enumerate(self.titles):
            # Names may fold on a narrow terminal, numbers never do.
            name = index < self.left
            table.add_column(escape(title), justify="left" if name else "right", overflow="fold", no_wrap=not name)
        for row in self.rows:
            table.add_row(*map(escape, row))
        return Group(table, Text(self.caption))

    def text(self) -> str:
        """In its natural width, for files and pipes."""
        console = Console(file=io.StringIO(), width=_WIDEST, color_system=None)
        console.print(self.rich())
        assert isinstance(console.file, io.StringIO)
        return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"

    def markdown(self) -> str:
        """GitHub-flavoured Markdown."""
        aligns = ["---" if index < self.left else "---:" for index in range(len(self.titles))]
        lines = [self.titles, aligns, *self.rows]
        text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"{text}\n\n{self.caption}\n"
