"""The command line of a study that trains networks of ``layout_studies`` and fills one table of a page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import documents
from example_data import DataError
from layout_studies import STUDIES, Study, quick

Results = dict[str, Any]


class StudyCommand:
    """The options that such studies share, and what they do.

    Args:
        name: of the program, and of its table.
        about: what it does; the first line is shown.
        tasks: names of the studies that are trained if none is asked for.
        choices: names of those that may be asked for; default: these.
        results: the committed result file.
        document: the page with the table.
        table: makes the table of the results.
    """

    def __init__(
        self,
        name: str,
        about: str | None,
        tasks: Collection[str],
        results: Path,
        document: Path,
        table: Callable[[Results], str],
        choices: Collection[str] | None = None,
    ) -> None:
        self.name, self.tasks, self.results, self.document, self.table = name, tasks, results, document, table
        self.parser = parser = argparse.ArgumentParser(description=(about or "").split("\n", 1)[0])
        parser.add_argument(
            "--data", metavar="DIR", help="folder with the data sets, as train.py takes it, or 'synthetic'"
        )
        parser.add_argument("--results", type=Path, metavar="FILE", default=results, help="file to read and extend")
        parser.add_argument(
            "--only", choices=choices or tasks, action="append", metavar="TASK", help="one task; may be repeated"
        )
        parser.add_argument("--seeds", type=int, default=3, help="runs of each network (default: %(default)s)")
        parser.add_argument("--quick", action="store_true", help="a trial: two steps for each run")
        parser.add_argument("--table", action="store_true", help="print the results as a Markdown table")
        parser.add_argument("--docs", action="store_true", help=f"write it to docs/{document.name}")

    def run(
        self,
        train: Callable[[argparse.Namespace, dict[str, Study], Results], None],
        arguments: Sequence[str] | None = None,
    ) -> int:
        """Train what the result file lacks, and show the table; returns the exit status.

        Args:
            train: trains and writes the file, given the options, the studies by name, and what the file holds.
            arguments: of the command line.
        """
        options = self.parser.parse_args(arguments)
        if options.seeds < 1:
            self.parser.error("--seeds must be at least 1")
        if options.quick and options.results == self.results:
            self.parser.error("--quick needs --results: its figures do not belong among the real ones")
        chosen = options.only or self.tasks
        studies = {name: quick(study) if options.quick else study for name, study in STUDIES.items() if name in chosen}
        results = documents.load(options.results)
        if options.data:
            try:
                train(options, studies, results)
            except DataError as error:
                print(f"{self.name}: {error}", file=sys.stderr)
                return 1
        if options.table or options.docs:
            if not results.get("runs"):
                print(f"{self.name}: {options.results} holds no runs yet; train with --data", file=sys.stderr)
                return 1
            table = self.table(results)
            documents.show_or_write(self.name, table, self.document, show=options.table, write=options.docs)
        return 0
