"""What commands print: a table for people, or data with ``--json``."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tbn_compiler.tables import console


def add_json(parser: Any) -> None:
    """The option ``--json``, which every command has: data on standard output and nothing else."""
    parser.add_argument("--json", action="store_true", help="print data as JSON instead of text")


def print_json(data: Any) -> None:
    """Print data as JSON. Numbers that JSON has no form for (infinity, NaN) are ``null``; paths are strings."""
    print(json.dumps(_plain(data), indent=2))


def add_formats(parser: argparse.ArgumentParser) -> None:
    """The options that say how a result is printed."""
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--markdown", action="store_true", help="print a Markdown table with exact numbers")
    add_json(formats)


def show(result: Any, arguments: argparse.Namespace) -> None:
    """Print a result with ``table``, ``to_markdown`` and ``to_dict`` as the arguments say."""
    if arguments.json:
        print_json(result.to_dict())
    elif arguments.markdown:
        print(result.to_markdown(), end="")
    else:
        console().print(result.table())


@contextmanager
def stages(number: int) -> Iterator[Callable[[str], None]]:
    """Progress on standard error, if that is a terminal; gives what is called with each stage when it begins."""
    terminal = console(stderr=True)
    columns = (TextColumn("{task.description:<13}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as progress:

        def begin(name: str) -> None:
            if progress.task_ids:
                progress.update(progress.task_ids[0], description=name, advance=1)
            else:
                progress.add_task(name, total=number)

        yield begin


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
