"""``tbn-compiler report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbn_compiler.cli.models import add_inputs, add_model, example_inputs, load_model
from tbn_compiler.cli.options import add_kernel_choice
from tbn_compiler.cli.output import add_json, print_json, stages
from tbn_compiler.errors import ConfigError

if TYPE_CHECKING:
    from tbn_compiler.reporting import Report


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "report",
        help="write a page about a model: layers, C program, memory, errors",
        description="Write one HTML page that needs nothing else: layers with bits and multiply-adds, the C program "
        "with its kernels, costs and memory over time, and the error of each layer lowered, in int8, in C and in ONNX. "
        "Of a packed file (FILE.safetensors in place of the model) it has the layers alone.",
    )
    add_model(parser)
    add_inputs(parser, "errors are those on it; real inputs say more")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default: %(default)s")
    parser.add_argument("--title", help="of the page (default: the name of the model's class)")
    add_kernel_choice(parser)
    parser.add_argument(
        "--sweep",
        type=Path,
        metavar="FILE.json",
        help="other tilings of the network, for size against accuracy: the file of tbn-compiler sweep",
    )
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    result = _report_file(arguments) if arguments.model.endswith(".safetensors") else _report_model(arguments)
    result.write(arguments.output)
    if arguments.json:
        print_json({"output": arguments.output} | result.to_dict())
        return
    print(f"wrote {arguments.output}: {len(result.summary.layers)} layers")
    for what, why in result.errors.missing.items() if result.errors else ():
        print(f"note: {what}: {why}")


def _report_file(arguments: argparse.Namespace) -> Report:
    from tbn_compiler.reporting import report_file

    if arguments.input or arguments.inputs or arguments.checkpoint or arguments.sweep:
        raise ConfigError(
            "a packed file holds no network: name its module:factory, and give the file with --checkpoint"
        )
    return report_file(arguments.model, title=arguments.title)


def _report_model(arguments: argparse.Namespace) -> Report:
    from tbn_compiler.planning import Sweep
    from tbn_compiler.reporting import STAGES, report

    sweep = None if arguments.sweep is None else Sweep.read(arguments.sweep)
    options = {"title": arguments.title, "optimize": arguments.optimize, "target": arguments.target}
    with stages(1 + len(STAGES)) as begin:
        begin("model")
        model = load_model(arguments)
        return report(model, example_inputs(arguments, model), sweep=sweep, on_stage=begin, **options)
