"""Files of packed models: safetensors with one JSON header entry; never pickle.

The header entry ``tbn`` is an object with these fields, all required:

``version``
    The format version, 2.
``layers``
    By weight name, each stored tile: ``shape`` of the weight, ``p``, ``p_in``, ``shift``, ``alphas`` (their number),
    ``alpha_source``, ``tile_dtype`` as in :class:`~tbn_compiler.tiling.TileSpec`, and ``note``; further options of its
    :class:`~tbn_compiler.tiling.TileLayout` (``batch``, ``hadamard``) and of its inputs (``activation``,
    ``input_scale``) only where they are not the usual ones.
``left_alone``
    By weight name, why each other layer is in float.
``aliases``
    By name, the stored tensor that is the same one: a tensor that several names share is stored once.
``sha256``
    Of the other fields and all tensors: a file is read as it was written, or not at all.

Tensors keep their ``state_dict`` names; ``<weight>_tile`` and ``<weight>_alpha`` hold a layer's stored form, and
``<weight>_input_scale`` the scale of its inputs where ``input_scale`` is ``"layer"``.

Compatibility: a field that this version does not know may change what a tile means, so it is refused, wherever it
stands. A later version can still add an option of a layout without a new format version: files that do not use it read
as before, others are refused by name. What never changes a result belongs into a safetensors entry beside ``tbn``;
those are ignored. Version 1 (tbn_compiler 0.1) is read too: it has no ``sha256`` and no further options.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tbn_compiler.errors import ConfigError, SerializationError
from tbn_compiler.files import replacing
from tbn_compiler.graph.records import alpha_key, input_scale_key, tile_key
from tbn_compiler.graph.tiling_data import (
    FURTHER,
    OPTIONS,
    SPEC_FIELDS,
    check_fields,
    parse_json,
    shorten,
    spec_from_data,
    spec_to_data,
)
from tbn_compiler.ops.schemas import INT8_TINY
from tbn_compiler.packing import packed_size
from tbn_compiler.tiling import TileSpec

FORMAT_VERSION = 2
ENTRY = "tbn"

_FIELDS = ("version", "layers", "left_alone", "aliases")
_LAYER_FIELDS = (*SPEC_FIELDS, "note")
_PACKED_OPTIONS = (*OPTIONS, "activation", "input_scale")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class StoredLayer:
    """The tiling of one stored weight, and the note of its record."""

    spec: TileSpec
    note: str | None = None


@dataclass(frozen=True)
class PackedHeader:
    """What the header of a file says, once it is known to agree with the tensors.

    Attributes:
        layers: the stored tiles by weight name.
        left_alone: by weight name, why a layer is in float.
        aliases: further names of stored tensors.
        version: format version of the file.
    """

    layers: Mapping[str, StoredLayer]
    left_alone: Mapping[str, str]
    aliases: Mapping[str, str]
    version: int = FORMAT_VERSION


def read_header(header: Any, tensors: Mapping[str, Tensor]) -> PackedHeader:
    """Check a header against the tensors beside it.

    Args:
        header: the parsed JSON of the entry, whatever it is.
        tensors: the stored tensors by name, on the CPU.

    Raises:
        SerializationError: anything is not exactly what :func:`make_header` gives for such tensors; names the layer
            and what is wrong.
    """
    if not isinstance(header, dict):
        raise SerializationError(f"its header is {shorten(header)}, not an object")
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise SerializationError(f"its format version is {shorten(version)}, not a positive integer")
    if version > FORMAT_VERSION:
        raise SerializationError(
            f"it has format version {shorten(version)}; this tbn_compiler reads up to {FORMAT_VERSION}: upgrade it"
        )
    check_fields("its header", header, _FIELDS if version == 1 else (*_FIELDS, "sha256"))
    for name in ("layers", "left_alone", "aliases"):
        if not isinstance(header[name], dict):
            raise SerializationError(f"{name} is {shorten(header[name])}, not an object")
    named = dict(tensors)
    for name, source in header["aliases"].items():
        if name in tensors:
            raise SerializationError(f"alias {name!r} is the name of a stored tensor")
        if not isinstance(source, str) or source not in tensors:
            raise SerializationError(f"alias {name!r} points to {shorten(source)}, which is no stored tensor")
        named[name] = tensors[source]
    layers = {name: _read_layer(name, layer, version, named) for name, layer in header["layers"].items()}
    for name, reason in header["left_alone"].items():
        if not isinstance(reason, str):
            raise SerializationError(f"the reason for leaving {name!r} alone is {shorten(reason)}, not a text")
        if name in layers:
            raise SerializationError(f"layer {name!r} is both stored and left alone")
    if version > 1 and header["sha256"] != _digest(header, tensors):
        raise SerializationError("its contents do not have the stored sha256: it was changed after it was written")
    return PackedHeader(layers, header["left_alone"], header["aliases"], version)


def make_header(contents: PackedHeader, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header entry of a file in the present format version, for tensors on the CPU.

    Raises:
        SerializationError: the format cannot hold the contents; names the layer.
    """
    header = {
        "version": FORMAT_VERSION,
        "layers": {name: layer_to_data(layer) for name, layer in contents.layers.items()},
        "left_alone": dict(contents.left_alone),
        "aliases": dict(contents.aliases),
    }
    header["sha256"] = _digest(header, tensors)
    # A field that the header lacks would be lost without a word: what is written is read again.
    again = read_header(header, tensors)
    for name, layer in contents.layers.items():
        if again.layers[name] != layer:
            raise SerializationError(f"layer {name!r}: the format has no place for all of {layer.spec}")
    return header


