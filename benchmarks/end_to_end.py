"""Whole networks on a CPU: tiled and compiled against float and compiled, and against ONNX Runtime.

The paper's ViT (256 x 256 pixels, patches of 32, 1024 wide, 6 blocks, 16 heads, MLP 2048) and a ResNet18 (224 x 224),
1000 classes each, networks for CIFAR-10, and two for which calls are everything: the paper's MLP, and its
encoder of time series with 128 channels. Weights are random: time does not depend on them. Compared are

- the float network under ``torch.compile``,
- the float network in ONNX Runtime, and quantised for it: static int8 activations, int8 weights by channel,
- the same two files in OpenVINO, and the float file quantised for it by its own tool, NNCF,
- the tiled network, lowered, under ``torch.compile(backend="tbn")``,
- the same with int8 activations (``options={"activation": "int8"}``), or both bound without ``torch.compile``,
- networks that cannot keep bytes between layers, and their float forms, compiled ahead of time (AOTInductor) without
  Dynamo's guards and Inductor's Python; the tiled ones are bound, as in a program without Python (``examples/cpp``),
- networks that can keep bytes between layers in one call, bound: one scale for the inputs of each layer and for what is
  between layers, as ONNX Runtime has it.

All forms of a network run in one process on the same input, in turn, after they were compiled; times are medians over
all turns, and the spread is that of the middle half. What takes less than two milliseconds is called until they have
passed, and its time is the mean: the first call behind another engine finds none of its code in the caches. Before
that, the tiled result is compared with the lowered module in eager mode.

    python -m benchmarks.end_to_end               # prints a table, writes benchmarks/results/end_to_end.json
    python -m benchmarks.end_to_end --model mlp   # measures one network again, and puts it in its place
    python -m benchmarks.end_to_end --results benchmarks/results/end_to_end_avx2.json   # of a machine without AVX-512

It needs the extras ``onnx`` and ``benchmarks``.

Takes about half an hour, most of which is compiling and quantising.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn
from torch.nn import functional as F

import tbn_compiler as tbn
from benchmarks.machine import machine, with_rows
from benchmarks.models import ViT, resnet18
from examples.documents import markdown
from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import bound
from tbn_compiler.ops.calls import OPERATORS

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the paper's networks stand beside its scripts
from paper.convnets import VGGSmall, resnet18_cifar, resnet50_cifar
from paper.transformers import Swin, TimeSeriesTransformer

RESULT = Path(__file__).parent / "results" / "end_to_end.json"


@dataclass(frozen=True)
class Network:
    """A network to time.

    Attributes:
        title: what tables call it.
        build: makes it in float.
        shape: of its input, batch first.
        options: of the tiling, beside ``p``.
        bound: the tiled forms are those of ``backends.cpu.bind``, not of ``torch.compile``.
        one_call: whether the kernels keep bytes between its layers.
    """

    title: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)
    bound: bool = False
    one_call: bool = True


def mlp() -> nn.Module:
    """The paper's network for MNIST."""
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))


MODELS = {
    "vit": Network("the paper's ViT", ViT, (1, 3, 256, 256), one_call=False),
    "resnet18": Network("ResNet18", resnet18, (1, 3, 224, 224)),
    "resnet18-all": Network("ResNet18, every layer tiled", resnet18, (1, 3, 224, 224), {"min_size": 0}),
    "resnet18-8": Network("ResNet18, batch 8", resnet18, (8, 3, 224, 224)),
    "resnet18-all-8": Network("ResNet18, every layer tiled, batch 8", resnet18, (8, 3, 224, 224), {"min_size": 0}),
    "resnet18-cifar": Network("ResNet18 for CIFAR-10", resnet18_cifar, (1, 3, 32, 32)),
    "resnet18-cifar-64": Network("ResNet18 for CIFAR-10, batch 64", resnet18_cifar, (64, 3, 32, 32)),
    "resnet50-cifar": Network("ResNet50 for CIFAR-10", resnet50_cifar, (1, 3, 32, 32)),
    "vgg-small": Network("VGG-small for CIFAR-10", VGGSmall, (1, 3, 32, 32)),
    "swin-cifar": Network("Swin-t for CIFAR-10", Swin, (1, 3, 32, 32), one_call=False),
    "series": Network(
        "time series, 128 channels",
        lambda: TimeSeriesTransformer(21, 128),
        (1, 96, 21),
        {"min_size": 16_000},
        one_call=False,
    ),
    "mlp": Network("MLP 784-128-10", mlp, (1, 784), one_call=False),
    "mlp-bound": Network("MLP 784-128-10, bound", mlp, (1, 784), bound=True),
}


