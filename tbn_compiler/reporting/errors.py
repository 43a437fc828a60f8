"""How far each layer of a network is from the model in each form that it is deployed in."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from tbn_compiler.compiler import optimize
from tbn_compiler.errors import TBNError
from tbn_compiler.graph.copying import copy_with_tensors
from tbn_compiler.graph.records import get_records
from tbn_compiler.graph.shapes import does_not_run
from tbn_compiler.html import Column, Notes, Section, Table
from tbn_compiler.torch_private import tree_leaves
from tbn_compiler.verify import OnnxFile, compare, load_onnxruntime

if TYPE_CHECKING:
    from tbn_compiler.backends.c import Plan

FORMS = ("lowered", "int8", "C", "ONNX")

Results = list[np.ndarray]


@dataclass(frozen=True)
class NetworkErrors:
    """Relative errors: the largest absolute difference over the largest magnitude of the model's result.

    Attributes:
        reference: what the forms are compared with.
        outputs: for each output of the network its errors by form, of the network as it is deployed.
        layers: for each layer its errors by form, in a network that gives every layer's result besides.
        unobserved: layers whose results no module gives in a run.
        missing: why a form, or its layers, have no errors.
    """

    reference: str
    outputs: Mapping[str, Mapping[str, float]]
    layers: Mapping[str, Mapping[str, float]]
    unobserved: tuple[str, ...]
    missing: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """The errors as plain data (ready for JSON)."""
        return dataclasses.asdict(self)

    def section(self) -> Section:
        """The errors as a part of a page."""
        columns = (Column("layer"), *(Column(form, numeric=True, hint=_HINTS[form]) for form in FORMS))
        rows = [(name, *_cells(errors)) for name, errors in {**self.layers, **self.outputs}.items()]
        lines = [
            f"Relative error on the example inputs: the largest difference from {self.reference}, over the largest "
            "magnitude of its result. Errors of earlier layers are in those of later ones.",
        ]
        if self.layers:
            lines.append(
                "Layers are measured in a network that gives each layer's result besides, which keeps a backend from "
                "computing some functions inside the layer; outputs are those of the network as it is deployed."
            )
        if self.unobserved:
            lines.append(f"Not measured, as no module gives their results in this run: {', '.join(self.unobserved)}.")
        notes = tuple(f"{what}: {why}" for what, why in self.missing.items())
        parts = (Notes(tuple(lines)), *([Notes(notes, listed=True)] if notes else []))
        return Section("Errors by layer", (*parts, Table("Relative errors", columns, tuple(rows))))


_HINTS = {
    "lowered": "packed tiles, in floating point",
    "int8": "int8 activations, with scales from the example inputs",
    "C": "the C file, compiled and run on this computer",
    "ONNX": "the ONNX file in ONNX Runtime",
}


def _cells(errors: Mapping[str, float]) -> tuple[str, ...]:
    return tuple(_number(errors[form]) if form in errors else "-" for form in FORMS)


def _number(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def measure_errors(
    module: nn.Module,
    packed: nn.Module,
    inputs: tuple[Tensor, ...],
    c_options: Mapping[str, Any],
    on_stage: Callable[[str], None],
) -> tuple[NetworkErrors, Plan | str]:
    """Run a network in every form and compare all layers.

    Args:
        module: the network in training form, or the lowered one.
        packed: the lowered network.
        inputs: what it runs on.
        c_options: for the C file.
        on_stage: called with the name of each form.

    Returns:
        The errors, and the plan of the C file or why there is none.

    Raises:
        TBNError: the network does not run on the inputs.
    """
    model = copy_with_tensors(module).eval()
    plain = _run(model, inputs)
    called = _called(copy_with_tensors(model), inputs) & _called(copy_with_tensors(packed), inputs)
    layers = dict.fromkeys(record.name for record in get_records(packed) or ())
    names, unobserved = [n for n in layers if n in called], tuple(n for n in layers if n not in called)
    expected = _run(_observed(model, names), inputs)
    collected = _Collected(plain, expected[len(plain) :], names)

    with tempfile.TemporaryDirectory() as folder:
        exports = _Exports(Path(folder), inputs, c_options)
        for form, make in (("lowered", _run), ("int8", _int8), ("C", exports.c), ("ONNX", exports.onnx)):
            on_stage(form)
            collected.add(form, lambda net, make=make: make(net, _cloned(inputs)), packed)  # type: ignore[misc]
    is_lowered = module.state_dict().keys() == packed.state_dict().keys()
    reference = "the lowered module" if is_lowered else "the model as it is trained"
    found = NetworkErrors(reference, collected.outputs, collected.layers, unobserved, collected.missing)
    return found, exports.plan or collected.missing["C"]


class _Collected:
    """Errors, as they are measured.

    Args:
        plain: the outputs of the network that all others are compared with.
        inside: results of its layers.
        names: those of the layers.
    """

    def __init__(self, plain: Results, inside: Results, names: Sequence[str]) -> None:
        titles = ["output"] if len(plain) == 1 else [f"output {index}" for index in range(len(plain))]
        self.outputs: dict[str, dict[str, float]] = {title: {} for title in titles}
        self.layers: dict[str, dict[str, float]] = {name: {} for name in names}
        self.missing: dict[str, str] = {}
        self._plain, self._inside = plain, inside

    def add(self, form: str, run: Callable[[nn.Module], Results], packed: nn.Module) -> None:
        """Measure a form: the network as it is, then with what its layers give."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the plan and the notes of the layers say the same
            try:
                self._compare(form, self.outputs, run(copy_with_tensors(packed)), self._plain)
            except TBNError as error:
                self.missing[form] = _first_line(error)
                return
            if self.layers:
                try:
                    results = run(_observed(copy_with_tensors(packed), list(self.layers)))
                    self._compare(form, self.layers, results[len(self._plain) :], self._inside)
                except TBNError as error:
                    self.missing[f"{form}, by layer"] = _first_line(error)

    @staticmethod
    def _compare(form: str, rows: Mapping[str, dict[str, float]], actual: Results, expected: Results) -> None:
        for (name, row), value, wanted in zip(rows.items(), actual, expected, strict=True):
            row[form] = compare(name, value, wanted).relative


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