def read_file(path: Path) -> tuple[PackedHeader, dict[str, Tensor]]:
    """The checked header and the stored tensors, on the CPU, without the aliases.

    Raises:
        SerializationError: the file is foreign, newer than this version, or damaged; names the file.
        OSError: the file cannot be read.
    """
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(ENTRY)
            if text is None:
                raise SerializationError(f"{path} was not written by tbn_compiler.save: it has no {ENTRY!r} entry")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except safetensors.SafetensorError as error:
        raise SerializationError(f"{path} is truncated or no safetensors file: {error}") from error
    try:
        return read_header(parse_json("its header", text), tensors), tensors
    except SerializationError as error:
        raise SerializationError(f"{path} cannot be read: {error}") from error


def write_file(path: Any, contents: PackedHeader, tensors: Mapping[str, Tensor]) -> None:
    """Write a file beside ``path`` and rename it.

    Args:
        path: file to write.
        contents: what the header is to say.
        tensors: contiguous tensors on the CPU that share no memory.

    Raises:
        SerializationError: the format cannot hold the contents; names the layer.
        OSError: the file cannot be written.
    """
    header = make_header(contents, tensors)
    with replacing(path) as temporary:
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(dict(tensors), temporary, {ENTRY: json.dumps(header)})
        temporary.chmod(mode)  # safetensors makes a file that only its owner may read


def layer_to_data(layer: StoredLayer) -> dict[str, Any]:
    """A layer's entry as plain data, ready for JSON."""
    return spec_to_data(layer.spec) | {"note": layer.note}


def layer_from_data(data: Any, optional: Collection[str] = (*OPTIONS, *FURTHER)) -> StoredLayer:
    """The layer that :func:`layer_to_data` wrote.

    Args:
        data: the entry, whatever it is.
        optional: fields that it may have beside those that it must have.

    Raises:
        SerializationError: the entry is damaged; names the field.
        ConfigError: its values do not fit each other.
    """
    check_fields("its entry", data, _LAYER_FIELDS, optional)
    spec = spec_from_data(data)
    if data["note"] is not None and not isinstance(data["note"], str):
        raise SerializationError(f"note is {shorten(data['note'])}, not a text")
    return StoredLayer(spec, data["note"])


def _read_layer(name: str, layer: Any, version: int, tensors: Mapping[str, Tensor]) -> StoredLayer:
    """Check one layer's header entry, alone and against its tensors."""
    try:
        stored = layer_from_data(layer, () if version == 1 else _PACKED_OPTIONS)
        spec = stored.spec
        keys = (tile_key, alpha_key, *([input_scale_key] if spec.input_scale == "layer" else []))
        missing = [key(name) for key in keys if key(name) not in tensors]
        if missing:
            raise SerializationError(f"the file lacks its tensor {', '.join(map(repr, missing))}")
        _check_tile(tensors[tile_key(name)], spec)
        _check_alpha(tensors[alpha_key(name)], spec)
        if spec.input_scale == "layer":
            _check_input_scale(tensors[input_scale_key(name)])
    except (SerializationError, ConfigError) as error:
        raise SerializationError(f"layer {name!r}: {error}") from error
    return stored


def _check_tile(tile: Tensor, spec: TileSpec) -> None:
    q = spec.layout.tile_size
    if spec.tile_dtype == "float":
        if tile.dtype not in _FLOATS or tuple(tile.shape) != (q,):
            raise SerializationError(f"its tile is {_kind(tile)}, not {q} floating-point numbers (tile_dtype 'float')")
        if not tile.isfinite().all():
            raise SerializationError("its tile has non-finite values (NaN or infinity)")
        return
    size = packed_size(q)
    if tile.dtype != torch.uint8 or tuple(tile.shape) != (size,):
        raise SerializationError(f"its tile is {_kind(tile)}, not {size} bytes (uint8) for {q} bits")
    if q % 8 and int(tile[-1]) >> q % 8:
        raise SerializationError(f"the padding bits of its tile, behind {q} bits, are not zero")


def _check_alpha(alpha: Tensor, spec: TileSpec) -> None:
    if alpha.dtype not in _FLOATS or tuple(alpha.shape) != (spec.num_alphas,):
        raise SerializationError(f"its alpha is {_kind(alpha)}, not {spec.num_alphas} floating-point numbers")
    if not (alpha.isfinite() & (alpha >= 0)).all():
        raise SerializationError("its alphas are no means of absolute values: one is negative, NaN or infinite")


def _check_input_scale(scale: Tensor) -> None:
    if scale.dtype not in _FLOATS or scale.numel() != 1:
        raise SerializationError(f"its input scale is {_kind(scale)}, not one floating-point number")
    if not (scale.isfinite() & (scale >= INT8_TINY)).all():
        raise SerializationError("its input scale is no number that inputs can be divided by")


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of all fields but itself, and of names, dtypes, shapes and bytes of the tensors, in order of names."""
    text = json.dumps({name: value for name, value in header.items() if name != "sha256"}, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(json.dumps([name, _kind(tensor)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
