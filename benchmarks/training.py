"""What a training step on tiles costs, against the same network in float: time, state, memory kept for the backward.

One step is forward, backward and SGD with momentum and weight decay on random data, in training mode. Three networks of
one architecture take turns: float, tiled with ``latent="weight"`` (the paper's) and with ``latent="tile"``. The single
layers are tiled whatever their size, the networks by the paper's default (``min_size=64_000``; smaller layers are
binary). Times are medians, ratios are float over tiled.

*State* are parameters, gradients and momentum: what stays from step to step. *Kept* are the tensors that autograd keeps
between forward and backward, each storage once, without the parameters. A small network is bound by the calls of its
operators; what ``torch.compile`` leaves of them is measured, too.

    python -m benchmarks.training            # prints a table, writes benchmarks/results/training.json

Takes about ten minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks.machine import machine, with_rows
from benchmarks.transform_cost import decoder
from examples.documents import markdown

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the paper's networks stand beside its scripts
from paper.convnets import VGGSmall, resnet18_cifar
from paper.mixers import ConvMixer, MLPMixer
from paper.pointnet import PointNetClassification
from paper.transformers import TimeSeriesTransformer, ViT

RESULT = Path(__file__).parent / "results" / "training.json"
FORMS = ("float", "weight", "tile")
_EVERYTHING = {"min_size": 0}


@dataclass(frozen=True)
class Case:
    """A network to train.

    Attributes:
        build: makes it in float.
        shape: of its input, batch first.
        options: of the tiling, beside ``p``.
        goal: how many times faster than float ``latent="tile"`` shall be at ``p=4``.
        compiled: whether all forms run under ``torch.compile``.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any]
    goal: float = 1 / 1.02
    compiled: bool = False


def _small_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


