"""Tile layouts beyond the paper's, compared on MNIST: the paper's, copies along both axes, and rolled copies.

    python examples/layouts.py --data DIR                  # trains what the result file lacks
    python examples/layouts.py --table                     # prints what it holds; --docs writes it into docs/layouts.md
    python examples/layouts.py --plot docs/layouts.png     # accuracy over stored bits (needs matplotlib)
    python examples/layouts.py --data DIR --look-at-shift  # how far to roll, on held-out training images

Every network is trained by the same plain loop and measured on the test images after the last epoch and
``tbn.lower``. Seeds are the outer loop, so that a run that was stopped has about as many seeds of each layout.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import documents
import torch
import torch.nn.functional as F
from example_data import DataError, ImageData, read_mnist, sklearn_digits
from torch import Tensor, nn

import tbn_compiler as tbn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "layouts.json"
DOCUMENT = ROOT / "docs" / "layouts.md"
HELD_OUT = 10_000

Results = dict[str, Any]


@dataclass(frozen=True)
class Layout:
    """How the copies of a tile fill a weight: ``p`` as in ``TilingConfig``, and whether copies are rolled."""

    p: int | tuple[int, int]
    rolled: bool = False

    @property
    def copies(self) -> int:
        """Number of copies: the tiled layers store ``1 / copies`` bits per weight."""
        return self.p if isinstance(self.p, int) else math.prod(self.p)

    @property
    def family(self) -> str:
        """What the plot marks alike."""
        if self.copies == 1:
            return "binary"
        if isinstance(self.p, tuple):
            return "two-axis"
        return "rolled" if self.rolled else "paper"

    @property
    def title(self) -> str:
        """What tables and the result file call it."""
        if isinstance(self.p, tuple):
            return f"two-axis {self.p[0]} x {self.p[1]}"
        return self.family


@dataclass(frozen=True)
class Study:
    """One network and the layouts to compare in it.

    Attributes:
        title: what tables call the network.
        build: makes the float model.
        tiled: name pattern of the layers that take the layout; the others are binary.
        shape: shape of their weights.
        layouts: what to compare.
        epochs: passes over the training images.
    """

    title: str
    build: Callable[[], nn.Module]
    tiled: str
    shape: tuple[int, int]
    layouts: tuple[Layout, ...]
    epochs: int

    def shift(self, layout: Layout) -> int:
        """Elements by which each further rolled copy moves: an equal part of the tile plus one of the row.

        Parts of the tile alone (``q / p``) are whole rows here, which would only permute the rows.
        """
        rows, row_size = self.shape
        return rows * row_size // layout.copies**2 + row_size // layout.copies

    def config(self, layout: Layout, shift: int | None = None) -> tbn.TilingConfig:
        """Tile the study's layers, with one scale per copy along the output, and make all others binary.

        One scale per copy on both axes would give up the saving in arithmetic of the two-axis layouts.
        """
        options: dict[str, Any] = {"p": layout.p}
        if layout.rolled:
            options |= {"replicate": "roll", "shift": shift or self.shift(layout)}
        return tbn.TilingConfig(p=1, alpha="output", min_size=0, overrides={self.tiled: options})


def mlp() -> nn.Module:
    """784-128-10, without biases."""
    return nn.Sequential(nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False))


def deep_mlp() -> nn.Module:
    """784-256-256-256-10 with batch-norm."""
    layers: list[nn.Module] = []
    for inputs in (784, 256, 256):
        layers += [nn.Linear(inputs, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(256, 10, bias=False))


_BINARY = Layout(1)

STUDIES = {
    "mlp": Study(
        "784-128-10, first layer tiled",
        mlp,
        tiled="0",
        shape=(128, 784),
        layouts=(
            _BINARY,
            *(Layout(4), Layout((2, 2)), Layout(4, rolled=True)),
            *(Layout(8), Layout((4, 2)), Layout((2, 4)), Layout(8, rolled=True)),
            *(Layout(16), Layout((4, 4)), Layout(16, rolled=True)),
        ),
        epochs=12,
    ),
    "deep_mlp": Study(
        "784-256-256-256-10 with batch-norm, two middle layers tiled",
        deep_mlp,
        tiled="[36]",
        shape=(256, 256),
        layouts=(
            _BINARY,
            *(Layout(8), Layout((4, 2)), Layout(8, rolled=True)),
            *(Layout(32), Layout((4, 8)), Layout(32, rolled=True)),
        ),
        epochs=8,
    ),
}


@dataclass(frozen=True)
class Recipe:
    """The training loop's settings, the same for every network: Adam, and a cosine from ``lr`` to zero."""

    batch_size: int = 512
    lr: float = 2e-3
    mean: float = 0.1307  # inputs become (x - mean) / std
    std: float = 0.3081


def standardise(data: ImageData, recipe: Recipe) -> ImageData:
    """Images as ``(x - mean) / std``."""
    train_x, test_x = ((x - recipe.mean) / recipe.std for x in (data.train_x, data.test_x))
    return dataclasses.replace(data, train_x=train_x, test_x=test_x)


