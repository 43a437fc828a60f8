"""Comparing an exported file with the PyTorch model that it was made from."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from tbn_compiler import html
from tbn_compiler.errors import ExportError
from tbn_compiler.html import Column, Section
from tbn_compiler.torch_private import tree_leaves

if TYPE_CHECKING:
    from tbn_compiler.backends.c.interface import Interface

Arrays = dict[str, np.ndarray]

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
}


@dataclass(frozen=True)
class Difference:
    """How far one output of a file is from the model's.

    Attributes:
        name: name of the output.
        shape: its shape.
        absolute: the largest absolute difference.
        relative: the same over the largest magnitude in the model's output; infinite for integers that differ.
        top1: share of the vectors along the last axis whose largest element is at the same place in both; ``None``
            for an output without such a choice.
    """

    name: str
    shape: tuple[int, ...]
    absolute: float
    relative: float
    top1: float | None

    def within(self, tolerance: float) -> bool:
        """Whether the relative error is at most ``tolerance``; never with NaN in either output."""
        return self.relative <= tolerance


@dataclass(frozen=True)
class Comparison(Sequence[Difference]):
    """How far the outputs of a file are from the model's: one :class:`Difference` for each, in order.

    Attributes:
        outputs: the differences.
    """

    outputs: tuple[Difference, ...]

    @overload
    def __getitem__(self, index: int) -> Difference: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Difference, ...]: ...
    def __getitem__(self, index: int | slice) -> Difference | tuple[Difference, ...]:
        return self.outputs[index]

    def __len__(self) -> int:
        return len(self.outputs)

    def within(self, tolerance: float) -> bool:
        """Whether the relative error of every output is at most ``tolerance``."""
        return all(difference.within(tolerance) for difference in self.outputs)

    def to_dict(self, tolerance: float) -> dict[str, Any]:
        """The comparison as plain data, with a verdict for every output and for all."""
        rows = [dataclasses.asdict(row) | {"within": row.within(tolerance)} for row in self.outputs]
        return {"tolerance": tolerance, "within": self.within(tolerance), "outputs": rows}

    def table(self, tolerance: float) -> Table:
        """A ``rich`` table, a row for each output."""
        table = Table()
        for title in (*_COLUMNS, ""):
            table.add_column(title, overflow="fold")
        for row in self.outputs:
            table.add_row(*map(escape, (*_cells(row), "ok" if row.within(tolerance) else f"above {tolerance:g}")))
        return table

    def section(self, tolerance: float | None = None) -> Section:
        """The comparison as a part of a page; with a verdict if there is a ``tolerance``."""
        verdicts = [] if tolerance is None else [Column(f"within {tolerance:g}")]
        columns = (*(Column(title, title not in _COLUMNS[:2]) for title in _COLUMNS), *verdicts)
        rows = (
            (*_cells(row), *([] if tolerance is None else ["yes" if row.within(tolerance) else "no"]))
            for row in self.outputs
        )
        return Section("The file against the model", (html.Table("Outputs", columns, tuple(rows)),))

    def to_html(self, tolerance: float | None = None) -> str:
        """The comparison as an HTML fragment that needs nothing else, neither style nor script."""
        return html.fragment(self.section(tolerance))

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.to_html()


_COLUMNS = ("output", "shape", "max. absolute error", "relative error", "top-1 agreement")


def _cells(row: Difference) -> tuple[str, ...]:
    shape = "x".join(map(str, row.shape)) or "1"
    top1 = "-" if row.top1 is None else f"{row.top1:.2%}"
    return row.name, shape, f"{row.absolute:.3g}", f"{row.relative:.3g}", top1


def compare(name: str, actual: np.ndarray, expected: np.ndarray) -> Difference:
    """Compare an output of a file with the model's; the file's may be flat.

    Raises:
        ExportError: they differ in size, or are empty.
    """
    if not expected.size:
        raise ExportError(f"output {name!r} of the model has the shape {expected.shape}: there is nothing to compare")
    if actual.size != expected.size:
        raise ExportError(f"output {name!r} has the shape {actual.shape} in the file and {expected.shape} in the model")
    whole = expected.dtype.kind != "f"  # indices and the like are right or wrong
    actual = actual.reshape(expected.shape).astype(np.float64)
    expected = expected.astype(np.float64)
    absolute = float(np.abs(actual - expected).max(initial=0.0))
    largest = 0.0 if whole else float(np.abs(expected).max(initial=0.0))
    relative = absolute / largest if largest else (0.0 if absolute == 0 else math.inf)
    top1 = None
    if expected.ndim >= 2 and expected.shape[-1] > 1 and expected.size:
        top1 = float((actual.argmax(-1) == expected.argmax(-1)).mean())
    return Difference(name, expected.shape, absolute, relative, top1)


def run_model(module: nn.Module, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """The outputs of a PyTorch model, in order. Inputs are passed by name where ``forward`` has these names."""
    tensors: dict[str, Tensor] = {name: torch.from_numpy(value) for name, value in inputs.items()}
    named = inspect.signature(module.forward).parameters.keys() >= tensors.keys()
    with torch.no_grad():
        result = module(**tensors) if named else module(*tensors.values())
    return [leaf.numpy() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


def load_onnxruntime() -> Any:
    """The package ``onnxruntime``.

    Raises:
        ExportError: it is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError(f"verify needs onnxruntime ({error}): pip install 'tbn-compiler[onnx]'") from error
    return onnxruntime


