"""The peer of networks with int8 activations: the float network quantised by ONNX Runtime's own tools."""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

from mcu import tiny
from mcu.task import Examples, scores

_INPUT = "x"
_BATCH = 128


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    """Inputs from which the scales of activations are taken."""

    def __init__(self, inputs: Tensor) -> None:
        self._left = [{_INPUT: batch.numpy()} for batch in inputs.split(_BATCH)]

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch."""
        return self._left.pop() if self._left else None


def peer(model: nn.Module, calibration: Tensor, test: Examples) -> dict[str, Any]:
    """Quantise a float network after training, as microcontrollers' int8 kernels take it, and measure it.

    Weights are int8 with a scale for each output channel, activations int8 with a scale and a zero point, norms folded.

    Args:
        model: the trained float network.
        calibration: inputs; what they span gives the scales of activations.
        test: the examples to measure it on.

    Returns:
        Scores; bytes of its weights; instructions that int8 kernels would take (:func:`mcu.tiny.int8_instructions`).
    """
    with tempfile.TemporaryDirectory() as folder:
        quantised = _quantised(model, calibration, Path(folder))
        outputs = torch.cat([torch.from_numpy(_run(quantised, batch)) for batch in test.x.split(_BATCH)])
    return {
        "scores": scores(outputs, test.y),
        "weight_bytes": sum(value.numel() for value in model.parameters() if value.ndim > 1),
        "instructions": tiny.int8_instructions(model, tuple(test.x.shape[1:])),
    }


def _quantised(model: nn.Module, calibration: Tensor, folder: Path) -> onnxruntime.InferenceSession:
    """The quantised network as a session that rounds every activation that int8 kernels would round.

    ONNX Runtime's optimisations are off: with them, kernels of some processors clip sums of pairs to 16 bits.
    """
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    source, prepared, quantised = (folder / f"{name}.onnx" for name in ("source", "prepared", "quantised"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own copy of an exported graph
        program = torch.onnx.export(
            model.eval(),
            (calibration[:2],),
            dynamo=True,
            verbose=False,
            input_names=[_INPUT],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        )
    assert program is not None
    program.save(source)
    quant_pre_process(source, prepared)
    quantize_static(
        prepared,
        quantised,
        _Batches(calibration),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(quantised, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, x: Tensor) -> np.ndarray:
    outputs: np.ndarray = session.run(None, {_INPUT: x.numpy()})[0]
    return outputs
