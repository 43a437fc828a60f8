"""Tile layouts compared: the paper's, copies along both axes, rolled copies, and copies with Hadamard signs.

    python examples/layouts.py --list                      # every run, and whether its result is there
    python examples/layouts.py --data DIR                  # trains what the result file lacks
    python examples/layouts.py --data DIR --only text --seeds 1 --workers 2
    python examples/layouts.py --data DIR --only images --workers 4 --device cuda
    python examples/layouts.py --docs                      # tables and figure of docs/layouts.md (needs matplotlib)

Networks, data and training are those of recipes (``paper.recipes``), shortened; only the layout differs between the
runs of a task. The result file is written after each run, and the study can be stopped at any time. Seeds are the outer
loop, so that a study that was stopped has as many seeds of each layout, or one less.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import documents
import torch
from example_data import DataError
from layout_studies import STUDIES, Layout, Study, misfit, quick, summary
from layout_tables import Results, draw, tables
from paper.devices import RunError, joined_world
from paper.recipes import Recipe
from paper.runs import machine, versions
from paper.tasks import Task, read_task, synthetic_task
from paper.training import Files, Trainer, run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "layouts.json"
DOCUMENT = ROOT / "docs" / "layouts.md"
FIGURE = ROOT / "docs" / "layouts.png"


class StepClock:
    """Time of the process between steps. Other processes on the machine change it little."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._last = time.process_time()

    def on_step(self, trainer: Trainer) -> None:
        """Stop the time."""
        now = time.process_time()
        self.seconds.append(now - self._last)
        self._last = now

    def on_epoch(self, trainer: Trainer, record: Any) -> None:
        """Nothing; the last step of an epoch takes longer for it, and the median does not see it."""


@functools.lru_cache(maxsize=1)
def load_task(data: str, settings: Recipe) -> Task:
    """The recipe's data, from a folder or made up."""
    return synthetic_task(settings) if data == "synthetic" else read_task(Path(data), settings)


@dataclass(frozen=True)
class Job:
    """One run: a study by name, one of its layouts, and the seed of the weights and of every step."""

    name: str
    study: Study
    layout: Layout
    seed: int

    @property
    def key(self) -> Results:
        """What tells its result from others."""
        return {"task": self.name, "layout": self.layout.title, "p": self.layout.copies, "seed": self.seed}

    def __str__(self) -> str:
        return f"{self.name:7} p={self.layout.copies:<3} {self.layout.title:15} seed {self.seed}"


def train(job: Job, data: str, device: str = "cpu") -> tuple[Results, Results]:
    """Train, lower and measure one network; returns what the task's runs have in common, and the run's result.

    On a GPU (``device="cuda"``) the steps are a CUDA graph, in float32 as on a CPU; they are not timed, since other
    runs share the GPU.
    """
    study, layout = job.study, job.layout
    task = load_task(data, study.settings)
    clock = StepClock()
    with joined_world(device) as world, tempfile.TemporaryDirectory() as folder:
        on_gpu = world.device.type == "cuda"
        options = replace(study.options(layout, job.seed), graph=on_gpu)
        document = run(task, options, world, Files(Path(folder), seconds=math.inf), observer=clock)
    header, result = document["header"], document["result"]
    rows = [row for row in summary(study, layout, task).layers if row.tiled]  # without embeddings
    weights = sum(row.weights for row in rows)
    common = {
        "recipe": study.recipe,
        "settings": header["settings"],
        "tiling": dict(study.tiling),
        "data": header["data"],
        "metric": result["metric"],
        "steps": header["steps_per_epoch"] * result["epochs"],
    }
    return json.loads(json.dumps(common)), {  # as it is read again
        **job.key,
        "score": result["lowered" if layout.copies else "trained"][result["metric"]],
        "loss": document["epochs"][-1]["loss"],
        "weights": weights,
        "stored_bits": sum(row.stored_bits for row in rows) if layout.copies else 32 * weights,
        "alphas": result["alphas"],
        "bytes": result["tensor_bytes"],
        "macs": sum((row.macs_tiled if layout.copies else row.macs) or 0 for row in rows),
        "step_ms": None if on_gpu else round(1000 * median(clock.seconds), 3),
        "parameters_sha256": result["parameters_sha256"],
        "machine": {**machine(world.device), **versions()},
    }


def attempt(job: Job, data: str, device: str) -> tuple[Results, Results] | RunError:
    """What :func:`train` returns, or why the run has no result: one that diverges does not end the study."""
    try:
        return train(job, data, device)
    except RunError as error:
        return error


def jobs(studies: Mapping[str, Study], seeds: int) -> Iterator[Job]:
    """Every run, seed by seed."""
    for seed in range(seeds):
        for name, study in studies.items():
            for layout in study.layouts:
                yield Job(name, study, layout, seed)