def run_steps(module: nn.Module, inputs: Mapping[str, np.ndarray], interface: Interface) -> list[np.ndarray]:
    """The outputs ``[steps, ...]`` of a PyTorch model in steps that follow one another, without those that are state.

    Args:
        module: the model.
        inputs: for each input that is no state, of one step or of all steps.
        interface: what the header says of the state.

    Raises:
        ExportError: the state does not begin with zeros, or the model has fewer outputs.
    """
    given = next((member.name for member in interface.state if not member.zeros), None)
    if given is not None:
        raise ExportError(f"the state {given!r} does not begin with zeros, and its header does not say with what")
    parts = [
        torch.from_numpy(np.ascontiguousarray(inputs[argument.name])).reshape(-1, *argument.shape)
        for argument in interface.inputs
    ]
    held = {member.input: torch.zeros(member.shape, dtype=_torch_type(member.dtype)) for member in interface.state}
    after = {member.output for member in interface.state}
    steps: list[list[np.ndarray]] = []
    for step in range(max((len(part) for part in parts), default=1)):
        rest = iter(part[step if len(part) > 1 else 0] for part in parts)
        arguments = [held[place] if place in held else next(rest) for place in range(len(held) + len(parts))]
        with torch.no_grad():
            result = [leaf for leaf in tree_leaves(module(*arguments)) if isinstance(leaf, Tensor)]
        if len(result) <= max(after):
            raise ExportError(f"the model has {len(result)} outputs, and the state of the file is output {max(after)}")
        held = {member.input: result[member.output] for member in interface.state}
        steps.append([leaf.numpy() for place, leaf in enumerate(result) if place not in after])
    return [np.stack(outputs) for outputs in zip(*steps, strict=True)]


def _torch_type(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype


class OnnxFile:
    """An ONNX file in ONNX Runtime on the CPU.

    Raises:
        ExportError: ONNX Runtime is not installed, or does not load the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        onnxruntime = load_onnxruntime()
        if not Path(path).is_file():
            raise ExportError(f"{path} is no file")
        try:
            self._session = onnxruntime.InferenceSession(os.fspath(path), providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions have no common base class
            raise ExportError(f"ONNX Runtime cannot load {path}: {error}") from error

    def random_inputs(
        self, batch: int, generator: np.random.Generator, shapes: Sequence[Sequence[int]] | None = None
    ) -> Arrays:
        """Random inputs of the file's dtypes, of its shapes or those given. Free dimensions become ``batch``.

        Raises:
            ExportError: another number of shapes, or a dtype without random inputs.
        """
        values = self._session.get_inputs()
        if shapes is None:
            shapes = [[size if isinstance(size, int) else batch for size in value.shape] for value in values]
        if len(shapes) != len(values):
            raise ExportError(f"the file has {len(values)} inputs, got {len(shapes)} shapes")
        inputs: Arrays = {}
        for value, shape in zip(values, shapes, strict=True):
            if value.type not in _DTYPES:
                raise ExportError(f"input {value.name!r} is a {value.type}: give stored inputs")
            inputs[value.name] = random_array(shape, np.dtype(_DTYPES[value.type]), generator)
        return inputs

    def name_inputs(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Inputs by the file's names, in its dtypes; a single one may have any name.

        Raises:
            ExportError: the names or the number are not those of the file's inputs.
        """
        values = self._session.get_inputs()
        arrays = _by_name(arrays, [value.name for value in values])
        return {value.name: arrays[value.name].astype(_DTYPES.get(value.type), copy=False) for value in values}

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """The outputs by name.

        Raises:
            ExportError: ONNX Runtime fails on these inputs.
        """
        names = [output.name for output in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))
        except Exception as error:  # its exceptions have no common base class
            raise ExportError(f"ONNX Runtime cannot run the file on these inputs: {error}") from error


