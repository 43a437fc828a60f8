"""Training the tile instead of the weight, with optimisers that are not linear: what start makes both alike?

    python examples/latents.py --data DIR      # trains what the result file lacks
    python examples/latents.py --table         # prints what it holds; --docs writes it into docs/latents.md

Under stochastic gradient descent the sum of the copies moves as the copies do, and both give the same tiles. Adam and
its kin divide each gradient by its own magnitude: every one of ``p`` weight elements moves by about the learning rate,
and their sum by up to ``p`` times that, while a tile that is trained itself moves by it once. Its signs turn as easily
if it starts ``p**e`` times smaller, with ``e`` between 1/2 (copies that move at random) and 1 (copies that move alike).
The network is the same for all ``e``: only signs count.

The 784-128-10 network on MNIST, its first layer tiled, the second binary; one recipe for all but the learning rate,
which is given for each optimiser. Seeds are the outer loop.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import documents
import torch
import torch.nn.functional as F
from example_data import DataError, ImageData, read_mnist, sklearn_digits
from paper.runs import versions
from torch import Tensor, nn

import tbn_compiler as tbn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "latents.json"
DOCUMENT = ROOT / "docs" / "latents.md"
EPOCHS = 8
BATCH_SIZE = 512
MEAN, STD = 0.1307, 0.3081  # inputs become (x - MEAN) / STD

Results = dict[str, Any]


def mlp() -> nn.Module:
    """784-128-10, without biases."""
    return nn.Sequential(nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False))


def standardise(data: ImageData) -> ImageData:
    """Images as ``(x - MEAN) / STD``."""
    return replace(data, train_x=(data.train_x - MEAN) / STD, test_x=(data.test_x - MEAN) / STD)


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percentage of images that are classified right."""
    right: Tensor = model(x).argmax(1) == y
    return 100 * right.float().mean().item()


def _muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon on matrices, Adam on the rest, as its authors advise."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    others = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.Muon(matrices, lr=0.02, weight_decay=0)]
    return optimizers + ([torch.optim.Adam(others, lr=2e-3)] if others else [])


OPTIMIZERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    "SGD 0.1, momentum 0.9": lambda model: [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)],
    "Adam 2e-3": lambda model: [torch.optim.Adam(model.parameters(), lr=2e-3)],
    "AdamW 2e-3, decay 0.05": lambda model: [torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)],
    "Muon 0.02": _muon,
}
COPIES = (4, 16)
# What is trained: the weight, or the tile that starts p**e times smaller than the sum of its copies.
STARTS: tuple[float | None, ...] = (None, 0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Run:
    """One network to train: optimiser, copies, exponent of the start (``None``: the weight is trained) and seed."""

    optimizer: str
    p: int
    exponent: float | None
    seed: int

    @property
    def title(self) -> str:
        """What tables call its form."""
        return "weight" if self.exponent is None else f"tile, e = {self.exponent:g}"

    def found(self, results: Results) -> Results | None:
        """Its result, if there is one already."""
        key = {"optimizer": self.optimizer, "p": self.p, "exponent": self.exponent, "seed": self.seed}
        return next((run for run in results.get("runs", []) if key.items() <= run.items()), None)


def runs(seeds: int) -> Iterator[Run]:
    """Everything to train, seed by seed."""
    for seed in range(seeds):
        for optimizer in OPTIMIZERS:
            for p in COPIES:
                for exponent in STARTS:
                    yield Run(optimizer, p, exponent, seed)


def build(run: Run) -> nn.Module:
    """The network at the start of a run: the same signs and alphas for every form of one seed."""
    torch.manual_seed(run.seed)
    config = tbn.TilingConfig(p=1, min_size=0, overrides={"0": {"p": run.p}})
    model: nn.Module = tbn.transform(mlp(), config)
    if run.exponent is None:
        return model
    model = tbn.convert_latent(model, "tile")
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(run.p**-run.exponent)
    return model


def train(model: nn.Module, data: ImageData, run: Run, epochs: int) -> None:
    """Train in place, with a cosine from the optimiser's learning rate to zero."""
    optimizers = OPTIMIZERS[run.optimizer](model)
    steps = max(1, len(data.train_x) // BATCH_SIZE)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps) for optimizer in optimizers]
    torch.manual_seed(1000 + run.seed)  # of the order of the images
    for _ in range(epochs):
        for batch in torch.randperm(len(data.train_x))[: steps * BATCH_SIZE].split(BATCH_SIZE):
            loss = F.cross_entropy(model(data.train_x[batch]), data.train_y[batch])
            model.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            for schedule in schedules:
                schedule.step()


def measure(data: ImageData, run: Run, epochs: int) -> Results:
    """Train one network, lower it and measure it; ``data`` is standardised."""
    model = build(run)
    first = tbn.lower(model).get_buffer("0.weight_tile").clone()
    start = time.perf_counter()
    train(model, data, run, epochs)
    seconds = time.perf_counter() - start
    packed = tbn.lower(model).eval()
    turned = torch.bitwise_xor(first, packed.get_buffer("0.weight_tile"))
    bits = sum(bin(byte).count("1") for byte in turned.tolist())
    return {
        "optimizer": run.optimizer,
        "p": run.p,
        "exponent": run.exponent,
        "seed": run.seed,
        "epochs": epochs,
        "accuracy": round(accuracy(packed, data.test_x, data.test_y), 2),
        "train_accuracy": round(accuracy(packed, data.train_x, data.train_y), 2),
        "turned": round(bits / (128 * 784 // run.p), 3),
        "seconds": round(seconds, 1),
    }


def run_all(data: ImageData, results: Results, path: Path, seeds: int, epochs: int) -> None:
    """Train what ``results`` lacks; the file is written after each network.

    Raises:
        DataError: ``results`` are of other images.
    """
    if results.setdefault("data", data.name) != data.name:
        raise DataError(f"{path} holds results of {results['data']}, not of {data.name}; name another file")
    results.setdefault("versions", versions())
    inputs = standardise(data)
    for run in runs(seeds):
        if run.found(results) is None:
            found = measure(inputs, run, epochs)
            results.setdefault("runs", []).append(found)
            documents.save(results, path)
            print(
                f"{run.optimizer:24} p={run.p:<3} {run.title:14} seed {run.seed} {found['accuracy']:6.2f} %", flush=True
            )


def table(results: Results) -> str:
    """A row for each optimiser and form: accuracy over the seeds, and the share of signs that turned while training."""
    header = ["optimiser", "p", "trained", "accuracy %", "range", "over weight", "signs turned", "seeds"]
    rows = []
    groups: dict[tuple[str, int, float | None], list[Any]] = {}
    for run in results["runs"]:
        groups.setdefault((run["optimizer"], run["p"], run["exponent"]), []).append(run)
    for (optimizer, p, exponent), found in groups.items():
        scores = [run["accuracy"] for run in found]
        base = {run["seed"]: run["accuracy"] for run in groups[optimizer, p, None]}
        gains = [run["accuracy"] - base[run["seed"]] for run in found if run["seed"] in base]
        rows.append(
            [
                optimizer,
                str(p),
                Run(optimizer, p, exponent, 0).title,
                f"{mean(scores):.2f}",
                f"{min(scores):.2f} to {max(scores):.2f}",
                "" if exponent is None else f"{mean(gains):+.2f}",
                f"{mean(run['turned'] for run in found):.2f}",
                str(len(found)),
            ]
        )
    return documents.markdown(header, rows, left=["optimiser", "trained"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the idx files of MNIST")
    parser.add_argument("--results", type=Path, metavar="FILE", default=RESULTS, help="result file to read and extend")
    parser.add_argument("--seeds", type=int, default=3, help="number of runs of each network (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a trial: 1 epoch on 1,024 images, digits without --data")
    parser.add_argument("--table", action="store_true", help="print the results as a Markdown table")
    parser.add_argument("--docs", action="store_true", help="write it to docs/latents.md")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    if options.quick and options.results == RESULTS:
        parser.error("--quick needs --results: its figures do not belong among the real ones")
    results = documents.load(options.results)
    if options.data or options.quick:
        try:
            data = read_mnist(options.data) if options.data else sklearn_digits()
            data = data.head(1024, 256) if options.quick else data
            run_all(data, results, options.results, options.seeds, 1 if options.quick else EPOCHS)
        except DataError as error:
            print(f"latents: {error}", file=sys.stderr)
            return 1
    if options.table or options.docs:
        if not results.get("runs"):
            print(f"latents: {options.results} holds no runs yet; train with --data", file=sys.stderr)
            return 1
        documents.show_or_write("latents", table(results), DOCUMENT, show=options.table, write=options.docs)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    sys.exit(main())
