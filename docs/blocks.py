"""The code of a page: its blocks, what is marked beside them, and the page as a notebook.

A block of Python is run by ``tests/docs/test_pages.py``, all of a page in one namespace from top to bottom. A block of
text right behind it is what it prints, with ``...`` for what differs from machine to machine. A comment right before a
block says otherwise::

    <!-- not run: needs a GPU -->             the Python below is not run
    <!-- output of one machine -->            the text below (or the output of a >>> block) is not compared
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
_MARK = re.compile(r"<!-- (?P<mark>not run|output of one machine)(?:: (?P<reason>[^\n]+?))? -->\n\s*\Z")


@dataclass(frozen=True)
class Block:
    """One block of Python.

    Attributes:
        code: without its indentation.
        line: of the page on which the code begins, from 1.
        output: what it prints, if the page shows that.
        not_run: why it is not run; empty if it is.
        compared: whether the output is the same on every machine.
    """

    code: str
    line: int
    output: str | None = None
    not_run: str = ""
    compared: bool = True

    @property
    def is_session(self) -> bool:
        """Whether it is typed at a prompt, with its output in it."""
        return self.code.startswith(">>>")


def python_blocks(page: str) -> list[Block]:
    """The blocks of Python of a page, in order.

    Raises:
        ValueError: a block is not run, and the page does not say why.
    """
    return [part for part in parts(page) if isinstance(part, Block)]


def parts(page: str) -> Iterator[str | Block]:
    """A page as text and blocks of Python in order; the output of a block, and its marks, belong to it."""
    fences = list(_FENCE.finditer(page))
    done = 0
    for index, fence in enumerate(fences):
        if fence["language"] != "python" or fence.start() < done:
            continue
        line = page.count("\n", 0, fence.start("code")) + 1
        mark = _MARK.search(page[done : fence.start()])
        reason = (mark["reason"] or "") if mark and mark["mark"] == "not run" else ""
        if mark and mark["mark"] == "not run" and not reason:
            raise ValueError(f"line {line}: say why the block is not run: <!-- not run: needs a GPU -->")
        yield page[done : fence.start()][: mark.start() if mark else None]
        done = fence.end()
        output, compared = None, not (mark and mark["mark"] == "output of one machine")
        following = fences[index + 1] if index + 1 < len(fences) else None
        if following is not None and following["language"] == "text":
            between = page[done : following.start()]
            shown = _MARK.search(between)
            if not between[: shown.start() if shown else None].strip():
                output, done = following["code"], following.end()
                compared = compared and shown is None
        code = textwrap.dedent(fence["code"])
        yield Block(code, line, output, reason, compared)
    yield page[done:]


def to_notebook(page: str) -> str:
    """A page as a notebook: a cell for each block, with the output that the page shows.

    The tests compare that output with what the code prints, so that the notebook is as it would be after a run.
    """
    cells = []
    for part in parts(page):
        number = str(len(cells))
        if isinstance(part, str):
            if text := part.strip():
                cells.append({"cell_type": "markdown", "id": number, "metadata": {}, "source": text})
            continue
        outputs = [] if part.output is None else [{"name": "stdout", "output_type": "stream", "text": part.output}]
        code = {"cell_type": "code", "id": number, "metadata": {}, "execution_count": None}
        cells.append(code | {"source": part.code.rstrip("\n"), "outputs": outputs})
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"
