"""How to start a tiled network: new weights, those of a float network, or its answers besides (distillation).

    python examples/starts.py --data DIR      # trains what the result file lacks
    python examples/starts.py --table         # prints what it holds; --docs writes it into docs/recipes.md

Networks, data and training are those of the layout study (``layout_studies``) with the paper's layout. The float
network that a tiled one starts from, or learns from, is trained by the same recipe and seed. Seeds are the outer loop,
and the result file is written after each run.
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
from paper.training import Options, Trainer
from study_command import StudyCommand
from torch import Tensor, nn

import tbn_compiler as tbn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "starts.json"
DOCUMENT = ROOT / "docs" / "recipes.md"

Results = dict[str, Any]


@dataclass(frozen=True)
class Start:
    """One way to begin.

    Attributes:
        title: what tables call it.
        from_float: weights and alphas of the float network.
        gradual: blend from float to tiled weights over the first half of the steps.
        distilled: learn from the float network's answers, too.
        alpha_start: how large the alpha sources start, as in ``TilingConfig``.
    """

    title: str
    from_float: bool = False
    gradual: bool = False
    distilled: bool = False
    alpha_start: str = "uniform"


STARTS = {
    "new": Start("new weights"),
    "new-alphas": Start("new weights, alphas at their size", alpha_start="weight"),
    "distilled": Start("new weights, distilled", distilled=True),
    "float": Start("float weights", from_float=True),
    "float-distilled": Start("float weights, distilled", from_float=True, distilled=True),
    "gradual": Start("float weights, gradually", from_float=True, gradual=True),
    "gradual-distilled": Start("float weights, gradually, distilled", from_float=True, gradual=True, distilled=True),
}
WEIGHT, TEMPERATURE = 0.7, 2.0


class Beginner(Trainer):
    """A tiled network with one of the starts."""

    def __init__(self, task: Task, options: Options, start: Start, teacher: nn.Module) -> None:
        self.start, self.teacher = start, teacher
        super().__init__(task, options, World())
        if start.from_float:
            tbn.init_from_float(self.model, teacher)

    def advance(self) -> None:
        """Do one step, at the tiling strength of the step."""
        if self.start.gradual:
            half = self.options.settings.epochs * self.steps_per_epoch / 2
            tbn.set_tiling_strength(self.model, min(1.0, self.step / half))
        super().advance()

    def _learn(self, inputs: tuple[Tensor, ...], target: Tensor) -> None:
        """Learn from a batch, and from the teacher's answers."""
        if not self.start.distilled:
            super()._learn(inputs, target)
            return
        with torch.no_grad():
            answers = self.teacher(*inputs)
        output = self._module(*inputs)
        loss = tbn.distillation_loss(output, answers, target, weight=WEIGHT, temperature=TEMPERATURE)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._loss += loss.detach().double()


@dataclass(frozen=True)
class Run:
    """One network to train: study and start by name, copies, and seed."""

    task: str
    start: str
    p: int
    seed: int

    def found(self, results: Results) -> Results | None:
        """Its result, if there is one already."""
        return next((run for run in results.get("runs", []) if vars(self).items() <= run.items()), None)


def runs(task: str, copies: Sequence[int], seed: int) -> Iterator[Run]:
    """Everything to train with one seed."""
    for p in copies:
        for start in STARTS:
            yield Run(task, start, p, seed)


def train_float(study: Study, task: Task, seed: int) -> Trainer:
    """The float network of a seed, trained."""
    trainer = Trainer(task, study.options(Layout(0), seed), World())
    while not trainer.finished:
        trainer.advance()
    trainer.model.eval()
    return trainer


def measure(run: Run, study: Study, task: Task, teacher: nn.Module) -> float:
    """Train one network and test it lowered."""
    options, start = study.options(Layout(run.p), run.seed), STARTS[run.start]
    tiling = {**options.tiling, "gradual": start.gradual, "alpha_start": start.alpha_start}
    options = replace(options, tiling=tiling)
    trainer = Beginner(task, options, start, teacher)
    while not trainer.finished:
        trainer.advance()
    if start.gradual:
        tbn.set_tiling_strength(trainer.model, 1.0)
    return round(trainer.evaluate(tbn.lower(trainer.model))[task.metric], 4)


def run_all(
    data: str, studies: dict[str, Study], copies: Sequence[int], seeds: int, results: Results, path: Path
) -> None:
    """Train what ``results`` lacks; the file is written after each network.

    Raises:
        DataError: the data cannot be read.
    """
    results.setdefault("machine", machine(torch.device("cpu")))
    results.setdefault("versions", versions())
    for seed in range(seeds):
        for name, study in studies.items():
            missing = [run for run in runs(name, copies, seed) if run.found(results) is None]
            if not missing:
                continue
            task = synthetic_task(study.settings) if data == "synthetic" else read_task(Path(data), study.settings)
            teacher = train_float(study, task, seed)
            score = round(teacher.evaluate()[task.metric], 4)
            for run in missing:
                found = measure(run, study, task, teacher.model.eval())
                results.setdefault("runs", []).append({**vars(run), "score": found, "float": score})
                documents.save(results, path)
                print(f"{run.task:7} p={run.p:<3} {run.start:18} seed {run.seed} {found}, float {score}", flush=True)


def table(results: Results) -> str:
    """A row for each start, a column for each number of copies."""
    found: dict[tuple[str, int, str], list[float]] = {}
    for run in results["runs"]:
        found.setdefault((run["task"], run["p"], run["start"]), []).append(run["score"])
    tasks = [name for name in STUDIES if any(key[0] == name for key in found)]
    columns = [(task, p) for task in tasks for p in sorted({key[1] for key in found if key[0] == task})]
    header = ["start", *(f"{STUDIES[task].title}, p={p} ({STUDIES[task].measure})" for task, p in columns), "seeds"]
    rows = []
    for name, start in STARTS.items():
        scores = [found.get((task, p, name), []) for task, p in columns]
        if not any(scores):
            continue
        cells = [
            f"{mean(each):.{STUDIES[task].digits}f}" if each else ""
            for each, (task, _) in zip(scores, columns, strict=True)
        ]
        rows.append([start.title, *cells, str(min(map(len, scores)))])
    floats = {(run["task"], run["seed"]): run["float"] for run in results["runs"]}
    cells = [
        f"{mean(score for (task, _), score in floats.items() if task == name):.{STUDIES[name].digits}f}"
        for name, _ in columns
    ]
    rows.append(["the float network", *cells, str(len(floats) // len(tasks))])
    return documents.markdown(header, rows, left=["start"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    command = StudyCommand("starts", __doc__, ("mnist", "images"), RESULTS, DOCUMENT, table)
    command.parser.add_argument("--p", type=int, action="append", help="copies; may be repeated (default: 4 and 16)")

    def train(options: argparse.Namespace, studies: dict[str, Study], results: Results) -> None:
        run_all(options.data, studies, options.p or (4, 16), options.seeds, results, options.results)

    return command.run(train, arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)  # so that results do not depend on the machine's number of cores
    sys.exit(main())
