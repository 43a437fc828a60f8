"""The study behind docs/mnist.md: what each change of the training recipe gives on MNIST, over three seeds.

    python examples/mnist_study.py --data DIR    # trains what the result file lacks, then writes the tables
    python examples/mnist_study.py               # only writes the tables again

Recipes are compared on the last 10,000 training images, which they are not trained on. The recipes that were chosen
are then trained on all training images and measured once on the test images, after the last epoch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import documents
import torch
from example_data import DataError, ImageData, read_mnist
from mnist_mlp import NETWORKS, RECIPES, Recipe, Result, run_all, to_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mnist_mlp.json"
DOCUMENT = ROOT / "docs" / "mnist.md"
SEEDS = (0, 1, 2)
HELD_OUT = 10_000


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    return dataclasses.replace(recipe, **changes)


_BASE = Recipe(epochs=20)
_TEACHERS = {"float": _BASE, "float+bias": _with(_BASE, center=True)}
_BIASES = _with(_BASE, lr_small=1e-2, bias_start=2.0)
_SPREAD = (0.5, 1.0, 2.0, 4.0)

# What is compared: description -> network and recipe.
STEPS: dict[str, tuple[str, Recipe]] = {
    "float": ("float", _TEACHERS["float"]),
    "float, biases, centred": ("float+bias", _TEACHERS["float+bias"]),
    "TBN4, plain": ("tbn4", _BASE),
    "TBN4, alphas start at 1 : 2 : 4 : 8": ("tbn4", _with(_BASE, alpha_start=_SPREAD)),
    "TBN4, distilled": ("tbn4", _with(_BASE, distill=0.7)),
    "TBN4, distilled, alphas start at 1 : 2 : 4 : 8": ("tbn4", _with(_BASE, distill=0.7, alpha_start=_SPREAD)),
    "TBN4, biases": ("tbn4+bias", _BIASES),
    "TBN4, biases, distilled": ("tbn4+bias", _with(_BIASES, distill=0.7)),
    "TBN4, biases, distilled, centred": ("tbn4+bias", _with(_BIASES, distill=0.7, center=True)),
    "TBN 2 x 2, distilled, alphas start at 1 : 2": ("tbn2x2", _with(_BASE, distill=0.7, alpha_start=(0.5, 1.0))),
    "TBN 2 x 2, biases, distilled, centred": ("tbn2x2+bias", _with(_BIASES, distill=0.7, center=True)),
}


def run_steps(data: ImageData, results: dict[str, Any]) -> None:
    """Train the steps that ``results`` lacks; the result file is written after each."""
    steps = results.setdefault("steps", {})
    teachers: dict[int, dict[str, Result]] = {seed: {} for seed in SEEDS}
    for step, (network, recipe) in STEPS.items():
        if step in steps:
            continue
        print(step)
        teacher = "float+bias" if NETWORKS[network].bias else "float"
        runs = []
        for seed, known in teachers.items():
            if recipe.distill and teacher not in known:
                known |= run_all(data, {teacher: _TEACHERS[teacher]}, seed)
            runs.append(run_all(data, {network: recipe}, seed, known))
            known |= {name: result for name, result in runs[-1].items() if NETWORKS[name].p is None}
        steps[step] = to_json(data, {network: recipe}, runs)["networks"][network]
        save(results)


def run_final(data: ImageData, results: dict[str, Any]) -> None:
    """Train the chosen recipes on all training images, if ``results`` lacks them."""
    if "final" not in results:
        print("chosen recipes, all training images")
        recipes = RECIPES["tuned"]
        results["final"] = to_json(data, recipes, [run_all(data, recipes, seed) for seed in SEEDS])["networks"]
        save(results)


def save(results: Mapping[str, Any]) -> None:
    """Write the result file."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def _row(title: str, entry: Mapping[str, Any]) -> list[str]:
    scores = entry["accuracy"]
    return [
        title,
        str(entry["recipe"]["epochs"]),
        f"{mean(scores):.2f}",
        f"{min(scores):.2f} to {max(scores):.2f}",
        f"{mean(entry['train_accuracy']):.2f}",
        f"{entry['stored_bytes']:,}",
    ]


def tables(results: Mapping[str, Any]) -> dict[str, str]:
    """The tables of the document, by the name of their place in it."""
    header = ["network", "epochs", "accuracy %", "range", "training accuracy %", "stored bytes"]
    steps = [_row(step, entry) for step, entry in results["steps"].items()]
    final = results["final"]
    best_float = max(mean(final[name]["accuracy"]) for name in ("float", "float+bias"))
    rows = []
    for name, entry in final.items():
        gap = "" if NETWORKS[name].p is None else f"{best_float - mean(entry['accuracy']):.2f}"
        rows.append([*_row(entry["title"], entry), gap, NETWORKS[name].paper])
    explored = [
        [entry["change"], entry["baseline"], f"{entry['accuracy'] - entry['baseline_accuracy']:+.2f}"]
        for entry in results["explored"]
    ]
    return {
        "explored": documents.markdown(["change", "of", "points"], explored, left=["change"]),
        "final": documents.markdown([*header, "points below float", "paper, Table 6"], rows, left=["network"]),
        "steps": documents.markdown([*header[:2], "validation accuracy %", *header[3:]], steps, left=["network"]),
    }


def fill(document: str, results: Mapping[str, Any]) -> str:
    """``document`` with its tables replaced by those of ``results``."""
    return documents.fill(document, tables(results))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the idx files of MNIST")
    options = parser.parse_args(arguments)
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.data:
        try:
            data = read_mnist(options.data)
        except DataError as error:
            print(f"mnist_study: {error}", file=sys.stderr)
            return 1
        results["versions"] = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        run_steps(data.hold_out(HELD_OUT), results)
        run_final(data, results)
    DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    sys.exit(main())
