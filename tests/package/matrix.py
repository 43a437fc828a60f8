"""Build the package, and install and run it with several versions of Python and PyTorch.

    python -m tests.package.matrix 3.10:2.9.1 3.13:2.15.0 --output benchmarks/results/packages.json
    python -m tests.package.matrix --docs    # writes the table of docs/stability.md from that file

Every pair gets an environment of its own, and in turn the wheel and the source distribution. Interpreters are looked
for as ``python3.x`` and as full paths. The test suite samples one pair, in the environment that it runs in.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.documents import fill, markdown

ROOT = Path(__file__).parent.parent.parent
SMOKE = Path(__file__).with_name("smoke.py")
RESULTS = ROOT / "benchmarks" / "results" / "packages.json"
DOCUMENT = ROOT / "docs" / "stability.md"


def build(folder: Path) -> tuple[Path, Path]:
    """Build the source distribution, and the wheel from it; returns both files."""
    # What git has: a checkout may hold the outputs of other builds.
    source = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    run([sys.executable, "-m", "build", "--outdir", folder / "dist", source], folder)
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    (wheel,) = (folder / "dist").glob("*.whl")
    return sdist, wheel


def run(command: Sequence[Any], cwd: Path, **environment: str) -> str:
    """Output of a command that must succeed.

    Raises:
        RuntimeError: it does not; with the end of what it printed.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command} failed:\n{(result.stdout + result.stderr)[-3000:]}")
    return result.stdout


def try_pair(python: str, torch: str, package: Path, folder: Path) -> dict[str, Any]:
    """Install a package file beside a version of PyTorch in a new environment, and run it there."""
    interpreter = shutil.which(python if "/" in python else f"python{python}")
    if interpreter is None:
        raise RuntimeError(f"there is no Python {python}")
    run([interpreter, "-m", "venv", folder], folder.parent)
    inside = folder / "bin" / "python"
    run([inside, "-m", "pip", "install", "-q", f"torch=={torch}", package], folder.parent)
    shutil.copy(SMOKE, folder / "smoke.py")
    found: dict[str, Any] = json.loads(
        run([inside, "-W", "error::DeprecationWarning:tbn_compiler", "smoke.py", folder], folder).splitlines()[-1]
    )
    return found | {"package": "wheel" if package.suffix == ".whl" else "source"}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """The pairs that were tried as a Markdown table; what a failed one printed is in the result file."""
    rows = []
    for result in results:
        # A pair that failed has the interpreter as it was asked for, which may be a path of somebody's machine.
        versions = [Path(result["python"]).name, result["torch"]]
        if "error" in result:
            rows.append([*versions, "", "", "**no**"])
        else:
            rows.append([*versions, result["package"], result["level"] or "none", "yes"])
    header = ["Python", "PyTorch", "package", "native kernels", "works"]
    return markdown(header, rows, left=header)


def _pair(text: str) -> tuple[str, str]:
    python, _, torch = text.rpartition(":")
    if not python or not torch:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form PYTHON:TORCH, as 3.10:2.9.1")
    return python, torch


def main(argv: Sequence[str] | None = None) -> int:
    """Try all pairs, or fill the document; the exit status is 1 if a pair fails."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pairs", nargs="*", type=_pair, metavar="PYTHON:TORCH", help="versions to try together")
    parser.add_argument("--output", type=Path, help="file for the results, as JSON")
    parser.add_argument("--docs", action="store_true", help=f"only fill docs/{DOCUMENT.name} from {RESULTS.name}")
    arguments = parser.parse_args(argv)
    if arguments.docs == bool(arguments.pairs):
        parser.error("name pairs to try, or give --docs alone")
    if arguments.docs:
        text = fill(DOCUMENT.read_text(), {"packages": table(json.loads(RESULTS.read_text()))})
        DOCUMENT.write_text(text)
        return 0
    results, failed = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        sdist, wheel = build(Path(temporary))
        for number, (python, torch) in enumerate(arguments.pairs):
            folder = Path(temporary) / "environment"
            try:
                result = try_pair(python, torch, sdist if number % 2 else wheel, folder)
            except RuntimeError as error:
                result, failed = {"python": python, "torch": torch, "error": str(error)}, failed + 1
            print(json.dumps(result), flush=True)
            results.append(result)
            shutil.rmtree(folder, ignore_errors=True)
            if arguments.output is not None:
                arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
