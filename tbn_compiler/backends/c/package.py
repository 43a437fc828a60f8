"""The files of an export: the C file and its header alone, or a folder that a build system takes as it is."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tbn_compiler.backends.c.emit import emit_header, emit_package_file, emit_source, system_headers
from tbn_compiler.backends.c.number_formats import from_int8, to_int8
from tbn_compiler.backends.c.plan import Plan, PlannedState, Port
from tbn_compiler.errors import ExportError
from tbn_compiler.files import replacing
from tbn_compiler.torch_private import tree_leaves

# The cores for Arduino boards whose constants stay in flash. AVR is not among them: it would copy them to RAM.
ARDUINO_ARCHITECTURES = (
    *("mbed", "mbed_nano", "mbed_rp2040", "mbed_portenta", "mbed_giga", "mbed_nicla", "mbed_opta"),
    *("renesas_uno", "renesas_portenta", "sam", "samd", "rp2040", "esp32", "nrf52", "stm32"),
)

# Share of the largest expected element by which an output may differ on another machine, whose math.h rounds otherwise.
TOLERANCE = 1e-4
# Share of it that integers which PyTorch rounds otherwise may make of it at most.
MARGIN = 0.1


@dataclass(frozen=True)
class Vectors:
    """Inputs of a model and what PyTorch gives for them, an array for each parameter of the run function.

    Attributes:
        inputs, outputs: ``[count, size]``, in the types of the parameters.
        margins: for each output, what integers that PyTorch rounds otherwise may make of it.
    """

    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    margins: tuple[float, ...]

    @property
    def count(self) -> int:
        """How many inputs there are."""
        return len(self.outputs[0])

    @property
    def nbytes(self) -> int:
        """Flash that they take."""
        return sum(array.nbytes for array in (*self.inputs, *self.outputs))

    @property
    def tolerances(self) -> tuple[tuple[float, ...], ...]:
        """For each output, how much it may differ for each input; integers may not."""
        return tuple(
            tuple(
                float(np.float32(TOLERANCE * np.abs(row).max() + min(margin, MARGIN * np.abs(row).max())))
                if row.dtype == np.float32
                else 0.0
                for row in array
            )
            for array, margin in zip(self.outputs, self.margins, strict=True)
        )


Inputs = Tensor | Sequence[Tensor]
"""A tensor, or one for each argument of ``forward``."""


def self_test_inputs(self_test: bool | Sequence[Inputs], example: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """What a self-test runs: the example inputs, or those that are given instead.

    Raises:
        ExportError: there are none, or one does not have the shapes and types of the example.
    """
    if isinstance(self_test, bool):
        return [tuple(example)]
    if isinstance(self_test, Tensor) or not isinstance(self_test, Sequence) or not self_test:
        raise ExportError(
            f"self_test is True or a list of inputs, such as list(x.split(1)), not {type(self_test).__name__}"
            + (" without any" if isinstance(self_test, list | tuple) else "")
        )
    found = [tuple(inputs) if isinstance(inputs, list | tuple) else (inputs,) for inputs in self_test]
    wanted = _kinds(example)
    for index, inputs in enumerate(found):
        if _kinds(inputs) != wanted:
            raise ExportError(f"self_test[{index}] is {_kinds(inputs)}; the example inputs are {wanted}")
    return found


def _kinds(inputs: Sequence[object]) -> str:
    """Types and shapes, for people."""
    return ", ".join(
        f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        if isinstance(value, Tensor)
        else f"no tensor but {type(value).__name__}"
        for value in inputs
    )


def compute_vectors(module: nn.Module, inputs: Sequence[Sequence[Tensor]], plan: Plan) -> Vectors:
    """Run a module in evaluation mode on each of some inputs, for the parameters of a plan that was made from it.

    Args:
        module: the model.
        inputs: of each run, like the example inputs. With a state, each run has that of the one before.
        plan: what was made of the model.

    Raises:
        ExportError: an output is not finite, so that it cannot be compared.
    """
    before = [state.before for state in plan.states]
    given = [index for index in range(len(inputs[0])) if index not in before]
    stored = [
        tuple(_flat(tensors[index], port) for index, port in zip(given, plan.inputs, strict=True)) for tensors in inputs
    ]
    kept: dict[int, Tensor] = {
        state.before: first_state(plan, state).to(inputs[0][state.before]) for state in plan.states
    }
    training = {part: part.training for part in module.modules()}
    module.eval()
    results = []
    try:
        with torch.no_grad():
            for tensors, arrays in zip(inputs, stored, strict=True):
                used = dict(enumerate(tensors)) | kept
                for index, array, port in zip(given, arrays, plan.inputs, strict=True):
                    used[index] = _as_stored(tensors[index], array, port)
                outputs = tree_leaves(module(*used.values()))
                kept = {state.before: outputs[state.output] for state in plan.states}
                results.append(outputs)
    finally:
        for part, mode in training.items():
            part.training = mode
    after = [state.output for state in plan.states]
    compared = [index for index in range(len(results[0])) if index not in after]
    for number, outputs in enumerate(results):
        for index in compared:
            if outputs[index].is_floating_point() and not outputs[index].isfinite().all():
                same = all(tensors is inputs[0] for tensors in inputs)
                which = "the example inputs" if same else f"self_test[{number}]"
                raise ExportError(f"output {index} of {which} is not finite: a self-test needs other inputs")
    expected = [
        tuple(_flat(outputs[index], port) for index, port in zip(compared, plan.outputs, strict=True))
        for outputs in results
    ]
    inputs_by_port = tuple(np.stack(rows) for rows in zip(*stored, strict=True))
    outputs_by_port = tuple(np.stack(rows) for rows in zip(*expected, strict=True))
    return Vectors(inputs_by_port, outputs_by_port, tuple(port.step for port in plan.outputs))


def first_state(plan: Plan, state: PlannedState) -> Tensor:
    """What an array of the state holds before the first run."""
    constants = {planned.symbol: planned.constant.array for planned in plan.constants}
    if state.initial is None:
        return torch.zeros(state.value.shape)
    return torch.from_numpy(constants[state.initial].copy())


def _flat(tensor: Tensor, port: Port) -> np.ndarray:
    array: np.ndarray = tensor.detach().cpu().flatten().numpy()
    if port.format is not None and port.format.single_scale is not None:
        return to_int8(array, port.format.single_scale)
    stored = array.astype(port.value.dtype)
    if array.dtype.kind in "iu" and not np.array_equal(stored, array):
        raise ExportError(f"{port.name} of a self-test has numbers that {port.value.dtype} cannot hold")
    return stored


def _as_stored(tensor: Tensor, stored: np.ndarray, port: Port) -> Tensor:
    """An input of the model with what its stored form can hold."""
    if port.format is None or port.format.single_scale is None:
        return tensor
    return torch.from_numpy(from_int8(stored, port.format.single_scale)).reshape(tensor.shape)


def check_source_path(path: Path) -> None:
    """Refuse a path that a C file cannot have, or that its header's ``#include`` cannot name."""
    if path.suffix != ".c" or any(char in path.name for char in '"\\\n'):
        raise ExportError(f"path {str(path)!r} must end in .c and hold no quote, backslash or line break")


