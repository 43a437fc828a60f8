"""``tbn-compiler verify``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from tbn_compiler.cli.models import add_model, load_model, parse_positive, parse_shape
from tbn_compiler.compiler import lower
from tbn_compiler.errors import ExportError
from tbn_compiler.verify import Arrays, Difference, OnnxFile, run_c, verify


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
        action="append",
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
    parser.add_argument("--name", default="model", help="prefix of the symbols of a C file (default: %(default)s)")
    parser.add_argument(
        "--scratch", choices=("static", "caller"), default="static", help="of a C file (default: %(default)s)"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.file.suffix not in (".onnx", ".c"):
        raise ExportError(f"{arguments.file} is neither an .onnx nor a .c file")
    model = load_model(arguments)
    if arguments.checkpoint is None and not _are_equal(model, load_model(arguments)):
        raise ExportError(
            f"{arguments.model} gives other weights at every call, with which no file can be compared: give the "
            "checkpoint with --against"
        )
    stored = None if arguments.inputs is None else _load_inputs(arguments.inputs)
    generator = np.random.default_rng(arguments.seed)
    if stored is None and arguments.input:
        stored = {
            f"input_{index}": generator.standard_normal(shape, dtype=np.float32)
            for index, shape in enumerate(arguments.input)
        }
    if arguments.file.suffix == ".onnx":
        onnx_file = OnnxFile(arguments.file)
        if stored is None:
            inputs = onnx_file.random_inputs(arguments.batch, generator)
        else:
            inputs = onnx_file.name_inputs(stored, by_order=arguments.inputs is None)
        actual = onnx_file.run(inputs)
    else:
        if stored is None:
            raise ExportError("a C file does not say the shape of its input: give --input or --inputs")
        inputs = stored
        actual = run_c(arguments.file, inputs, arguments.name, arguments.scratch)
    differences = verify(actual, lower(model), inputs)
    Console().print(_table(differences, arguments.tolerance))
    return 0 if all(difference.within(arguments.tolerance) for difference in differences) else 1


def _are_equal(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models hold the same values."""
    states = (first.state_dict(), second.state_dict())
    return states[0].keys() == states[1].keys() and all(
        torch.equal(value, states[1][key]) for key, value in states[0].items() if isinstance(value, torch.Tensor)
    )


def _load_inputs(path: Path) -> Arrays:
    if path.suffix not in (".npy", ".npz"):
        raise ExportError(f"stored inputs must be .npy or .npz, got {path}")
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ExportError(f"cannot read {path}: {error}") from error
    return {"input": loaded} if path.suffix == ".npy" else dict(loaded)


def _table(differences: list[Difference], tolerance: float) -> Table:
    table = Table("output", "shape", "max. absolute error", "relative error", "top-1 agreement", "")
    for difference in differences:
        table.add_row(
            difference.name,
            "x".join(map(str, difference.shape)),
            f"{difference.absolute:.3g}",
            f"{difference.relative:.3g}",
            "-" if difference.top1 is None else f"{difference.top1:.2%}",
            "ok" if difference.within(tolerance) else f"above {tolerance:g}",
        )
    return table
