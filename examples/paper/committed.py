"""The committed results of trainings and measurements, each with what has to be said beside its figures."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, get_args

from paper.baselines import Method
from paper.runs import Record, title

ROOT = Path(__file__).parents[2]
TRAININGS = ROOT / "examples" / "results"
MEASUREMENTS = ROOT / "benchmarks" / "results"

# Changes of a recipe that are said in other words, or change no result.
_SAID = {"epochs", "eval_batch_size", "min_size", "subset", "test_subset"}
_ALPHAS = {"layer": "one alpha a layer", "tile": "one alpha a copy", "output": "one alpha a copy along the output"}


@dataclass(frozen=True)
class Run:
    """A training, with all its seeds: logs that differ in the seed only.

    Attributes:
        headers: the header of each log (see ``paper.runs.FIELDS``).
        results: their results.
    """

    headers: tuple[Record, ...]
    results: tuple[Record, ...]

    @property
    def recipe(self) -> str:
        """Name of the recipe."""
        return str(self.headers[0]["recipe"])

    @property
    def network(self) -> str:
        """``"float"``, ``"bwnn"`` or ``"tbn"``."""
        return str(self.headers[0]["network"])

    @property
    def tiling(self) -> Record:
        """The options of the tiling; empty for a float network."""
        return dict(self.headers[0]["tiling"])

    @property
    def title(self) -> str:
        """What its weights are, in the words of the tables."""
        return title(self.headers[0]).replace("bwnn", "binary").replace("tbn ", "p = ")

    @property
    def scores(self) -> list[float]:
        """The measure of each seed after the last epoch, of the lowered network where there is one."""
        return [float((result["lowered"] or result["trained"])[result["metric"]]) for result in self.results]

    @property
    def score(self) -> str:
        """The mean over the seeds with the measure's name, and the range if there are several."""
        metric = str(self.results[0]["metric"])
        digits = 4 if metric == "mse" else 2
        text = f"{metric.replace('_', ' ')} {mean(self.scores):.{digits}f}"
        if len(self.scores) > 1:
            text += f" ({min(self.scores):.{digits}f} to {max(self.scores):.{digits}f})"
        return text

    @property
    def epochs(self) -> str:
        """How long it was trained, and the recipe's own number of epochs if that is another."""
        epochs, whole = self.headers[0]["settings"]["epochs"], self.headers[0]["changes"].get("epochs")
        return f"{epochs} epochs of the recipe's {whole[0]}" if whole else f"{epochs} epochs"

    @property
    def megabits(self) -> str:
        """Stored bits of its weights in millions."""
        return f"{self.results[0]['stored_bits'] / 1e6:.3f}"

    def __str__(self) -> str:
        """Data set, epochs, seeds and machine, from the header."""
        header = self.headers[0]
        data, machine = header["data"], header["machine"]
        parts = [data["name"]]
        parts += [
            f"{data[part]:,} of {data[f'{part}_of']:,} {what} examples"
            for part, what in (("train", "training"), ("test", "test"))
            if data[part] != data[f"{part}_of"]
        ]
        parts += [data["note"]] if data["note"] else []
        parts.append(self.epochs)
        parts += [f"{name} {before} -> {now}" for name, (before, now) in header["changes"].items() if name not in _SAID]
        if self.tiling:
            parts.append(f"lambda {self.tiling['min_size']:,}")
        if "alpha" in self.tiling:  # methods that are compared with have no alphas of that kind
            parts.append(f"{_ALPHAS[self.tiling['alpha']]} from {self.tiling['alpha_source']}")
        parts += ["tf32"] if header.get("fast") else []  # see the option --fast
        parts += [header["amp"]] if header["amp"] != "off" else []
        parts += ["not lowered"] if any(result.get("failure") for result in self.results) else []
        parts.append(seeds([header["seed"] for header in self.headers]))
        parts.append(
            machine.get("accelerator") or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
        )
        parts.append(f"torch {header['versions']['torch']}, {header['started'][:10]}")
        return f"`{self.recipe}`, {self.title}: " + "; ".join(map(str, parts))


def seeds(found: Sequence[int]) -> str:
    """The seeds of a run in words."""
    return f"seed{'s' if len(found) > 1 else ''} {', '.join(map(str, sorted(found)))}"


def read_runs(folder: Path) -> tuple[Run, ...]:
    """All trainings in a folder, by recipe, from float to most copies; none if there is no such folder."""
    groups: dict[str, list[Record]] = {}
    for path in sorted(folder.glob("train-*.json")):
        document = json.loads(path.read_text())
        same = {key: value for key, value in document["header"].items() if key not in ("seed", "started")}
        groups.setdefault(json.dumps(same, sort_keys=True), []).append(document)
    runs = [
        Run(tuple(document["header"] for document in found), tuple(document["result"] for document in found))
        for found in groups.values()
    ]
    return tuple(sorted(runs, key=_order))


def _order(run: Run) -> tuple[str, int, int]:
    p = run.tiling.get("p", 0)
    copies = math.prod(p) if isinstance(p, list) else p
    return run.recipe, ("float", "bwnn", *get_args(Method), "tbn").index(run.network), copies


@dataclass(frozen=True)
class Committed:
    """All results that the tables are made from.

    Attributes:
        runs: trainings by ``examples/train.py``.
        measurements: folder of the results of the benchmarks and studies.
    """

    runs: tuple[Run, ...]
    measurements: Path

    @classmethod
    def read(cls, trainings: Path = TRAININGS, measurements: Path = MEASUREMENTS) -> Committed:
        """What is in the two folders."""
        return cls(read_runs(trainings), measurements)

    def measured(self, name: str) -> Record:
        """A file of the benchmarks; empty if it is missing."""
        path = self.measurements / f"{name}.json"
        found: Record = json.loads(path.read_text()) if path.exists() else {}
        return found

    def of(self, recipe: str, network: str, **tiling: Any) -> Iterator[Run]:
        """Trainings by a recipe, with these options of the tiling."""
        for run in self.runs:
            if run.recipe == recipe and run.network == network:
                options = run.tiling
                if all(name in options and options[name] == value for name, value in tiling.items()):
                    yield run