def single_file(plan: Plan, path: Path, vectors: Vectors | None) -> dict[Path, str]:
    """The C file and, beside it, its header; with a self-test if there are ``vectors``."""
    header = path.with_suffix(".h")
    return {path: emit_source(plan, header.name, vectors), header: emit_header(plan, vectors)}


@dataclass(frozen=True)
class PackageInfo:
    """What a package says about itself beside the model. It names no license, which is the user's to choose.

    Attributes:
        version: of the package.
        vendor: who answers for it.

    Raises:
        ExportError: one that is not valid in every kind of package.
    """

    version: str = "1.0.0"
    vendor: str = "tbn_compiler"

    def __post_init__(self) -> None:
        """Check both."""
        if not isinstance(self.version, str) or not re.fullmatch(
            r"(0|[1-9][0-9]*)(\.(0|[1-9][0-9]*)){2}", self.version
        ):
            raise ExportError(f"package_version={self.version!r} is not of the form 1.2.3")
        if not isinstance(self.vendor, str) or not re.fullmatch(r"[A-Za-z0-9_]+(-[A-Za-z0-9_]+)*", self.vendor):
            raise ExportError(
                f"package_vendor={self.vendor!r} must consist of letters, digits and _, with single - between them"
            )


def arduino_library(plan: Plan, folder: Path, vectors: Vectors, info: PackageInfo) -> dict[Path, str]:
    """A library folder for the Arduino IDE, with examples that run one stored input, and the self-test."""
    name = plan.name
    if not name[0].isalpha():
        raise ExportError(f"name={name!r}: the name of an Arduino library begins with a letter")
    emit = _emitter(plan, vectors, info)
    test = f"{name}_self_test"
    return {
        folder / "library.properties": emit("library.properties", architectures=ARDUINO_ARCHITECTURES),
        folder / "src" / f"{name}.c": emit_source(plan, f"{name}.h", vectors),
        folder / "src" / f"{name}.h": emit_header(plan, vectors),
        folder / "examples" / name / f"{name}.ino": emit("example.ino"),
        folder / "examples" / test / f"{test}.ino": emit("self_test.ino"),
    }


