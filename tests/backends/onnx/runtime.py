"""Running exported files in ONNX Runtime, and comparing them with PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# MatMulNBits takes 2 bits from here on.
RUNTIME_HAS_2_BITS = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) >= (1, 24)
LEVELS = onnxruntime.GraphOptimizationLevel


def run(path: Path, inputs: dict[str, Tensor], *, optimized: bool = True) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = LEVELS.ORT_ENABLE_ALL if optimized else LEVELS.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray] = session.run(None, {name: value.numpy() for name, value in inputs.items()})
    return outputs


@torch.no_grad()
def expected(module: nn.Module, inputs: dict[str, Tensor]) -> list[np.ndarray]:
    leaves = pytree.tree_leaves(module.eval()(**inputs))
    return [leaf.numpy() for leaf in leaves if isinstance(leaf, Tensor)]


def assert_same(actual: list[np.ndarray], wanted: list[np.ndarray], tolerance: float = 1e-5) -> None:
    """Every output agrees to ``tolerance`` of its largest value: what reordering sums changes, and no more."""
    assert len(actual) == len(wanted) > 0
    for index, (a, w) in enumerate(zip(actual, wanted, strict=True)):
        assert a.shape == w.shape
        assert a.dtype == w.dtype
        largest = float(np.abs(w).max())
        assert largest > 0, "an all-zero reference shows nothing"
        np.testing.assert_allclose(a, w, rtol=0, atol=tolerance * largest, err_msg=f"output {index}")


def initializers(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def operators(path: Path) -> set[tuple[str, str]]:
    return {(node.domain, node.op_type) for node in onnx.load(path).graph.node}


def packed_bytes(qat: Any) -> int:
    """Bytes of the packed tiles of a transformed module."""
    from tbn_compiler.graph.records import get_records

    return sum(-(-record.spec.layout.tile_size // 8) for record in get_records(qat) or () if record.spec)
