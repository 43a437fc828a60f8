"""Pages and fragments that people look at: parts (text, tables, pictures) and the templates that show them.

A result describes itself as :class:`Section`; :func:`fragment` shows one in a notebook, :func:`page` several as a file
of their own. Either holds its style, no script, and needs nothing from outside. Colours follow the reader's choice of
light or dark.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from tbn_compiler.html.pictures import Bars, MemoryMap, Scatter

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup

__all__ = ["Bars", "Column", "Facts", "MemoryMap", "Notes", "Part", "Scatter", "Section", "Table", "fragment", "page"]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its heading.
        numeric: whether it holds numbers, which stand to the right and are never broken.
        hint: what it means, for readers who do not know the word; empty if the title says it.
    """

    title: str
    numeric: bool = False
    hint: str = ""


@dataclass(frozen=True)
class Table:
    """A table; the first column names the rows.

    Attributes:
        caption: what it shows.
        columns: the columns.
        rows: a string for each column.
        total: the last row, if there is one.
        folded: whether it opens only when the reader asks for it.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    total: tuple[str, ...] = ()
    folded: bool = False

    kind = "table"


@dataclass(frozen=True)
class Facts:
    """A few numbers with what they are."""

    pairs: tuple[tuple[str, str], ...]

    kind = "facts"


@dataclass(frozen=True)
class Notes:
    """Sentences, each in a paragraph or, with ``listed``, in a list."""

    lines: tuple[str, ...]
    listed: bool = False

    kind = "notes"


Part = Table | Facts | Notes | Bars | MemoryMap | Scatter


@dataclass(frozen=True)
class Section:
    """Parts under a heading.

    Attributes:
        title: the heading.
        parts: what stands under it.
    """

    title: str
    parts: tuple[Part, ...]


def fragment(section: Section) -> str:
    """A section to put into another page, such as a notebook."""
    return _render("fragment.html", section=section)


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """A page of its own, in HTML 5."""
    return _render("page.html", title=title, subtitle=subtitle, sections=sections)


def _render(template: str, **values: object) -> str:
    return _environment().get_template(template).render(**values) + "\n"


@cache
def _environment() -> jinja2.Environment:
    import jinja2  # `import tbn_compiler` does without it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tbn_compiler.html"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(name: str) -> Markup:
    """Text whose long names may be broken behind a dot or an underscore, and no arrow inside."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"(_|(?<=[A-Za-z])\.)(?=\w)", r"\1<wbr>", str(escape(name)).replace("-&gt;", "&rarr;")))
