"""Files of packed models: safetensors with one JSON header entry; never pickle.

The header entry ``tbn`` holds the format version; for each stored tile its weight's shape, ``p``, number of alphas
and dtype; and for each layer left alone the reason. Tensors keep their ``state_dict`` names; a tensor that several
names share is stored once.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor, nn

from tbn_compiler.compiler import lower_model, tile_model
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError, LoweringError, SerializationError
from tbn_compiler.files import replacing
from tbn_compiler.graph.calls import InferenceCall, inference_call
from tbn_compiler.graph.layers import LayerRecord, alpha_key, get_records, graph_parts, layer_calls, set_records
from tbn_compiler.tiling import TileLayout, TileSpec

FORMAT_VERSION = 1
_ENTRY = "tbn"


def save(packed: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a lowered module to a safetensors file.

    The file is written beside ``path`` and renamed, so an interrupted save leaves an older file as it was.

    Args:
        packed: the result of :func:`~tbn_compiler.lower`.
        path: file to write.

    Raises:
        SerializationError: the module is not lowered, or its state cannot be stored as tensors.
        OSError: the file cannot be written.
    """
    records = get_records(packed)
    if records is None:
        raise SerializationError(f"{type(packed).__name__} is not a lowered module: call tbn_compiler.lower first")
    trained = [call.weight for _, part in graph_parts(packed) for call in layer_calls(part) if call.form == "tiled"]
    if trained:
        raise SerializationError(
            f"save stores packed tiles, but {trained[0]!r} is still a trainable weight: call tbn_compiler.lower first "
            "(or torch.save the state_dict to go on training later)"
        )
    for _, part in graph_parts(packed):
        for node in part.graph.nodes:
            call = inference_call(node)
            if call is not None and _is_optimized(call):
                raise SerializationError(
                    f"layer {str(call.arguments['tile'].target).removesuffix('_tile')!r} was rewritten by "
                    "tbn_compiler.optimize, which no file holds: save the lowered module, and optimise after load"
                )
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    stored: dict[Any, str] = {}
    for name, value in packed.state_dict().items():
        if not isinstance(value, Tensor):
            raise SerializationError(f"state_dict entry {name!r} is a {type(value).__name__}, not a tensor")
        identity = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else name
        if identity in stored:
            aliases[name] = stored[identity]
        else:
            stored[identity] = name
            tensors[name] = value.detach().cpu().contiguous().clone()
    header = {
        "version": FORMAT_VERSION,
        "layers": {record.weight: _describe(record) for record in records if record.spec},
        "left_alone": {record.weight: record.reason for record in records if record.reason},
        "aliases": aliases,
    }
    with replacing(path) as temporary:
        safetensors.torch.save_file(tensors, temporary, {_ENTRY: json.dumps(header)})


def load(path: str | os.PathLike[str], model: nn.Module) -> Any:
    """Read a packed file into the architecture that it was made from.

    Args:
        path: a file that :func:`save` wrote.
        model: the float model (``nn.Module`` or ``GraphModule``), with any weights, on any device, the meta
            device included. It is not changed.

    Returns:
        The lowered module, in evaluation mode, on the model's device (the CPU for a meta model).

    Raises:
        SerializationError: the file is damaged, foreign or newer than this version, or does not fit the model.
        TransformError: the model cannot be traced.
        OSError: the file cannot be read.
    """
    header, tensors = _read(Path(path), _device(model))
    layers, reasons = header["layers"], header["left_alone"]
    specs = {name: _parse(name, layer, path) for name, layer in layers.items()}
    # Alphas come from the file: no alpha source needs to exist meanwhile.
    placed = {name: replace(spec, alpha_source="W") for name, spec in specs.items()}
    gm = tile_model(model, TilingConfig(), placed)
    _check_layers(gm, specs, path)
    try:
        lower_model(gm, tensors)
    except LoweringError as error:
        raise SerializationError(f"{path} does not fit {type(model).__name__}: {error}") from error
    set_records(
        gm,
        [
            replace(record, spec=specs[record.weight], note=layers[record.weight].get("note"))
            if record.spec
            else replace(record, reason=reasons.get(record.weight, record.reason))
            for record in get_records(gm) or ()
        ],
    )
    try:
        gm.load_state_dict(tensors, strict=True, assign=True)
    except RuntimeError as error:
        raise SerializationError(f"{path} does not fit {type(model).__name__}: {error}") from error
    return gm.eval()


def _is_optimized(call: InferenceCall) -> bool:
    """Whether a call no longer uses the tensors that lowering stored for its weight, in its own shape."""
    weight = str(call.arguments["tile"].target).removesuffix("_tile")
    return str(call.arguments["alpha"].target) != alpha_key(weight) or call.arguments["input_alpha"] is not None


def _describe(record: LayerRecord) -> dict[str, Any]:
    spec = record.spec
    assert spec is not None
    return {
        "shape": list(record.shape),
        "p": spec.layout.p,
        "p_in": spec.layout.p_in,
        "shift": spec.layout.shift,
        "alphas": spec.num_alphas,
        "alpha_source": spec.alpha_source,
        "tile_dtype": spec.tile_dtype,
        "note": record.note,
    }


def _parse(name: str, layer: dict[str, Any], path: Any) -> TileSpec:
    try:
        layout = TileLayout(tuple(layer["shape"]), layer["p"], layer["p_in"], layer["shift"])
        return TileSpec(layout, layer["alphas"], layer["alpha_source"], layer["tile_dtype"])
    except (KeyError, TypeError, AttributeError, ConfigError) as error:
        raise SerializationError(f"{path}: the header entry of layer {name!r} is damaged: {error!r}") from error


def _device(model: nn.Module) -> str:
    device = next((str(parameter.device) for parameter in model.parameters()), "cpu")
    return "cpu" if device == "meta" else device


def _read(path: Path, device: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header entry and all tensors, shared names included."""
    try:
        with safetensors.safe_open(path, framework="pt", device=device) as file:
            metadata = file.metadata() or {}
            if _ENTRY not in metadata:
                raise SerializationError(f"{path} was not written by tbn_compiler.save: it has no {_ENTRY!r} entry")
            header = json.loads(metadata[_ENTRY])
            version = header["version"]
            if version > FORMAT_VERSION:
                raise SerializationError(
                    f"{path} has format version {version}; this tbn_compiler reads up to {FORMAT_VERSION}: upgrade it"
                )
            for name in ("layers", "left_alone", "aliases"):
                if not isinstance(header[name], dict):
                    raise TypeError(f"{name} is not a mapping")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return header, tensors | {name: tensors[source] for name, source in header["aliases"].items()}
    except safetensors.SafetensorError as error:
        raise SerializationError(f"{path} is truncated or no safetensors file: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise SerializationError(f"{path}: the {_ENTRY!r} header entry is damaged: {error!r}") from error


def _check_layers(gm: nn.Module, specs: dict[str, TileSpec], path: Any) -> None:
    """Every stored tile must have found its layer, with the same weight shape."""
    records = {record.weight: record for record in get_records(gm) or ()}
    for name, spec in specs.items():
        record = records.get(name)
        if record is None:
            raise SerializationError(f"{path}: the model has no linear or conv weight {name!r}")
        if record.shape != spec.layout.shape:
            raise SerializationError(
                f"{path}: weight {name!r} has shape {spec.layout.shape} in the file, {record.shape} in the model"
            )
        if record.spec is None:
            raise SerializationError(f"{path}: weight {name!r} cannot be tiled in this model: {record.reason}")