# Targets that build systems have of their own, and the library of mathematics.
_CMAKE_NAMES = frozenset(
    {"all", "all_build", "clean", "depend", "edit_cache", "help", "install", "m", "ninja", "package", "package_source"}
    | {"preinstall", "rebuild_cache", "run_tests", "test", "zero_check"}
)


def cmake_project(plan: Plan, folder: Path, vectors: Vectors, info: PackageInfo) -> dict[Path, str]:
    """A folder for ``add_subdirectory``, which also builds alone and tests itself."""
    if plan.name.lower() in _CMAKE_NAMES:
        raise ExportError(f"name={plan.name!r} means something else to CMake: choose another one")
    emit = _emitter(plan, vectors, info)
    return {
        folder / "CMakeLists.txt": emit("CMakeLists.txt"),
        **_source_and_header(plan, folder, vectors),
        folder / "test" / "main.c": emit("self_test_main.c"),
    }


def cmsis_pack(plan: Plan, folder: Path, vectors: Vectors, info: PackageInfo) -> dict[Path, str]:
    """A software pack with one component, and its self-test as a file to copy into a project."""
    name = plan.name
    if len(name) > _LONGEST_COMPONENT:
        raise ExportError(f"name={name!r}: the name of a CMSIS component has at most {_LONGEST_COMPONENT} letters")
    emit = _emitter(plan, vectors, info)
    return {
        folder / f"{info.vendor}.{name}.pdsc": emit("model.pdsc"),
        **_source_and_header(plan, folder, vectors),
        folder / "template" / f"{name}_self_test.c": emit("self_test_main.c"),
    }


def zephyr_module(plan: Plan, folder: Path, vectors: Vectors, info: PackageInfo) -> dict[Path, str]:
    """A module for Zephyr's build, whose self-test runs when the system starts, if it is configured to."""
    emit = _emitter(plan, vectors, info)
    return {
        folder / "zephyr" / "module.yml": emit("module.yml"),
        folder / "zephyr" / "Kconfig": emit("Kconfig", needs_math="math.h" in system_headers(plan)),
        folder / "zephyr" / "self_test.c": emit("zephyr_self_test.c"),
        folder / "CMakeLists.txt": emit("zephyr.cmake"),
        **_source_and_header(plan, folder, vectors),
    }


def _emitter(plan: Plan, vectors: Vectors, info: PackageInfo) -> Callable[..., str]:
    """Prints files of a package, from the template and what it needs beside the model."""
    return functools.partial(emit_package_file, plan=plan, vectors=vectors, version=info.version, vendor=info.vendor)


def _source_and_header(plan: Plan, folder: Path, vectors: Vectors) -> dict[Path, str]:
    name = plan.name
    return {
        folder / "src" / f"{name}.c": emit_source(plan, f"{name}.h", vectors),
        folder / "include" / f"{name}.h": emit_header(plan, vectors),
    }


_LONGEST_COMPONENT = 32  # the schema of packs
PACKAGES = {"arduino": arduino_library, "cmake": cmake_project, "cmsis-pack": cmsis_pack, "zephyr": zephyr_module}


def write_files(files: Mapping[Path, str], folder: Path | None = None) -> None:
    """Write all files, or none. Folders are made inside ``folder``, which may be new itself.

    Raises:
        ExportError: a file cannot be written.
    """
    made: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            for path, text in files.items():
                if folder is not None:
                    missing = [p for p in (path.parent, *path.parent.parents) if not p.exists()]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    made += reversed(missing)
                stack.enter_context(replacing(path)).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        for path in reversed(made):
            with contextlib.suppress(OSError):  # not empty: something was written there meanwhile
                path.rmdir()
        raise ExportError(f"cannot write {error.filename or next(iter(files))}: {error.strerror}") from error