class _Exports:
    """The exported files, in a folder that is gone afterwards."""

    def __init__(self, folder: Path, inputs: tuple[Tensor, ...], c_options: Mapping[str, Any]) -> None:
        self.plan: Plan | None = None
        self._folder = folder
        self._c_options = c_options

    def c(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> Results:
        """Outputs of the C file."""
        from tbn_compiler.backends.c import export_c, host

        path = self._folder / "model.c"
        plan = export_c(network, _cloned(inputs), path, **self._c_options)
        self.plan = self.plan or plan  # that of the network as it is
        return list(host.run_arrays(path, [value.numpy() for value in inputs]).values())

    def onnx(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> Results:
        """Outputs of the ONNX file."""
        from tbn_compiler.backends.onnx import export_onnx

        load_onnxruntime()  # before the export, which takes seconds
        path, names = self._folder / "model.onnx", [f"input_{index}" for index in range(len(inputs))]
        export_onnx(network, _cloned(inputs), path, dynamic_batch=False, input_names=names)
        arrays = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return list(OnnxFile(path).run(arrays).values())


def _int8(network: nn.Module, inputs: tuple[Tensor, ...]) -> Results:
    found = optimize(network, _cloned(inputs), activation="int8", calibration=[_cloned(inputs)])
    return _run(found, inputs)


def _cloned(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.clone() for value in inputs)


def _run(network: nn.Module, inputs: tuple[Tensor, ...]) -> Results:
    # A forward may write to its inputs and to buffers, which other copies of the network share.
    buffers = [(owner, dict(owner._buffers)) for owner in network.modules()]
    values = [(value, value.clone()) for _, held in buffers for value in held.values() if value is not None]
    try:
        with torch.no_grad():
            result = network(*_cloned(inputs))
    except Exception as error:
        raise does_not_run(network, inputs, {}, error) from error
    finally:
        for owner, held in buffers:
            owner._buffers.update(held)
        with torch.no_grad():
            for value, before in values:
                value.copy_(before)
    halves = (torch.bfloat16, torch.float16)
    return [(leaf.float() if leaf.dtype in halves else leaf).numpy() for leaf in _tensors(result)]


def _tensors(result: Any) -> Iterator[Tensor]:
    """The tensors in what a module gives, in the fields of dataclasses, too."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from _tensors([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])


def _called(network: nn.Module, inputs: tuple[Tensor, ...]) -> set[str]:
    """The modules inside a network that are called when it runs, and give tensors."""
    called: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, result: Any) -> None:
            if next(_tensors(result), None) is not None:
                called.add(name)

        return hook

    for name, part in network.named_modules():
        if name:
            part.register_forward_hook(note(name))
    _run(network, inputs)
    return called


def _observed(network: nn.Module, names: Sequence[str]) -> nn.Module:
    """Let a network give the results of its layers behind its own, those of a layer's first call."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, result: Any) -> None:
            seen.setdefault(name, next(_tensors(result)))

        return hook

    def append(network: nn.Module, inputs: Any, result: Any) -> Any:
        results = tuple(seen[name] for name in names)
        seen.clear()
        return (result, *results)

    for name in names:
        network.get_submodule(name).register_forward_hook(keep(name))
    network.register_forward_hook(append)
    return network
