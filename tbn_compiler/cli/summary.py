"""``tbn-compiler summary``."""

from __future__ import annotations

import argparse
from typing import Any

from tbn_compiler.cli.models import add_inputs, add_model, load_model, optional_inputs
from tbn_compiler.cli.output import add_formats, show, stages
from tbn_compiler.compiler import optimize
from tbn_compiler.summary import summary


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser("summary", help="show what is tiled in a model and what it saves")
    add_model(parser)
    add_inputs(parser, "counts MACs for it")
    parser.add_argument(
        "--optimize", action=argparse.BooleanOptionalAction, default=False, help="count the module that optimize makes"
    )
    add_formats(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    with stages(2) as begin:
        begin("model")
        model = load_model(arguments)
        inputs = optional_inputs(arguments, model)
        begin("summary")
        result = summary(optimize(model, inputs) if arguments.optimize else model, inputs)
    show(result, arguments)
