"""Tilings as words for messages and as plain data for files and checkpoints, with the checks of what comes back."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args

from tbn_compiler.config import Activation, AlphaSource, InputScale, Latent, TileDType
from tbn_compiler.errors import SerializationError
from tbn_compiler.tiling import TileLayout, TileSpec

SPEC_FIELDS = ("shape", "p", "p_in", "shift", "alphas", "alpha_source", "tile_dtype")
# Options of a layout with their usual values.
OPTIONS: dict[str, Any] = {field.name: field.default for field in fields(TileLayout) if field.default is not MISSING}

# Fields that are written where they have another value.
FURTHER: dict[str, Any] = {"latent": "weight", "activation": "float", "input_scale": "token"}
_CHOICES = {
    "alpha_source": get_args(AlphaSource),
    "tile_dtype": get_args(TileDType),
    "latent": get_args(Latent),
    "activation": get_args(Activation),
    "input_scale": get_args(InputScale),
}


def describe_spec(spec: TileSpec) -> str:
    """A tiling in words, for messages."""
    layout = spec.layout
    p = f"p=({layout.p_out}, {layout.p_in})" if layout.p_in > 1 else f"p={layout.p}"
    parts = [p, *([f"replicate='roll' (shift {layout.shift})"] if layout.shift else [])]
    parts += ["replicate='hadamard'"] if layout.hadamard else []
    parts += [f"batch={layout.batch}"] if layout.batch > 1 else []
    alphas = f"{spec.num_alphas} alpha{'s' if spec.num_alphas > 1 else ''} from {spec.alpha_source}"
    parts += [alphas, *(["full-precision tile"] if spec.tile_dtype == "float" else [])]
    parts += ["latent='tile'"] if spec.latent == "tile" else []
    if spec.activation != "float":
        parts.append(f"{spec.activation} inputs" + (" of one scale" if spec.input_scale == "layer" else ""))
    return ", ".join(parts)


def spec_to_data(spec: TileSpec) -> dict[str, Any]:
    """A tiling as plain data, ready for JSON."""
    layout = spec.layout
    data: dict[str, Any] = {"shape": list(layout.shape), "p": layout.p, "p_in": layout.p_in, "shift": layout.shift}
    if layout.batch != 1:
        data["batch"] = layout.batch
    if layout.hadamard:
        data["hadamard"] = True
    data |= {"alphas": spec.num_alphas, "alpha_source": spec.alpha_source, "tile_dtype": spec.tile_dtype}
    return data | {name: getattr(spec, name) for name, usual in FURTHER.items() if getattr(spec, name) != usual}


def spec_from_data(data: Mapping[str, Any]) -> TileSpec:
    """The tiling that :func:`spec_to_data` wrote.

    Args:
        data: an object whose fields :func:`check_fields` has looked at; of any other kind are their values.

    Raises:
        SerializationError: a value is none that :func:`spec_to_data` writes; names the field.
        ConfigError: the values do not fit each other.
    """
    shape = data["shape"]
    if not isinstance(shape, list) or not 1 <= len(shape) <= 8:
        raise SerializationError(f"shape is {shorten(shape)}, not a list of 1 to 8 sizes")
    for size in shape:
        _check_integer("shape", size, 1)
    for field in ("p", "alphas"):
        _check_integer(field, data[field], 1)
    options = {name: data.get(name, usual) for name, usual in OPTIONS.items()}
    for field, value in options.items():
        if type(OPTIONS[field]) is int:
            _check_integer(field, value, 0)
        elif type(value) is not type(OPTIONS[field]):
            raise SerializationError(f"{field} is {shorten(value)}, not a {type(OPTIONS[field]).__name__}")
    named = FURTHER | {field: data[field] for field in _CHOICES if field in data}
    for field, choices in _CHOICES.items():
        value = named[field]
        if not isinstance(value, str) or value not in choices:
            raise SerializationError(f"{field} is {shorten(value)}, not one of {', '.join(map(repr, choices))}")
    for field, size in (("shape", math.prod(shape)), ("shift", options["shift"] * data["p"])):
        if size >= 2**63:
            raise SerializationError(f"{field} is {shorten(data[field])}, too large for any tensor")
    layout = TileLayout(tuple(shape), data["p"], **options)
    if not layout.allows_alphas(data["alphas"]):
        raise SerializationError(f"alphas={data['alphas']} is no number of alphas of {layout}")
    if named["input_scale"] != "token" and named["activation"] == "float":
        raise SerializationError(f"input_scale is {named['input_scale']!r} where inputs are float")
    return TileSpec(layout, data["alphas"], **named)


def _check_integer(field: str, value: Any, least: int) -> None:
    if type(value) is not int or not least <= value < 2**63:  # True is an int for isinstance
        raise SerializationError(f"{field} holds {shorten(value)}, not an integer of at least {least}")


def check_fields(where: str, given: Any, expected: Collection[str], optional: Collection[str] = ()) -> None:
    """Check that something is an object with all expected fields, and no others but the optional ones.

    Raises:
        SerializationError: it is not; ``where`` names it.
    """
    if not isinstance(given, dict):
        raise SerializationError(f"{where} is {shorten(given)}, not an object")
    missing = [name for name in expected if name not in given]
    unknown = [name for name in given if name not in expected and name not in optional]
    if missing:
        raise SerializationError(f"{where} lacks {', '.join(map(shorten, missing))}")
    if unknown:
        raise SerializationError(
            f"{where} has the unknown field {', '.join(map(shorten, unknown))}: it may change what the tiles mean, "
            "so a later tbn_compiler must read it"
        )


def parse_json(where: str, text: str) -> Any:
    """The value of a JSON text.

    Raises:
        SerializationError: it is none, or gives a field of an object twice; ``where`` names it.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):  # JSON parsers disagree about which one counts
            raise SerializationError(f"{where} gives a field twice: {shorten([name for name, _ in pairs])}")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    # A number of thousands of digits is a plain ValueError; brackets can be nested too deep.
    except (ValueError, RecursionError) as error:
        raise SerializationError(f"{where} is not valid JSON: {error}") from error


def shorten(value: Any) -> str:
    """A value for a message: damage can make it long."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 2**64 else "a huge integer"
    return text if len(text) <= 80 else f"{text[:80]}..."
