"""The finished ONNX file: names, metadata, checks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tbn_compiler.errors import ExportError
from tbn_compiler.graph.records import LayerRecord
from tbn_compiler.version import __version__

if TYPE_CHECKING:
    import onnx_ir as ir

FORMAT_VERSION = 1
METADATA_KEY = "tbn"

_LARGEST = 2**31 - 2**20  # protocol buffers end at 2 GiB; the graph itself takes some


def description(
    weights: str, records: Iterable[LayerRecord], forms: Mapping[str, str], reasons: Mapping[str, str]
) -> dict[str, Any]:
    """The metadata entry: what each layer is, under its name."""
    layers: dict[str, Any] = {}
    left_alone: dict[str, str] = {}
    for record in records:
        if record.spec is None:
            left_alone[record.weight] = str(record.reason)
            continue
        layout = record.spec.layout
        layers[record.weight] = {
            "kind": record.kind,
            "shape": list(record.shape),
            "p": layout.p,
            "p_in": layout.p_in,
            "shift": layout.shift,
            "alphas": record.spec.num_alphas,
            "tile": record.spec.tile_dtype,
            "form": forms.get(record.weight, weights),
        }
        if layout.hadamard:
            layers[record.weight]["hadamard"] = True
        if record.weight in reasons:
            layers[record.weight]["reason"] = reasons[record.weight]
    return {"version": FORMAT_VERSION, "weights": weights, "layers": layers, "left_alone": left_alone}


def finish(model: ir.Model, names: tuple[Sequence[str], Sequence[str]], entry: Mapping[str, Any]) -> None:
    """Set names and metadata, and drop what the exporter keeps for debugging itself.

    Raises:
        ExportError: the number of names is not that of the inputs or outputs, or a name occurs twice.
    """
    from onnx_ir.passes import common

    graph = model.graph
    for what, values, chosen in (("input", graph.inputs, names[0]), ("output", graph.outputs, names[1])):
        if len(chosen) != len(values):
            raise ExportError(f"the model has {len(values)} {what}s, got the names {list(chosen)}")
    if len({*names[0], *names[1]}) != len(names[0]) + len(names[1]):
        raise ExportError(f"the names of inputs {list(names[0])} and outputs {list(names[1])} must all differ")
    for value, name in zip((*graph.inputs, *graph.outputs), (*names[0], *names[1]), strict=True):
        value.name = name
    for index, node in enumerate(graph):
        node.name = f"{node.op_type}_{index}"  # the stored tensors have the names of the layers
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                # Every reader infers them again; stored, they are a good part of a small file.
                value.shape = value.type = None
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
    common.NameFixPass()(model)  # an inner value may have had the name of an input or output
    model.producer_name, model.producer_version = "tbn_compiler", __version__
    model.metadata_props.clear()
    model.metadata_props[METADATA_KEY] = json.dumps(entry, separators=(",", ":"))
    graph.metadata_props.clear()
    graph.name = "tbn_compiler"


def serialize(model: ir.Model) -> bytes:
    """The bytes of the file, after the full check of ``onnx``.

    Raises:
        ExportError: the model is larger than one file can be, or not valid.
    """
    import onnx
    import onnx_ir

    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if stored > _LARGEST:
        raise ExportError(f"the weights take {stored:,} bytes, one ONNX file holds less than 2 GiB")
    proto = onnx_ir.to_proto(model)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported model is not valid ONNX: {error}") from error
    data: bytes = proto.SerializeToString()
    return data
