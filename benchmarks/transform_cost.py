"""Time and memory that ``transform`` and ``lower`` take, over the number of parameters.

The model is a decoder (attention, gated MLP, RMS norm) of about 10 to 300 million
parameters, nearly all of them in linear layers, in two variants: one that ``torch.fx`` traces as a whole, and one
whose blocks take an optional mask, so that it is transformed part by part, as most published models are.

Each run has a process of its own: it transforms and lowers a tiny model first, so that code loaded on first use
is not counted, then builds, transforms and lowers the measured one. Memory is the highest resident size of the
process by then, less its resident size before the model was built, in multiples of the model's parameters: 1 is
the model, 2 is the model with one alpha source for each weight, and what exceeds 2 is temporary. Repetitions are
interleaved over all cases, and times are medians.

    python -m benchmarks.transform_cost            # prints a table, writes benchmarks/results/transform_cost.json

Needs Linux (``/proc``). Takes about two minutes and 3 GB of memory.
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
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks.machine import machine

RESULT = Path(__file__).parent / "results" / "transform_cost.json"
HEAD_SIZE = 64
# Width and number of blocks by size, and how often each is run.
SIZES = {"10M": (384, 6), "30M": (512, 10), "100M": (768, 14), "300M": (1024, 24)}
REPEATS = {"10M": 3, "30M": 3, "100M": 3, "300M": 1}
VARIANTS = ("whole", "parts")
STEPS = ("transform", "lower")
GOAL_SECONDS, GOAL_MEMORY = 20, 2.2


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

    def feed(self, x: Tensor) -> Tensor:
        """The gated MLP."""
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def forward(self, x: Tensor) -> Tensor:
        """The block without an optional argument: torch.fx traces it."""
        x = x + self.attend(self.norm1(x), None)
        return x + self.feed(self.norm2(x))


class MaskedBlock(Block):
    """The same block with an optional mask: torch.fx does not trace it, only the layers in it."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """One block."""
        x = x + self.attend(self.norm1(x), mask)
        return x + self.feed(self.norm2(x))


class Decoder(nn.Module):
    """A stack of blocks with a norm at the end."""

    def __init__(self, width: int, depth: int, block: type[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block(width) for _ in range(depth))
        self.norm = nn.RMSNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states ``[batch, length, width]`` after all blocks."""
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def build(variant: str, width: int, depth: int) -> nn.Module:
    """The decoder in one of the two variants."""
    return Decoder(width, depth, {"whole": Block, "parts": MaskedBlock}[variant])


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(variant: str, size: str) -> dict[str, Any]:
    """Transform and lower one model in this process; seconds, and peak memory in multiples of the parameters'."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = tbn.TilingConfig(p=4)
    tbn.lower(tbn.transform(build(variant, HEAD_SIZE, 1), config))
    before = _resident_bytes()
    model = build(variant, *SIZES[size])
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size_bytes = sum(parameter.nbytes for parameter in model.parameters())
    result: dict[str, Any] = {"parameters": parameters}
    current: Any = model
    for name, step in (("transform", lambda module: tbn.transform(module, config)), ("lower", tbn.lower)):
        start = time.perf_counter()
        current = step(current)
        result[f"{name}_seconds"] = time.perf_counter() - start
        result[f"{name}_memory"] = (_peak_bytes() - before) / size_bytes
    assert all(row.tiled for row in tbn.summary(current).layers)
    return result


def _measure_apart(variant: str, size: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.transform_cost", "--case", variant, size]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, Any] = json.loads(output)
    return result


def measure_all() -> list[dict[str, Any]]:
    """One row per variant and size: medians of the times, the largest peaks."""
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for repeat in range(max(REPEATS.values())):
        for size in SIZES:
            for variant in VARIANTS:
                if repeat < REPEATS[size]:
                    runs.setdefault((variant, size), []).append(_measure_apart(variant, size))
    rows = []
    for variant in VARIANTS:
        for size in SIZES:
            found = runs[variant, size]
            row = {"variant": variant, "parameters": found[0]["parameters"], "runs": len(found)}
            for step in STEPS:
                row[f"{step}_seconds"] = round(statistics.median(run[f"{step}_seconds"] for run in found), 3)
                row[f"{step}_memory"] = round(max(run[f"{step}_memory"] for run in found), 3)
            rows.append(row)
    return rows


def growth(rows: list[dict[str, Any]], step: str) -> float:
    """The exponent ``e`` of ``seconds ~ parameters**e``, by least squares on logarithms; 1 is linear."""
    x = [math.log(row["parameters"]) for row in rows]
    y = [math.log(row[f"{step}_seconds"]) for row in rows]
    return statistics.linear_regression(x, y).slope


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    titles = ["traced", "parameters", *(f"{step} {unit}" for step in STEPS for unit in ("[s]", "memory")), "runs"]
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)]]
    for row in rows:
        costs = [f"{row[f'{step}_{unit}']:.2f}" for step in STEPS for unit in ("seconds", "memory")]
        lines.append([row["variant"], f"{row['parameters'] / 1e6:.1f} M", *costs, str(row["runs"])])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Run one case, or all of them; the exit status says whether the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", nargs=2, metavar=("VARIANT", "SIZE"), help="measure one case in this process")
    case = parser.parse_args().case
    if case:
        print(json.dumps(measure(*case)))
        return 0
    rows = measure_all()
    slopes = {
        variant: {step: round(growth([row for row in rows if row["variant"] == variant], step), 2) for step in STEPS}
        for variant in VARIANTS
    }
    largest = max(rows, key=lambda row: row["parameters"])["parameters"]
    met = all(
        row[f"{step}_seconds"] < GOAL_SECONDS and row[f"{step}_memory"] < GOAL_MEMORY
        for row in rows
        if row["parameters"] == largest
        for step in STEPS
    )
    RESULT.parent.mkdir(exist_ok=True)
    result = {"machine": machine(threads=1), "rows": rows, "growth_exponents": slopes, "goal_met": met}
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))
    print(f"growth exponents of the time: {slopes}")
    goal = f"at {largest / 1e6:.0f} M parameters, each under {GOAL_SECONDS} s and {GOAL_MEMORY} times the parameters"
    print(f"goal ({goal}): {'met' if met else 'MISSED'}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
