"""Tiled layers on a GPU: linear layers and convolutions against cuBLAS and cuDNN, memory, whole models in CUDA graphs.

    python -m benchmarks.gpu                       # everything, within 4 minutes; writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --only conv memory    # these parts anew; the rows of other parts stay
    python -m benchmarks.gpu --resume              # what the file lacks, and what failed
    python -m benchmarks.gpu --docs                # tables of the result file, into docs/gpu.md

The file is complete after every case: a time limit, an exception or a crash costs one case. The cases run in a process
of their own, which is started again where one of them ends it or its CUDA context.

Every timed kernel is compared with a float32 product first. Times are medians with a cold second-level cache: between
events recorded inside a CUDA graph; launched by Python while the GPU waits; and of one of many calls by the clock.
Configurations are tuned in the warm-up and kept in the user's cache folder. Goals follow from ceilings measured on the
card at the start. The exit status is 0 if anything was measured, whatever goals it misses, and 1 if a result is wrong.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks import gpu_report, memory
from benchmarks.gpu_cases import (
    BATCHES,
    CONVS,
    IMAGES,
    SHAPES,
    Times,
    conv_cases,
    linear_cases,
    memory_cases,
    peer_cases,
)
from benchmarks.gpu_graphs import graph_cases
from benchmarks.gpu_results import Case, OtherMachineError, Results, run
from tbn_compiler.backends.triton import info

RESULT = Path(__file__).parent / "results" / "gpu.json"
SECONDS = 220.0  # what comes before and behind takes some more
CASE_SECONDS = 75.0  # a case that takes longer hangs
TUNE_SECONDS = 3.0  # a new shape measures no further candidates after this

# Parts in their order, with their shares of the time; what one leaves over is the others'.
SHARES = {"linear": 0.38, "conv": 0.2, "memory": 0.12, "graphs": 0.28, "peers": 0.02}

LOST = 17  # exit status of a worker whose CUDA context is gone, its case recorded


def machine() -> dict[str, Any]:
    """GPU, driver and versions."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
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


def all_cases(times: Times, device: torch.device, parts: Sequence[str]) -> Iterator[Case]:
    """The cases of the parts, the most telling first."""
    made: dict[str, Callable[[], Iterator[Case]]] = {
        "linear": lambda: linear_cases(times, device, SHAPES, BATCHES),
        "conv": lambda: conv_cases(times, device, CONVS, IMAGES),
        "memory": memory_cases,
        "graphs": lambda: graph_cases(times, device),
        "peers": lambda: peer_cases(times, device, SHAPES[:2], BATCHES),
    }
    for part in SHARES:
        if part in parts:
            yield from made[part]()


def missing(results: Results, parts: Sequence[str]) -> list[str]:
    """The cases of the parts that a file has no row of."""
    unused = cast(Times, None)  # nothing is measured
    return [case.name for case in all_cases(unused, torch.device("cpu"), parts) if case.name not in results.cases]


def usable() -> bool:
    """Whether the CUDA context still answers; also frees what a failed case left."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def work(path: Path, parts: Sequence[str], seconds: float) -> int:
    """Measure what a file lacks, on the GPU; :data:`LOST` where another process has to go on."""
    from benchmarks.gpu_timing import Timer
    from tbn_compiler.backends.triton import tuning

    end = time.monotonic() + seconds
    tuning.SECONDS = TUNE_SECONDS
    results, times = Results.read(path), Timer()
    if "ceilings" not in results.content:
        results.content["ceilings"] = asdict(times.ceilings())
        results.write()
        print(gpu_report.described(results.content), flush=True)
    cases = list(all_cases(times, torch.device("cuda"), parts))
    return 0 if run(results, cases, SHARES, end - time.monotonic(), usable) else LOST


def supervise(command: Sequence[str], path: Path, seconds: float, case_seconds: float = CASE_SECONDS) -> str | None:
    """Run a worker, and another one behind each that crashes or hangs; the case at fault is recorded.

    Args:
        command: starts a worker; ``--seconds`` and the time that is left are added.
        path: the result file that it writes.
        seconds: for all workers together. One that is still in a case a little later is stopped.
        case_seconds: for one case.

    Returns:
        Why nothing more could be measured, or ``None``.
    """
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        process = subprocess.Popen([*command, "--seconds", f"{left:.1f}"])
        try:
            why = _watch(process, path, end + min(10.0, seconds / 20), case_seconds)
        finally:
            process.kill()
            process.wait()
        if process.returncode == 0:
            return None
        results = Results.read(path)
        name = results.running
        if name is not None and why == "time":
            results.content.pop("running")
            results.write()
        elif name is not None:
            results.record(name, {"failed": why or f"the process ended with status {process.returncode}"})
        elif process.returncode != LOST:
            return f"the worker ended with status {process.returncode} outside any case"
        print(f"{name or 'a case'} ended the worker", flush=True)
    return None


def _watch(process: subprocess.Popen[bytes], path: Path, end: float, case_seconds: float) -> str:
    """Wait for a worker; stop it, and say why, when the time is over or a case hangs."""
    running, since = None, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        now, name = time.monotonic(), Results.read(path).running
        if name != running:
            running, since = name, now
        if now > end:
            return "time"
        if running is not None and now - since > case_seconds:
            return f"no result within {case_seconds:.0f} s"
    return ""


def show(result: Mapping[str, Any]) -> int:
    """Print tables, goals, failures; the exit status."""
    print(gpu_report.described(result))
    for name, table in gpu_report.tables(result).items():
        print(f"\n{name}\n{table}")
    for what, lines in (
        ("left out, no time", result.get("left_out", [])),
        ("failed", gpu_report.failures(result)),
        ("missed", gpu_report.misses(result)),
        ("seconds", [f"{part} {seconds}" for part, seconds in result.get("seconds", {}).items()]),
        ("wrong", wrong := gpu_report.wrong(result)),
    ):
        for line in lines:
            print(f"{what}: {line}")
    return int(bool(wrong) or all("failed" in row for row in result["cases"].values()))


def main() -> int:
    """Run the parts, or fill the document."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SHARES, default=list(SHARES), help="parts to run")
    parser.add_argument("--output", type=Path, default=RESULT, help="result file")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for everything")
    parser.add_argument("--resume", action="store_true", help="only what the file lacks, and what failed")
    parser.add_argument("--docs", action="store_true", help="only fill docs/gpu.md from the result file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.docs:
        document = memory.DOCUMENT.read_text()
        result = json.loads(arguments.output.read_text())
        memory.DOCUMENT.write_text(gpu_report.fill_document(result, document))
        return 0
    if not torch.cuda.is_available():
        print("no GPU: nothing measured (python -m benchmarks.memory counts memory without one)", file=sys.stderr)
        return 2
    if arguments.worker:
        return work(arguments.output, arguments.only, arguments.seconds)
    begun = time.monotonic()
    try:
        Results.prepare(arguments.output, machine(), arguments.only, resume=arguments.resume)
    except OtherMachineError as error:
        print(error, file=sys.stderr)
        return 2
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", "--output", str(arguments.output)]
    left = arguments.seconds - (time.monotonic() - begun)
    reason = supervise([*command, "--only", *arguments.only], arguments.output, left)
    results = Results.read(arguments.output)
    results.content["left_out"] = missing(results, arguments.only)
    results.write()
    status = show(results.content)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