def without_dropout(model: nn.Module) -> nn.Module:
    """A network whose dropout does nothing: drawing its random numbers takes the same time in every form."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


CASES = {
    "linear 2048, 512 tokens": Case(lambda: nn.Linear(2048, 2048), (512, 2048), _EVERYTHING, 2.5),
    "linear 2048, 32 tokens": Case(lambda: nn.Linear(2048, 2048), (32, 2048), _EVERYTHING),
    "conv 256 channels, 8 x 8, batch 32": Case(
        lambda: nn.Conv2d(256, 256, 3, padding=1, bias=False), (32, 256, 8, 8), _EVERYTHING, 2.2
    ),
    "MLP 784-128-10, batch 128": Case(_small_mlp, (128, 784), {}),
    "MLP 784-128-10, batch 128, compiled": Case(_small_mlp, (128, 784), {}, compiled=True),
    "ViT CIFAR, batch 32": Case(ViT, (32, 3, 32, 32), {}, 2.3),
    "ViT CIFAR without dropout, batch 32": Case(lambda: without_dropout(ViT()), (32, 3, 32, 32), {}, 2.3),
    "ResNet18 CIFAR, batch 16": Case(resnet18_cifar, (16, 3, 32, 32), {}, 1.6),
    "VGG-small, batch 16": Case(VGGSmall, (16, 3, 32, 32), {}),
    "decoder, width 256, 4 blocks, 8 x 128 tokens": Case(lambda: decoder(256, 4), (8, 128, 256), {}),
    "time series (Electricity), batch 32": Case(
        lambda: TimeSeriesTransformer(321, 512), (32, 96, 321), {"min_size": 32_000}
    ),
    "MLPMixer, batch 32": Case(MLPMixer, (32, 3, 32, 32), {}),
    "ConvMixer, batch 4": Case(ConvMixer, (4, 3, 32, 32), {}),
    "PointNet, batch 16": Case(PointNetClassification, (16, 3, 1024), {}),
}


def first_tensor(result: Any) -> Tensor:
    """The output of a network that may give more."""
    return result if isinstance(result, Tensor) else first_tensor(result[0])


class Step:
    """A training step of one network."""

    def __init__(self, model: nn.Module, x: Tensor, compiled: bool = False) -> None:
        self.model, self.x = model.train(), x
        self.forward: Callable[[Tensor], Any] = torch.compile(model) if compiled else model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)

    def __call__(self) -> None:
        """Forward, backward, update."""
        self.optimizer.zero_grad(set_to_none=True)
        first_tensor(self.forward(self.x)).square().mean().backward()
        self.optimizer.step()

    def state_bytes(self) -> int:
        """Parameters, gradients and momentum."""
        return 3 * sum(parameter.nbytes for parameter in self.model.parameters() if parameter.requires_grad)

    def kept_bytes(self) -> int:
        """What autograd keeps for the backward beside the parameters."""
        kept: dict[int, int] = {}
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            first_tensor(self.forward(self.x))
        return sum(kept.values())


def steps(case: Case, p: int) -> dict[str, Step]:
    """The step of each form of a network, all from the same weights."""
    torch.manual_seed(0)
    model, x = case.build(), torch.randn(case.shape)
    config = tbn.TilingConfig(p=p, **{"min_size": 64_000} | case.options)
    forms = {"float": model, "weight": tbn.transform(model, config)}
    forms["tile"] = tbn.transform(model, config.replace(latent="tile"))
    found = {}
    for name, form in forms.items():
        copy = case.build() if name == "float" else form
        found[name] = Step(copy, x, case.compiled)
    return found


def measure(name: str, p: int, repeats: int) -> dict[str, Any]:
    """One row: milliseconds, bytes and ratios of a network."""
    runs = steps(CASES[name], p)
    times: dict[str, list[float]] = {form: [] for form in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for form, run in runs.items():
            start = time.perf_counter()
            run()
            times[form].append(time.perf_counter() - start)
    row: dict[str, Any] = {"network": name, "p": p}
    for form, run in runs.items():
        row[form] = {
            "milliseconds": round(1e3 * statistics.median(times[form]), 2),
            "state_bytes": run.state_bytes(),
            "kept_bytes": run.kept_bytes(),
        }
    for form in FORMS[1:]:
        row[form]["speedup"] = round(
            statistics.median(first / second for first, second in zip(times["float"], times[form], strict=True)), 2
        )
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    header = ["network", "p", "float [ms]", "weight [ms]", "tile [ms]", "weight", "tile", "state", "kept"]
    lines = []
    for row in rows:
        times = [f"{row[form]['milliseconds']:.1f}" for form in FORMS]
        speedups = [f"{row[form]['speedup']:.2f}x" for form in FORMS[1:]]
        shares = [f"{row['tile'][what] / row['weight'][what]:.2f}" for what in ("state_bytes",)]
        shares.append(f"{row['tile']['kept_bytes'] / row['float']['kept_bytes']:.2f}")
        lines.append([row["network"], str(row["p"]), *times, *speedups, *shares])
    return markdown(header, lines)


def goals(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Which goals at ``p=4`` are met."""
    return {
        f"{row['network']}: {CASES[row['network']].goal:.2f}x": row["tile"]["speedup"] >= CASES[row["network"]].goal
        for row in rows
        if row["p"] == 4
    }


def main() -> int:
    """Measure and print everything, and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--case", choices=CASES, action="append", help="only this network, whose rows are replaced in the result file"
    )
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in arguments.case or CASES:
        for p in (4, 8):
            rows.append(measure(name, p, arguments.repeats))
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    print(table(rows))
    reached = goals(rows)
    print("\n".join(f"{goal}: {'met' if met else 'MISSED'}" for goal, met in reached.items()))
    found = machine(threads=1)
    rows = with_rows(RESULT, found, rows, lambda row: (row["network"], row["p"]))
    rows = sorted((row for row in rows if row["network"] in CASES), key=lambda row: list(CASES).index(row["network"]))
    RESULT.write_text(json.dumps({"machine": found, "rows": rows, "goals_met": goals(rows)}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
