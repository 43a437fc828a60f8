"""What is registered for CUDA devices, and what happens without triton."""

from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

import tbn_compiler  # noqa: F401  (registers the operators)
from tbn_compiler.backends import triton as backend
from tbn_compiler.ops import reference
from tbn_compiler.packing import pack_bits


@pytest.mark.parametrize("op", ["linear", "conv1d", "conv2d", "conv3d"])
def test_cuda_kernels_are_registered(op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"tbn::{op}", "CUDA")


def test_registering_imports_no_triton() -> None:
    code = "import sys, torch; before = 'triton' in sys.modules; import tbn_compiler; "
    code += "print(before or 'triton' not in sys.modules, 'tbn_compiler.backends.triton.linear' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]


def test_info() -> None:
    pytest.importorskip("triton")
    found = backend.info()
    assert (found.kernels, found.reason) == ("triton", "")
    assert found.torch == torch.__version__


@pytest.fixture
def _without_triton(monkeypatch: pytest.MonkeyPatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find(name))
    backend.unavailable.cache_clear()
    monkeypatch.setattr(backend, "_declined", {})
    yield
    backend.unavailable.cache_clear()


@pytest.mark.usefixtures("_without_triton")
def test_without_triton(caplog: pytest.LogCaptureFixture) -> None:
    found = backend.info()
    assert found.kernels == "reference"
    assert "pip install" in found.reason
    kernel = backend.kernel("linear")
    args = (torch.randn(3, 64), pack_bits(torch.randn(16 * 64)), torch.ones(1), None, 64, 64, 4)
    with caplog.at_level(logging.INFO, logger="tbn_compiler.backends.triton"):
        assert torch.equal(kernel(*args), reference.linear(*args))
        kernel(*args)
    assert list(backend.info().declined.values()) == [2]
    assert ["triton is not installed" in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("device", "layout", "expected"),
    [
        ("cuda", torch.contiguous_format, torch.contiguous_format),
        ("cuda", torch.channels_last, torch.channels_last),
        ("cpu", torch.channels_last, torch.channels_last),
    ],
)
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("hadamard", [False, True])
def test_fakes_have_the_strides_of_the_kernels(
    device: str, layout: torch.memory_format, expected: torch.memory_format, kernel: int, hadamard: bool
) -> None:
    """Compiled code counts on the strides that the fake of an operator has."""
    with FakeTensorMode():
        tile = torch.empty(16 * 8 * kernel**2 // 4 // 8, dtype=torch.uint8, device=device)
        x = torch.empty(2, 8, 7, 6, device=device, memory_format=layout)
        args = (tile, torch.ones(1, device=device), None, 8, 16, (kernel, kernel), 4)
        out = torch.ops.tbn.conv2d(x, *args, hadamard=hadamard)
        assert out.is_contiguous(memory_format=expected)
        unbatched = torch.empty(8, 7, 6, device=device)
        in_neither = torch.empty_strided((2, 8, 7, 6), (672, 1, 96, 16), device=device)
        assert torch.ops.tbn.conv2d(unbatched, *args).is_contiguous()
        assert torch.ops.tbn.conv2d(in_neither, *args).is_contiguous()


@pytest.mark.usefixtures("_without_triton")
def test_without_triton_the_strides_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = backend.kernel("conv2d")
    x = torch.randn(2, 8, 7, 6).to(memory_format=torch.channels_last)
    args = (pack_bits(torch.randn(16 * 8 * 9 // 4)), torch.ones(1), None, 8, 16, (3, 3), 4)
    out = kernel(x, *args)
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out, reference.KERNELS["conv2d"](x, *args))
