"""``tbn-compiler export-c``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import torch

from tbn_compiler.cli.models import add_model, load_model, parse_shape
from tbn_compiler.cli.output import add_json, print_json
from tbn_compiler.tables import console


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    from tbn_compiler.backends.c.options import OptimizeFor, ScratchOwner, Target

    parser = commands.add_parser("export-c", help="write a model as one standalone C99 file and a header")
    add_model(parser)
    parser.add_argument(
        "--input",
        type=parse_shape,
        action="append",
        required=True,
        help="shape of an input, e.g. 1,784; once for each input",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("model.c"),
        help="C file, or folder of a package (default: %(default)s)",
    )
    parser.add_argument("--name", default="model", help="prefix of the C symbols (default: %(default)s)")
    parser.add_argument(
        "--scratch",
        choices=get_args(ScratchOwner),
        default="static",
        help="who owns the scratch memory (default: %(default)s)",
    )
    parser.add_argument(
        "--optimize",
        choices=get_args(OptimizeFor),
        default="balanced",
        help="what kernels are chosen for (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        choices=get_args(Target),
        default="generic",
        help="processor whose costs decide (default: %(default)s)",
    )
    parser.add_argument("--skip-zeros", action="store_true", help="run time may depend on the data")
    parser.add_argument("--layer-hook", action="store_true", help="call a macro of yours behind every step")
    parser.add_argument("--self-test", action="store_true", help="add a test on a random input")
    parser.add_argument("--package", choices=("arduino", "cmake"), help="write a folder for a build system")
    parser.add_argument("--plan", action="store_true", help="print steps, kernels, costs and memory")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="picture of the scratch memory (needs matplotlib)")
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tbn_compiler.backends.c import export_c

    names = ("name", "scratch", "optimize", "target", "skip_zeros", "layer_hook", "self_test", "package")
    options = {name: getattr(arguments, name) for name in names}
    generator = torch.Generator().manual_seed(0)  # a test on zeros would see little
    inputs = tuple(torch.randn(shape, generator=generator) for shape in arguments.input)
    plan = export_c(load_model(arguments), inputs, arguments.output, **options)
    if arguments.draw is not None:
        plan.draw(arguments.draw)
    if arguments.json:
        print_json({"output": arguments.output} | plan.to_dict())
        return
    if arguments.plan:
        console().print(plan.table())
    written = arguments.output if arguments.package else f"{arguments.output} and {arguments.output.with_suffix('.h')}"
    sizes = f"{plan.weight_bytes:,} bytes of constants, {plan.scratch_bytes:,} of scratch"
    print(f"wrote {written}: {sizes}")
