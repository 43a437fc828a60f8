"""``tbn-compiler plan``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from tbn_compiler.cli.budgets import add_sensitivity, find_sensitivity, parse_budget, write_json
from tbn_compiler.cli.models import add_float_model, add_inputs, load_float_model, optional_inputs
from tbn_compiler.cli.options import Repeated, add_kernel_choice
from tbn_compiler.cli.output import add_formats, show
from tbn_compiler.planning import plan
from tbn_compiler.planning.costs import COSTS


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "plan",
        help="choose p, binary or float for each layer under a budget, before training",
        description="Measure what each layer of a float model loses under each candidate, and choose the candidates "
        "with the least loss within a budget, or the least cost within a loss.",
    )
    add_float_model(parser)
    parser.add_argument(
        "--budget",
        type=parse_budget,
        action=Repeated,
        help=f"bytes as a number, or name=limit with {', '.join(COSTS)} or loss; may be repeated",
    )
    parser.add_argument(
        "--objective", choices=("loss", *COSTS), default="loss", help="what is to be least (default: %(default)s)"
    )
    add_sensitivity(parser)
    add_inputs(parser, "for all costs but bytes")
    add_kernel_choice(parser)
    parser.add_argument("-o", "--output", type=Path, metavar="FILE.json", help="write the plan, with its config")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="picture of the plan (needs matplotlib)")
    parser.add_argument("--draw-sensitivity", type=Path, metavar="FILE", help="picture of what was measured")
    add_formats(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    model, config = load_float_model(arguments)
    measured = find_sensitivity(arguments, model, config)
    if arguments.draw_sensitivity is not None:
        measured.draw(arguments.draw_sensitivity)
    budget: dict[str, float] = {}
    for given in arguments.budget or ():
        budget |= given
    found = plan(
        model,
        budget=budget,
        sensitivity=measured,
        objective=arguments.objective,
        example_inputs=optional_inputs(arguments, model),
        config=config,
        candidates=arguments.candidate,
        target=arguments.target,
        optimize=arguments.optimize,
    )
    if arguments.output is not None:
        write_json(arguments.output, found.to_dict())
    if arguments.draw is not None:
        found.draw(arguments.draw)
    show(found, arguments)
