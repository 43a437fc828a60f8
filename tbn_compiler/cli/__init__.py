"""The ``tbn-compiler`` command: one module a command, with what they share in :mod:`models`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import tbn_compiler
from tbn_compiler.cli import bench_mcu, demo, export_c, export_onnx, plan, summary, sweep, verify
from tbn_compiler.errors import TBNError

_COMMANDS = (demo, summary, plan, sweep, export_c, export_onnx, verify, bench_mcu)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 1 after a message on standard error.

    A command may return a status of its own.
    """
    arguments = _parser().parse_args(argv)
    try:
        status: int | None = arguments.run(arguments)
    except (TBNError, OSError) as error:
        print(f"tbn-compiler: error: {error}", file=sys.stderr)
        return 1
    return status or 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tbn-compiler", description="A compiler for Tiled Bit Networks.")
    parser.add_argument("--version", action="version", version=f"tbn-compiler {tbn_compiler.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser
