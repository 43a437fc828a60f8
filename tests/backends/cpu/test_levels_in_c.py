"""The library without Python: ``check_level.c`` under the compiler's sanitizers, on an emulated ARM machine, in ISO C
alone, and as a DLL for Windows. Its checksum is that of all results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import library

SOURCES = Path(library.__file__).parent / "src"
CHECK = Path(__file__).with_name("check_level.c")
SMOKE = Path(__file__).parents[2] / "package" / "smoke.py"
# Not optimised: compiling the unrolled kernels with sanitizers and optimisation takes minutes.
FLAGS = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", f"-I{SOURCES}"]
WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror"]
ISO_C = ["-std=c11", "-DTBN_ISO_C", "-pedantic-errors", "-Wvla", *WARNINGS]
WINE_PATH = os.pathsep.join([os.environ["PATH"], "/usr/lib/wine"])  # where Debian puts it without its wrapper
LIBRARY = sorted(SOURCES.glob("*.c"))


def build(compiler: str, program: Path, *options: str, sources: Sequence[Path] = (*LIBRARY, CHECK)) -> None:
    standard = [] if any(option.startswith("-std=") for option in options) else ["-std=gnu11"]
    command = [compiler, *standard, *FLAGS, *options, *map(str, sources), "-o", str(program)]
    result = subprocess.run([*command, "-pthread", "-lm"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def checksum(*command: str | Path, **environment: str) -> str:
    """What a program prints that finds all results equal to those of plain loops."""
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("checksum "), result.stdout
    return result.stdout.strip()


@pytest.fixture(scope="module")
def portable(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The checksum of the portable level of the package's own library."""
    compiler, path = shutil.which("gcc"), library.library_path()
    if compiler is None or path is None:
        pytest.skip("no gcc, or no library")
    program = tmp_path_factory.mktemp("portable") / "check"
    build(compiler, program, f"-Wl,-rpath={path.parent}", sources=[CHECK, path])
    return checksum(program, "portable")


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer: str, tmp_path: Path) -> None:
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    build("gcc", tmp_path / "check", f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g")
    # Threads are the same at every level.
    for level in cpu.info().available[-1 if sanitizer == "thread" else 0 :]:
        checksum(tmp_path / "check", level)


def test_neon_on_an_emulated_machine(portable: str, tmp_path: Path) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("no compiler and emulator for 64-bit ARM")
    build(compiler, tmp_path / "check", "-static", *WARNINGS)
    checksum(emulator, tmp_path / "check", "neon")
    assert checksum(emulator, tmp_path / "check", "portable") == portable


def test_iso_c_is_enough(portable: str, tmp_path: Path) -> None:
    """The C that MSVC takes, without attributes, vectors, or built-in functions. There is the portable level alone."""
    build("gcc", tmp_path / "check", *ISO_C)
    assert checksum(tmp_path / "check", "portable") == portable
    others = [subprocess.run([tmp_path / "check", level]).returncode for level in cpu.LEVELS if level != "portable"]
    assert set(others) == {2}


def test_pytorch_calls_the_library_in_iso_c(tmp_path: Path) -> None:
    """What an installed package has to do, with this library in the place of the package's own."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc")
    build("gcc", tmp_path / "library.so", *ISO_C, "-O1", "-shared", "-fPIC", sources=LIBRARY)
    code = (
        "import pathlib, runpy, sys\n"
        "from tbn_compiler.backends.cpu import library\n"
        "path = pathlib.Path(sys.argv.pop())\n"
        "library.library_path = lambda: path\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-c", code, SMOKE, "--native", SMOKE.parents[2], tmp_path / "library.so"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["level"] == "portable"


def test_windows(portable: str, tmp_path: Path) -> None:
    """A DLL with threads of Windows, in ISO C with the functions that MSVC has for atomic values."""
    compiler, wine = shutil.which("x86_64-w64-mingw32-gcc"), shutil.which("wine64", path=WINE_PATH)
    if not compiler or not wine:
        pytest.skip("no compiler for Windows, or no wine")
    options = [*ISO_C, "-DTBN_INTERLOCKED"]
    build(compiler, tmp_path / "_tbn_cpu.dll", *options, "-shared", sources=LIBRARY)
    build(compiler, tmp_path / "check.exe", *options, sources=[CHECK, tmp_path / "_tbn_cpu.dll"])
    environment = {"WINEPREFIX": str(tmp_path / "wine"), "WINEDEBUG": "-all", "WINEDLLOVERRIDES": "mscoree,mshtml="}
    assert checksum(wine, tmp_path / "check.exe", "portable", **environment) == portable