FLOAT_PEERS = ("float", "float, ahead of time", "ONNX Runtime float", "OpenVINO float")
INT8_PEERS = ("ONNX Runtime int8", "OpenVINO int8", "OpenVINO int8, NNCF")
PEERS = (*FLOAT_PEERS, *INT8_PEERS)
AHEAD = {"tiled": "tiled, ahead of time", "tiled, int8": "tiled, int8, ahead of time"}
ONE_CALL = "tiled, int8, one call"
# Of each form, what its results are compared with, and how near they are.
TOLERANCES = dict.fromkeys(FLOAT_PEERS[1:], 1e-4) | dict.fromkeys(INT8_PEERS, 0.5)
TOLERANCES |= {"tiled": 1e-4, "tiled, int8": 0.2, ONE_CALL: 0.5}
TOLERANCES |= {AHEAD[name]: TOLERANCES[name] for name in AHEAD}
FLOATS = ("tiled", AHEAD["tiled"])
INTEGERS = ("tiled, int8", AHEAD["tiled, int8"], ONE_CALL)
FORMS = (*PEERS, *FLOATS, *INTEGERS)

BLOCK_SECONDS = 2e-3
"""Time for which a form is called in its turn, at least."""


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


def openvino_function(path: Path, threads: int, samples: Sequence[np.ndarray] = ()) -> Callable[[Tensor], Tensor]:
    """An ONNX file as a function of OpenVINO's, in the precision of the file, or quantised by NNCF with samples."""
    import openvino  # tables of results are made without it

    model = openvino.Core().read_model(path)
    if samples:
        import nncf

        nncf.set_log_level(logging.ERROR)
        attention = any(operation.get_type_name() == "Softmax" for operation in model.get_ops())
        kind = nncf.ModelType.TRANSFORMER if attention else None
        model = nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples), model_type=kind)
    options = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()

    def run(x: Tensor) -> Tensor:
        (result,) = request.infer([x.numpy()], share_inputs=True, share_outputs=True).values()
        return torch.from_numpy(result)

    return run


def onnx_forms(model: nn.Module, x: Tensor, threads: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """The float network in ONNX Runtime and OpenVINO, and its form as ONNX Runtime's tools quantise it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        source, prepared, quantised = (Path(folder) / f"{name}.onnx" for name in ("source", "prepared", "quantised"))
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        assert program is not None
        program.save(source)
        # Its own inference of shapes fails on windows that are shifted, and it would quantise their masks' infinities.
        windows = isinstance(model, Swin)
        quant_pre_process(source, prepared, skip_symbolic_shape=windows)
        samples = [torch.randn_like(x).numpy() for _ in range(4)]
        reader = Samples(program.model.graph.inputs[0].name or "", samples)
        quantize_static(prepared, quantised, reader, quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                        op_types_to_quantize=["MatMul", "Gemm"] if windows else None)  # fmt: skip
        return {
            "ONNX Runtime float": session(source, threads),
            "OpenVINO float": openvino_function(source, threads),
            "ONNX Runtime int8": session(quantised, threads),
            "OpenVINO int8": openvino_function(quantised, threads),
            "OpenVINO int8, NNCF": openvino_function(source, threads, samples),
        }


def ahead_of_time(module: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A module as a program of AOTInductor."""
    program = torch.export.export(module, (x,))
    with tempfile.TemporaryDirectory() as folder:
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder) / "module.pt2"))
        found: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(package)
        return found


def variants(
    model: nn.Module, config: tbn.TilingConfig, x: Tensor, *, without_compiling: bool = False, one_call: bool = False
) -> dict[str, Callable[[Tensor], Tensor]]:
    """The forms of a model by name, each called once."""
    packed = tbn.lower(tbn.transform(model, config))
    with torch.no_grad():
        expected = packed(x)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "float": torch.compile(model),
        **onnx_forms(model, x, torch.get_num_threads()),
    }
    if not (without_compiling or one_call):
        found[PEERS[1]] = ahead_of_time(model, x)
    for name, activation in (("tiled", "float"), ("tiled, int8", "int8")):
        if without_compiling:
            found[name] = cpu.bind(tbn.optimize(packed, x, activation=activation))  # type: ignore[arg-type]
        else:
            found[name] = torch.compile(packed, backend="tbn", options={"activation": activation})
            if not one_call:
                found[AHEAD[name]] = ahead_of_time(
                    cpu.bind(tbn.optimize(packed, x, activation=activation), stored=True), x
                )
    if one_call:
        batches = [torch.randn_like(x) for _ in range(4)]
        found[ONE_CALL] = cpu.bind(
            tbn.optimize(packed, x, activation="int8", calibration=batches, intermediates="int8")
        )
    results = {name: run(x) for name, run in found.items()}
    # Rounding adds up over the layers: about 1e-6 in float32, and int8 keeps two digits.
    for name, tolerance in TOLERANCES.items():
        if name not in results:
            continue
        right = results["float"] if name in PEERS else expected
        error = float((results[name] - right).abs().max() / right.abs().max())
        if not error < tolerance:
            raise SystemExit(f"{name}: relative error {error:.1e}")
    return found