def train(model: nn.Module, data: ImageData, recipe: Recipe, epochs: int) -> None:
    """Train in place."""
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, fused=True)
    steps_per_epoch = max(1, len(data.train_x) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps_per_epoch)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(data.train_x))
        for batch in order[: steps_per_epoch * recipe.batch_size].split(recipe.batch_size):
            loss = F.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percentage of images that are classified right."""
    right: Tensor = model(x).argmax(1) == y
    return 100 * right.float().mean().item()


def measure(
    data: ImageData, study: Study, layout: Layout, recipe: Recipe, seed: int, shift: int | None = None
) -> Results:
    """Train one network, lower it and measure it.

    Args:
        data: standardised images.
        study: the network.
        layout: that of its tiled layers.
        recipe: how to train.
        seed: of the initial weights and the order of the images.
        shift: for a rolled layout, instead of the study's.

    Returns:
        Accuracies in percent after the last epoch, and the stored bits and multiply-adds of the tiled layers.
    """
    torch.manual_seed(seed)
    config = study.config(layout, shift)
    qat = tbn.transform(study.build(), config)
    train(qat, data, recipe, study.epochs)
    packed = tbn.lower(qat)
    tiled = [row for row in tbn.summary(packed).layers if row.shape == study.shape]
    return {
        "layout": layout.title,
        "p": layout.copies,
        "shift": config.for_layer(tiled[0].name).shift if layout.rolled else None,
        "seed": seed,
        "epochs": study.epochs,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "accuracy": round(accuracy(packed, data.test_x, data.test_y), 2),
        "train_accuracy": round(accuracy(packed, data.train_x, data.train_y), 2),
        "tiled_weights": sum(row.weights for row in tiled),
        "stored_bits": sum(row.stored_bits for row in tiled),
        "alphas": sum(row.alphas or 0 for row in tiled),
        "macs": sum(row.macs_tiled or 0 for row in tiled),
    }


def find(results: Results, name: str, study: Study, layout: Layout) -> list[Results]:
    """The runs of one layout, trained for as many epochs as the study says, by seed."""
    wanted = (layout.title, layout.copies, study.epochs)
    runs = [run for run in results["studies"].get(name, []) if (run["layout"], run["p"], run["epochs"]) == wanted]
    return sorted(runs, key=lambda run: run["seed"])


def missing(results: Results, studies: Mapping[str, Study], seeds: int) -> Iterator[tuple[str, Layout, int]]:
    """What is to be trained still: study, layout and seed."""
    for seed in range(seeds):
        for name, study in studies.items():
            for layout in study.layouts:
                if all(run["seed"] != seed for run in find(results, name, study, layout)):
                    yield name, layout, seed


def run_all(data: ImageData, results: Results, path: Path, studies: Mapping[str, Study], seeds: int) -> None:
    """Train what ``results`` lacks; the file is written after each network.

    Raises:
        DataError: ``results`` are of other images.
    """
    if results.setdefault("data", data.name) != data.name:
        raise DataError(f"{path} holds results of {results['data']}, not of {data.name}; name another file")
    save(results, path)
    recipe = Recipe()
    inputs = standardise(data, recipe)
    for name, layout, seed in list(missing(results, studies, seeds)):
        start = time.perf_counter()
        run = measure(inputs, studies[name], layout, recipe, seed)
        seconds = time.perf_counter() - start
        results["studies"].setdefault(name, []).append(run)
        save(results, path)
        print(f"{name:9} p={run['p']:<3} {run['layout']:15} seed {seed} {run['accuracy']:6.2f} % {seconds:6.1f} s")


def look_at_shift(data: ImageData, results: Results, path: Path) -> None:
    """One seed of the first study at p = 8: the paper's layout, and rolled by 1, ``q / p`` and the study's shift."""
    recipe, study, rolled = Recipe(), STUDIES["mlp"], Layout(8, rolled=True)
    inputs = standardise(data.hold_out(HELD_OUT), recipe)
    part = math.prod(study.shape) // rolled.copies**2
    runs = [measure(inputs, study, Layout(8), recipe, seed=0)]
    runs += [measure(inputs, study, rolled, recipe, seed=0, shift=shift) for shift in (1, part, study.shift(rolled))]
    results["shifts"] = runs
    save(results, path)


def load(path: Path) -> Results:
    """Read the result file, or begin one."""
    if path.exists():
        results: Results = json.loads(path.read_text(encoding="utf-8"))
        return results
    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    return {"versions": versions, "studies": {}}


def save(results: Results, path: Path) -> None:
    """Write the result file at once, so that a stopped run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def tables(results: Results, studies: Mapping[str, Study] = STUDIES) -> dict[str, str]:
    """A Markdown table for each study, and one for the look at the shift, by name.

    Bits and multiply-adds are those of the tiled layers. "over paper" subtracts the accuracy of the paper's layout
    with as many copies, seed by seed.
    """
    header = ["p", "layout", "accuracy %", "range", "over paper", "range", "seeds", "bits/weight", "multiply-adds"]
    made = {}
    for name, study in studies.items():
        rows = [_cells(results, name, study, layout) for layout in study.layouts]
        made[name] = documents.markdown(header, [row for row in rows if row], left=["layout"])
    shifts = [[run["layout"], str(run["shift"] or ""), f"{run['accuracy']:.2f}"] for run in results.get("shifts", [])]
    return made | {"shifts": documents.markdown(["layout", "shift", "validation accuracy %"], shifts, ["layout"])}


