"""The library without Python: ``check_level.c`` under the compiler's sanitizers, and on an emulated ARM machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import library

SOURCES = Path(library.__file__).parent / "src"
CHECK = Path(__file__).with_name("check_level.c")
# Not optimised: compiling the unrolled kernels with sanitizers and optimisation takes minutes.
FLAGS = ["-std=gnu11", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", f"-I{SOURCES}"]


def build(compiler: str, program: Path, *options: str) -> None:
    command = [compiler, *FLAGS, *options, *map(str, sorted(SOURCES.glob("*.c"))), str(CHECK), "-o", str(program)]
    result = subprocess.run([*command, "-pthread"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    build("gcc", tmp_path / "check", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g")
    # Threads are the same at every level.
    for level in cpu.info().available[-1 if sanitizer == "thread" else 0 :]:
        result = subprocess.run([tmp_path / "check", level], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_neon_on_an_emulated_machine(tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("no compiler and emulator for 64-bit ARM")
    build(compiler, tmp_path / "check", "-static", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror")
    for level in ("neon", "portable"):
        result = subprocess.run([emulator, tmp_path / "check", level], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
