"""The exported C program of a trained network, run on this computer."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from mcu.task import Examples, Network, is_classes, scores
from mcu.training import predict
from tbn_compiler.backends.c import host


def run_as_c(network: Network, model: nn.Module, test: Examples, name: str) -> dict[str, Any]:
    """Export a network as C and run it.

    Args:
        network: what it is.
        model: as it was trained and lowered.
        test: the examples to run it on.
        name: prefix of the C symbols.

    Returns:
        Sizes, scores, and how far the outputs are from PyTorch's, as plain data.

    Raises:
        ExportError: the model has an operator that C lacks, or there is no compiler.
    """
    expected = predict(model, test.x)
    deployed = model if network.config is None else tbn.optimize(model, test.x[:1])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"{name}.c")
        plan = tbn.export_c(deployed, test.x[:1], source, name=name)
        on_host = host.run(source, test.x, name=name)
    return {
        "weight_bytes": plan.weight_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "input_output_bytes": 4 * (test.x[0].numel() + expected[0].numel()),
        "host": _compare(on_host, test, expected),
    }


def _compare(outputs: np.ndarray, examples: Examples, expected: Tensor) -> dict[str, Any]:
    """Scores of C outputs ``[count, flat]``, and their distance from PyTorch's."""
    found = torch.from_numpy(outputs).reshape(expected.shape)
    compared = {
        "examples": len(examples),
        "scores": scores(found, examples.y),
        "max_error": (found - expected).abs().max().item(),
        "max_output": expected.abs().max().item(),
    }
    if is_classes(examples.y):
        compared["other_classes"] = int((found.argmax(1) != expected.argmax(1)).sum())
    return compared
