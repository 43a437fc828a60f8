"""File size and latency of the ONNX weight forms in ONNX Runtime, on one thread.

Three models of the paper's kinds with random weights, ``p = 4``, one alpha per copy: an MLP, a ViT (patches of 4, width
512, 6 layers) and ResNet18, the last two for 32 x 32 images. Beside the forms of ``export_onnx`` stands what ONNX
Runtime offers for a float model: float32, and its own 4-bit quantisation (``MatMulNBits`` of the whole layers). Runs of
all variants of a model are interleaved, so that a disturbance of the machine meets all of them; medians are reported.

    python -m benchmarks.onnx            # prints a table, writes benchmarks/results/onnx.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import nn

import tbn_compiler as tbn
from benchmarks.machine import machine
from benchmarks.models import ViT, resnet18
from examples.documents import markdown

RESULT = Path(__file__).parent / "results" / "onnx.json"
CONFIG = tbn.TilingConfig(p=4, alpha="tile", min_size=64_000)

# Options of export_onnx by the name in the table.
FORMS: dict[str, dict[str, Any]] = {
    "bits": {},
    "nbits, 4 bit, float32": {"weights": "nbits"},
    "nbits, 4 bit, int8 inputs": {"weights": "nbits", "accuracy_level": 4},
    "nbits, 2 bit, int8 inputs": {"weights": "nbits", "bits": 2, "accuracy_level": 4},
    "dense": {"weights": "dense"},
}
FLOAT, QUANTIZED = "float, whole layers", "ONNX Runtime 4 bit, whole layers, int8 inputs"


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    hidden = 1024
    layers = [nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*layers)


def vit() -> nn.Module:
    """A vision transformer for 32 x 32 images."""
    return ViT(image_size=32, patch_size=4, dim=512, depth=6, heads=8, mlp_dim=512, classes=10)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP 784-1024-1024-10": (mlp, (1, 784)),
    "ViT 512 x 6": (vit, (1, 3, 32, 32)),
    "ResNet18": (lambda: resnet18(10, small_images=True), (1, 3, 32, 32)),
}


def quantize_whole_layers(source: Path, target: Path) -> None:
    """Write the float model ``source`` with its linear layers as 4-bit ``MatMulNBits``, by ONNX Runtime's own tool."""
    options = onnxruntime.SessionOptions()
    # Folds the transposition of the weights, which hides them from the tool.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(target)
    options.log_severity_level = 3
    onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    model = onnx.load(target)
    _split_gemm(model)
    quantizer = MatMulNBitsQuantizer(model, bits=4, block_size=32, is_symmetric=False, accuracy_level=4)
    quantizer.process()
    onnx.save(quantizer.model.model, target)


def _split_gemm(model: onnx.ModelProto) -> None:
    """``Gemm`` as ``MatMul`` and ``Add``: the tool only quantises the former."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = list(model.graph.node)
    del model.graph.node[:]
    for node in nodes:
        if node.op_type != "Gemm":
            model.graph.node.append(node)
            continue
        values, weight, bias = node.input
        name = f"{weight}_transposed"
        array = numpy_helper.to_array(tensors[weight])
        transposed = next(attribute.i for attribute in node.attribute if attribute.name == "transB")
        model.graph.initializer.append(numpy_helper.from_array(array.T.copy() if transposed else array, name))
        model.graph.node.append(onnx.helper.make_node("MatMul", [values, name], [f"{node.name}_product"]))
        model.graph.node.append(onnx.helper.make_node("Add", [f"{node.name}_product", bias], list(node.output)))
    used = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def write_files(name: str, folder: Path) -> dict[str, Path]:
    """All variants of one model, by the name in the table."""
    build, shape = MODELS[name]
    torch.manual_seed(0)
    model = build()
    example = torch.randn(shape)
    qat = tbn.transform(model, CONFIG).eval()
    paths = {form: folder / f"{index}.onnx" for index, form in enumerate([*FORMS, FLOAT, QUANTIZED])}
    for form, options in FORMS.items():
        tbn.export_onnx(qat, example, paths[form], **options)
    tbn.export_onnx(qat, example, paths[FLOAT], weights="dense", optimized=False)
    quantize_whole_layers(paths[FLOAT], paths[QUANTIZED])
    return paths


def measure(name: str, seconds: float) -> list[dict[str, Any]]:
    """Size and median latency of each variant of a model at batch 1; ``seconds`` is the time for all of them."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_files(name, Path(folder))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        sessions = {
            form: onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            for form, path in paths.items()
        }
        value = np.random.default_rng(0).standard_normal(MODELS[name][1], dtype=np.float32)
        times: dict[str, list[float]] = {form: [] for form in sessions}
        outputs = {}
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(times[FLOAT]) < 5:
            for form, session in sessions.items():
                inputs = {session.get_inputs()[0].name: value}
                (outputs[form],) = session.run(None, inputs)  # once to warm the caches that the others have used
                start = time.perf_counter()
                session.run(None, inputs)
                times[form].append(time.perf_counter() - start)
        wanted = outputs[FLOAT]
        return [
            {
                "model": name,
                "form": form,
                "bytes": path.stat().st_size,
                "microseconds": round(statistics.median(times[form]) * 1e6, 1),
                "relative_error": float(np.abs(outputs[form] - wanted).max() / np.abs(wanted).max()),
                "runs": len(times[form]),
            }
            for form, path in paths.items()
        ]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    cells = [
        [
            row["model"],
            row["form"],
            f"{row['bytes'] / 1e3:,.1f}",
            f"{row['microseconds']:,.0f}",
            f"{row['relative_error']:.1e}",
        ]
        for row in rows
    ]
    header = ["model", "form", "file [KB]", "latency [us]", "relative error"]
    return markdown(header, cells, left=["model", "form"])


def main() -> int:
    """Measure all models and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each model (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULT, help="result file (default: %(default)s)")
    arguments = parser.parse_args()
    rows = [row for name in MODELS for row in measure(name, arguments.seconds)]
    found = machine(threads=1, onnxruntime=onnxruntime.__version__, onnx=onnx.__version__)
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps({"machine": found, "rows": rows}, indent=2) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