def missing(results: Results, studies: Mapping[str, Study], seeds: int) -> Iterator[Job]:
    """What can be trained and has no result yet."""
    known = {tuple(run[name] for name in ("task", "layout", "p", "seed")) for run in results.get("runs", [])}
    for job in jobs(studies, seeds):
        if tuple(job.key.values()) not in known and not misfit(job.study, job.layout):
            yield job


def keep(results: Results, job: Job, common: Results, result: Results) -> None:
    """Put a result among the others.

    Raises:
        DataError: those of its task are of other data or settings.
    """
    before = results.setdefault("tasks", {}).setdefault(job.name, common)
    differing = [name for name in common if before.get(name) != common[name]]
    if differing:
        raise DataError(f"the file holds results of {job.name} with another {differing[0]}; name another file")
    machines = results.setdefault("machines", [])
    if result["machine"] not in machines:
        machines.append(result["machine"])
    results.setdefault("runs", []).append({**result, "machine": machines.index(result["machine"])})


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_worker(threads: int) -> None:
    """A worker ends when the study does, however that ended."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _finished(
    todo: Sequence[Job], data: str, device: str, workers: int, threads: int
) -> Iterator[tuple[Job, tuple[Results, Results] | RunError]]:
    """The jobs with what became of them, one after another or several at a time."""
    if workers == 1:
        for job in todo:
            yield job, attempt(job, data, device)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (threads,)) as pool:
        futures = {pool.submit(attempt, job, data, device): job for job in todo}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def run_all(
    path: Path, studies: Mapping[str, Study], seeds: int, data: str, device: str, workers: int, threads: int
) -> int:
    """Train what the file lacks, and write it after each run; returns how many runs have no result.

    Raises:
        DataError: the data cannot be read, or the file is of others.
    """
    results = documents.load(path)
    todo, failed = list(missing(results, studies, seeds)), 0
    for count, (job, found) in enumerate(_finished(todo, data, device, workers, threads), 1):
        if isinstance(found, RunError):
            failed += 1
            print(f"{count} of {len(todo)}: {job} failed: {found}", file=sys.stderr, flush=True)
            continue
        common, result = found
        keep(results, job, common, result)
        documents.save(results, path)
        score = f"{common['metric'].replace('_', ' ')} {result['score']:.{job.study.digits}f}"
        step = f"  {result['step_ms']:.1f} ms a step" if result["step_ms"] is not None else ""
        print(f"{count} of {len(todo)}: {job} {score}{step}", flush=True)
    return failed


def show(results: Results, studies: Mapping[str, Study], seeds: int) -> None:
    """Print every run and what became of it."""
    waiting = set(missing(results, studies, seeds))
    for job in jobs(studies, seeds):
        short = misfit(job.study, job.layout)
        state = "to be trained" if job in waiting else "impossible" if short else "there"
        print(f"{job} {state}{''.join(f', {name} takes {copies}' for name, copies in short.items())}")


def _number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="layouts.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", metavar="DIR", help="folder with the data sets, as train.py takes it, or 'synthetic'")
    parser.add_argument("--results", type=Path, metavar="FILE", default=RESULTS, help="result file to read and extend")
    parser.add_argument("--only", choices=STUDIES, action="append", metavar="TASK", help="one task; may be repeated")
    parser.add_argument(
        "--seeds", type=_number, default=5, help="number of runs of each network (default: %(default)s)"
    )
    parser.add_argument("--workers", type=_number, default=1, help="processes that train (default: %(default)s)")
    parser.add_argument("--threads", type=_number, default=1, help="threads of each; results depend on it (default: 1)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="a trial: two steps for each run")
    parser.add_argument("--list", action="store_true", help="print all runs and end")
    parser.add_argument("--docs", action="store_true", help="write tables and figure of docs/layouts.md")
    options = parser.parse_args(arguments)
    if options.quick and options.results == RESULTS:
        parser.error("--quick needs --results: its figures do not belong among the real ones")
    studies = {name: study for name, study in STUDIES.items() if name in (options.only or STUDIES)}
    if options.quick:
        studies = {name: quick(study) for name, study in studies.items()}
    if options.list:
        show(documents.load(options.results), studies, options.seeds)
        return 0
    torch.set_num_threads(options.threads)
    if options.data:
        try:
            how = (options.data, options.device, options.workers, options.threads)
            if run_all(options.results, studies, options.seeds, *how):
                return 1
        except DataError as error:
            print(f"layouts.py: {error}", file=sys.stderr)
            return 1
    if options.docs:
        results = documents.load(options.results)
        filled = documents.fill(DOCUMENT.read_text(encoding="utf-8"), tables(results, STUDIES))
        DOCUMENT.write_text(filled, encoding="utf-8")
        draw(results, STUDIES, FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
