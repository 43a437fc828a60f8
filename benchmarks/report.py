"""Fills the tables of the README and of the pages under ``docs`` from the result files.

    python -m benchmarks.report            # after any benchmark has written its result

``docs/gpu.md``, the pages of the examples and the other tables of ``docs/mcu.md`` are filled by their own scripts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import end_to_end, onnx, tflm
from examples.documents import fill, markdown

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

Result = dict[str, Any]


def read(name: str) -> Result:
    """A result file."""
    found: Result = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def machine(result: Result) -> str:
    """The machine of a result, as a sentence."""
    found = result["machine"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "onnxruntime") if name in found)
    level = f", {found['level']} kernels" if "level" in found else ""
    return f"Measured on {found['cpu']}, {found['cores']} cores{level}, with {versions}, on {found['date']}."


def cpu_linear(result: Result) -> str:
    """Linear layers against every peer: medians in microseconds."""
    names = list(result["linear"][0]["us"])
    rows = [
        [f"{row['out']} x {row['in']}", str(row["batch"]), str(row["threads"])]
        + [f"{row['us'][name]:,.1f}" for name in names]
        for row in result["linear"]
    ]
    return markdown(["out x in", "batch", "threads", *names], rows)


def cpu_copies(result: Result) -> str:
    """How the time falls with the number of copies."""
    rows = [
        [f"{row['out']} x {row['in']}", str(row["batch"]), str(row["p"])]
        + [f"{row['us'][name]:,.1f}" for name in ("tiled fp32", "tiled int8", "unique fp32", "unique int8")]
        for row in result["copies"]
    ]
    return markdown(["out x in", "batch", "p", "tiled fp32", "tiled int8", "unique fp32", "unique int8"], rows)


def cpu_conv(result: Result) -> str:
    """Convolutions."""
    names = list(result["conv"][0]["us"])
    rows = [
        [f"{row['channels']} channels, {row['size']} x {row['size']}"]
        + [f"{row['us'][name]:,.0f}" for name in names]
        + [f"{row['us']['fp32'] / row['us']['tiled fp32']:.1f}x"]
        for row in result["conv"]
    ]
    return markdown(["3 x 3, p = 4", *names, "tiled fp32 over fp32"], rows)


def cpu_goals(result: Result) -> str:
    """The ratios that were set as goals."""
    rows = [
        [
            *(goal[key] for key in ("what", "tiled", "peer")),
            f"{goal['times']:.1f}x",
            f"{goal['goal']:g}x",
            "yes" if goal["met"] else "**no**",
        ]
        for goal in result["goals"]
    ]
    header = ["what", "tiled", "peer", "ratio", "goal", "reached"]
    return markdown(header, rows, left=header[:3])


def summary(cpu: Result) -> str:
    """Operators in the README: one row a claim."""
    by_case = {(row["out"], row["in"], row["batch"]): row["us"] for row in cpu["linear"] if row["threads"] == 1}
    rows = []
    for batch in (1, 64):
        us = by_case[4096, 4096, batch]
        for peer, name in (
            ("fp32", "PyTorch float32"),
            ("int8", "PyTorch int8 dynamic"),
            ("ort 4-bit", "ONNX Runtime 4-bit"),
        ):
            ratios = [f"{us[peer] / us[tiled]:.1f}x" for tiled in ("tiled fp32", "tiled int8")]
            rows.append([f"linear 4096 x 4096, batch {batch}", name, *ratios])
    for row in cpu["conv"]:
        us = row["us"]
        rows.append(
            [f"convolution 3 x 3, {row['channels']} channels, {row['size']} x {row['size']}", "PyTorch float32"]
            + [f"{us['fp32'] / us[name]:.1f}x" for name in ("tiled fp32", "tiled int8")]
        )
    header = ["p = 4, one thread", "against", "float32 activations", "int8 activations"]
    return markdown(header, rows, left=header[:2])


PEERS = {
    "float": "`torch.compile`",
    "float, ahead of time": "AOTInductor",
    "ONNX Runtime float": "ONNX Runtime float32",
    "ONNX Runtime int8": "ONNX Runtime int8",
    "OpenVINO float": "OpenVINO float32",
    "OpenVINO int8": "OpenVINO int8",
    "OpenVINO int8, NNCF": "OpenVINO int8",
}


def networks(*results: tuple[str, Result]) -> str:
    """Whole networks in the README: how much faster than the fastest peer of any precision, on each machine."""
    header = ["p = 4, one thread"]
    cells: dict[str, list[str]] = {}
    for machine, result in results:
        header += [f"{machine}: its fastest peer", "float32 activations", "int8 activations"]
        for row in result["rows"]:
            peer = end_to_end.fastest(row)
            tiled = (end_to_end.fastest(row, end_to_end.FLOATS), end_to_end.fastest_int8(row))
            ratios = [f"{row[peer]['median_ms'] / row[name]['median_ms']:.1f}x" for name in tiled]
            cells.setdefault(row["title"], []).extend([PEERS[peer], *ratios])
    return markdown(header, [[title, *found] for title, found in cells.items()], left=(header[0], header[1], header[4]))


def microcontrollers(result: Result) -> str:
    """Instructions and flash of the paper's MLP on each emulated core, by kernel choice."""
    cases = [case for case in result["cases"] if case["model"] == "784-128-10"]
    choices = list(dict.fromkeys(case["kernels"] for case in cases))
    rows = []
    for core in dict.fromkeys(case["cpu"] for case in cases):
        found = {case["kernels"]: case for case in cases if case["cpu"] == core}
        rows.append(
            [core, *(f"{max(found[name]['instructions']):,} ({found[name]['flash_bytes']:,})" for name in choices)]
        )
    return markdown(["784-128-10, p = 4: instructions (flash bytes)", *choices], rows)


