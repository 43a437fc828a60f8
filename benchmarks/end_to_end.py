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
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks.transform_cost import machine

RESULT = Path(__file__).parent / "results" / "end_to_end.json"


class Attention(nn.Module):
    """Multi-head self-attention on ``[batch, length, width]`` with one layer for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to all positions."""
        q, k, v = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """The ViT that the paper trains on ImageNet; classifies by the first token."""

    def __init__(
        self, size: int = 256, patch: int = 32, width: int = 1024, depth: int = 6, heads: int = 16, hidden: int = 2048
    ) -> None:
        super().__init__()
        self.patch = patch
        self.embed = nn.Linear(3 * patch * patch, width)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(EncoderBlock(width, heads, hidden) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 1000)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[batch, 1000]`` of images ``[batch, 3, size, size]``."""
        rows = image.unfold(2, self.patch, self.patch).unfold(3, self.patch, self.patch)
        x = self.embed(rows.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2))
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class BasicBlock(nn.Module):
    """The residual block of ResNet18."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions and the shortcut."""
        return F.relu(self.layers(x) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet18 for images ``[batch, 3, 224, 224]``."""
    stem = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = (64, 64, 128, 256, 512)
    blocks = [
        block
        for stage, (inputs, outputs) in enumerate(itertools.pairwise(widths))
        for block in (BasicBlock(inputs, outputs, 2 if stage else 1), BasicBlock(outputs, outputs, 1))
    ]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"vit": (VisionTransformer, 256), "resnet18": (resnet18, 224)}


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
        result = {"machine": machine() | {"threads": arguments.threads}, "rows": rows}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
