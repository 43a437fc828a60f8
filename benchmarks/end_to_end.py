"""Whole networks on a CPU, one input at a time: tiled and compiled against float and compiled.

The paper's ViT (256 x 256 pixels, patches of 32, 1024 wide, 6 blocks, 16 heads, MLP 2048) and a ResNet18 (224 x 224),
1000 classes each, with random weights: time does not depend on them. Compared are

- the float network under ``torch.compile``,
- the tiled network, lowered, under ``torch.compile(backend="tbn")``,
- the same with int8 activations (``options={"activation": "int8"}``).

All run in one process on the same input, in turn, after they were compiled; times are medians over all turns, and the
spread is that of the middle half. Before that, the tiled result is compared with the lowered module in eager mode.

    python -m benchmarks.end_to_end               # prints a table, writes benchmarks/results/end_to_end.json

Compiling takes a minute or two, measuring one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks.machine import machine
from benchmarks.models import ViT, resnet18

RESULT = Path(__file__).parent / "results" / "end_to_end.json"


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"vit": (ViT, 256), "resnet18": (resnet18, 224)}


def variants(model: nn.Module, p: int, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The compiled forms of a model by name, each called once."""
    packed = tbn.lower(tbn.transform(model, tbn.TilingConfig(p=p)))
    with torch.no_grad():
        expected = packed(x)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "float": torch.compile(model),
        "tiled": torch.compile(packed, backend="tbn"),
        "tiled, int8": torch.compile(packed, backend="tbn", options={"activation": "int8"}),
    }
    results = {name: run(x) for name, run in found.items()}
    # Rounding adds up over the layers: about 1e-6 in float32, and int8 keeps two digits.
    for name, tolerance in (("tiled", 1e-4), ("tiled, int8", 0.2)):
        error = float((results[name] - expected).abs().max() / expected.abs().max())
        if not error < tolerance:
            raise SystemExit(f"{name}: relative error {error:.1e} against the lowered module")
    return found


def measure(name: str, p: int, turns: int) -> dict[str, Any]:
    """Time all variants of one model in turn."""
    torch.manual_seed(0)
    build, size = MODELS[name]
    model, x = build().eval(), torch.randn(1, 3, size, size)
    runs = variants(model, p, x)
    times: dict[str, list[float]] = {variant: [] for variant in runs}
    for turn in range(turns + 2):
        for variant, run in runs.items():
            start = time.perf_counter()
            run(x)
            elapsed = time.perf_counter() - start
            if turn >= 2:  # the first turns fill the caches
                times[variant].append(elapsed * 1e3)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result: dict[str, Any] = {"model": name, "parameters": parameters, "p": p, "turns": turns}
    for variant, found in times.items():
        low, median, high = statistics.quantiles(found, n=4)
        row = {"median_ms": round(median, 3), "quartiles_ms": [round(low, 3), round(high, 3)]}
        result[variant] = row | {"speedup": round(statistics.median(times["float"]) / median, 2)}
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| model | form | median [ms] | middle half [ms] | against float |", "|---|---|---:|---:|---:|"]
    for row in rows:
        for variant in ("float", "tiled", "tiled, int8"):
            found = row[variant]
            low, high = found["quartiles_ms"]
            times = f"{found['median_ms']:.2f} | {low:.2f} to {high:.2f} | {found['speedup']:.2f}x"
            lines.append(f"| {row['model']}, p = {row['p']} | {variant} | {times} |")
    return "\n".join(lines)


@torch.no_grad()
def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    parser.add_argument("--p", type=int, default=4, help="copies of each tile (default 4)")
    parser.add_argument("--turns", type=int, default=100, help="default 100")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(name, arguments.p, arguments.turns) for name in arguments.model or MODELS]
    if not arguments.model:
        RESULT.parent.mkdir(exist_ok=True)
        result = {"machine": machine(threads=arguments.threads), "rows": rows}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
