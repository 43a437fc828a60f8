"""Compile the kernels that a call launches for a GPU that is not there, from the wrapper's own arguments."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class _Driver:
    """What Triton's launcher asks of a driver before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # compiled kernels are kept for each device

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextmanager
def compiling(target: str) -> Iterator[list[Any]]:
    """Launches inside the block only compile; the compiled kernels are collected."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append(run(self, *args, warmup=True, **kwargs))

    # Not reset_active(): that looks for a real driver.
    driver = mock.patch.object(triton.runtime.driver, "_active", _Driver(TARGETS[target]))
    with driver, mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


def resources(kernel: Any, folder: Path) -> dict[str, int]:
    """Registers, spilled bytes and shared memory of a kernel for NVIDIA, as its assembler reports them."""
    arch = re.search(r"\.target (\w+)", kernel.asm["ptx"])
    assert arch is not None
    tool = "ptxas-blackwell" if arch[1].startswith("sm_10") else "ptxas"
    source = folder / "kernel.ptx"
    source.write_text(kernel.asm["ptx"])
    command = [
        os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", tool),
        *("-v", f"--gpu-name={arch[1]}", str(source), "-o", str(folder / "kernel.cubin")),
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", report))
    registers = re.search(r"Used (\d+) registers", report)
    assert registers is not None, report
    return {
        "registers": int(registers[1]),
        "spilled": spills,
        "shared": kernel.metadata.shared,
        "serialized": "wgmma.mma_async instructions are serialized" in report,
    }
