"""``tbn-compiler export-onnx``."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from tbn_compiler.cli.models import add_model, load_model, parse_shape
from tbn_compiler.cli.output import add_json, print_json


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser("export-onnx", help="write a model as an ONNX file")
    add_model(parser)
    parser.add_argument(
        "--input",
        type=parse_shape,
        action="append",
        required=True,
        help="shape of an input, e.g. 1,784; may be repeated. Its first size is the batch",
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("model.onnx"), help="default: %(default)s")
    parser.add_argument(
        "--weights",
        choices=("bits", "nbits", "dense"),
        default="bits",
        help="packed bits in standard operators, ONNX Runtime's MatMulNBits, or float (default: %(default)s)",
    )
    parser.add_argument("--bits", type=int, choices=(2, 4), default=4, help="of nbits (default: %(default)s)")
    parser.add_argument(
        "--accuracy-level",
        type=int,
        choices=(0, 4),
        default=0,
        help="of nbits: 0 computes in float32, 4 rounds inputs to int8 (default: %(default)s)",
    )
    parser.add_argument("--opset", type=int, default=18, help="default: %(default)s")
    parser.add_argument("--fixed-batch", action="store_true", help="keep the batch size of --input")
    parser.add_argument("--no-optimize", action="store_true", help="keep norms and copies as they are")
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tbn_compiler.backends.onnx import export_onnx

    inputs = tuple(torch.zeros(shape) for shape in arguments.input)
    written = export_onnx(
        load_model(arguments),
        inputs,
        arguments.output,
        weights=arguments.weights,
        dynamic_batch=not arguments.fixed_batch,
        opset=arguments.opset,
        optimized=not arguments.no_optimize,
        bits=arguments.bits,
        accuracy_level=arguments.accuracy_level,
    )
    if arguments.json:
        print_json(asdict(written))
        return
    print(f"wrote {written.path}: {written.size:,} bytes, opset {written.opset}, {len(written.forms)} tiled layers")
    for reason, count in Counter(written.reasons.values()).items():
        print(f"note: {count} layers keep packed bits: {reason}")
