"""``tbn-compiler export-onnx``."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tbn_compiler.cli.models import add_inputs, add_model, example_inputs, load_model
from tbn_compiler.cli.options import Repeated
from tbn_compiler.cli.output import add_json, print_json, stages
from tbn_compiler.errors import ConfigError


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    parser = commands.add_parser("export-onnx", help="write a model as an ONNX file")
    add_model(parser)
    add_inputs(parser, "fixes every size but the first one, the batch")
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
    parser.add_argument(
        "--fixed-batch",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep the batch size of the inputs",
    )
    parser.add_argument(
        "--batched-input",
        metavar="NAME",
        action=Repeated,
        help="an input whose first size is free; may be repeated (default: all with the first one's batch size)",
    )
    parser.add_argument(
        "--optimize",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fold norms and pass copies on, or keep them as they are",
    )
    for what in ("input", "output"):
        parser.add_argument(
            f"--{what}-name", metavar="NAME", action=Repeated, help=f"name of an {what} in the file, once for each"
        )
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tbn_compiler.backends.onnx import export_onnx

    if arguments.fixed_batch and arguments.batched_input:
        raise ConfigError("--fixed-batch and --batched-input contradict each other: give one of them")
    with stages(2) as begin:
        begin("model")
        model = load_model(arguments)
        begin("ONNX file")
        written = export_onnx(
            model,
            example_inputs(arguments, model),
            arguments.output,
            weights=arguments.weights,
            dynamic_batch=arguments.batched_input or not arguments.fixed_batch,
            opset=arguments.opset,
            optimized=arguments.optimize,
            bits=arguments.bits,
            accuracy_level=arguments.accuracy_level,
            input_names=arguments.input_name,
            output_names=arguments.output_name,
        )
    if arguments.json:
        print_json(asdict(written))
        return
    print(f"wrote {written.path}: {written.size:,} bytes, opset {written.opset}, {len(written.forms)} tiled layers")
    for reason, count in Counter(written.reasons.values()).items():
        print(f"note: {count} layers keep packed bits: {reason}")
