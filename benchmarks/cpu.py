"""Tiled layers on the CPU against every other format that a user of PyTorch has, whole operator calls.

    python -m benchmarks.cpu                    # prints tables, writes benchmarks/results/cpu.json
    python -m benchmarks.cpu --only conv --seconds 1

One process. In each case all candidates run in turn, round after round, so that a change of the machine's speed meets
all of them; a round of a candidate repeats it for at least 2 ms. Medians over the rounds, and the distance between the
quartiles in per cent of the median. What is timed is checked first: the tiled layers against the reference.

Linear layers, all without bias, on ``[batch, in]``:

- ``fp32``, ``bf16``: ``F.linear`` with the dense weight, inputs in that format.
- ``int8``: PyTorch's dynamically quantised layer (weights and activations of 8 bits).
- ``ort 4-bit``: ONNX Runtime's ``MatMulNBits``, blocks of 32, ``accuracy_level`` 4 (activations of 8 bits).
- ``unique fp32``, ``unique int8``: the stock kernels on the different rows of the tile, decoded beforehand, and the
  result replicated with the alphas.
- ``tiled fp32``, ``tiled int8``: ``tbn::linear`` with float32 activations, and with ``activation="int8"``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import machine
from tbn_compiler.backends import cpu
from tbn_compiler.ops import reference
from tbn_compiler.packing import pack_bits

RESULT = Path(__file__).parent / "results" / "cpu.json"
SIZES = [(512, 2048), (1024, 4096), (4096, 4096)]  # out x in
BATCHES = [1, 64, 512]
COPIES = [1, 2, 4, 8, 16]
THREADS = [1, 2]
CONVS = [(256, 14), (128, 28), (512, 7)]  # channels, height and width
MIN_ROUNDS, MAX_ROUNDS, ROUND_SECONDS = 7, 51, 0.002

# (batch, goal against fp32, int8, ort 4-bit) for 4096 x 4096, p = 4, one thread; and for the convolutions.
LINEAR_GOALS = {1: (60, 12, 4), 64: (15, 2.5, 4)}
CONV_GOAL = 3.5

Candidates = dict[str, Callable[[], Any]]
Row = dict[str, Any]


def interleaved(candidates: Candidates, seconds: float) -> dict[str, tuple[float, float]]:
    """Median microseconds and quartile distance in per cent of each candidate, in ``seconds`` or a few rounds."""
    repeats = {}
    for name, call in candidates.items():
        call()
        start = time.perf_counter()
        call()
        repeats[name] = max(1, round(ROUND_SECONDS / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() > end:
            break
        for name, call in candidates.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                call()
            times[name].append((time.perf_counter() - start) / repeats[name] * 1e6)
    result = {}
    for name, found in times.items():
        low, median, high = statistics.quantiles(found, n=4)
        result[name] = (median, 100 * (high - low) / median)
    return result


def quantized_linear(weight: Tensor) -> torch.nn.Module:
    """PyTorch's dynamically quantised layer."""
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of a package of its own; still what PyTorch ships
        quantize = torch.ao.quantization.quantize_dynamic
        result: torch.nn.Module = quantize(torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8)[0]
    return result


def matmul_4_bits(rows: int, columns: int, threads: int) -> onnxruntime.InferenceSession:
    """A graph of one ``MatMulNBits`` on random weights: input ``x [batch, columns]``."""
    block, rng = 32, np.random.default_rng(0)
    weight = rng.integers(0, 256, (rows, columns // block, block // 2), dtype=np.uint8)
    scales = rng.random(rows * columns // block, dtype=np.float32)
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "weight", "scales"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=block, accuracy_level=4,
    )  # fmt: skip
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node],
        "matmul_4_bits",
        [value("x", onnx.TensorProto.FLOAT, ["batch", columns])],
        [value("y", onnx.TensorProto.FLOAT, ["batch", rows])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(scales, "scales")],
    )
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def replicate(z: Tensor, alpha: Tensor) -> Tensor:
    """The outputs of all copies from those of the different rows."""
    return (z.unsqueeze(-2) * alpha.unsqueeze(-1)).flatten(-2)