def _cells(results: Results, name: str, study: Study, layout: Layout) -> list[str]:
    runs = find(results, name, study, layout)
    if not runs:
        return []
    paper = {run["seed"]: run["accuracy"] for run in find(results, name, study, Layout(layout.copies))}
    scores = [run["accuracy"] for run in runs]
    gains = [run["accuracy"] - paper[run["seed"]] for run in runs if run["seed"] in paper]
    compared = ["", ""]
    if gains and layout.family != "paper" and layout.copies > 1:
        compared = [f"{mean(gains):+.2f}", f"{min(gains):+.2f} to {max(gains):+.2f}"]
    return [
        str(layout.copies),
        layout.title,
        f"{mean(scores):.2f}",
        f"{min(scores):.2f} to {max(scores):.2f}",
        *compared,
        str(len(runs)),
        f"{runs[0]['stored_bits'] / runs[0]['tiled_weights']:.4f}",
        f"{runs[0]['macs']:,}",
    ]


def fill(document: str, results: Results) -> str:
    """``document`` with its tables, between ``<!-- table: NAME -->`` and ``<!-- end -->``, replaced."""
    return documents.fill(document, tables(results))


# Families of layouts in the plot, and the factors that keep points of equal bits apart.
_OFFSETS = {"binary": 1.0, "paper": 1.0, "two-axis": 0.94, "rolled": 1.06}


def plot(results: Results, path: Path, studies: Mapping[str, Study] = STUDIES) -> None:
    """Draw accuracy over stored bits: the mean of the seeds, and a bar from the lowest to the highest."""
    from matplotlib.figure import Figure  # only plotting needs it

    figure = Figure(figsize=(5 * len(studies), 3.6), layout="constrained")
    for axes, (name, study) in zip(figure.subplots(1, len(studies)), studies.items(), strict=True):
        for marker, (family, offset) in zip("Dos^", _OFFSETS.items(), strict=True):
            found = [find(results, name, study, layout) for layout in study.layouts if layout.family == family]
            points = [(runs[0]["stored_bits"] * offset, *_spread(runs)) for runs in found if runs]
            if points:
                bits, scores, below, above = zip(*points, strict=True)
                axes.errorbar(bits, scores, yerr=(below, above), fmt=marker, capsize=3, label=family)
        axes.set_xscale("log", base=2)
        axes.set_title(study.title, fontsize=9)
        axes.set(xlabel="stored bits of the tiled layers", ylabel="test accuracy %")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=90)


def _spread(runs: Sequence[Results]) -> tuple[float, float, float]:
    """Mean of the accuracies, and how far the lowest and the highest lie from it."""
    scores = [run["accuracy"] for run in runs]
    return mean(scores), mean(scores) - min(scores), max(scores) - mean(scores)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the idx files of MNIST")
    parser.add_argument("--results", type=Path, metavar="FILE", default=RESULTS, help="result file to read and extend")
    parser.add_argument("--seeds", type=int, default=5, help="number of runs of each network (default: %(default)s)")
    parser.add_argument("--look-at-shift", action="store_true", help="only compare how far to roll")
    parser.add_argument("--quick", action="store_true", help="a trial: 1 epoch on 1,024 images, digits without --data")
    parser.add_argument("--table", action="store_true", help="print the results as Markdown tables")
    parser.add_argument("--docs", action="store_true", help="write those tables to docs/layouts.md")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw accuracy over stored bits")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    if options.look_at_shift and not options.data:
        parser.error("--look-at-shift needs --data")
    if options.quick and options.results == RESULTS:
        parser.error("--quick needs --results: its figures do not belong among the real ones")
    results = load(options.results)
    studies = STUDIES
    if options.quick:
        studies = {name: dataclasses.replace(study, epochs=1) for name, study in STUDIES.items()}
    if options.data or options.quick:
        try:
            data = read_mnist(options.data) if options.data else sklearn_digits()
            if options.quick:
                data = data.head(1024, 256)
            if options.look_at_shift:
                look_at_shift(data, results, options.results)
            else:
                run_all(data, results, options.results, studies, options.seeds)
        except DataError as error:
            print(f"layouts: {error}", file=sys.stderr)
            return 1
    if (options.table or options.docs or options.plot) and next(missing(results, studies, seeds=1), None):
        print(f"layouts: {options.results} does not hold every layout yet; train with --data", file=sys.stderr)
        return 1
    if options.table:
        for name, table in tables(results, studies).items():
            title = STUDIES[name].title if name in STUDIES else "how far to roll"
            print(f"{title}:\n\n{table}\n")
    if options.docs:
        DOCUMENT.write_text(fill(DOCUMENT.read_text(encoding="utf-8"), results), encoding="utf-8")
    if options.plot:
        plot(results, options.plot, studies)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    sys.exit(main())