class CFile:
    """An exported C file, compiled on this computer.

    Raises:
        ExportError: it is no file, its header beside it is missing, or is not that of such an export.
    """

    def __init__(self, path: str | os.PathLike[str], name: str | None = None, scratch: str | None = None) -> None:
        from tbn_compiler.backends.c.interface import read_interface

        self._path = Path(path)
        if not self._path.is_file():
            raise ExportError(f"{path} is no file")
        self._interface = read_interface(self._path.with_suffix(".h"))
        owner = "caller" if self._interface.takes_scratch else "static"
        if name not in (None, self._interface.name):
            raise ExportError(f"{path} has the name {self._interface.name!r}, not {name!r}")
        if scratch not in (None, owner):
            raise ExportError(f"{path} was exported with scratch={owner!r}, not {scratch!r}")

    def random_inputs(self, shapes: Sequence[Sequence[int]] | None, generator: np.random.Generator) -> Arrays:
        """Random inputs of these shapes in the model's dtypes, and of numbers that the file's can hold.

        Raises:
            ExportError: another number of shapes, or none for a file that has inputs.
        """
        arguments = self._interface.inputs
        if not shapes and arguments:
            raise ExportError("a C file does not say the shape of its input: give --input or --inputs")
        shapes = shapes or ()
        if len(shapes) != len(arguments):
            raise ExportError(f"the file has {len(arguments)} inputs, got {len(shapes)} shapes")
        found: Arrays = {}
        for argument, shape in zip(arguments, shapes, strict=True):
            dtype = argument.dtype if argument.scale is None else np.dtype(np.float32)
            found[argument.name] = argument.numbers(argument.elements(random_array(shape, dtype, generator)))
        return found

    def name_inputs(self, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Inputs by the file's names, in its order and the model's dtypes; a single one may have any name.

        Where the file takes int8 in place of floats, they are rounded to what that can hold.

        Raises:
            ExportError: the names or the number are not those of the file's inputs, or an integer input does not hold
                what is given.
        """
        arrays = _by_name(arrays, [argument.name for argument in self._interface.inputs])
        return {a.name: a.numbers(a.elements(arrays[a.name])) for a in self._interface.inputs}

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """The outputs by name, those of all runs one behind the other.

        Raises:
            ExportError: there is no C compiler, or the file does not compile or does not take these inputs.
        """
        from tbn_compiler.backends.c import host

        return host.run_arrays(self._path, list(inputs.values()))

    def run_model(self, module: nn.Module, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of the model that the file was made from; step by step where the file keeps a state.

        Raises:
            ExportError: the state does not begin with zeros, or the model gives fewer outputs than the file says.
        """
        return run_steps(module, inputs, self._interface) if self._interface.state else run_model(module, inputs)


def random_array(shape: Sequence[int], dtype: np.dtype[Any], generator: np.random.Generator) -> np.ndarray:
    """Normally distributed numbers, or any bytes; other integers are 0 or 1."""
    if dtype.kind == "f":
        return generator.standard_normal(shape, dtype=np.float32)
    limits = np.iinfo(dtype) if dtype.itemsize == 1 and dtype.kind != "b" else None
    low, high = (0, 1) if limits is None else (limits.min, limits.max)
    return generator.integers(low, high, shape, endpoint=True).astype(dtype)


def _by_name(arrays: Mapping[str, np.ndarray], names: list[str]) -> Mapping[str, np.ndarray]:
    if len(arrays) == len(names) == 1:
        return dict(zip(names, arrays.values(), strict=True))
    if arrays.keys() != set(names):
        raise ExportError(f"stored inputs are named {sorted(arrays)}, the file's are {names}")
    return arrays


def verify(
    actual: Mapping[str, np.ndarray],
    module: nn.Module,
    inputs: Mapping[str, np.ndarray],
    run: Callable[[nn.Module, Mapping[str, np.ndarray]], list[np.ndarray]] = run_model,
) -> Comparison:
    """Compare the outputs of a file with those of the model on the same inputs.

    Args:
        actual: the outputs of the file by name.
        module: the model.
        inputs: what both run on.
        run: how the model runs on them; :meth:`CFile.run_model` for one whose file keeps a state.

    Raises:
        ExportError: the number or the sizes of the outputs differ, they are empty, or the model fails on the inputs.
    """
    try:
        expected = run(module, inputs)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
        raise ExportError(f"the model does not run on {shapes}: {error}") from error
    if len(actual) != len(expected):
        raise ExportError(f"the file has {len(actual)} outputs, the model {len(expected)}")
    pairs = zip(actual.items(), expected, strict=True)
    return Comparison(tuple(compare(name, value, wanted) for (name, value), wanted in pairs))