def linear_candidates(rows: int, columns: int, p: int, batch: int, threads: int, peers: bool) -> Candidates:
    """All formats of one layer, checked; the dense ones only if ``peers``."""
    weight, x = torch.randn(rows // p, columns), torch.randn(batch, columns)
    tile, alpha = pack_bits(weight), torch.rand(p) + 0.5
    unique = torch.where(weight > 0, 1.0, -1.0)
    dense = unique.repeat(p, 1) * alpha.repeat_interleave(rows // p)[:, None]
    args = (x, tile, alpha, None, columns, rows, p)
    op = torch.ops.tbn.linear.default
    exact = F.linear(x.double(), dense.double())
    bound = torch.finfo(torch.float32).eps * columns * F.linear(x.abs(), dense.abs())
    assert bool(((op(*args) - exact).abs() <= bound).all()), "the float32 kernel is wrong"
    assert torch.equal(op(*args, activation="int8"), reference.linear(*args, activation="int8")), "int8 is wrong"
    unique_int8 = quantized_linear(unique)
    candidates: Candidates = {
        "unique fp32": lambda: replicate(F.linear(x, unique), alpha),
        "unique int8": lambda: replicate(unique_int8(x), alpha),
        "tiled fp32": lambda: op(*args),
        "tiled int8": lambda: op(*args, activation="int8"),
    }
    if not peers:
        return candidates
    half, half_x = dense.bfloat16(), x.bfloat16()
    int8, session, array = quantized_linear(dense), matmul_4_bits(rows, columns, threads), x.numpy()
    return {
        "fp32": lambda: F.linear(x, dense),
        "bf16": lambda: F.linear(half_x, half),
        "int8": lambda: int8(x),
        "ort 4-bit": lambda: session.run(None, {"x": array}),
        **candidates,
    }


def conv_candidates(channels: int, size: int, p: int) -> Candidates:
    """A 3x3 convolution of one image, padding 1: PyTorch, PyTorch on the different filters, and the tiled ones."""
    weight, x = torch.randn(channels // p, channels, 3, 3), torch.randn(1, channels, size, size)
    tile, alpha = pack_bits(weight), torch.rand(p) + 0.5
    unique = torch.where(weight > 0, 1.0, -1.0)
    dense = unique.repeat(p, 1, 1, 1) * alpha.repeat_interleave(channels // p).view(-1, 1, 1, 1)
    args = (x, tile, alpha, None, channels, channels, [3, 3], p)
    op = torch.ops.tbn.conv2d.default
    exact = F.conv2d(x.double(), dense.double(), padding=1)
    bound = torch.finfo(torch.float32).eps * 9 * channels * F.conv2d(x.abs(), dense.abs(), padding=1)
    assert bool(((op(*args, padding=[1, 1]) - exact).abs() <= bound).all()), "the float32 kernel is wrong"
    expected = reference.KERNELS["conv2d"](*args, padding=[1, 1], activation="int8")
    assert torch.equal(op(*args, padding=[1, 1], activation="int8"), expected), "int8 is wrong"

    def on_unique() -> Tensor:
        z = F.conv2d(x, unique, padding=1)
        return (z.unsqueeze(1) * alpha.view(-1, 1, 1, 1)).flatten(1, 2)

    return {
        "fp32": lambda: F.conv2d(x, dense, padding=1),
        "unique fp32": on_unique,
        "tiled fp32": lambda: op(*args, padding=[1, 1]),
        "tiled int8": lambda: op(*args, padding=[1, 1], activation="int8"),
    }


def linear_cases() -> Iterator[Row]:
    """Sizes, batches and threads with all peers, then the number of copies."""
    for threads in THREADS:
        for rows, columns in SIZES:
            for batch in BATCHES:
                yield {"out": rows, "in": columns, "p": 4, "batch": batch, "threads": threads, "peers": True}


def copies_cases() -> Iterator[Row]:
    """The number of copies, one thread."""
    for rows, columns in SIZES:
        for batch in BATCHES[:2]:
            for p in COPIES:
                yield {"out": rows, "in": columns, "p": p, "batch": batch, "threads": 1, "peers": False}


def measure(case: Row, seconds: float) -> Row:
    """One case with its times."""
    torch.manual_seed(0)
    torch.set_num_threads(case["threads"])
    if "channels" in case:
        candidates = conv_candidates(case["channels"], case["size"], case["p"])
    else:
        size = (case["out"], case["in"], case["p"], case["batch"], case["threads"])
        candidates = linear_candidates(*size, case["peers"])
    with torch.inference_mode():
        times = interleaved(candidates, seconds)
    row = {key: value for key, value in case.items() if key != "peers"}
    row["us"] = {name: round(median, 2) for name, (median, _) in times.items()}
    row["spread_percent"] = {name: round(spread, 1) for name, (_, spread) in times.items()}
    return row


def goals(rows: dict[str, list[Row]]) -> list[Row]:
    """What was to be reached, and what was: how many times faster the best tiled format is."""
    found = []

    def compare(what: str, row: Row, tiled: str, peer: str, goal: float) -> None:
        ratio = round(row["us"][peer] / row["us"][tiled], 2)
        found.append({"what": what, "tiled": tiled, "peer": peer, "times": ratio, "goal": goal, "met": ratio >= goal})

    for row in rows.get("linear", []):
        if row["threads"] != 1:
            continue
        where = f"{row['out']} x {row['in']}, batch {row['batch']}"
        if (row["out"], row["in"]) == SIZES[-1] and row["batch"] in LINEAR_GOALS:
            for peer, goal in zip(("fp32", "int8", "ort 4-bit"), LINEAR_GOALS[row["batch"]], strict=True):
                for tiled in ("tiled fp32", "tiled int8"):
                    compare(where, row, tiled, peer, goal)
        if row["batch"] == BATCHES[-1]:
            compare(where, row, "tiled fp32", "unique fp32", 1.0)
    for row in rows.get("conv", []):
        compare(f"3x3, {row['channels']} channels {row['size']}x{row['size']}", row, "tiled fp32", "fp32", CONV_GOAL)
    return found


def show(console: Console, title: str, rows: list[Row]) -> None:
    """Print a table: microseconds, and the spread in per cent behind them."""
    keys = [key for key in rows[0] if key not in ("us", "spread_percent")]
    table = Table(title=f"{title}: median us (quartile distance in %)")
    for key in (*keys, *rows[0]["us"]):
        table.add_column(key, justify="right")
    for row in rows:
        times = [f"{us:,.1f} ({row['spread_percent'][name]:.0f})" for name, us in row["us"].items()]
        table.add_row(*(str(row[key]) for key in keys), *times)
    console.print(table)


def main() -> None:
    """Run the cases that are asked for, print them, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--only", choices=["linear", "copies", "conv"], help="one part; the result file keeps the others"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each case (default: 2)")
    options = parser.parse_args()
    parts: dict[str, Iterator[Row]] = {
        "linear": linear_cases(),
        "copies": copies_cases(),
        "conv": ({"channels": c, "size": s, "p": 4, "batch": 1, "threads": 1} for c, s in CONVS),
    }
    result: Row = json.loads(RESULT.read_text()) if options.only and RESULT.exists() else {}
    console = Console(width=200)
    for part, cases in parts.items():
        if options.only in (None, part):
            result[part] = [measure(case, options.seconds) for case in cases]
            show(console, part, result[part])
    info = cpu.info()
    result["machine"] = machine(level=info.level, levels=info.available, onnxruntime=onnxruntime.__version__)
    result["goals"] = goals(result)
    for goal in result["goals"]:
        text = f"{goal['what']}: {goal['tiled']} is {goal['times']} times {goal['peer']} (goal {goal['goal']})"
        console.print(text + (", met" if goal["met"] else ", MISSED"), highlight=False)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
