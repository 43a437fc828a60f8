"""The ``tbn-compiler`` command: one module a command, with what they share in :mod:`models`."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence

import tbn_compiler
from tbn_compiler.cli import bench_mcu, config_file, demo, export_c, export_onnx, plan, report, summary, sweep, verify
from tbn_compiler.errors import TBNError

_COMMANDS = (demo, summary, plan, sweep, report, export_c, export_onnx, verify, bench_mcu)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 1 after a message on standard error.

    A command may return a status of its own. An interrupt ends it with 130, as a shell has it.
    """
    streams = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, io.TextIOWrapper)]
    before = [stream.errors for stream in streams]
    try:
        for stream in streams:
            stream.reconfigure(errors="replace")  # where a terminal has no sign for a line or an arrow
        return _run(argv)
    finally:
        for stream, errors in zip(streams, before, strict=True):
            stream.reconfigure(errors=errors)


def _run(argv: Sequence[str] | None) -> int:
    parser, commands = _parser()
    arguments = parser.parse_args(argv)
    try:
        if getattr(arguments, "config", None) is not None:
            config_file.apply(arguments.config, commands, arguments)
            arguments = parser.parse_args(argv)
        status: int | None = arguments.run(arguments)
    except KeyboardInterrupt:
        print("tbn-compiler: interrupted", file=sys.stderr)
        return 130
    except (TBNError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 0
        print(f"tbn-compiler: error: {error}", file=sys.stderr)
        return 1
    return status or 0


def _reader_is_gone() -> bool:
    """Whether whoever reads standard output has seen enough, as ``head``; what is left of it goes nowhere then."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _parser() -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
    """The parser, and those of the commands by name."""
    parser = argparse.ArgumentParser(prog="tbn-compiler", description="A compiler for Tiled Bit Networks.")
    parser.add_argument("--version", action="version", version=f"tbn-compiler {tbn_compiler.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser, commands.choices
