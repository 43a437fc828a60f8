"""``tbn-compiler demo``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tbn_compiler.cli.options import parse_positive
from tbn_compiler.cli.output import add_json, print_json
from tbn_compiler.tables import console


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser("demo", help="train, lower and run a small network on scanned digits, in C too")
    parser.add_argument(
        "--out", type=Path, default=Path("tbn-demo"), help="folder for the files (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=parse_positive, default=30, help="epochs per network (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tbn_compiler.demo import run

    results = run(arguments.out, arguments.epochs, arguments.seed, console(stderr=arguments.json))
    if arguments.json:
        print_json(results)
