"""What a layer may become: the options that a sensitivity is measured for and a plan chooses from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError

# What concerns the weight alone: its error is then that of the layer.
_FIELDS = ("p", "alpha", "tile_dtype", "replicate", "shift")
_WORDS = {"alpha": "alpha=", "tile_dtype": "tile_dtype=", "replicate": "", "shift": "shift="}

Candidate = int | tuple[int, int] | str | Mapping[str, Any]
"""``p``, ``"binary"`` (``p=1``), ``"float"``, or options of :class:`~tbn_compiler.TilingConfig` that name ``p``."""

DEFAULT_CANDIDATES: tuple[Candidate, ...] = ("float", "binary", 2, 4, 8)


@dataclass(frozen=True)
class LayerOption:
    """One option of a layer.

    Attributes:
        name: ``"float"``, ``"binary"``, ``"p=4"``, ``"p=2x2"``, ``"p=4 hadamard"``, ...
        options: what :class:`~tbn_compiler.TilingConfig` calls it, ``(("p", 4), ...)``; empty for a float layer.
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def is_float(self) -> bool:
        """Whether the layer stays in full precision."""
        return not self.options

    def to_data(self) -> str | dict[str, Any]:
        """The option as plain data, which :func:`parse_option` reads."""
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in self.options}
        return options or self.name


def parse_option(candidate: Candidate) -> LayerOption:
    """One candidate as a user writes it.

    Raises:
        ConfigError: it is none of the forms, or an option is out of range or concerns more than the weight.
    """
    if candidate == "float":
        return LayerOption("float")
    given: dict[str, Any]
    if candidate == "binary":
        given = {"p": 1}
    elif isinstance(candidate, Mapping):
        given = dict(candidate)
    elif isinstance(candidate, str):
        raise ConfigError(
            f"candidate {candidate!r} is neither 'float' nor 'binary', a number p or a mapping of options"
        )
    else:
        given = {"p": candidate}
    unknown = sorted(given.keys() - set(_FIELDS))
    if unknown or "p" not in given:
        why = f"has the options {unknown}" if unknown else "names no p"
        raise ConfigError(f"candidate {candidate!r} {why}: it must name p, and may name {', '.join(_FIELDS[1:])}")
    try:
        checked = TilingConfig(**given)
    except ConfigError as error:
        raise ConfigError(f"candidate {candidate!r}: {error}") from None
    options = tuple((field, getattr(checked, field)) for field in _FIELDS if field in given)
    if checked.p == (1, 1):  # one copy, whichever way it is written
        return parse_option({**given, "p": 1})
    p = checked.p if isinstance(checked.p, int) else "x".join(map(str, checked.p))
    words = [f"{_WORDS[field]}{value}" for field, value in options[1:]]
    name = "binary" if p == 1 and not words else " ".join([f"p={p}", *words])
    return LayerOption(name, options)


def parse_options(candidates: Iterable[Candidate]) -> tuple[LayerOption, ...]:
    """Several candidates, each once.

    Raises:
        ConfigError: there are none, or one is not valid.
    """
    if isinstance(candidates, str | Mapping):
        raise ConfigError(f"candidates must be a sequence, got {candidates!r}")
    options = tuple(dict.fromkeys(map(parse_option, candidates)))
    if not options:
        raise ConfigError("there are no candidates to choose from")
    return options
