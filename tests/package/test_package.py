"""The files that are published: what is in them, for whom they are, and that they run where nothing else is."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
from setuptools.command.build_ext import build_ext

import tbn_compiler
from examples.documents import fill
from tests.package import matrix

pytest.importorskip("build")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return matrix.build(tmp_path_factory.mktemp("package"))


def _tracked(folder: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", folder], cwd=matrix.ROOT, capture_output=True, text=True, check=True)
    return set(listed.stdout.split())


def test_contents(files: tuple[Path, Path]) -> None:
    """Every file of the package, the library, and nothing from beside it."""
    sdist, wheel = files
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == _tracked("tbn_compiler") | {"tbn_compiler/backends/cpu/_tbn_cpu.so"}
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert _tracked("tbn_compiler") <= inside
    assert {"README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml", "setup.py"} <= inside
    assert not [name for name in inside if name.startswith(("tests/", "benchmarks/"))]


def test_for_every_python_on_its_platform(files: tuple[Path, Path]) -> None:
    _, wheel = files
    assert re.fullmatch(r"tbn_compiler-.*-py3-none-\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        (tags,) = (name for name in archive.namelist() if name.endswith("/WHEEL"))
        assert "Root-Is-Purelib: false" in archive.read(tags).decode()


def test_description(files: tuple[Path, Path]) -> None:
    """The package index shows the README, where links into the repository lead nowhere."""
    _, wheel = files
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        message = Parser().parsestr(archive.read(metadata).decode())
    assert message["Version"] == tbn_compiler.__version__
    assert message["Description-Content-Type"] == "text/markdown"
    assert message["Author"]
    description = str(message.get_payload())
    assert "tbn.transform(" in description
    assert re.findall(r"\]\((?!https?://|#)[^)]*\)", description) == []


def test_the_library_needs_only_old_parts_of_the_c_library(files: tuple[Path, Path]) -> None:
    """``auditwheel`` finds a manylinux tag: nothing but the C library is linked."""
    pytest.importorskip("auditwheel")
    shown = matrix.run([sys.executable, "-m", "auditwheel", "show", files[1]], files[1].parent)
    assert re.search(r'following platform\s+tag: "manylinux_2_\d+_\w+"', " ".join(shown.split()))


def test_the_installed_package_runs(files: tuple[Path, Path], tmp_path: Path) -> None:
    """Beside the dependencies of this environment; ``python -m tests.package.matrix`` tries others."""
    target = tmp_path / "installed"
    matrix.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", target, files[1]], tmp_path)
    (tmp_path / "smoke.py").write_text(matrix.SMOKE.read_text())
    output = matrix.run([sys.executable, "smoke.py", "--native", target], tmp_path, PYTHONPATH=str(target))
    found = json.loads(output.splitlines()[-1])
    assert found["tbn-compiler"] == tbn_compiler.__version__
    assert found["level"] is not None


def test_each_compiler_gets_its_own_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """MSVC knows none of GCC's; the workflow that checks the kernels with it takes those of the wheels."""
    monkeypatch.chdir(matrix.ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    script = runpy.run_path("setup.py")
    monkeypatch.setattr(build_ext, "build_extension", lambda command, extension: None)
    command = script["BuildLibrary"](setuptools.Distribution())
    extension = setuptools.Extension("library", [])
    for kind, options, link in (("unix", "OPTIONS", ["-pthread", "-lm"]), ("msvc", "MSVC_OPTIONS", [])):
        command.compiler = SimpleNamespace(compiler_type=kind)
        command.build_extension(extension)
        assert tuple(extension.extra_compile_args) == script[options]
        assert extension.extra_link_args == link
    assert all(option.startswith("/") for option in script["MSVC_OPTIONS"])
    workflow = (matrix.ROOT / ".github" / "workflows" / "wheels.yml").read_text()
    assert f"cl /nologo {' '.join(script['MSVC_OPTIONS'])} /W4" in workflow


WORKED = {"python": "3.10.13", "torch": "2.9.1+cu128", "level": "avx512vnni", "package": "wheel", "loss": 0.2}
FAILED = {"python": "/opt/python/bin/python3.13", "torch": "2.15.0", "error": "no such version\n| of many |"}


def test_the_table_of_tried_pairs() -> None:
    assert matrix.table([WORKED, WORKED | {"level": None, "package": "source"}, FAILED]).splitlines()[2:] == [
        "| 3.10.13 | 2.9.1+cu128 | wheel | avx512vnni | yes |",
        "| 3.10.13 | 2.9.1+cu128 | source | none | yes |",
        "| python3.13 | 2.15.0 |  |  | **no** |",
    ]


def test_docs_writes_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "packages.json")
    monkeypatch.setattr(matrix, "DOCUMENT", tmp_path / "page.md")
    matrix.RESULTS.write_text(json.dumps([WORKED, FAILED]))
    matrix.DOCUMENT.write_text("before\n<!-- packages -->\nold\n<!-- end -->\nbehind\n")
    assert matrix.main(["--docs"]) == 0
    made = matrix.table([WORKED, FAILED])
    assert matrix.DOCUMENT.read_text() == f"before\n<!-- packages -->\n{made}\n<!-- end -->\nbehind\n"


@pytest.mark.parametrize("arguments", [[], ["3.10:2.9.1", "--docs"]])
def test_either_pairs_or_docs(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        matrix.main(arguments)
    assert "name pairs to try, or give --docs alone" in capsys.readouterr().err


def test_the_page_shows_the_results() -> None:
    if not matrix.RESULTS.exists():
        pytest.skip("no pairs were tried")
    document = matrix.DOCUMENT.read_text()
    assert fill(document, {"packages": matrix.table(json.loads(matrix.RESULTS.read_text()))}) == document
