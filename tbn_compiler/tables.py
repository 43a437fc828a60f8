"""Where tables are printed: as wide as a terminal is, and in their natural width in files and pipes."""

from __future__ import annotations

import io

from rich.console import Console, RenderableType

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
