"""The compilers that the tests of the C backend use, and what they are called with."""

from __future__ import annotations

import functools
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from tbn_compiler.backends.c import Plan, export_c, host
from tbn_compiler.backends.c.mcu import CPUS, missing_tool
from tbn_compiler.backends.c.options import OptimizeFor

WARNINGS = (
    "-Wall",
    "-Wextra",
    "-Werror",
    "-pedantic",
    "-Wconversion",
    "-Wdouble-promotion",
    "-Wshadow",
    "-Wundef",
)
_SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")

needs_cc = pytest.mark.skipif(host.find_compiler() is None, reason="no C compiler ($CC, cc, gcc, clang)")
needs_arm = pytest.mark.skipif(missing_tool() is not None, reason=f"no {missing_tool()}: cannot emulate a Cortex-M")
needs_riscv = pytest.mark.skipif(
    missing_tool(CPUS["rv32imac"]) is not None, reason=f"no {missing_tool(CPUS['rv32imac'])}: cannot emulate RISC-V"
)
# Every emulated processor whose tools are there.
EMULATED = [pytest.param(name, marks=needs_riscv if name.startswith("rv32") else needs_arm) for name in CPUS]
needs_cxx = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")


@functools.cache
def sanitizer_flags() -> tuple[str, ...]:
    """The sanitizers' options; empty where the compiler comes without their libraries."""
    compiler = host.find_compiler()
    assert compiler is not None
    command = [*shlex.split(compiler), *_SANITIZE, "-x", "c", "-", "-o", "/dev/null"]
    found = subprocess.run(command, input=b"int main(void) { return 0; }", capture_output=True).returncode == 0
    return _SANITIZE if found else ()


def run_strict(source: Path, inputs: torch.Tensor, **options: str) -> np.ndarray:
    """Compile with every warning as an error and with sanitizers, unoptimised because that is fastest, and run."""
    return host.run(source, inputs, flags=("-O0", *WARNINGS, *sanitizer_flags()), **options)


def assert_matches_torch(
    module: torch.nn.Module, inputs: torch.Tensor, folder: Path, optimize: OptimizeFor = "balanced", **options: str
) -> Plan:
    """Export a module for one sample, compare the compiled program with PyTorch on a batch, and return the plan."""
    plan = export_c(module, inputs[:1], folder / "net.c", name="net", optimize=optimize, **options)
    actual = torch.from_numpy(run_strict(folder / "net.c", inputs, name="net", **options))
    with torch.no_grad():
        expected = module.eval()(inputs).reshape(len(inputs), -1)
    assert expected.isfinite().all()
    error = (actual - expected).abs().max().item()
    assert error <= 1e-5 * expected.abs().max().item()
    return plan
