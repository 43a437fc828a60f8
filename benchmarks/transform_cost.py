"""Time and memory that ``transform`` and ``lower`` take: for each layer, and over the number of parameters.

Both work layer by layer. Where weights are small, what Python does for a layer is all there is, and layers are what
counts: the MLPs, of 64 and 512 linears. Where weights are large, drawing alpha sources and packing tiles is: the
decoders, of about 10 to 300 million parameters. Between the two stand a ResNet18, whose convolutions have many shapes,
and an encoder of PyTorch's own layers, whose attentions are taken apart.

Each run has a process of its own: it transforms and lowers one layer first, so that code loaded on first use is not
counted, then builds, transforms and lowers the measured model. Memory is the highest resident size of the process by
then, less its resident size before the model was built, in multiples of the model's parameters: 1 is the model, 2 is
the model with one alpha source for each weight, and what exceeds 2 is temporary, or what a layer's graph takes.
Repetitions are interleaved over all models, times are medians, and memory is the largest.

    python -m benchmarks.transform_cost            # prints a table, writes benchmarks/results/transform_cost.json

Needs Linux (``/proc``). Takes about a minute and a half and 3 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks.machine import machine
from benchmarks.models import resnet18
from examples.documents import markdown

RESULT = Path(__file__).parent / "results" / "transform_cost.json"
CONFIG = tbn.TilingConfig(p=4, min_size=64_000)
HEAD_SIZE = 64
STEPS = ("transform", "lower")
# For each layer where weights are small; for the largest model.
GOAL_MILLISECONDS, GOAL_SECONDS, GOAL_MEMORY = 1.5, 20, 2.2


class Block(nn.Module):
    """A decoder block of about ``12 width**2`` weights, on ``[batch, length, width]``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = 8 * width // 3 // 64 * 64
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Attention to the positions that ``mask`` adds nothing to, or to the earlier ones without it."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, HEAD_SIZE)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None)
        return self.out(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """One block."""
        x = x + self.attend(self.norm1(x), mask)
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def mlp(depth: int, width: int = 128) -> nn.Sequential:
    """Linear layers with a function behind each."""
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())))


def decoder(width: int, depth: int) -> nn.Sequential:
    """A stack of blocks with a norm at the end; nearly all its parameters are in linear layers."""
    return nn.Sequential(*(Block(width) for _ in range(depth)), nn.RMSNorm(width))


