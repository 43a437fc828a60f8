"""int8 and binary inputs of tiled layers: what they cost in accuracy, after training in float and trained with.

    python examples/activations.py --data DIR      # trains what the result file lacks
    python examples/activations.py --table         # prints what it holds; --docs writes it into docs/activations.md

Networks, data and training are those of the layout study (``layout_studies``) with the paper's layout at p = 4. Each
network is trained with every kind of input; the one with float inputs is then measured with each kind besides
(``tbn.optimize``), with scales of tokens, and with one scale of each layer that training batches calibrate. Seeds are
the outer loop, and the result file is written after each run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import documents
import torch
from layout_studies import STUDIES, Layout, Study
from paper.devices import World
from paper.runs import machine, versions
from paper.tasks import Task, read_task, synthetic_task
from paper.training import Trainer
from study_command import StudyCommand
from torch import Tensor, nn

import tbn_compiler as tbn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "activations.json"
DOCUMENT = ROOT / "docs" / "activations.md"
COPIES = 4
CALIBRATION_BATCHES = 4

Results = dict[str, Any]

# Format of the inputs and whose scale it has, as in TilingConfig.
FLOAT = ("float", "token")
INPUTS = (FLOAT, *((activation, scale) for activation in ("int8", "binary") for scale in ("token", "layer")))


@dataclass(frozen=True)
class Run:
    """One network to train: study by name, format and scale of its layers' inputs, and seed."""

    task: str
    activation: str
    input_scale: str
    seed: int

    def found(self, results: Results) -> Results | None:
        """Its result, if there is one already."""
        return next((run for run in results.get("runs", []) if vars(self).items() <= run.items()), None)


def runs(tasks: Sequence[str], seeds: int) -> Iterator[Run]:
    """Everything to train, seed by seed."""
    for seed in range(seeds):
        for task in tasks:
            for activation, scale in INPUTS:
                yield Run(task, activation, scale, seed)


def load_task(data: str, study: Study) -> Task:
    """The data of a study, from a folder or made up."""
    return synthetic_task(study.settings) if data == "synthetic" else read_task(Path(data), study.settings)


def batches(task: Task, study: Study) -> list[tuple[Tensor, ...]]:
    """Inputs of the first training examples, as training sees them."""
    size, generator = study.settings.batch_size, torch.Generator().manual_seed(0)
    known = torch.arange(min(task.train_size, CALIBRATION_BATCHES * size)).split(size)
    return [task.train_batch(index, generator)[0] for index in known]


def measure(run: Run, study: Study, task: Task) -> Results:
    """Train one network, lower it and measure it; the one with float inputs also with every other kind."""
    options = study.options(Layout(COPIES), run.seed)
    tiling = {**options.tiling, "activation": run.activation, "input_scale": run.input_scale}
    trainer = Trainer(task, replace(options, tiling=tiling), World())
    if run.input_scale == "layer":
        tbn.calibrate_inputs(trainer.model, batches(task, study))
    while not trainer.finished:
        trainer.advance()
    packed = tbn.lower(trainer.model)

    def score(model: nn.Module) -> float:
        return round(trainer.evaluate(model)[task.metric], 4)

    result = {**vars(run), "steps": trainer.step, "score": score(packed)}
    if (run.activation, run.input_scale) == FLOAT:
        example, known = tuple(task.test_batch(torch.arange(2))[0]), batches(task, study)
        result["after"] = {
            f"{activation} {scale}": score(
                tbn.optimize(
                    packed,
                    example,
                    activation="int8" if activation == "int8" else "binary",
                    calibration=known if scale == "layer" else None,
                )
            )
            for activation, scale in INPUTS[1:]
        }
    return result


def run_all(data: str, studies: dict[str, Study], results: Results, path: Path, seeds: int) -> None:
    """Train what ``results`` lacks; the file is written after each network.

    Raises:
        DataError: the data cannot be read.
    """
    results.setdefault("machine", machine(torch.device("cpu")))
    results.setdefault("versions", versions())
    tasks = {name: load_task(data, study) for name, study in studies.items()}
    for run in runs(list(studies), seeds):
        if run.found(results) is None:
            found = measure(run, studies[run.task], tasks[run.task])
            results.setdefault("runs", []).append(found)
            documents.save(results, path)
            print(f"{run.task:7} {run.activation:7} {run.input_scale:6} seed {run.seed} {found['score']}", flush=True)


def table(results: Results) -> str:
    """A row for each task and kind of inputs: the measure after training in float, and trained with them."""
    header = ["network", "inputs", "scale", "after training in float", "trained with them", "seeds"]
    rows = []
    for name, study in STUDIES.items():
        for activation, scale in INPUTS:
            found = [
                run
                for run in results["runs"]
                if (run["task"], run["activation"], run["input_scale"]) == (name, activation, scale)
            ]
            if not found:
                continue
            base = [run for run in results["runs"] if run["task"] == name and "after" in run]
            after = [run["after"][f"{activation} {scale}"] for run in base if activation != "float"]
            rows.append(
                [
                    f"{study.title} ({study.measure})",
                    activation,
                    "" if activation == "float" else f"a {scale}",
                    f"{mean(after):.{study.digits}f}" if after else "",
                    f"{mean(run['score'] for run in found):.{study.digits}f}",
                    str(len(found)),
                ]
            )
    return documents.markdown(header, rows, left=["network", "inputs", "scale"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""

    def train(options: argparse.Namespace, studies: dict[str, Study], results: Results) -> None:
        run_all(options.data, studies, results, options.results, options.seeds)

    command = StudyCommand("activations", __doc__, ("mnist", "images"), RESULTS, DOCUMENT, table, STUDIES)
    return command.run(train, arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)  # so that results do not depend on the machine's number of cores
    sys.exit(main())
