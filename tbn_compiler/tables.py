"""Tables: as wide as a terminal is, in their natural width in files and pipes, and in Markdown."""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_WIDEST = 10_000  # columns; wider than any table, so that nothing is folded or cut


def console(*, stderr: bool = False) -> Console:
    """The console of standard output or error; one that is no terminal takes tables in their natural width."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=_WIDEST)


def as_text(renderable: RenderableType) -> str:
    """What ``rich`` shows, in its natural width and without colours; ends with a line break."""
    file = io.StringIO()
    Console(file=file, width=_WIDEST, color_system=None).print(renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines()) + "\n"


def markdown(titles: Sequence[str], rows: Sequence[Sequence[str]], left: Collection[str]) -> str:
    """A GitHub-flavoured Markdown table; columns with a title in ``left`` are aligned left, the others right."""
    aligns = ["---" if title in left else "---:" for title in titles]
    lines = [titles, aligns, *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


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
        return as_text(self.rich())

    def markdown(self) -> str:
        """GitHub-flavoured Markdown."""
        return f"{markdown(self.titles, self.rows, self.titles[: self.left])}\n{self.caption}\n"


class Tabular:
    """Mixin of results that are one table. ``print`` gives it in its natural width."""

    def _plain_table(self) -> PlainTable:
        raise NotImplementedError

    def table(self) -> RenderableType:
        """The result as a ``rich`` table."""
        return self._plain_table().rich()

    def to_markdown(self) -> str:
        """The result as a GitHub-flavoured Markdown table."""
        return self._plain_table().markdown()

    def __str__(self) -> str:
        """The table in its natural width."""
        return self._plain_table().text()
