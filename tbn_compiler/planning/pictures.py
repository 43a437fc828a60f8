"""The pictures: sensitivities, plans and sweeps. matplotlib loads with the first one."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tbn_compiler.errors import TBNError

if TYPE_CHECKING:
    from tbn_compiler.planning.layer_plan import LayerPlan
    from tbn_compiler.planning.sensitivity import Sensitivity
    from tbn_compiler.planning.sweep import Sweep

_MARKS = "oXDs^vP*<>dp"


def new_figure(width: float, height: float) -> Any:
    """A figure that belongs to nothing global, and needs no display.

    Raises:
        TBNError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise TBNError("pictures need matplotlib: pip install 'tbn-compiler[plan]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def mark(index: int) -> dict[str, Any]:
    """Shape and colour of the marks of a series."""
    return {"marker": _MARKS[index % len(_MARKS)], "color": f"C{index % 10}"}


def draw_sensitivity(found: Sensitivity, path: str | os.PathLike[str], title: str) -> None:
    """A line a layer, a mark an option; to the right is worse."""
    figure = new_figure(8, 1.6 + 0.28 * len(found.layers))
    axes = figure.add_subplot()
    changes = [abs(change) for layer in found.layers for _, change in layer.changes if 0 < abs(change) < math.inf]
    for index, option in enumerate(found.options):
        points = [(layer.change(option.name), row) for row, layer in enumerate(found.layers)]
        shown = [(change, row) for change, row in points if change is not None and math.isfinite(change)]
        axes.scatter([c for c, _ in shown], [r for _, r in shown], s=28, label=option.name, alpha=0.8, **mark(index))
    if changes and max(changes) > 100 * sorted(changes)[len(changes) // 2]:
        axes.set_xscale("symlog", linthresh=sorted(changes)[len(changes) // 2])
    axes.set_xlabel(title)
    _name_layers(axes, [layer.name for layer in found.layers])
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=120)


def draw_plan(plan: LayerPlan, path: str | os.PathLike[str]) -> None:
    """A panel for the change and for each cost, a bar a layer in the colour of its option."""
    names = [name for name, _ in plan.costs]
    figure = new_figure(3.2 + 2.6 * (1 + len(names)), 1.8 + 0.28 * len(plan.layers))
    panels = figure.subplots(1, 1 + len(names), sharey=True, squeeze=False)[0]
    options = list(dict.fromkeys(layer.option.name for layer in plan.layers))
    word = "loss" if plan.measure == "loss" else "weight error"
    for panel, name in zip(panels, ["", *names], strict=True):
        for index, option in enumerate(options):
            rows = [row for row, layer in enumerate(plan.layers) if layer.option.name == option]
            layers = [plan.layers[row] for row in rows]
            values = [dict(layer.costs)[name] if name else layer.change for layer in layers]
            panel.barh(rows, values, color=f"C{index % 10}", label=option)
        panel.set_xlabel(name or f"change of the {word}")
        panel.tick_params(axis="x", labelrotation=30)
    _name_layers(panels[0], [layer.name for layer in plan.layers])
    panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=120)


def _name_layers(axes: Any, names: Sequence[str]) -> None:
    """Layers from top to bottom."""
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)


def draw_sweep(found: Sweep, path: str | os.PathLike[str]) -> None:
    """A mark a point; names stand in a legend beside, where none covers another."""
    shown = [point for point in found.points if math.isfinite(point.metric)]
    figure = new_figure(8, max(4.0, 1.5 + 0.24 * len(shown)))
    axes = figure.add_subplot()
    for index, point in enumerate(shown):
        axes.scatter([point.bytes], [point.metric], s=45, label=point.name, zorder=3, **mark(index))
    sizes = [point.bytes for point in shown]
    if sizes and max(sizes) > 10 * min(sizes):
        axes.set_xscale("log")
    axes.set(xlabel="bytes of the weights", ylabel=found.metric)
    axes.grid(alpha=0.3)
    if shown:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.savefig(path, dpi=120)
