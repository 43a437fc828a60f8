"""``tbn-compiler verify``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tbn_compiler.cli.arrays import load_arrays
from tbn_compiler.cli.models import add_model, load_model
from tbn_compiler.cli.options import Repeated, parse_positive, parse_shape
from tbn_compiler.cli.output import add_json, print_json, stages
from tbn_compiler.compiler import lower
from tbn_compiler.errors import ExportError
from tbn_compiler.tables import console
from tbn_compiler.verify import CFile, Comparison, OnnxFile, verify


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser(
        "verify",
        help="compare an exported ONNX or C file with the model",
        description="Run an exported file and the PyTorch model on the same inputs and compare the outputs. "
        "The exit status is 0 if they agree, 1 if not.",
    )
    parser.add_argument("file", type=Path, help="an .onnx file, or a .c file with its header beside it")
    add_model(parser, checkpoint="--against")
    parser.add_argument("--inputs", type=Path, help="stored inputs: .npy, or .npz with an array for each input")
    parser.add_argument(
        "--input",
        type=parse_shape,
        action=Repeated,
        help="shape of a random input, e.g. 8,784 (default: the shapes in the ONNX file)",
    )
    parser.add_argument(
        "--batch",
        type=parse_positive,
        default=8,
        help="size of free dimensions of random inputs (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random inputs (default: %(default)s)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="largest relative error to accept (default: %(default)s)"
    )
    parser.add_argument("--name", help="prefix of the symbols of a C file, to be checked (default: as in its header)")
    parser.add_argument(
        "--scratch", choices=("static", "caller"), help="of a C file, to be checked (default: as in its header)"
    )
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.file.suffix not in (".onnx", ".c"):
        raise ExportError(f"{arguments.file} is neither an .onnx nor a .c file")
    with stages(3) as begin:
        comparison = _compare(arguments, begin)
    if arguments.json:
        print_json(comparison.to_dict(arguments.tolerance))
    else:
        console().print(comparison.table(arguments.tolerance))
    return 0 if comparison.within(arguments.tolerance) else 1


def _compare(arguments: argparse.Namespace, begin: Callable[[str], None]) -> Comparison:
    """Run the file and the model."""
    begin("model")
    model = load_model(arguments)
    if arguments.checkpoint is None and not _are_equal(model, load_model(arguments)):
        raise ExportError(
            f"{arguments.model} gives other weights at every call, with which no file can be compared: give the "
            "checkpoint with --against"
        )
    begin("file")
    stored = None if arguments.inputs is None else load_arrays(arguments.inputs)
    generator = np.random.default_rng(arguments.seed)
    file: OnnxFile | CFile
    if arguments.file.suffix == ".onnx":
        file = OnnxFile(arguments.file)
        random = file.random_inputs(arguments.batch, generator, arguments.input) if stored is None else {}
    else:
        file = CFile(arguments.file, arguments.name, arguments.scratch)
        random = file.random_inputs(arguments.input, generator) if stored is None else {}
    inputs = random if stored is None else file.name_inputs(stored)
    actual = file.run(inputs)
    begin("comparison")
    if isinstance(file, CFile):
        return verify(actual, lower(model), inputs, file.run_model)
    return verify(actual, lower(model), inputs)


def _are_equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models hold the same values."""
    states = (first.state_dict(), second.state_dict())
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][key]) for key, value in states[0].items() if isinstance(value, torch.Tensor)
    )
