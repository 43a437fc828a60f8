"""The tables of ``docs/microcontroller_examples.md``, made from the result file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean
from typing import Any

import documents

from mcu.task import Network, Task

Results = Mapping[str, Any]


def fill(document: str, results: Results, tasks: Mapping[str, Task]) -> str:
    """``document`` with its tables replaced by those of ``results``."""
    return documents.fill(document, tables(results, tasks))


def tables(results: Results, tasks: Mapping[str, Task]) -> dict[str, str]:
    """The tables by name: ``target``, ``seeds`` and ``tasks``."""
    found = list(_networks(results, tasks))
    return {
        "target": documents.markdown(
            [
                *("example", "network", "PyTorch", "C on the host", "of the first", "C on the core", "of the first"),
                *("difference", "flash B", "of it weights B", "RAM B", "in + out B", "instructions"),
            ],
            [_target_row(*row) for row in found],
            left=("example", "network"),
        ),
        "seeds": documents.markdown(
            ["example", "network", "mean", "range", "seeds", "training s"],
            [_seeds_row(*row) for row in found],
            left=("example", "network"),
        ),
        "tasks": documents.markdown(
            ["example", "model", "TBN", "data", "division"],
            [
                [task.title, task.model, task.networks["tbn4"].layout, entry["data"], entry["split"]]
                for task, entry in ((task, results["tasks"].get(name)) for name, task in tasks.items())
                if entry
            ],
            left=("example", "model", "TBN", "data", "division"),
        ),
    }


def _networks(results: Results, tasks: Mapping[str, Task]) -> Iterator[tuple[Task, Network, Results]]:
    """What the result file holds, in the order of the tasks."""
    for name, task in tasks.items():
        entries = results["tasks"].get(name, {"networks": {}})["networks"]
        for key, network in task.networks.items():
            if key in entries:
                yield task, network, entries[key]


def _target_row(task: Task, network: Network, entry: Results) -> list[str]:
    """Seed 0: scores in PyTorch with all test examples and in C with the first ones, and what the C program costs."""
    cells = [task.title, network.title, score(entry["scores"]["0"])]
    if "target" not in entry:
        return [*cells, *["not measured"] * 10]
    target, emulated = entry["target"], entry["target"]["emulated"]
    return [
        *cells,
        score(target["host"]["scores"]),
        f"{target['host']['examples']:,}",
        score(emulated["scores"]),
        f"{emulated['examples']:,}",
        _difference(target["host"], emulated),
        f"{emulated['flash_bytes']:,}",
        f"{target['weight_bytes']:,}",
        f"{emulated['static_bytes'] + emulated['stack_bytes']:,}",
        f"{target['input_output_bytes']:,}",
        f"{emulated['instructions']:,}",
    ]


def _difference(*places: Results) -> str:
    """The largest difference of any output; for classes also the number of examples that got another one."""
    text = f"{max(place['max_error'] for place in places):.1e}"
    return f"{text} / {max(place['other_classes'] for place in places)}" if "other_classes" in places[0] else text


def _seeds_row(task: Task, network: Network, entry: Results) -> list[str]:
    runs = list(entry["scores"].values())
    means = {key: mean(run[key] for run in runs) for key in runs[0]}
    first = next(iter(means))  # accuracy, or the squared error
    spread = sorted(runs, key=lambda run: run[first])
    return [
        task.title,
        network.title,
        score(means),
        f"{_number(first, spread[0][first])} to {_number(first, spread[-1][first])}",
        str(len(runs)),
        f"{mean(entry['seconds'].values()):.0f}",
    ]


def score(values: Mapping[str, float]) -> str:
    """``96.50 %``, or ``0.387 / 0.401`` for squared and absolute error."""
    text = " / ".join(_number(key, value) for key, value in values.items())
    return f"{text} %" if "accuracy" in values else text


def _number(key: str, value: float) -> str:
    return f"{value:.2f}" if key == "accuracy" else f"{value:.3f}"
