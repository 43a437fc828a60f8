"""What a plan looks like: a table of its steps, and a picture of its scratch memory."""

from __future__ import annotations

import dataclasses
import os
import textwrap
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from tbn_compiler import html
from tbn_compiler.html import Column, Facts, MemoryMap, Notes, Part, Section
from tbn_compiler.html.pictures import LINE, Box, text_width

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
        *((("state", f"{plan.state_bytes:,} B"),) if plan.states else ()),
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
        parts.append(memory_map(plan))
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
        "state_bytes": plan.state_bytes,
        "total_bytes": plan.total_bytes,
        "largest_layer_bytes": plan.largest_layer_bytes,
        "estimated_instructions": plan.cost,
        "steps": steps,
        "states": [{"name": state.name, "bytes": state.value.nbytes, "output": state.output} for state in plan.states],
        "buffers": [dataclasses.asdict(buffer) for buffer in plan.buffers],
    }


def memory_map(plan: Plan) -> MemoryMap:
    """The scratch memory over time."""
    boxes = tuple(Box(b.name, b.nbytes, b.offset, b.first, b.last) for b in plan.buffers)
    return MemoryMap("Scratch memory over time", boxes, plan.live_bytes, plan.scratch_bytes)


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw the scratch block: time to the right, offsets upwards, a box for each buffer while it is in use."""
    # The object interface: nothing global is changed, and no display is needed.
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    picture = memory_map(plan)
    title = textwrap.wrap(f"{plan.name}: {_sizes(plan)}", int(picture.width / text_width("m")))
    head = LINE * (len(title) + 2)  # the title, and the legend below it
    width, height = picture.width, picture.height + head
    font = 11 * 72 / _PIXELS_PER_INCH  # 11 pixels, in points
    figure = Figure(figsize=(width / _PIXELS_PER_INCH, height / _PIXELS_PER_INCH))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(picture.height, -head))
    axes.set_axis_off()
    for index, line in enumerate(title):
        axes.text(width / 2, LINE * (index + 1) - head, line, ha="center", fontsize=font)
    for tick in picture.offsets:
        axes.plot((picture.left, picture.right), (tick.at, tick.at), color="0.85", linewidth=0.8, zorder=0)
        axes.text(picture.left - 8, tick.at, tick.label, ha="right", va="center", fontsize=font)
    rim = withStroke(linewidth=3, foreground="white", alpha=0.85)  # names are read over the line
    for box in picture.rectangles:
        corner = (box.x, box.y)
        axes.add_patch(
            Rectangle(corner, box.width, box.height, facecolor=f"C{box.color}", edgecolor="white", alpha=0.4)
        )
        for y, text in box.lines:
            axes.text(box.middle, y, text, ha="center", va="baseline", fontsize=font, zorder=4, path_effects=[rim])
    corners = picture.live_corners
    live = Line2D([x for x, _ in corners], [y for _, y in corners], color="black", linewidth=1.2, label="bytes in use")
    axes.add_line(live)
    ends = (picture.left, picture.right)
    block = Line2D(ends, (picture.top, picture.top), color="firebrick", linestyle="--", label="scratch block")
    axes.add_line(block)
    for tick in picture.steps:
        axes.text(tick.at, picture.bottom + 16, tick.label, ha="center", fontsize=font)
    axes.text((picture.left + picture.right) / 2, picture.bottom + 34, "step", ha="center", fontsize=font)
    axes.text(
        14, (picture.top + picture.bottom) / 2, "offset in bytes", rotation=90, ha="center", va="center", fontsize=font
    )
    axes.legend(
        handles=[live, block], ncols=2, fontsize=font, frameon=False,
        loc="center", bbox_to_anchor=(width / 2, -LINE / 2), bbox_transform=axes.transData,
    )  # fmt: skip
    figure.savefig(path, dpi=2 * _PIXELS_PER_INCH)


_PIXELS_PER_INCH = 96


def _sizes(plan: Plan) -> str:
    largest = max(plan.live_bytes, default=0)
    return (
        f"{plan.weight_bytes:,} bytes of constants, {plan.scratch_bytes:,} of scratch "
        f"(at least {largest:,} needed), {plan.cost:,} estimated instructions on {_target(plan)}"
    )


def _target(plan: Plan) -> str:
    """The processor that instructions are estimated for: the target, or the one whose counts stand for it."""
    processor = plan.options.processor
    return processor.name if processor.same_instructions else processor.costs
