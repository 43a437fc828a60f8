"""Running an exported model on this computer, to check or to show it."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tbn_compiler.backends.c.emit import emit_host_main
from tbn_compiler.errors import ExportError

_DEFAULT_FLAGS = ("-O2",)


def find_compiler() -> str | None:
    """The host's C compiler: ``$CC``, else the first of cc, gcc and clang on the path, else ``None``."""
    candidates = [os.environ.get("CC", ""), "cc", "gcc", "clang"]
    return next((name for name in candidates if name and shutil.which(shlex.split(name)[0])), None)


def build(
    source: str | os.PathLike[str],
    executable: str | os.PathLike[str],
    *,
    name: str = "model",
    scratch: str = "static",
    flags: Sequence[str] = _DEFAULT_FLAGS,
) -> None:
    """Compile an exported model into a program that maps inputs on standard input to outputs on standard output.

    Args:
        source: the ``.c`` file; its header lies beside it.
        executable: program to write.
        name: the ``name`` that the model was exported with.
        scratch: the ``scratch`` that it was exported with.
        flags: further options of the compiler; ``-std=c99`` is given always.

    Raises:
        ExportError: there is no compiler, or it reports an error; its output is in the message.
    """
    compiler = find_compiler()
    if compiler is None:
        raise ExportError("no C compiler found: set CC, or install cc, gcc or clang")
    source = Path(source).resolve()
    with tempfile.TemporaryDirectory() as folder:
        main = Path(folder, "main.c")
        main.write_text(emit_host_main(name, scratch, source.with_suffix(".h").name))
        command = [*shlex.split(compiler), "-std=c99", *flags, f"-I{source.parent}", str(main), str(source)]
        result = subprocess.run([*command, "-o", str(executable), "-lm"], capture_output=True, text=True)
    if result.returncode:
        raise ExportError(f"{compiler} cannot compile {source}:\n{result.stderr}")


def run_executable(executable: str | os.PathLike[str], inputs: Any) -> np.ndarray:
    """Run a program that :func:`build` made.

    Args:
        executable: the program.
        inputs: tensor or array ``[batch, *input shape]``, converted to float32.

    Returns:
        ``float32 [batch, output size]``: outputs are flat.

    Raises:
        ExportError: the program fails, or the inputs do not have the size of the model's input.
    """
    array = np.asarray(torch.as_tensor(inputs).detach().cpu().numpy(), np.float32, order="C")
    if array.ndim == 0 or array.size == 0:
        raise ExportError(f"inputs must have the shape [batch, *input shape], got {list(array.shape)}")
    command = [str(executable), str(array[0].size)]
    result = subprocess.run(command, input=array.tobytes(), capture_output=True)
    if result.returncode:
        message = result.stderr.decode(errors="replace")
        raise ExportError(
            f"the compiled model stopped with code {result.returncode} on inputs {list(array.shape)}:\n{message}"
        )
    return np.frombuffer(result.stdout, dtype=np.float32).reshape(len(array), -1).copy()


def run(
    source: str | os.PathLike[str],
    inputs: Any,
    *,
    name: str = "model",
    scratch: str = "static",
    flags: Sequence[str] = _DEFAULT_FLAGS,
) -> np.ndarray:
    """Compile an exported model and run it on a batch; see :func:`build` and :func:`run_executable`.

    Example:
        >>> export_c(packed, x[:1], "model.c")  # doctest: +SKIP
        >>> logits = run("model.c", x)          # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as folder:
        executable = Path(folder, "model")
        build(source, executable, name=name, scratch=scratch, flags=flags)
        return run_executable(executable, inputs)
