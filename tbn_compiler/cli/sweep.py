"""``tbn-compiler sweep``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, get_args

from torch import nn

from tbn_compiler.cli.budgets import add_sensitivity, find_sensitivity, parse_budget
from tbn_compiler.cli.models import add_float_model, add_inputs, load_float_model, optional_inputs
from tbn_compiler.cli.options import Repeated, load_object, parse_copies
from tbn_compiler.cli.output import add_formats, show
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError
from tbn_compiler.planning import sweep
from tbn_compiler.planning.sweep import Point, point_name


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    from tbn_compiler.backends.c.targets import Target

    parser = commands.add_parser(
        "sweep",
        help="train a few tilings of one model and compare accuracy and bytes",
        description="Train copies of one model, each tiled as one point says, by a function of yours. Points that the "
        "file of results has already are not trained again.",
    )
    add_float_model(parser)
    parser.add_argument("--train", help="module:function, needed: trains the module that it gets; returns the metric")
    parser.add_argument("--evaluate", help="module:function, returns the metric of the trained module in its place")
    points = parser.add_argument_group("points", "in the order float, p, budgets, plans")
    points.add_argument("--float", action="store_true", help="the float model")
    points.add_argument(
        "--p", dest="copies", type=parse_copies, action=Repeated, help="copies, or OUTxIN; may be repeated"
    )
    points.add_argument(
        "--budget", type=parse_budget, action=Repeated, help="a plan under a budget, as 20000 or macs=3000,bytes=20000"
    )
    points.add_argument(
        "--plan", type=Path, action=Repeated, metavar="FILE.json", help="what the command plan has written"
    )
    parser.add_argument(
        "--min-size", dest="least", type=int, help="of the points --p (default: derived from the model)"
    )
    add_sensitivity(parser)
    add_inputs(parser, "for costs of budgets")
    parser.add_argument(
        "--target", choices=get_args(Target), default="generic", help="of costs in C (default: %(default)s)"
    )
    parser.add_argument("--metric", default="accuracy", help="what the metric is called (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of every point (default: %(default)s)")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("sweep.json"), help="file of results (default: %(default)s)"
    )
    parser.add_argument("--draw", type=Path, metavar="FILE", help="picture of the results (needs matplotlib)")
    add_formats(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    if arguments.train is None:
        raise ConfigError("give what trains a module with --train module:function")
    model, config = load_float_model(arguments)
    if arguments.candidate and arguments.sensitivity is not None and arguments.sensitivity.exists():
        raise ConfigError(f"{arguments.sensitivity} says what was measured: leave --candidate out")
    measured = find_sensitivity(arguments, model, config) if arguments.budget else None
    if measured is None and (arguments.data or arguments.sensitivity or arguments.candidate):
        raise ConfigError("--data, --sensitivity and --candidate are of budgets: give --budget too")
    found = sweep(
        model,
        _points(arguments, config),
        _quiet(load_object(arguments.train, "--train")),
        None if arguments.evaluate is None else _quiet(load_object(arguments.evaluate, "--evaluate")),
        metric=arguments.metric,
        path=arguments.output,
        seed=arguments.seed,
        sensitivity=measured,
        example_inputs=optional_inputs(arguments, model),
        config=config,
        target=arguments.target,
    )
    if arguments.draw is not None:
        found.draw(arguments.draw)
    show(found, arguments)


def _quiet(function: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    """A function whose prints go to standard error, so that standard output holds the result alone."""

    def call(module: nn.Module) -> Any:
        with redirect_stdout(sys.stderr):
            return function(module)

    return call


def _points(arguments: argparse.Namespace, config: TilingConfig) -> dict[str, Point]:
    points: list[Point] = ["float"] if arguments.float else []
    points += [config.replace(p=p, min_size=arguments.least) for p in arguments.copies or ()]
    points += arguments.budget or ()
    pairs = [(point_name(point), point) for point in points]
    pairs += [(path.stem, _read_plan(path)) for path in arguments.plan or ()]
    named = dict(pairs)
    if len(named) < len(pairs):
        raise ConfigError(f"two points have one name: {', '.join(name for name, _ in pairs)}")
    return named


def _read_plan(path: Path) -> TilingConfig:
    try:
        return TilingConfig(**json.loads(path.read_text(encoding="utf-8"))["config"])
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} is not what the command plan has written: {error}") from error
