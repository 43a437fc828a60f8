"""``tbn-compiler export-c``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from tbn_compiler.cli.models import add_model, load_model, parse_shape
from tbn_compiler.compiler import lower, optimize


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser("export-c", help="write a model as one standalone C99 file and a header")
    add_model(parser)
    parser.add_argument(
        "--input", type=parse_shape, action="append", required=True, help="shape of the input, e.g. 1,784"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("model.c"), help="C file (default: %(default)s)")
    parser.add_argument("--optimize", action="store_true", help="fold norms and leave out copies first")
    parser.add_argument("--name", default="model", help="prefix of the C symbols (default: %(default)s)")
    parser.add_argument(
        "--scratch",
        choices=("static", "caller"),
        default="static",
        help="who owns the scratch memory (default: %(default)s)",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tbn_compiler.backends.c import export_c

    model = load_model(arguments)
    inputs = tuple(torch.zeros(shape) for shape in arguments.input)
    packed = optimize(model, inputs) if arguments.optimize else lower(model)
    plan = export_c(packed, inputs, arguments.output, name=arguments.name, scratch=arguments.scratch)
    header = arguments.output.with_suffix(".h")
    sizes = f"{plan.weight_bytes:,} bytes of constants, {plan.scratch_bytes:,} of scratch"
    print(f"wrote {arguments.output} and {header}: {sizes}")
