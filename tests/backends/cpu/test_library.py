"""The native library: that it is there, what it says, and what happens without it."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import declined, library
from tbn_compiler.errors import ConfigError
from tbn_compiler.ops import reference

tbn = torch.ops.tbn
CALL = (torch.ones(3, 96), torch.zeros(192, dtype=torch.uint8), torch.ones(1), None, 96, 64, 4)


def run(code: str, **environment: str) -> str:
    """Output of a fresh interpreter."""
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def test_library_is_built_where_there_is_a_compiler() -> None:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    assert library.load()[0] is not None, library.load()[1] + " (python setup.py build_ext --inplace)"


def test_every_level_that_the_machine_has_is_found() -> None:
    if library.load()[0] is None:
        pytest.skip(library.load()[1])
    assert cpu.info().available[-1] == "portable"
    flags = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    assert ("avx2" in cpu.info().available) == ({"avx2", "bmi2"} <= set(flags))
    assert ("avx512" in cpu.info().available) == ({"avx512f", "avx512bw", "avx512vl", "fma"} <= set(flags))
    assert ("avx512vnni" in cpu.info().available) == ({"avx512f", "avx512bw", "avx512vl", "avx512_vnni"} <= set(flags))
    assert "amx_int8" in flags or "avx512amx" not in cpu.info().available  # the system may forbid it
    assert cpu.info().level == cpu.info().available[0]


@pytest.mark.parametrize("name", ["LinearPlan", "ConvPlan"])
def test_structures_have_the_fields_of_the_header(name: str) -> None:
    header = (Path(library.__file__).parent / "src" / "tbn_cpu.h").read_text()
    struct = header.partition("struct tbn_" + name.removesuffix("Plan").lower() + " {")[2].partition("};")[0]
    declarations = re.findall(r"^ +(?:const )?(?:struct )?\w+ ([^;]+);", struct, re.MULTILINE)
    names = [re.sub(r"[*\s]|\[\d\]", "", name) for line in declarations for name in line.split(",")]
    assert names == [field[0] for field in getattr(library, name)._fields_]


def test_levels_are_chosen_by_name() -> None:
    with cpu.use_level("none"):
        assert cpu.info().level is None
        assert cpu.info().reason == "the native kernels are turned off"
        assert torch.equal(tbn.linear(*CALL), reference.linear(*CALL))
    with pytest.raises(ConfigError, match=f"CPU level 'sse' is not one of {', '.join(cpu.LEVELS)} or none"):
        cpu.set_level("sse")
    missing = next((level for level in cpu.LEVELS if level not in cpu.info().available), None)
    if missing:
        with pytest.raises(ConfigError, match=f"this machine does not run CPU level '{missing}'"):
            cpu.set_level(missing)
    default = cpu.info().level
    for level in cpu.info().available:
        cpu.set_level(level)
        assert cpu.info().level == level
    cpu.set_level(None)
    assert cpu.info().level == default


def test_environment_variable_chooses_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.load()[0] is None:
        pytest.skip(library.load()[1])
    with cpu.use_level(None):
        monkeypatch.setenv("TBN_CPU_LEVEL", "portable")
        assert cpu.info().level == "portable"
    with cpu.use_level(None):
        monkeypatch.setenv("TBN_CPU_LEVEL", "none")
        assert cpu.info().level is None
    with cpu.use_level(None):
        monkeypatch.setenv("TBN_CPU_LEVEL", "fast")
        with pytest.raises(ConfigError, match="CPU level 'fast'"):
            cpu.info()


@pytest.mark.parametrize("problem", ["none was built", "it does not load", "it is of another version"])
def test_without_the_library_pytorch_computes_and_info_says_why(
    problem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = None
    if problem == "it does not load":
        path = tmp_path / "broken.so"
        path.write_text("not a library")
    elif problem == "it is of another version":
        monkeypatch.setattr(library, "INTERFACE", -1)
        path = library.library_path()
    monkeypatch.setattr(library, "library_path", lambda: path)
    reason = {
        "none was built": "the installation found no C compiler",
        "it does not load": "the native library broken.so does not load",
        "it is of another version": "belongs to another version",
    }[problem]
    library.load.cache_clear()
    try:
        with cpu.use_level(None):
            info = cpu.info()
            assert info.level is None
            assert info.available == ()
            assert reason in info.reason or (path is None and "no C compiler" in info.reason)
            assert torch.equal(tbn.linear(*CALL), reference.linear(*CALL))
            assert any(info.reason in text for text in cpu.info().declined)
    finally:
        library.load.cache_clear()


def test_each_reason_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declined, "_counts", type(declined._counts)())
    with caplog.at_level(logging.INFO, logger=declined.__name__):
        declined.decline("linear", "a reason")
        declined.decline("linear", "a reason")
    assert [record.message for record in caplog.records] == ["tbn::linear: a reason: PyTorch computes it"]
    assert declined.counts() == {"tbn::linear: a reason": 2}


def test_import_opens_no_library() -> None:
    code = (
        "import tbn_compiler\nfrom tbn_compiler.backends.cpu import library\nprint(library.load.cache_info().currsize)"
    )
    assert run(code) == "0"


def test_library_needs_nothing_but_the_c_library() -> None:
    """One build serves every version of PyTorch and Python."""
    path = library.library_path()
    if path is None or not shutil.which("readelf"):
        pytest.skip("no library, or no readelf")
    dynamic = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
    needed = [line.partition("[")[2].partition("]")[0] for line in dynamic.splitlines() if "NEEDED" in line]
    assert {name.partition(".")[0] for name in needed} <= {"libc", "libm", "libpthread"}


def test_sources_compile_without_warnings(tmp_path: Path) -> None:
    compilers = [name for name in ("gcc", "clang") if shutil.which(name)]
    if not compilers:
        pytest.skip("no C compiler")
    sources = sorted((Path(library.__file__).parent / "src").glob("*.c"))
    flags = ["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Wconversion", "-Wshadow", "-Werror", "-fsyntax-only"]
    for compiler in compilers:
        result = subprocess.run([compiler, *flags, *map(str, sources)], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
