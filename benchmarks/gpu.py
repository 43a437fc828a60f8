"""Tiled layers on a GPU: linear layers against cuBLAS and low-bit formats, convolutions against cuDNN, memory.

    python -m benchmarks.gpu                       # everything, under 8 minutes; writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --only conv memory    # parts
    python -m benchmarks.gpu --docs                # tables of the result file, into docs/gpu.md

Every timed kernel is compared with a float32 product first. Times are medians with a cold second-level cache, with and
without a CUDA graph. Configurations are tuned in the warm-up and kept in the user's cache folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks import gpu_peers, memory
from tbn_compiler.backends.triton import info

RESULT = Path(__file__).parent / "results" / "gpu.json"
SECONDS = 440

SHAPES = [(512, 2048), (1024, 4096), (4096, 4096), (14336, 4096), (28672, 8192)]  # out x in
BATCHES = (1, 16, 256, 4096)
TILINGS = (4, 8)
CONVS = [(64, 56), (128, 28), (256, 14), (512, 7)]  # channels, image size of the 3x3 layers of a ResNet
IMAGES = (1, 32, 256)

# Of an H200: what a copy and a bf16 matrix product reach, and what a launch inside a graph takes.
BYTES_PER_US = 4.3e6
FLOP_PER_US = 790e6
LAUNCH_US = 2.5

# Norm of the error over the norm of the result: bf16 operands and one rounding of the result.
TOLERANCE = 1e-2


class Times(Protocol):
    """What measures: microseconds of a call, launched by Python or from a graph."""

    def eager(self, run: Callable[[], object]) -> float:
        """Launched by Python."""

    def graph(self, run: Callable[[], object]) -> float:
        """Launched by a CUDA graph."""


def limit(m: int, n: int, batch: int, p: int, itemsize: int = 2) -> float:
    """The largest possible speed-up over a dense layer: both at the limits of the machine.

    Time is the largest of moving the weights once, multiplying, and a launch.
    """

    def least(weight_bytes: float, flop: float) -> float:
        moved = weight_bytes + itemsize * batch * (m + n)
        return max(moved / BYTES_PER_US, flop / FLOP_PER_US, LAUNCH_US)

    flop = 2.0 * m * n * batch
    return least(itemsize * m * n, flop) / least(m * n / p / 8, flop / p)


def goal(m: int, n: int, batch: int, p: int) -> float | None:
    """The speed-up over cuBLAS, inside a graph, that is aimed at; ``None``: none is set."""
    if m * n < 4096 * 4096:
        return None
    if batch >= 256:
        return 0.8 * p
    return 0.7 * limit(m, n, batch, p) if batch == 1 else None


def random_tile(numel: int, device: torch.device) -> Tensor:
    """A random packed tile of ``numel`` bits, a multiple of 8."""
    return torch.randint(0, 256, (numel // 8,), dtype=torch.uint8, device=device)


def unpacked(tile: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Its +1 and -1."""
    result: Tensor = torch.ops.tbn.unpack_bits(tile, numel, dtype=dtype)
    return result


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; NaN if either has one."""
    return float((got.float() - expected).norm() / expected.norm())


def linear_row(
    m: int, n: int, batch: int, p: int, times: Times, device: torch.device, dense: Mapping[str, float]
) -> dict[str, Any]:
    """One tiled layer beside the times of the dense one."""
    x = torch.randn(batch, n, dtype=torch.bfloat16, device=device)
    tile, alpha = random_tile(m * n // p, device), torch.rand(p, device=device) + 0.5

    def run() -> Tensor:
        result: Tensor = torch.ops.tbn.linear(x, tile, alpha, None, n, m, p)
        return result

    unique = x.float() @ unpacked(tile, m * n // p, torch.float32).view(m // p, n).t()
    expected = (unique.unsqueeze(1) * alpha.view(1, p, 1)).flatten(1)
    row: dict[str, Any] = {"out": m, "in": n, "batch": batch, "p": p, "error": error(run(), expected)}
    del unique, expected
    row |= {"graph_us": times.graph(run), "eager_us": times.eager(run)}
    row["speedup_graph"] = dense["graph_us"] / row["graph_us"]
    row["speedup_eager"] = dense["eager_us"] / row["eager_us"]
    row |= {"limit": limit(m, n, batch, p), "goal": goal(m, n, batch, p)}
    return row


def dense_times(m: int, n: int, batch: int, times: Times, device: torch.device) -> dict[str, Any]:
    """Times of cuBLAS in bf16, and of the peers that are installed."""
    x = torch.randn(batch, n, dtype=torch.bfloat16, device=device)
    weight = torch.randn(m, n, dtype=torch.bfloat16, device=device)
    found: dict[str, Any] = {"out": m, "in": n, "batch": batch}
    found["graph_us"] = times.graph(lambda: F.linear(x, weight))
    found["eager_us"] = times.eager(lambda: F.linear(x, weight))
    for name in gpu_peers.PEERS:
        layer = gpu_peers.make(name, weight)
        if isinstance(layer, str):
            found[name] = layer
            continue
        try:
            found[name] = times.graph(lambda layer=layer: layer(x))  # type: ignore[misc]
        except RuntimeError as failure:
            found[name] = f"{type(failure).__name__}: {failure}"
    return found


def conv_row(
    channels: int, size: int, images: int, p: int, times: Times, device: torch.device, dense: float
) -> dict[str, Any]:
    """One 3x3 convolution beside the time of cuDNN's; the better of both memory formats."""
    numel = channels * channels * 9
    tile, alpha = random_tile(numel // p, device), torch.rand(p, device=device) + 0.5
    weight = unpacked(tile, numel // p, torch.float32).repeat(p).view(p, -1) * alpha[:, None]
    x = torch.randn(images, channels, size, size, dtype=torch.bfloat16, device=device)
    row: dict[str, Any] = {"channels": channels, "size": size, "images": images, "p": p}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = F.conv2d(x[:4].float(), weight.view(channels, channels, 3, 3), padding=1)
    sizes = (channels, channels, (3, 3), p)
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = x.to(memory_format=memory_format)
        got = torch.ops.tbn.conv2d(y, tile, alpha, None, *sizes, padding=(1, 1))
        results.append(error(got[:4], expected))
        us = times.graph(lambda y=y: torch.ops.tbn.conv2d(y, tile, alpha, None, *sizes, padding=(1, 1)))  # type: ignore[misc]
        row["graph_us"] = min(us, row.get("graph_us", us))
    row["error"] = max(results)
    row["speedup_graph"] = dense / row["graph_us"]
    flop = 2.0 * numel * images * size * size
    moved = 2.0 * (numel + 2 * images * channels * size * size)
    row["compute_bound"] = flop / FLOP_PER_US > moved / BYTES_PER_US
    row["goal"] = 0.7 * p if row["compute_bound"] else None
    return row


def conv_dense(channels: int, size: int, images: int, times: Times, device: torch.device) -> float:
    """Time of cuDNN in bf16, in the better of both memory formats, its own search on."""
    x = torch.randn(images, channels, size, size, dtype=torch.bfloat16, device=device)
    weight = torch.randn(channels, channels, 3, 3, dtype=torch.bfloat16, device=device)
    found = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            y, w = x.to(memory_format=memory_format), weight.to(memory_format=memory_format)
            found.append(times.graph(lambda y=y, w=w: F.conv2d(y, w, padding=1)))  # type: ignore[misc]
    return min(found)


def memory_row(model: str, column: str) -> dict[str, Any]:
    """Peak of the allocator for one inference on the GPU, everything that the model holds included."""
    module: nn.Module = memory.MODELS[model][0]().eval()
    config = memory.CONFIGS[column]
    if config is not None:
        module = tbn.lower(tbn.transform(module, config)).eval()
    inputs = torch.randn(memory.MODELS[model][1])
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    module = module.cuda()
    parameters = torch.cuda.memory_allocated() - before
    x = inputs.cuda()
    with torch.no_grad():
        module(x)  # tunes, and lets the libraries take their workspaces
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before - parameters - x.nbytes
        torch.cuda.reset_peak_memory_stats()
        module(x)
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    row = {"model": model, "column": column, "parameters": parameters, "peak": peak, "library_workspaces": kept}
    return row | {"counted_peak": memory.account_model(model, column).peak}


def machine() -> dict[str, Any]:
    """GPU, driver and versions."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    found = info()
    return {
        "gpu": found.device,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": found.torch,
        "triton": found.triton,
        "kernels": found.kernels,
        "date": date.today().isoformat(),
    }


class Deadline:
    """Says when to leave the rest out, and keeps what was left out."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds
        self.left_out: list[str] = []

    def passed(self, what: str) -> bool:
        """Whether the time is over; then ``what`` is noted."""
        if self._clock() < self._end:
            return False
        self.left_out.append(what)
        return True


def run_linear(
    times: Times, device: torch.device, deadline: Deadline, shapes: Sequence[tuple[int, int]] = SHAPES
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Tiled layers, and dense ones with the peers."""
    rows, dense_rows = [], []
    for m, n in sorted(shapes, reverse=True):  # the largest have the goals
        for batch in BATCHES:
            if deadline.passed(f"linear {m}x{n} batch {batch}"):
                continue
            dense = dense_times(m, n, batch, times, device)
            dense_rows.append(dense)
            rows += [linear_row(m, n, batch, p, times, device, dense) for p in TILINGS]
    return rows, dense_rows


def run_conv(
    times: Times, device: torch.device, deadline: Deadline, convs: Sequence[tuple[int, int]] = CONVS
) -> list[dict[str, Any]]:
    """3x3 convolutions."""
    rows = []
    for channels, size in convs:
        for images in IMAGES:
            if deadline.passed(f"conv {channels} channels, {images} images"):
                continue
            dense = conv_dense(channels, size, images, times, device)
            rows += [conv_row(channels, size, images, p, times, device, dense) for p in TILINGS]
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table, a column for each key."""

    def text(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.2g}" if abs(value) < 0.01 else f"{value:.2f}" if value < 100 else f"{value:.0f}"
        return str(value)

    titles = list(rows[0])
    lines = [titles, ["---:"] * len(titles), *([text(row[title]) for title in titles] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(result: Mapping[str, Any]) -> dict[str, str]:
    """The tables of a result, by their names in docs/gpu.md."""
    found = {name: markdown(result[name]) for name in ("linear", "dense", "conv") if result.get(name)}
    if result.get("memory"):
        peaks = {row["column"]: row["peak"] / memory.MIB for row in result["memory"] if row["model"] == "ViT"}
        found["memory"] = memory.table(peaks, "ViT, measured [MiB]")
    return found


def misses(result: Mapping[str, Any]) -> list[str]:
    """Goals that a result does not meet, wrong results first."""
    rows = [*result.get("linear", ()), *result.get("conv", ())]
    wrong = [f"WRONG RESULT ({row['error']:.2g}): {row}" for row in rows if not row["error"] <= TOLERANCE]
    slow = [
        f"{row['speedup_graph']:.2f} of {row['goal']:.2f}: "
        + ", ".join(f"{key} {row[key]}" for key in ("out", "in", "batch", "channels", "images", "p") if key in row)
        for row in rows
        if row["goal"] is not None and row["speedup_graph"] < row["goal"]
    ]
    above = [
        f"{row['column']}: peak {row['peak'] / memory.MIB:.1f} MiB, paper {memory.PAPER[row['column']][0]}"
        for row in result.get("memory", ())
        if row["model"] == "ViT" and row["peak"] / memory.MIB > memory.PAPER[row["column"]][0]
    ]
    return wrong + slow + above


def fill_document(result: Mapping[str, Any], document: str) -> str:
    """``document`` with the tables of a result between ``<!-- table: NAME -->`` and ``<!-- end -->``."""
    for name, table in tables(result).items():
        document = memory.fill(document, f"table: {name}", table)
    device = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    return memory.fill(document, "machine", f"Measured: {device}.")


def main() -> int:
    """Run the parts; exit status 1 if a result is wrong or a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parts = ("memory", "linear", "conv")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts, help="parts to run")
    parser.add_argument("--output", type=Path, default=RESULT, help="result file")
    parser.add_argument("--docs", action="store_true", help="only fill docs/gpu.md from the result file")
    arguments = parser.parse_args()
    if arguments.docs:
        document = memory.DOCUMENT.read_text()
        memory.DOCUMENT.write_text(fill_document(json.loads(arguments.output.read_text()), document))
        return 0
    if not torch.cuda.is_available():
        print("no GPU: nothing measured (python -m benchmarks.memory counts memory without one)", file=sys.stderr)
        return 2
    from benchmarks.gpu_timing import Timer

    device, times, deadline = torch.device("cuda"), Timer(), Deadline(SECONDS)
    result: dict[str, Any] = {"machine": machine()}
    if "memory" in arguments.only:
        result["memory"] = [memory_row(model, column) for model in memory.MODELS for column in memory.CONFIGS]
    if "linear" in arguments.only:
        result["linear"], result["dense"] = run_linear(times, device, deadline)
    if "conv" in arguments.only:
        result["conv"] = run_conv(times, device, deadline)
    result["left_out"] = deadline.left_out
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for name, table in tables(result).items():
        print(f"\n{name}\n{table}")
    for line in (missed := misses(result)):
        print(f"missed: {line}")
    for line in deadline.left_out:
        print(f"left out, no time: {line}")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