def encoder(width: int, depth: int) -> nn.TransformerEncoder:
    """A stack of PyTorch's own encoder layers."""
    layer = nn.TransformerEncoderLayer(width, width // HEAD_SIZE, 4 * width, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


@dataclass(frozen=True)
class Model:
    """A model to measure.

    Attributes:
        build: makes it.
        runs: how often it is measured.
        small_weights: what Python does for a layer is all there is.
        grows: one of those over whose parameters the growth of the time is told.
    """

    build: Callable[[], nn.Module]
    runs: int = 3
    small_weights: bool = False
    grows: bool = False


MODELS = {
    "MLP, 64 layers": Model(lambda: mlp(64), small_weights=True),
    "MLP, 512 layers": Model(lambda: mlp(512), small_weights=True),
    "ResNet18": Model(resnet18),
    "encoder, 12 layers": Model(lambda: encoder(384, 12)),
    "decoder, 6 blocks": Model(lambda: decoder(384, 6), grows=True),
    "decoder, 14 blocks": Model(lambda: decoder(768, 14), runs=2, grows=True),
    "decoder, 24 blocks": Model(lambda: decoder(1024, 24), runs=1, grows=True),
}


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(build: Callable[[], nn.Module]) -> dict[str, Any]:
    """Transform and lower one model in this process.

    Returns:
        The numbers of parameters and of layers, all tiled, and for each step the seconds and the peak memory in
        multiples of the parameters'.
    """
    torch.manual_seed(0)
    tbn.lower(tbn.transform(mlp(1), CONFIG))
    before = _resident_bytes()
    model = build()
    size_bytes = sum(parameter.nbytes for parameter in model.parameters())
    result: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    current: Any = model
    for name, step in (("transform", lambda module: tbn.transform(module, CONFIG)), ("lower", tbn.lower)):
        start = time.perf_counter()
        current = step(current)
        result[f"{name}_seconds"] = time.perf_counter() - start
        result[f"{name}_memory"] = (_peak_bytes() - before) / size_bytes
    layers = tbn.summary(current).layers
    assert all(layer.tiled for layer in layers)
    return {**result, "layers": len(layers)}


def _measure_apart(name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.transform_cost", "--case", name]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def measure_all() -> list[dict[str, Any]]:
    """One row for each model."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in MODELS}
    for repeat in range(max(model.runs for model in MODELS.values())):
        for name, model in MODELS.items():
            if repeat < model.runs:
                found[name].append(_measure_apart(name))
    return [summarise(name, runs) for name, runs in found.items()]


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The runs of one model as a row: medians of the times, the largest peaks."""
    row = {"model": name, "layers": runs[0]["layers"], "parameters": runs[0]["parameters"], "runs": len(runs)}
    for step in STEPS:
        seconds = statistics.median(run[f"{step}_seconds"] for run in runs)
        row[f"{step}_seconds"] = round(seconds, 3)
        row[f"{step}_milliseconds_a_layer"] = round(1e3 * seconds / row["layers"], 2)
        row[f"{step}_memory"] = round(max(run[f"{step}_memory"] for run in runs), 3)
    return row


def growth(rows: list[dict[str, Any]], step: str) -> float:
    """The exponent ``e`` of ``seconds ~ parameters**e``, by least squares on logarithms; 1 is linear."""
    x = [math.log(row["parameters"]) for row in rows]
    y = [math.log(row[f"{step}_seconds"]) for row in rows]
    return statistics.linear_regression(x, y).slope


def goals(rows: list[dict[str, Any]]) -> dict[str, bool]:
    """Which goals are met."""
    small = [row for row in rows if MODELS[row["model"]].small_weights]
    largest = max(rows, key=lambda row: row["parameters"])
    size = f"{largest['parameters'] / 1e6:.0f} M parameters"
    return {
        f"under {GOAL_MILLISECONDS} ms a layer where weights are small": all(
            row[f"{step}_milliseconds_a_layer"] < GOAL_MILLISECONDS for row in small for step in STEPS
        ),
        f"under {GOAL_SECONDS} s at {size}": all(largest[f"{step}_seconds"] < GOAL_SECONDS for step in STEPS),
        f"under {GOAL_MEMORY} times the parameters at {size}": all(
            largest[f"{step}_memory"] < GOAL_MEMORY for step in STEPS
        ),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    titles = ["model", "layers", "parameters", "runs"]
    titles += [f"{step} {unit}" for step in STEPS for unit in ("[s]", "[ms a layer]", "memory")]
    lines = []
    for row in rows:
        costs = [
            f"{row[f'{step}_{unit}']:.2f}" for step in STEPS for unit in ("seconds", "milliseconds_a_layer", "memory")
        ]
        lines.append([row["model"], str(row["layers"]), f"{row['parameters'] / 1e6:.1f} M", str(row["runs"]), *costs])
    return markdown(titles, lines)


def main() -> int:
    """Run one model, or all of them; the exit status says whether the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", choices=MODELS, help="measure one model in this process")
    case = parser.parse_args().case
    if case:
        torch.set_num_threads(1)
        print(json.dumps(measure(MODELS[case].build)))
        return 0
    rows = measure_all()
    growing = [row for row in rows if MODELS[row["model"]].grows]
    slopes = {step: round(growth(growing, step), 2) for step in STEPS}
    reached = goals(rows)
    RESULT.parent.mkdir(exist_ok=True)
    result = {"machine": machine(threads=1), "rows": rows, "growth_exponents": slopes, "goals_met": reached}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))
    print(f"growth exponents of the time: {slopes}")
    print("\n".join(f"{goal}: {'met' if met else 'MISSED'}" for goal, met in reached.items()))
    return 0 if all(reached.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