def gpu_linear(result: Result) -> str:
    """How much faster tiled linear layers are than cuBLAS, inside a CUDA graph: one row a layer, p and batch."""
    cases = [case for case in result["cases"].values() if case["part"] == "linear" and "graph_us" in case]
    dense = {(c["out"], c["in"], c["batch"]): c["graph_us"] for c in cases if c["kind"] == "dense"}
    tiled = {
        (c["out"], c["in"], c["batch"], c["p"]): c["graph_us"]
        for c in cases
        if c["kind"] == "tiled" and c["out"] >= 4096
    }
    batches = sorted({batch for *_, batch, _ in tiled})
    rows = [
        [f"linear {m} x {n}, p = {p}"] + [f"{dense[m, n, batch] / tiled[m, n, batch, p]:.1f}x" for batch in batches]
        for m, n, p in sorted({(m, n, p) for m, n, _, p in tiled})
    ]
    header = [f"{result['machine']['gpu']}, bfloat16, against cuBLAS", *(f"batch {batch}" for batch in batches)]
    return markdown(header, rows)


def documents() -> dict[Path, dict[str, Callable[[], str]]]:
    """What is filled in where: texts by their marks, by document."""
    return {
        ROOT / "README.md": {
            "speed": lambda: summary(read("cpu")),
            "machine": lambda: machine(read("cpu")),
            "networks": lambda: networks(("AVX-512", read("end_to_end")), ("AVX2", read("end_to_end_avx2"))),
            "gpu": lambda: gpu_linear(read("gpu")),
            "mcu": lambda: microcontrollers(read("mcu")),
        },
        ROOT / "docs" / "cpu.md": {
            "machine": lambda: machine(read("cpu")),
            "calls": lambda: end_to_end.calls_table(read("end_to_end")["calls_us"]),
            "goals": lambda: cpu_goals(read("cpu")),
            "linear": lambda: cpu_linear(read("cpu")),
            "copies": lambda: cpu_copies(read("cpu")),
            "conv": lambda: cpu_conv(read("cpu")),
        },
        ROOT / "docs" / "compile.md": {
            "machine": lambda: machine(read("end_to_end")),
            "end to end": lambda: end_to_end.table(read("end_to_end")["rows"]),
            "machine avx2": lambda: machine(read("end_to_end_avx2")),
            "end to end avx2": lambda: end_to_end.table(read("end_to_end_avx2")["rows"]),
        },
        ROOT / "docs" / "mcu.md": {
            "tflm": lambda: tflm.table(read("tflm")["rows"], read("mcu")["cases"]),
            "tflm versions": lambda: tflm.versions(read("tflm")),
        },
        ROOT / "docs" / "onnx.md": {
            "machine": lambda: machine(read("onnx")),
            "forms": lambda: onnx.table(read("onnx")["rows"]),
        },
    }


def filled(path: Path, texts: dict[str, Callable[[], str]]) -> str:
    """A document with its tables."""
    return fill(path.read_text(), {mark: text() for mark, text in texts.items()})


def main() -> int:
    """Fill all documents."""
    for path, texts in documents().items():
        path.write_text(filled(path, texts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
