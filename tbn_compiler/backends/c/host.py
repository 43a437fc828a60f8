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
from tbn_compiler.backends.c.interface import read_interface
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
    name: str | None = None,
    scratch: str | None = None,
    flags: Sequence[str] = _DEFAULT_FLAGS,
) -> None:
    """Compile an exported model into a program that maps inputs on standard input to outputs on standard output.

    Args:
        source: the ``.c`` file; its header lies beside it.
        executable: program to write.
        name: the ``name`` that the model was exported with, to be checked; its header says it.
        scratch: the ``scratch`` that it was exported with, in the same way.
        flags: further options of the compiler; ``-std=c99`` is given always.

    Raises:
        ExportError: there is no compiler, or it reports an error; its output is in the message.
    """
    compiler = find_compiler()
    if compiler is None:
        raise ExportError("no C compiler found: set CC, or install cc, gcc or clang")
    source = Path(source).resolve()
    interface = read_interface(source.with_suffix(".h"))
    owner = "caller" if interface.takes_scratch else "static"
    if name not in (None, interface.name):
        raise ExportError(f"cannot compile {source} as {name!r}: its header declares {interface.name}_run")
    if scratch not in (None, owner):
        raise ExportError(f"cannot compile {source} with scratch={scratch!r}: it was exported with {owner!r}")
    with tempfile.TemporaryDirectory() as folder:
        main = Path(folder, "main.c")
        main.write_text(emit_host_main(interface, source.with_suffix(".h").name))
        command = [*shlex.split(compiler), "-std=c99", *flags, f"-I{source.parent}", str(main), str(source)]
        result = subprocess.run([*command, "-o", str(executable), "-lm"], capture_output=True, text=True)
    if result.returncode:
        raise ExportError(f"{compiler} cannot compile {source}:\n{result.stderr}")


def run_executable(executable: str | os.PathLike[str], inputs: Any) -> np.ndarray:
    """Run a program that :func:`build` made of a model with floats in and out.

    Args:
        executable: the program.
        inputs: tensor or array ``[batch, *input shape]``, converted to float32.

    Returns:
        ``float32 [batch, output size]``: outputs are flat.

    Raises:
        ExportError: the program fails, or the inputs do not have the size of the model's input.
    """
    array = _batch(inputs).astype(np.float32)
    output = _start(executable, array[0].size, array.tobytes(), f"inputs {list(array.shape)}")
    return np.frombuffer(output, dtype=np.float32).reshape(len(array), -1).copy()


def _batch(inputs: Any) -> np.ndarray:
    array: np.ndarray = torch.as_tensor(inputs).detach().cpu().numpy()
    if array.ndim == 0 or array.size == 0:
        raise ExportError(f"inputs must have the shape [batch, *input shape], got {list(array.shape)}")
    return array


def _start(executable: str | os.PathLike[str], size: int, data: bytes, what: str) -> bytes:
    """The output of a program for runs on inputs of ``size`` elements."""
    result = subprocess.run([str(executable), str(size)], input=data, capture_output=True)
    if result.returncode:
        message = result.stderr.decode(errors="replace")
        raise ExportError(f"the compiled model stopped with code {result.returncode} on {what}:\n{message}")
    return result.stdout


def run_arrays(source: str | os.PathLike[str], inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Compile an exported model and run it on all its inputs, once or as often as they are long.

    A model whose inputs are all state takes none, and runs once.

    Args:
        source: the ``.c`` file; its header lies beside it.
        inputs: for each input an array of its size, for every run the same, or of a multiple of it, for a run each.
            Where int8 stands in place of floats, floats are rounded.

    Returns:
        For each output, by name, the model's numbers in all runs, ``[runs, size]``, ``float32`` or integers; booleans
        are ``uint8``.

    Raises:
        ExportError: the inputs are not those of the model, or do not fit its integers, or it does not compile.
    """
    interface = read_interface(Path(source).with_suffix(".h"))
    if len(inputs) != len(interface.inputs):
        names = ", ".join(argument.name for argument in interface.inputs)
        raise ExportError(f"{source} has {len(interface.inputs)} inputs ({names}), got {len(inputs)}")
    rows = []
    for argument, array in zip(interface.inputs, inputs, strict=True):
        if not array.size or array.size % argument.size:
            raise ExportError(
                f"input {argument.name!r} of {source} has {argument.size} elements, which {list(array.shape)} is no "
                "multiple of"
            )
        elements = np.ascontiguousarray(argument.elements(array))
        rows.append(elements.reshape(-1, argument.size).view(np.uint8))
    counts = {len(row) for row in rows}
    runs = max(counts, default=1)
    if counts - {1, runs}:
        raise ExportError(f"the inputs of {source} are enough for {', '.join(map(str, sorted(counts)))} runs")
    repeated = [np.broadcast_to(row, (runs, row.shape[1])) for row in rows]
    data = np.concatenate(repeated, 1).tobytes() if repeated else b""
    with tempfile.TemporaryDirectory() as folder:
        executable = Path(folder, "model")
        build(source, executable)
        output = _start(executable, interface.input_size, data, f"{runs} inputs")
    bounds = np.cumsum([argument.size * argument.dtype.itemsize for argument in interface.outputs])
    parts = np.split(np.frombuffer(output, np.uint8).reshape(runs, -1), bounds[:-1], 1)
    named = zip(interface.outputs, parts, strict=True)
    return {a.name: a.numbers(np.ascontiguousarray(part).view(a.dtype)) for a, part in named}


def run(
    source: str | os.PathLike[str],
    inputs: Any,
    *,
    name: str | None = None,
    scratch: str | None = None,
    flags: Sequence[str] = _DEFAULT_FLAGS,
) -> np.ndarray:
    """Compile an exported model and run it on a batch; see :func:`build` and :func:`run_executable`.

    A model with integers has one input and one output here, and takes and gives its own types, or floats where int8
    stands in their place; for more of them there is :func:`run_arrays`.

    Example:
        >>> export_c(packed, x[:1], "model.c")  # doctest: +SKIP
        >>> logits = run("model.c", x)          # doctest: +SKIP
    """
    with tempfile.TemporaryDirectory() as folder:
        executable = Path(folder, "model")
        build(source, executable, name=name, scratch=scratch, flags=flags)
        interface = read_interface(Path(source).with_suffix(".h"))
        if all(argument.dtype == np.float32 for argument in (*interface.inputs, *interface.outputs)):
            return run_executable(executable, inputs)
        if len(interface.inputs) != 1 or len(interface.outputs) != 1:
            raise ExportError(f"{interface.prototype} has several arrays, some of integers: run_arrays runs it")
        array, (given,), (made,) = _batch(inputs), interface.inputs, interface.outputs
        data = given.elements(array).tobytes()
        output = _start(executable, array[0].size, data, f"inputs {list(array.shape)}")
        return made.numbers(np.frombuffer(output, made.dtype).reshape(len(array), -1).copy())
