"""The exported C program of a trained network, run on this computer and on an emulated Cortex-M4F."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from mcu.task import Examples, Network, Task, is_classes, scores
from tbn_compiler.backends.c import host, mcu

_CPU = mcu.CPUS["cortex-m4"]
_FLAGS = ("-O2",)
_EXAMPLES_A_RUN = 50  # the emulator has a time limit
_CALIBRATION_BATCH = 128


def deploy(network: Network, model: nn.Module, x: Tensor, calibration: Tensor | None = None) -> nn.Module:
    """What is exported of a trained network.

    Args:
        network: what it is.
        model: as it was trained and lowered.
        x: an example.
        calibration: inputs that give scales to int8 activations; without them, activations are in float.
    """
    if network.config is None:
        return model
    if calibration is None:
        return tbn.optimize(model, x)
    batches = calibration.split(_CALIBRATION_BATCH)
    return tbn.optimize(model, x, activation="int8", calibration=batches, intermediates="int8")


def run_as_c(
    deployed: nn.Module, outputs: Tensor, test: Examples, task: Task, emulated: int | None, name: str
) -> dict[str, Any]:
    """Export a network as C, with the kernels for speed on a Cortex-M4, and run it.

    Args:
        deployed: what :func:`deploy` returned.
        outputs: what the network gives in PyTorch.
        test: all test examples.
        task: how many of them run as C.
        emulated: how many of these, from the first on, also run on the emulated core; ``None``: as ``task`` says.
        name: prefix of the C symbols.

    Returns:
        Scores in PyTorch with all examples; sizes, instructions of an inference, scores, and how far the outputs are
        from PyTorch's, as plain data.

    Raises:
        ExportError: the model has an operator that C lacks, or a tool is missing.
    """
    some, few = test.head(task.run_as_c), test.head(emulated or task.emulated)
    expected = outputs[: len(some)]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"{name}.c")
        plan = tbn.export_c(deployed, test.x[:1], source, name=name, optimize="speed", target="cortex-m4")
        on_host = host.run(source, some.x, name=name)
        runs = [mcu.measure(source, _CPU, x, flags=_FLAGS) for x in few.x.split(_EXAMPLES_A_RUN)]
    on_core = np.concatenate([run.outputs for run in runs])
    instructions = [count for run in runs for count in run.instructions]
    return {
        "scores": scores(outputs, test.y),
        "weight_bytes": plan.weight_bytes,
        "scratch_bytes": plan.scratch_bytes,
        "input_output_bytes": 4 * (test.x[0].numel() + expected[0].numel()),
        "host": _compare(on_host, some, expected),
        "emulated": {
            "cpu": _CPU.name,
            "machine": runs[0].machine,
            "flags": " ".join(_FLAGS),
            "flash_bytes": runs[0].flash_bytes,
            "static_bytes": runs[0].static_bytes,
            "stack_bytes": max(run.stack_bytes for run in runs),
            "instructions": round(mean(instructions)),
            "instructions_range": [min(instructions), max(instructions)],
            **_compare(on_core, few, expected[: len(few)]),
        },
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
