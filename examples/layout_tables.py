"""Tables and figure of ``docs/layouts.md`` from the results of ``examples/layouts.py``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import documents
from layout_studies import Layout, Study, misfit

Results = dict[str, Any]

# The figure's marks, and the factors that keep points of equal bits apart.
_FAMILIES = {"paper": ("o", 0.94), "two-axis": ("s", 0.98), "rolled": ("^", 1.02), "Hadamard": ("D", 1.06)}


def find(results: Results, name: str, layout: Layout) -> list[Results]:
    """The runs of a layout, by seed."""
    key = {"task": name, "layout": layout.title, "p": layout.copies}
    return sorted((run for run in results.get("runs", []) if key.items() <= run.items()), key=lambda run: run["seed"])


def tables(results: Results, studies: Mapping[str, Study]) -> dict[str, str]:
    """A Markdown table for each study by its name, and ``"overview"``."""
    return {name: _table(results, name, study) for name, study in studies.items()} | {
        "overview": _overview(results, studies)
    }


def _table(results: Results, name: str, study: Study) -> str:
    header = ["p", "layout", study.measure, "range", "over paper", "range", "seeds", "bits/weight", "bytes",
              "multiply-adds", "ms/step"]  # fmt: skip
    rows = [_cells(results, name, study, layout) for layout in study.layouts]
    return documents.markdown(header, rows, left=["layout"])


def _cells(results: Results, name: str, study: Study, layout: Layout) -> list[str]:
    short = misfit(study, layout)
    note = f": impossible, at most p = {max(short.values())}" if short else ""
    runs = find(results, name, layout)
    start = [str(layout.copies or ""), layout.title + note]
    if not runs:
        return [*start, *("",) * 4, "" if short else "0", *("",) * 4]
    # "over paper" subtracts the measure of the paper's layout with as many copies, seed by seed.
    paper = {run["seed"]: run["score"] for run in find(results, name, Layout(layout.copies))}
    scores = [run["score"] for run in runs]
    over = [run["score"] - paper[run["seed"]] for run in runs if run["seed"] in paper]
    if layout.copies < 2 or layout.family == "paper":
        over = []
    return [
        *start,
        *_mean_and_range(scores, f".{study.digits}f"),
        *_mean_and_range(over, f"+.{study.digits}f"),
        str(len(runs)),
        f"{runs[0]['stored_bits'] / runs[0]['weights']:.4f}",
        f"{runs[0]['bytes']:,}",
        f"{runs[0]['macs']:,}",
        min((f"{step:.1f}" for run in runs if (step := run["step_ms"]) is not None), key=float, default=""),
    ]


def _mean_and_range(values: list[float], form: str) -> tuple[str, str]:
    if not values:
        return "", ""
    several = f"{min(values):{form}} to {max(values):{form}}" if len(values) > 1 else ""
    return f"{mean(values):{form}}", several


def _overview(results: Results, studies: Mapping[str, Study]) -> str:
    """The mean of each layout over its seeds, and how many these are; of several pairs or shifts the first."""
    rows = []
    for name, study in studies.items():
        start = [f"{study.title}: {study.measure}", *(_short_mean(results, name, study, Layout(p)) for p in (0, 1))]
        for copies in sorted({layout.copies for layout in study.layouts} - {0, 1}):
            first: dict[str, Layout] = {}
            for layout in study.layouts:
                if layout.copies == copies:
                    first.setdefault(layout.family, layout)
            means = [_short_mean(results, name, study, first.get(family)) for family in _FAMILIES]
            rows.append([*start, str(copies), *means])
            start = ["", "", ""]
    return documents.markdown(["task", "float", "binary", "p", *_FAMILIES], rows, left=["task"])


def _short_mean(results: Results, name: str, study: Study, layout: Layout | None) -> str:
    if layout is None:
        return ""
    if misfit(study, layout):
        return "impossible"
    scores = [run["score"] for run in find(results, name, layout)]
    return f"{mean(scores):.{study.digits}f} ({len(scores)})" if scores else ""


def draw(results: Results, studies: Mapping[str, Study], path: Path) -> None:
    """Draw the measures over stored bits: the mean of the seeds, bars from the lowest to the highest; up is better.

    Accuracy stands as the percentage of errors on a logarithmic axis, where a network of few distinct rows does not
    hide the differences between the others. Other shifts of the rolled layout are left to the tables.
    """
    from matplotlib.figure import Figure  # only the figure needs it
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(10, 3.6 * ((len(studies) + 1) // 2)), layout="constrained")
    panels = figure.subplots((len(studies) + 1) // 2, 2, squeeze=False).flatten()
    for axes, (name, study) in zip(panels, studies.items(), strict=False):
        for layout, style in ((Layout(0), ":"), (Layout(1), "--")):
            runs = find(results, name, layout)
            if runs:
                axes.axhline(mean(_losses(study, runs)), linestyle=style, color="gray", label=layout.family)
        for family, (marker, offset) in _FAMILIES.items():
            found = [find(results, name, layout) for layout in study.layouts
                     if layout.family == family and not layout.shift]  # fmt: skip
            points = [(runs[0]["stored_bits"] / runs[0]["weights"], _losses(study, runs)) for runs in found if runs]
            if points:
                middles = [mean(losses) for _, losses in points]
                below, above = ([abs(end(losses) - mean(losses)) for _, losses in points] for end in (min, max))
                positions = [bits * offset for bits, _ in points]
                axes.errorbar(positions, middles, yerr=(below, above), fmt=marker, capsize=3, label=family)
        axes.set_xscale("log", base=2)
        # As many labels as stand apart.
        axes.xaxis.set_major_locator(LogLocator(base=2, subs=(1, 1.5)))
        axes.xaxis.set_major_formatter("{x:.3g}")
        if not study.falls:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6)))
            axes.yaxis.set_major_formatter("{x:g}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_locator(NullLocator())
        axes.invert_yaxis()
        axes.set_title(study.title, fontsize=9)
        axes.set(xlabel="stored bits a weight", ylabel=study.measure if study.falls else "errors %")
        axes.grid(alpha=0.3)
    marks = dict(pair[::-1] for axes in panels for pair in zip(*axes.get_legend_handles_labels(), strict=True))
    if marks:
        figure.legend(marks.values(), marks.keys(), loc="outside lower center", ncols=len(marks), fontsize=8)
    for axes in panels[len(studies) :]:
        axes.remove()
    figure.savefig(path, dpi=90)


def _losses(study: Study, runs: list[Results]) -> list[float]:
    """The measures as something of which less is better."""
    return [run["score"] if study.falls else 100 - run["score"] for run in runs]
