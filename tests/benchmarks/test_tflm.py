"""Memory beside TensorFlow Lite for Microcontrollers: the stored result, and what needs no TensorFlow."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import mcu, tflm
from benchmarks.tflm import allocations, begin_at_the_end, table, turned, versions
from examples.mcu.tiny import NETWORKS, multiply_adds

ROOT = Path(__file__).parents[2]
PRINTED = """\
[RecordingMicroAllocator] Arena allocation total 24048 bytes
[RecordingMicroAllocator] Arena allocation head 16000 bytes
[RecordingMicroAllocator] Arena allocation tail 8048 bytes
[RecordingMicroAllocator] 'TfLiteEvalTensor data' used 768 bytes with alignment overhead
"""


def test_the_result_is_of_our_networks() -> None:
    result = json.loads(tflm.RESULT.read_text())
    assert [row["network"] for row in result["rows"]] == list(NETWORKS)
    ours = {
        case["model"]: case
        for case in json.loads(mcu.RESULT.read_text())["cases"]
        if (case["kernels"], case["cpu"]) == ("integers", "cortex-m4")
    }
    for row in result["rows"]:
        make, shape = NETWORKS[row["network"]]
        model = make()
        assert row["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert row["input_output_bytes"] == ours[mcu.network(row["network"])]["input_output_bytes"]
        assert row["head_bytes"] >= math.prod(shape)
        assert row["file_bytes"] > sum(value.numel() for value in model.parameters() if value.dim() > 1)
        assert 0 < row["relative_error"] < 0.02  # int8, but the same network


def test_the_table_compares_like_with_like() -> None:
    row = {"network": "a", "file_bytes": 40_000, "head_bytes": 2_000, "tail_bytes": 500}
    case = {"model": "network: a", "kernels": "integers", "cpu": "cortex-m4", "flash_bytes": 5_000}
    case |= {"static_bytes": 900, "stack_bytes": 90, "input_output_bytes": 10}
    others = [case | {"kernels": "int8", "flash_bytes": 1}, case | {"cpu": "cortex-m0plus", "flash_bytes": 2}]
    header, _, line = table([row], [others[0], case, others[1]]).splitlines()
    assert header.count("|") == line.count("|")
    assert line == "| a | 5,000 | 40,000 | 0.12 | 1,000 | 2,000 | 0.50 | 500 | 0.40 |"


def test_versions_are_a_sentence() -> None:
    found = {"machine": {"tflite-micro": "0.1", "tensorflow": "2.3", "date": "2026-01-02"}}
    assert versions(found) == "Measured with tflite-micro 0.1 and TensorFlow 2.3 on 2026-01-02."


def test_sizes_are_read_from_what_the_allocator_prints() -> None:
    assert allocations(PRINTED) == {"head_bytes": 16_000, "tail_bytes": 8_048}
    with pytest.raises(ValueError, match="did not print the head and the tail"):
        allocations(PRINTED.replace("tail", "end"))


def test_standard_error_below_python_is_read_and_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    assert tflm._printed(lambda: os.system("echo inside >&2")) == "inside\n"
    os.write(2, b"behind\n")
    assert capfd.readouterr().err == "behind\n"


def padded_at_the_end(x: torch.Tensor, layer: nn.Conv2d) -> torch.Tensor:
    """A convolution padded as TensorFlow's ``same``, with the kernel turned by half a turn."""
    pads = []
    for size, kernel, step in zip(x.shape[:1:-1], layer.kernel_size[::-1], layer.stride[::-1], strict=True):
        total = max((math.ceil(size / step) - 1) * step + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    weight = layer.weight.flip(2, 3)
    return nn.functional.conv2d(nn.functional.pad(x, pads), weight, layer.bias, layer.stride, groups=layer.groups)


@pytest.mark.parametrize("name", ["keywords, DS-CNN", "images, ResNet8", "wake words, MobileNetV1 0.25"])
def test_turned_images_need_no_padded_copy(name: str) -> None:
    """Each convolution of the networks computes on a turned image, padded at the end, what it computes here."""
    make, shape = NETWORKS[name]
    model = make().eval()
    begin_at_the_end(model)
    compared = 0

    def compare(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal compared
        assert isinstance(layer, nn.Conv2d)
        found = padded_at_the_end(images[layer].flip(2, 3), layer).flip(2, 3)
        torch.testing.assert_close(found, output)
        compared += 1

    images: dict[nn.Module, torch.Tensor] = {}
    for layer in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        # Before the hook that crops.
        layer.register_forward_pre_hook(lambda layer, inputs: images.update({layer: inputs[0]}), prepend=True)
        layer.register_forward_hook(compare)
    with torch.no_grad():
        model(torch.randn(1, *shape))
    assert compared == sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert multiply_adds(model, shape) == multiply_adds(make().eval(), shape)  # shapes stay


def test_inputs_are_turned_with_their_channels_last() -> None:
    x = torch.arange(2 * 3 * 4).reshape(1, 2, 3, 4)
    assert turned(x).shape == (1, 3, 4, 2)
    assert turned(x)[0, 0, 0].tolist() == x[0, :, -1, -1].tolist()
    assert turned(x[0, 0]).tolist() == x[0, 0].tolist()


def test_the_program_says_what_it_needs() -> None:
    """In a process where TensorFlow cannot be imported."""
    code = "import sys; sys.modules['tensorflow'] = None; from benchmarks import tflm; sys.exit(tflm.main())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "this benchmark needs: pip install tensorflow tflite-micro" in result.stderr
    assert "Traceback" not in result.stderr
