"""Running the code of a page: all its blocks in one module, from top to bottom, and what they print."""

from __future__ import annotations

import contextlib
import doctest
import io
import linecache
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.blocks import Block, python_blocks

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def run_page(path: Path, given: Mapping[str, Any]) -> types.ModuleType:
    """Run the blocks of a page.

    Args:
        path: the page.
        given: names that its code takes as known.

    Returns:
        The module that the code ran in.

    Raises:
        AssertionError: a block prints something else than the page shows.
        Exception: what the code raises; the traceback shows the lines of the page.
    """
    module = types.ModuleType("page")
    module.__file__ = str(path)  # as a file has it, so that the source of what is defined there can be read
    module.__dict__.update(given)
    blocks = [block for block in python_blocks(path.read_text(encoding="utf-8")) if not block.not_run]
    linecache.cache[str(path)] = _as_source(blocks, str(path))
    sys.modules["page"] = module
    try:
        for block in blocks:
            (_run_session if block.is_session else _run_block)(block, path, module.__dict__)
    finally:
        del sys.modules["page"], linecache.cache[str(path)]
    return module


def _as_source(blocks: Sequence[Block], path: str) -> tuple[int, None, list[str], str]:
    """The page as a Python file with code on its own lines, which tracebacks and ``inspect`` read."""
    lines: list[str] = []
    for block in blocks:
        lines += ["\n"] * (block.line - 1 - len(lines))
        lines += ["\n"] if block.is_session else block.code.splitlines(keepends=True)
    return sum(map(len, lines)), None, lines, path


def _run_block(block: Block, path: Path, names: dict[str, Any]) -> None:
    # Blank lines in front give the code the page's line numbers.
    code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, names)
    if block.output is not None and block.compared:
        check_output(block.output, printed.getvalue(), f"{path.name}:{block.line}")


def check_output(shown: str, printed: str, place: str) -> None:
    """Compare what a page shows with what its code printed; ``...`` stands for anything.

    Raises:
        AssertionError: they differ.
    """
    checker = doctest.OutputChecker()
    if not checker.check_output(shown, printed, FLAGS):
        example = doctest.Example("", shown)
        raise AssertionError(f"{place} prints something else\n{checker.output_difference(example, printed, FLAGS)}")


def _run_session(block: Block, path: Path, names: dict[str, Any]) -> None:
    session = doctest.DocTestParser().get_doctest(block.code, names, path.name, str(path), block.line - 1)
    report = io.StringIO()
    runner = doctest.DocTestRunner(_Checker(block.compared), verbose=False, optionflags=FLAGS)
    failed = runner.run(session, out=report.write, clear_globs=False).failed
    names.update(session.globs)
    assert not failed, report.getvalue()


class _Checker(doctest.OutputChecker):
    """Takes any output where the page says that it is one machine's; what raises fails all the same."""

    def __init__(self, compared: bool) -> None:
        self._compared = compared

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not self._compared or super().check_output(want, got, optionflags)
