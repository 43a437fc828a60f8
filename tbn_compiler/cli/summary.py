"""``tbn-compiler summary``."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from tbn_compiler.cli.models import add_model, load_model, parse_shape
from tbn_compiler.cli.output import add_json, print_json
from tbn_compiler.compiler import optimize
from tbn_compiler.summary import summary
from tbn_compiler.tables import console


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser("summary", help="show what is tiled in a model and what it saves")
    add_model(parser)
    parser.add_argument(
        "--input", type=parse_shape, action="append", help="shape of an input, e.g. 1,3,224,224: counts MACs for it"
    )
    parser.add_argument("--optimize", action="store_true", help="count the module that optimize makes")
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--markdown", action="store_true", help="print a Markdown table with exact numbers")
    add_json(formats)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    inputs: Any = tuple(torch.zeros(shape) for shape in arguments.input) if arguments.input else None
    model = load_model(arguments)
    result = summary(optimize(model, inputs) if arguments.optimize else model, inputs)
    if arguments.json:
        print_json(result.to_dict())
    elif arguments.markdown:
        print(result.to_markdown(), end="")
    else:
        console().print(result.table())
