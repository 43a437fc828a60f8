"""Memory that TensorFlow Lite for Microcontrollers (TFLM) takes for the networks of MLPerf Tiny in int8.

    pip install tensorflow tflite-micro    # beside this project, which does not depend on them
    python -m benchmarks.tflm [--out FILE.json]

The networks of ``examples/mcu/tiny.py`` are built in Keras with the same weights and converted as TensorFlow Lite does
it: batch-norm folded, int8 in and out, a scale for each channel of a convolution. TFLM's interpreter, here on this
computer, records what it takes from its arena. The head holds inputs, outputs, tensors between layers and scratch
buffers; it is that of a microcontroller with the same kernels, the reference ones. The tail holds factors of channels,
and structs with pointers, which are larger in 64 bits. ``python -m benchmarks.report`` then writes the table of
``docs/mcu.md``.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.machine import machine
from benchmarks.mcu import network
from examples.documents import markdown
from examples.mcu.tiny import NETWORKS, with_statistics

RESULT = Path(__file__).parent / "results" / "tflm.json"
SAMPLES = 64  # of random inputs, for the ranges of int8
ARENA = 1 << 20  # bytes; more than any of the networks takes
CORE = "cortex-m4"


def to_keras(model: nn.Module, shape: tuple[int, ...]) -> Any:
    """The Keras model that computes on turned images what ``model`` computes: ``keras(turned(x)) == model(x)``.

    Where both ends of an axis cannot be padded alike, TensorFlow's ``same`` pads the end, and these networks the
    beginning. Turning images and kernels by half a turn saves the padded copy that TFLM would need otherwise. What is
    left is that windows of one pixel with a stride begin at the other end (:func:`begin_at_the_end`).

    Args:
        model: a network of modules that run one after the other, ``[N, *shape]`` to ``[N, classes]``.
        shape: ``(C, H, W)`` or ``(features,)``; the Keras model reads ``[1, H, W, C]`` or ``[1, features]``.

    Raises:
        TypeError: a module has no counterpart here.
    """
    import keras

    inputs = keras.Input(batch_shape=(1, *shape[1:], shape[0]))
    return keras.Model(inputs, _apply(model, inputs))


def _apply(module: nn.Module, x: Any) -> Any:
    """The layers of ``module`` behind ``x``, with its weights."""
    from keras import layers

    if isinstance(module, nn.Sequential):
        for child in module.children():
            x = _apply(child, x)
        return x
    if hasattr(module, "shortcut"):
        body, shortcut = module.get_submodule("body"), module.get_submodule("shortcut")
        return layers.ReLU()(layers.Add()([_apply(body, x), _apply(shortcut, x)]))
    if isinstance(module, nn.Identity):
        return x
    if isinstance(module, nn.ReLU):
        return layers.ReLU()(x)
    if isinstance(module, nn.Flatten):
        return layers.Flatten()(x)
    if isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d):  # both take the whole image
        return layers.AveragePooling2D(x.shape[1:3])(x)
    layer, weights = _weighted(module)
    x = layer(x)
    layer.set_weights([weight.detach().numpy() for weight in weights])
    return x


def _weighted(module: nn.Module) -> tuple[Any, list[Tensor]]:
    """The Keras layer of a layer with weights, and these in its order."""
    from keras import layers

    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        assert module.running_mean is not None
        assert module.running_var is not None
        weights: list[Tensor] = [module.weight, module.bias, module.running_mean, module.running_var]
        return layers.BatchNormalization(epsilon=module.eps), weights
    if isinstance(module, nn.Linear):
        bias = [] if module.bias is None else [module.bias]
        return layers.Dense(module.out_features, use_bias=bool(bias)), [module.weight.T, *bias]
    if isinstance(module, nn.Conv2d):
        bias = [] if module.bias is None else [module.bias]
        options = {"strides": module.stride, "padding": "same", "use_bias": bool(bias)}
        turned = module.weight.flip(2, 3)  # OIHW
        if module.groups == 1:
            layer = layers.Conv2D(module.out_channels, module.kernel_size, **options)
            return layer, [turned.permute(2, 3, 1, 0), *bias]
        if module.groups == module.in_channels == module.out_channels:
            return layers.DepthwiseConv2D(module.kernel_size, **options), [turned.permute(2, 3, 0, 1), *bias]
    raise TypeError(f"{module} has no counterpart in Keras here")


def begin_at_the_end(model: nn.Module) -> None:
    """Let windows of one pixel with a stride read the pixels that they read in a turned image."""

    def crop(layer: nn.Conv2d, inputs: tuple[Tensor]) -> Tensor:
        top, left = ((size - 1) % step for size, step in zip(inputs[0].shape[2:], layer.stride, strict=True))
        return inputs[0][:, :, top:, left:]

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
            layer.register_forward_pre_hook(crop)


def turned(x: Tensor) -> np.ndarray[Any, Any]:
    """Inputs as the Keras model reads them: images ``[N, C, H, W]`` as ``[N, H, W, C]``, turned by half a turn."""
    return x.flip(2, 3).permute(0, 2, 3, 1).numpy() if x.dim() == 4 else x.numpy()


def to_int8(model: Any, samples: np.ndarray[Any, Any]) -> bytes:
    """A Keras model as a TensorFlow Lite file in int8, inputs and outputs too.

    It has no names, and one scale for all outputs of a linear layer, for which TFLM needs less flash and RAM.

    Args:
        model: from :func:`to_keras`.
        samples: inputs ``[N, ...]`` that the ranges of int8 are taken from.
    """
    import tensorflow as tf
    from tensorflow.lite.tools import flatbuffer_utils

    converter = tf.lite.TFLiteConverter.from_keras_model(model)
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    converter._experimental_disable_per_channel_quantization_for_dense_layers = True
    with contextlib.redirect_stdout(io.StringIO()):
        file = converter.convert()
    found = flatbuffer_utils.convert_bytearray_to_object(file)
    flatbuffer_utils.strip_strings(found)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(found))


def measure(name: str) -> dict[str, Any]:
    """Convert one network and run it on one input: what it takes, and how far its output is from that of PyTorch.

    Raises:
        RuntimeError: the Keras model computes something else.
    """
    from tflite_micro import runtime

    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    module = with_statistics(make())
    samples = torch.randn(SAMPLES, *shape)
    inputs = turned(samples)
    model = to_keras(module, shape)
    begin_at_the_end(module)
    with torch.no_grad():
        expected = module(samples[:1]).numpy()
    if (error := _relative(model(inputs[:1]).numpy(), expected)) > 1e-5:
        raise RuntimeError(f"{name}: the output of the Keras model is off by {error:.1e} of the largest element")
    file = to_int8(model, inputs)
    interpreter = runtime.Interpreter.from_bytes(file, arena_size=ARENA)
    scale, zero = _quantization(interpreter.get_input_details(0))
    x = np.clip(np.round(inputs[:1] / scale + zero), -128, 127).astype(np.int8)
    interpreter.set_input(x, 0)
    interpreter.invoke()
    y = interpreter.get_output(0)
    scale, zero = _quantization(interpreter.get_output_details(0))
    return {
        "network": name,
        "parameters": sum(math.prod(weight.shape) for weight in model.trainable_weights),
        "file_bytes": len(file),
        **allocations(_printed(interpreter.print_allocations)),
        "input_output_bytes": x.nbytes + y.nbytes,
        "relative_error": _relative((y.astype(np.float32) - zero) * scale, expected),
    }


def _quantization(details: dict[str, Any]) -> tuple[float, int]:
    """Scale and zero point of an input or output."""
    found = details["quantization_parameters"]
    return float(found["scales"][0]), int(found["zero_points"][0])


def _relative(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _printed(call: Callable[[], None]) -> str:
    """What a call prints on standard error, below Python."""
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            call()
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return file.read()


def allocations(printed: str) -> dict[str, int]:
    """Bytes of the head and the tail of the arena, from what TFLM's recording allocator prints.

    Raises:
        ValueError: they are not in it.
    """
    found = dict(re.findall(r"Arena allocation (head|tail) (\d+) bytes", printed))
    if found.keys() != {"head", "tail"}:
        raise ValueError(f"TFLM did not print the head and the tail of its arena, but {printed!r}")
    return {f"{part}_bytes": int(found[part]) for part in ("head", "tail")}


def table(rows: Sequence[dict[str, Any]], cases: Sequence[dict[str, Any]]) -> str:
    """Networks with integers in and out beside TFLM's, as a Markdown table.

    Args:
        rows: of the result file of this benchmark.
        cases: of the one of ``benchmarks/mcu.py``.
    """
    found = {case["model"]: case for case in cases if (case["cpu"], case["kernels"]) == (CORE, "integers")}
    titles = ["network", "flash B", ".tflite B", "ratio", "RAM, in, out B"]
    titles += ["TFLM's head B", "ratio", "tail B", "ratio to both"]
    cells = []
    for row in rows:
        case = found[network(row["network"])]
        memory = case["static_bytes"] + case["stack_bytes"] + case["input_output_bytes"]
        flash, file, head, tail = case["flash_bytes"], row["file_bytes"], row["head_bytes"], row["tail_bytes"]
        sizes = [f"{flash:,}", f"{file:,}", f"{flash / file:.2f}", f"{memory:,}"]
        sizes += [f"{head:,}", f"{memory / head:.2f}", f"{tail:,}", f"{memory / (head + tail):.2f}"]
        cells.append([row["network"], *sizes])
    return markdown(titles, cells)


def versions(result: dict[str, Any]) -> str:
    """What was measured with, as a sentence."""
    found = result["machine"]
    used = f"tflite-micro {found['tflite-micro']} and TensorFlow {found['tensorflow']}"
    return f"Measured with {used} on {found['date']}."


def main() -> int:
    """Measure all networks and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULT, help="result file (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        import tensorflow
        import tflite_micro
    except ImportError as error:
        parser.error(f"{error}; this benchmark needs: pip install tensorflow tflite-micro")
    rows = [measure(name) for name in NETWORKS]
    used = {"tflite-micro": tflite_micro.__version__, "tensorflow": tensorflow.__version__}
    arguments.out.write_text(json.dumps({"machine": machine(**used), "rows": rows}, indent=2) + "\n")
    for row in rows:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
