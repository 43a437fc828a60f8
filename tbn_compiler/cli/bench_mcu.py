"""``tbn-compiler bench-mcu``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from tbn_compiler.cli.arrays import load_arrays
from tbn_compiler.cli.options import Repeated, parse_positive
from tbn_compiler.cli.output import add_json, print_json, stages
from tbn_compiler.errors import ConfigError
from tbn_compiler.tables import console
from tbn_compiler.verify import random_array

if TYPE_CHECKING:
    from tbn_compiler.backends.c.mcu import Measurement

# The microcontroller of the paper runs at this rate. Instructions are counted, cycles are not: loads, branches and wait
# states of the flash make the average instruction longer than a cycle. This factor is assumed, not measured.
_PAPER_CPU, _PAPER_HZ, _ASSUMED_CYCLES_PER_INSTRUCTION = "cortex-m4", 64e6, 1.5


def add_parser(commands: Any) -> None:
    """Add the command to the subparsers of the command line."""
    from tbn_compiler.backends.c.targets import CPUS  # backends load when used

    parser = commands.add_parser(
        "bench-mcu",
        help="run an exported C file on an emulated microcontroller and measure it",
        description="Build an exported C file for Cortex-M or RISC-V cores, run it under qemu and report executed "
        "instructions (exact and repeatable), flash, RAM beside input and output, stack and the largest error. A "
        "program that does not fit the smallest board of a core runs on the next one.",
    )
    parser.add_argument("source", type=Path, help="C file of export-c; its header lies beside it")
    parser.add_argument(
        "--cpu", choices=tuple(CPUS), action=Repeated, help=f"core to run on; may be repeated (default: {_PAPER_CPU})"
    )
    parser.add_argument(
        "--vectors",
        type=Path,
        metavar="FILE.npz",
        help="arrays 'inputs' and, to compare with, 'outputs', a vector in each row (default: random inputs)",
    )
    parser.add_argument(
        "--count", type=parse_positive, default=1, help="how many vectors to run (default: %(default)s)"
    )
    add_json(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from tbn_compiler.backends.c.interface import read_interface
    from tbn_compiler.backends.c.mcu import CPUS, measure

    ports = read_interface(arguments.source.with_suffix(".h")).inputs
    if not ports:
        raise ConfigError(f"{arguments.source} has no inputs, they are all state: bench-mcu needs vectors to run on")
    if arguments.vectors is None:
        generator = np.random.default_rng(0)
        parts = [random_array((arguments.count, port.size), port.dtype, generator) for port in ports]
        inputs, outputs = np.concatenate(parts, 1), None
    else:
        inputs, outputs = _load(arguments.vectors, arguments.count)
    names = dict.fromkeys(arguments.cpu or [_PAPER_CPU])
    results = []
    with stages(len(names)) as begin:
        for name in names:
            begin(name)
            results.append(measure(arguments.source, CPUS[name], inputs, outputs))
    for result in results:
        for reason in result.passed_over:
            print(f"note: {result.cpu} ran on {result.machine}: {reason}", file=sys.stderr)
    if arguments.json:
        print_json([_row(result) for result in results])
    else:
        console().print(_table(arguments.source, results))


def _load(path: Path, count: int) -> tuple[np.ndarray, np.ndarray | None]:
    arrays = load_arrays(path)
    if "inputs" not in arrays or not arrays["inputs"].ndim:
        raise ConfigError(f"{path} is not an .npz file with an array 'inputs': it has {sorted(arrays)}")
    if "outputs" in arrays and not arrays["outputs"].ndim:
        raise ConfigError(f"'outputs' in {path} is a single number, not one row for each input")
    return arrays["inputs"][:count], arrays["outputs"][:count] if "outputs" in arrays else None


def _frames_per_second(result: Measurement) -> float | None:
    """Estimated rate of the paper's part; ``None`` on other cores."""
    if result.cpu != _PAPER_CPU:
        return None
    return _PAPER_HZ / (max(result.instructions) * _ASSUMED_CYCLES_PER_INSTRUCTION)


def _row(result: Measurement) -> dict[str, object]:
    row = asdict(result)
    del row["outputs"]
    return row | {"ram_bytes": result.ram_bytes, "estimated_fps_at_64_mhz": _frames_per_second(result)}


def _table(source: Path, results: list[Measurement]) -> Table:
    table = Table(
        title=f"{source} under emulation",
        caption=f"RAM is beside input and output, stack included. FPS is an estimate at 64 MHz: it assumes "
        f"{_ASSUMED_CYCLES_PER_INSTRUCTION} cycles an instruction.",
    )
    for column in ("core", "board"):
        table.add_column(column, overflow="fold")
    for column in ("instructions", "flash B", "RAM B", "of it stack", "max error", "est. FPS"):
        table.add_column(column, justify="right", overflow="fold")
    for result in results:
        low, high = min(result.instructions), max(result.instructions)
        rate = _frames_per_second(result)
        table.add_row(
            result.cpu,
            result.machine,
            f"{high:,}" if low == high else f"{low:,} to {high:,}",
            f"{result.flash_bytes:,}",
            f"{result.ram_bytes:,}",
            f"{result.stack_bytes:,}",
            "-" if result.max_error is None else f"{result.max_error:.2e}",
            "-" if rate is None else f"{rate:,.0f}",
        )
    return table