def measure(name: str, p: int, turns: int) -> dict[str, Any]:
    """Time all variants of one model in turn."""
    torch.manual_seed(0)
    network = MODELS[name]
    model, x = network.build().eval(), torch.randn(network.shape)
    config = tbn.TilingConfig(p=p, **{"min_size": 64_000} | network.options)
    runs = variants(model, config, x, without_compiling=network.bound, one_call=network.one_call)
    times: dict[str, list[float]] = {variant: [] for variant in runs}
    repeats = dict.fromkeys(runs, 1)
    for turn in range(turns + 2):
        for variant, run in runs.items():
            start = time.perf_counter()
            for _ in range(repeats[variant]):
                run(x)
            elapsed = (time.perf_counter() - start) / repeats[variant]
            if turn >= 2:
                times[variant].append(elapsed * 1e3)
            else:  # the first turns fill the caches, and find how long a call takes
                repeats[variant] = max(1, math.ceil(BLOCK_SECONDS / elapsed))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    result: dict[str, Any] = {"model": name, "title": network.title, "input": list(network.shape), "p": p}
    result |= {"options": network.options, "parameters": parameters, "turns": turns}
    for variant, found in times.items():
        low, median, high = statistics.quantiles(found, n=4)
        row = {"median_ms": round(median, 3), "quartiles_ms": [round(low, 3), round(high, 3)]}
        result[variant] = row | {"speedup": round(statistics.median(times["float"]) / median, 2)}
    return result


def fastest_int8(row: dict[str, Any]) -> str:
    """The tiled form in int8 with the lowest median."""
    return fastest(row, INTEGERS)


def fastest(row: dict[str, Any], names: Sequence[str] = PEERS) -> str:
    """The form with the lowest median: of the peers, or of ``names``."""
    return min((name for name in names if name in row), key=lambda name: float(row[name]["median_ms"]))


def calls(repeats: int = 20_000) -> dict[str, float]:
    """Microseconds of one call of a 64 x 64 layer for one token, by operator; medians of hundreds of calls in turn."""
    x, weight, bias = torch.randn(1, 64), torch.randn(64, 64), torch.randn(64)
    packed = tbn.lower(tbn.transform(nn.Linear(64, 64), tbn.TilingConfig(p=4, min_size=0)))
    tile, alpha = packed.get_buffer("weight_tile"), packed.get_buffer("weight_alpha")
    layer = OPERATORS["linear"].bind((x, tile, alpha, bias, 64, 64, 4), {}).checked()
    reason = bound.why_not(layer, ())
    if reason is not None:
        raise SystemExit(f"layers cannot be bound: {reason}")
    plan = bound.as_tensor(bound.bind(layer))
    functions: dict[str, Callable[[], Tensor]] = {
        "F.linear": lambda: F.linear(x, weight, bias),
        "tbn::linear": lambda: torch.ops.tbn.linear.default(x, tile, alpha, bias, 64, 64, 4),
        "tbn_cpu::linear": lambda: torch.ops.tbn_cpu.linear.default(x, plan, 64),
    }
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats // 200):
        for name, function in functions.items():
            start = time.perf_counter()
            for _ in range(200):
                function()
            times[name].append((time.perf_counter() - start) / 200 * 1e6)
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def calls_table(found: dict[str, float]) -> str:
    """What calls cost, as a Markdown table."""
    return markdown(["operator", "us"], [[f"`{name}`", f"{us:.1f}"] for name, us in found.items()])


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table: medians in milliseconds, and ratios to the fastest peers."""
    cells, forms = [], [name for name in FORMS if any(name in row for row in rows)]
    for row in rows:
        times = [f"{row[name]['median_ms']:.3g}" if name in row else "" for name in forms]
        peers = (fastest(row, FLOAT_PEERS), fastest(row, FLOATS)), (fastest(row), fastest_int8(row))
        ratios = [f"{row[peer]['median_ms'] / row[name]['median_ms']:.2f}x" for peer, name in peers]
        cells.append([row["title"], *times, *ratios])
    titles = ["p = 4: ms", *forms, "float over the best float", "int8 over the best of all"]
    return markdown(titles, cells)


@torch.no_grad()
def main() -> int:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=MODELS, action="append", help="may be repeated; default: all")
    parser.add_argument("--p", type=int, default=4, help="copies of each tile (default 4)")
    parser.add_argument("--turns", type=int, default=100, help="default 100")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--results", type=Path, default=RESULT, help=f"default {RESULT.name}, beside the other results")
    parser.add_argument("--dry-run", action="store_true", help="write no result file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    versions = {"onnxruntime": onnxruntime.__version__, "openvino": version("openvino"), "nncf": version("nncf")}
    found = machine(threads=arguments.threads, level=cpu.info().level, **versions)
    costs = calls()
    print(calls_table(costs))
    rows = []
    for name in arguments.model or MODELS:
        torch._dynamo.reset()
        rows.append(measure(name, arguments.p, arguments.turns))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
        if not arguments.dry_run:
            arguments.results.parent.mkdir(exist_ok=True)
            merged = with_rows(arguments.results, found, rows, lambda row: row["model"])
            merged.sort(key=lambda row: list(MODELS).index(row["model"]))
            result = {"machine": found, "calls_us": costs, "rows": merged}
            arguments.results.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
