"""The table of targets: complete, used by every option, and printed in the page.

``TBN_UPDATE_DOCS=1`` writes the table of docs/mcu.md; a person reads the difference.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import get_args

import torch
from torch import nn

import tbn_compiler as tbn
from examples.documents import fill, markdown
from tbn_compiler.backends.c.costs import CORES
from tbn_compiler.backends.c.frontend import import_graph
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.planner import build_plan
from tbn_compiler.backends.c.targets import CPUS, TARGETS, Processor, Target
from tbn_compiler.cli import bench_mcu
from tbn_compiler.cli import export_c as export_command

PAGE = Path(tbn.__file__).parents[1] / "docs" / "mcu.md"


def test_every_name_is_in_the_table() -> None:
    assert tuple(TARGETS) == get_args(Target)
    assert {processor.costs for processor in TARGETS.values()} == set(CORES)
    assert all(name == processor.name for name, processor in TARGETS.items())


def test_a_core_with_counts_of_its_own_takes_them() -> None:
    for core in CORES:
        assert TARGETS[core].costs == core
        assert TARGETS[core].same_instructions


def test_boards_grow() -> None:
    for processor in CPUS.values():
        sizes = [board.ram.nbytes for board in processor.boards]
        assert sizes == sorted(sizes)
        assert processor.toolchain is not None


def test_commands_offer_what_is_in_the_table() -> None:
    commands = argparse.ArgumentParser().add_subparsers()
    export_command.add_parser(commands)
    bench_mcu.add_parser(commands)
    offered = {
        name: {option: action.choices for action in parser._actions for option in action.option_strings}
        for name, parser in commands.choices.items()
    }
    assert tuple(offered["export-c"]["--target"]) == tuple(TARGETS)
    assert tuple(offered["bench-mcu"]["--cpu"]) == tuple(CPUS)


def test_the_plan_says_whose_instructions_are_estimated() -> None:
    network = tbn.lower(tbn.transform(nn.Linear(64, 32), tbn.TilingConfig(p=4, min_size=0)))
    graph = import_graph(network, torch.zeros(1, 64))
    plans = {name: build_plan(graph, Options(target=name)) for name in TARGETS}
    for name, processor in TARGETS.items():
        whose = name if processor.same_instructions else processor.costs
        assert str(plans[name].table().title).endswith(f"estimated instructions on {whose}")
        assert any("fixed" in kernel for kernel in plans[name].kernels) is not processor.fpu
        # The figures of a neighbour give the plan of a neighbour.
        assert plans[name].cost == plans[processor.costs].cost


def _memory(nbytes: int) -> str:
    return f"{nbytes >> 20} MB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KB"


def _row(processor: Processor) -> list[str]:
    boards = [f"{b.machine} ({_memory(b.flash.nbytes)}, {_memory(b.ram.nbytes)})" for b in processor.boards]
    return [
        f"`{processor.name}`",
        processor.title,
        "yes" if processor.fpu else "no",
        processor.costs + ("" if processor.same_instructions else ", a neighbour"),
        ", then ".join(boards) or "not emulated",
        f"`{' '.join(processor.flags)}`" if processor.flags else "",
    ]


def test_the_page_has_the_table() -> None:
    header = ("target", "processor", "FPU", "estimates", "emulated as (flash, RAM)", "compiled with")
    text = PAGE.read_text()
    found = fill(text, {"targets": markdown(header, map(_row, TARGETS.values()), left=header)})
    if os.environ.get("TBN_UPDATE_DOCS"):
        PAGE.write_text(found)
    else:
        assert text == found
