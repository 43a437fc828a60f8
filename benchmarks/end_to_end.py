"""Whole networks on a CPU, one input at a time: tiled and compiled against float and compiled.

The paper's ViT (256 x 256 pixels, patches of 32, 1024 wide, 6 blocks, 16 heads, MLP 2048) and a ResNet18 (224 x 224),
1000 classes each, with random weights: time does not depend on them. Compared are

- the float network under ``torch.compile``,
- the float network in ONNX Runtime, and quantised for it: static int8 activations, int8 weights by channel,
- the tiled network, lowered, under ``torch.compile(backend="tbn")``,
- the same with int8 activations (``options={"activation": "int8"}``).

All run in one process on the same input, in turn, after they were compiled; times are medians over all turns, and the
spread is that of the middle half. Before that, the tiled result is compared with the lowered module in eager mode.

    python -m benchmarks.end_to_end               # prints a table, writes benchmarks/results/end_to_end.json

It needs the extra ``onnx``.

Compiling takes a minute or two, measuring one.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks.machine import machine
from benchmarks.models import ViT, resnet18

RESULT = Path(__file__).parent / "results" / "end_to_end.json"


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {"vit": (ViT, 256), "resnet18": (resnet18, 224)}


FORMS = ("float", "ONNX Runtime float", "ONNX Runtime int8", "tiled", "tiled, int8")


class Samples(CalibrationDataReader):  # type: ignore[misc]
    """Inputs from which ONNX Runtime takes the scales of activations."""

    def __init__(self, name: str, inputs: list[np.ndarray]) -> None:
        self._left = [{name: value} for value in inputs]

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input."""
        return self._left.pop() if self._left else None


def session(path: Path, threads: int) -> Callable[[Tensor], Tensor]:
    """An ONNX file as a function."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    found = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = found.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(found.run(None, {name: x.numpy()})[0])

    return run


def onnxruntime_forms(model: nn.Module, x: Tensor, threads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The float network in ONNX Runtime, and its quantised form as its own tools make it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("source", "prepared", "quantised"))
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        assert program is not None
        program.save(source)
        quant_pre_process(source, prepared)
        samples = Samples(program.model.graph.inputs[0].name or "", [torch.randn_like(x).numpy() for _ in range(4)])
        quantize_static(prepared, quantised, samples, quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
        return {FORMS[1]: session(source, threads), FORMS[2]: session(quantised, threads)}


def variants(model: nn.Module, p: int, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The forms of a model by name, each called once."""
    packed = tbn.lower(tbn.transform(model, tbn.TilingConfig(p=p)))
    with torch.no_grad():
        expected = packed(x)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "float": torch.compile(model),
        **onnxruntime_forms(model, x, torch.get_num_threads()),
        "tiled": torch.compile(packed, backend="tbn"),
        "tiled, int8": torch.compile(packed, backend="tbn", options={"activation": "int8"}),
    }
    results = {name: run(x) for name, run in found.items()}
    # Rounding adds up over the layers: about 1e-6 in float32, and int8 keeps two digits.
    references = {"ONNX Runtime float": results["float"], "ONNX Runtime int8": results["float"]}
    for name, tolerance in zip(FORMS[1:], (1e-4, 0.5, 1e-4, 0.2), strict=True):
        right = references.get(name, expected)
        error = float((results[name] - right).abs().max() / right.abs().max())
        if not error < tolerance:
            raise SystemExit(f"{name}: relative error {error:.1e}")
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
        for variant in FORMS:
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
        found = machine(threads=arguments.threads, onnxruntime=onnxruntime.__version__)
        result = {"machine": found, "rows": rows}
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
