"""The paper's tables and figures, with our figures beside the published ones.

python examples/reproduce.py table1 figure6              # some of them
python examples/reproduce.py all --format markdown
python examples/reproduce.py --docs                      # writes all into docs/paper.md

Nothing is trained or measured: ours are counted from the models, or read from the committed results
(``examples/results``, ``benchmarks/results``), with data set, epochs, seeds and machine of each.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from documents import fill, markdown
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

sys.path.append(str(Path(__file__).parents[1]))  # the benchmarks stand beside this folder

from paper.committed import Committed
from paper.reproduced import TABLES, Reproduced

DOCUMENT = Path(__file__).parents[1] / "docs" / "paper.md"


def as_markdown(found: Reproduced) -> str:
    """One table or figure as a section of a page."""
    blocks = [f"### {found.title}"]
    blocks += [markdown(part.header, part.rows, part.left) for part in found.parts]
    blocks += found.notes
    if found.runs:
        blocks.append("Runs:\n\n" + "\n".join(f"{number}. {run}" for number, run in enumerate(found.runs, 1)))
    return "\n\n".join(blocks)


def show(found: Reproduced, console: Console) -> None:
    """Print one table or figure."""
    console.print(Text(found.title, style="bold"))
    for part in found.parts:
        table = Table(box=box.SIMPLE_HEAD)
        for title in part.header:
            table.add_column(Text(title), justify="left" if title in part.left else "right")
        for row in part.rows:
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
    for note in found.notes:
        console.print(Text(note.replace("`", "")))
    for number, run in enumerate(found.runs, 1):
        console.print(Text(f"run {number}: {run}".replace("`", "")))
    console.print()


def sections(committed: Committed) -> Iterator[tuple[str, str]]:
    """The sections of ``docs/paper.md`` by the names of their places."""
    for name, make in TABLES.items():
        yield name, as_markdown(make(committed))


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} or all")
    parser.add_argument("--list", action="store_true", help="name the tables and figures")
    parser.add_argument("--format", choices=("text", "markdown"), default="text", help="default: %(default)s")
    parser.add_argument("--docs", action="store_true", help="write all of them into docs/paper.md")
    arguments = parser.parse_args(argv)
    unknown = sorted(set(arguments.tables) - {*TABLES, "all"})
    if unknown:
        parser.error(f"there is no {', '.join(unknown)}, only {', '.join(TABLES)} and all")
    if not (arguments.tables or arguments.list or arguments.docs):
        parser.error("name a table or figure, or all; --list shows them")
    if arguments.list:
        for name, make in TABLES.items():
            print(f"{name}  {make.__doc__}")
        return 0
    committed = Committed.read()
    if arguments.docs:
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), dict(sections(committed))))
        return 0
    names = TABLES if "all" in arguments.tables else list(dict.fromkeys(arguments.tables))
    console = Console(width=None if sys.stdout.isatty() else 160)
    for name in names:
        found = TABLES[name](committed)
        if arguments.format == "markdown":
            print(as_markdown(found), end="\n\n")
        else:
            show(found, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
