"""What a plan looks like: a table of its steps, and a picture of its scratch memory."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from tbn_compiler import html
from tbn_compiler.html import Column, Facts, MemoryMap, Notes, Part, Section
from tbn_compiler.html.pictures import Box

if TYPE_CHECKING:
    from tbn_compiler.backends.c.plan import Plan


def plan_table(plan: Plan) -> Table:
    """One row a step: operation, kernel and why, instructions, stored bytes, scratch bytes in use, the peak marked."""
    table = Table(title=escape(f"{plan.name}: {_sizes(plan)}"))
    for column in ("step", "operation", "result", "kernel"):
        table.add_column(column, overflow="fold")
    for column in ("estimated instructions", "constants", "scratch in use"):
        table.add_column(column, justify="right", overflow="fold")
    for index, (step, live) in enumerate(zip(plan.steps, plan.live_bytes, strict=True)):
        kernel = f"{step.kernel or 'none'}" + (f" ({step.choice})" if step.choice else "")
        peak = " (peak)" if live and step.node == plan.peak_step else ""
        shape = " x ".join(map(str, step.shape)) or "1"
        numbers = (f"{step.cost:,}", f"{step.constant_bytes:,}", f"{live:,}{peak}")
        table.add_row(str(index), escape(step.title), shape, escape(kernel), *numbers)
    return table


def plan_section(plan: Plan) -> Section:
    """A plan as a part of a page: sizes, the memory map over time, steps with kernels and costs, and the buffers."""
    facts = (
        ("constants", f"{plan.weight_bytes:,} B"),
        ("scratch memory", f"{plan.scratch_bytes:,} B"),
        ("of it needed at once", f"{max(plan.live_bytes, default=0):,} B"),
        ("estimated instructions", f"{plan.cost:,}"),
        ("on", _target(plan)),
        ("kernels chosen for", plan.options.optimize),
    )
    columns = (
        *(Column("step", numeric=True), Column("operation"), Column("result"), Column("kernel"), Column("why")),
        Column("instructions", numeric=True, hint=f"estimated for {_target(plan)}"),
        Column("constants", numeric=True, hint="bytes"),
        Column("scratch in use", numeric=True, hint="bytes"),
    )
    rows = []
    for index, (step, live) in enumerate(zip(plan.steps, plan.live_bytes, strict=True)):
        shape = "x".join(map(str, step.shape)) or "1"
        numbers = (f"{step.cost:,}", f"{step.constant_bytes:,}", f"{live:,}")
        rows.append((str(index), step.title, shape, step.kernel or "none", step.choice, *numbers))
    total = ("", "total", "", "", "", f"{plan.cost:,}", f"{plan.weight_bytes:,}", f"{plan.scratch_bytes:,}")
    parts: list[Part] = [Facts(facts)]
    if plan.buffers:
        boxes = tuple(Box(b.name, b.nbytes, b.offset, b.first, b.last) for b in plan.buffers)
        parts.append(MemoryMap("Scratch memory over time", boxes, plan.live_bytes, plan.scratch_bytes))
        titles = ("buffer", "bytes", "offset", "first step", "last step")
        cells = tuple((b.name, f"{b.nbytes:,}", f"{b.offset:,}", str(b.first), str(b.last)) for b in plan.buffers)
        listing = tuple(Column(title, numeric=title != "buffer") for title in titles)
        parts.append(html.Table("Buffers in the scratch block", listing, cells, folded=True))
    else:
        parts.append(Notes(("No scratch memory: nothing is kept between steps but inputs and outputs.",)))
    parts.append(html.Table("Steps of the run function", columns, tuple(rows), total))
    return Section(f"C program ({plan.name})", tuple(parts))


def plan_data(plan: Plan) -> dict[str, Any]:
    """A plan as plain data: sizes, steps and buffers."""
    steps = [
        {
            "layer": step.layer,
            "operation": step.implementation.title,
            "shape": list(step.shape),
            "kernels": list(step.implementation.kernels),
            "choice": step.implementation.choice,
            "notes": list(step.notes),
            "estimated_instructions": step.cost,
            "constant_bytes": step.constant_bytes,
            "live_bytes": live,
        }
        for step, live in zip(plan.steps, plan.live_bytes, strict=True)
    ]
    return {
        "name": plan.name,
        "options": dataclasses.asdict(plan.options),
        "weight_bytes": plan.weight_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "total_bytes": plan.total_bytes,
        "largest_layer_bytes": plan.largest_layer_bytes,
        "estimated_instructions": plan.cost,
        "steps": steps,
        "buffers": [dataclasses.asdict(buffer) for buffer in plan.buffers],
    }


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw the scratch block: time to the right, offsets upwards, a box for each buffer while it is in use."""
    # The object interface: nothing global is changed, and no display is needed.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(4 + 0.5 * len(plan.steps), 40), 5), layout="constrained")
    axes = figure.add_subplot()
    for number, buffer in enumerate(plan.buffers):
        width = buffer.last - buffer.first + 1
        box = (buffer.first, width, f"C{number % 10}")
        axes.broken_barh([box[:2]], (buffer.offset, buffer.nbytes), facecolor=box[2], edgecolor="black", alpha=0.6)
        middle = (buffer.first + width / 2, buffer.offset + buffer.nbytes / 2)
        axes.text(*middle, f"{buffer.name}\n{buffer.nbytes:,}", ha="center", va="center", fontsize=7, clip_on=True)
    axes.step(range(len(plan.steps) + 1), [*plan.live_bytes, 0], where="post", color="black", label="in use")
    axes.axhline(plan.scratch_bytes, linestyle="--", color="gray", label="scratch block")
    axes.set(title=f"{plan.name}: {_sizes(plan)}", xlabel="step", ylabel="offset in bytes", xlim=(0, len(plan.steps)))
    axes.set_xticks([i + 0.5 for i in range(len(plan.steps))], [str(i) for i in range(len(plan.steps))])
    axes.legend(loc="upper right", fontsize=8)
    figure.savefig(path, dpi=120)


def _sizes(plan: Plan) -> str:
    largest = max(plan.live_bytes, default=0)
    return (
        f"{plan.weight_bytes:,} bytes of constants, {plan.scratch_bytes:,} of scratch "
        f"(at least {largest:,} needed), {plan.cost:,} estimated instructions on {_target(plan)}"
    )


def _target(plan: Plan) -> str:
    """The processor that instructions are estimated for."""
    return "cortex-m4" if plan.options.target == "generic" else plan.options.target
