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
    """The tables by name: ``target``, ``int8``, ``seeds`` and ``tasks``."""
    found = list(_networks(results, tasks))
    with_int8 = [row for row in found if "int8" in row[2]]
    return {
        "target": documents.markdown(
            [
                *("example", "network", "PyTorch", "C on the host", "of the first", "C on the core", "of the first"),
                *("difference", "flash B", "of it weights B", "RAM B", "in + out B", "instructions"),
            ],
            [cells for row in found for cells in _target_rows(*row)],
            left=("example", "network"),
        ),
        "int8": documents.markdown(
            [
                *("example", "network", "activations", "accuracy", "instructions", "of int8 kernels"),
                *("flash B", "of it weights B", "RAM B"),
            ],
            [cells for row in with_int8 for cells in _int8_rows(*row, results)],
            left=("example", "network", "activations"),
        ),
        "seeds": documents.markdown(
            ["example", "network", "mean", "range", "seeds", "training s"],
            [_seeds_row(*row) for row in found],
            left=("example", "network"),
        ),
        "tasks": documents.markdown(
            ["example", "model", "TBN", "data", "division", "epochs"],
            [_task_row(task, results["tasks"][name]) for name, task in tasks.items() if name in results["tasks"]],
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


def _target_rows(task: Task, network: Network, entry: Results) -> Iterator[list[str]]:
    """Seed 0: scores in PyTorch with all test examples and in C with the first ones, and what the C program costs."""
    if "target" not in entry:
        yield [task.title, network.title, score(entry["scores"]["0"]), *["not measured"] * 10]
        return
    yield _target_row(task, network.title, entry["target"])
    if network.config is not None and "int8" in entry:
        yield _target_row(task, f"{network.title}, int8 activations", entry["int8"])


def _target_row(task: Task, title: str, target: Results) -> list[str]:
    emulated = target["emulated"]
    return [
        task.title,
        title,
        score(target["scores"]),
        score(target["host"]["scores"]),
        f"{target['host']['examples']:,}",
        score(emulated["scores"]),
        f"{emulated['examples']:,}",
        _difference(target["host"], emulated),
        f"{emulated['flash_bytes']:,}",
        f"{target['weight_bytes']:,}",
        f"{_memory(emulated):,}",
        f"{target['input_output_bytes']:,}",
        f"{emulated['instructions']:,}",
    ]


def _int8_rows(task: Task, network: Network, entry: Results, results: Results) -> Iterator[list[str]]:
    """The network with float and with int8 activations; behind the float network, int8 kernels."""
    peer = results["tasks"][task.name]["networks"]["float"]["int8"]
    yield _int8_row(task, network, "float", entry["target"], peer)
    if network.config is not None:
        yield _int8_row(task, network, "int8", entry["int8"], peer)
    else:
        size = f"{peer['weight_bytes']:,}"
        cells = [score(peer["scores"]), f"{peer['instructions']:,}", "1.00", size, size, ""]
        yield [task.title, "int8 kernels", "int8", *cells]


def _int8_row(task: Task, network: Network, activations: str, target: Results, peer: Results) -> list[str]:
    emulated = target["emulated"]
    return [
        task.title,
        network.title,
        activations,
        score(target["scores"]),
        f"{emulated['instructions']:,}",
        f"{emulated['instructions'] / peer['instructions']:.2f}",
        f"{emulated['flash_bytes']:,}",
        f"{target['weight_bytes']:,}",
        f"{_memory(emulated):,}",
    ]


def _memory(emulated: Results) -> int:
    memory: int = emulated["static_bytes"] + emulated["stack_bytes"]
    return memory


def _task_row(task: Task, entry: Results) -> list[str]:
    tiled = task.networks["tbn4"]
    return [task.title, task.model, tiled.layout, entry["data"], entry["split"], str(tiled.recipe.epochs)]


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
