"""The file of ``--config``: options of the commands in TOML.

The table ``[tiling]`` holds the fields of :class:`~tbn_compiler.TilingConfig` and ``preset``; ``[model]`` holds
``checkpoint``, ``input`` and ``inputs`` for every command; the table of a command, such as ``[export-c]``, holds its
options by their names on the command line, with ``_`` for ``-``. What is given on the command line wins.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tbn_compiler.cli.options import TILING, Repeated, load_object
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PRESETS = {
    "paper": TilingConfig.paper,
    "cifar": TilingConfig.cifar,
    "imagenet": TilingConfig.imagenet,
    "time-series": TilingConfig.time_series,
}
_MODEL = {"checkpoint": ("checkpoint", "against"), "input": ("input",), "inputs": ("inputs",)}
# Two ways to say the same: one that is given on the command line puts the other one of the file aside.
_EITHER = {"input": "inputs", "inputs": "input", "json": "markdown", "markdown": "json"}


def add_config(parser: argparse.ArgumentParser) -> None:
    """The option ``--config``."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE.toml",
        help="options in TOML: tables [tiling], [model] and one for each command; the command line wins",
    )
    parser.set_defaults(tiling={})


def apply(path: Path, commands: Mapping[str, argparse.ArgumentParser], given: argparse.Namespace) -> None:
    """Make the options in a file the defaults of the command that runs; the other tables are checked, too.

    Args:
        path: the file.
        commands: the parser of each command.
        given: what the command line alone gives, with the name of the command as ``command``.

    Raises:
        ConfigError: the file is missing or no TOML, a table, key or value in it is not known.
    """
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    configurable = {name: parser for name, parser in commands.items() if "config" in _options(parser)}
    _check_names(tables, ("tiling", "model", *configurable), f"{path} has no use for the table")
    for name, table in tables.items():
        if not isinstance(table, Mapping):
            raise ConfigError(f"{path}: {name} is no table: write [{name}] and a line for each option")
    values: dict[str, Any] = {}
    for name, parser in configurable.items():
        options = {key: action for key, action in _options(parser).items() if action.dest not in (*TILING, "config")}
        shared = _shared(tables.get("model", {}), options, f"{path}: [model]")
        own = _values(tables.get(name, {}), options, f"{path}: [{name}]")
        if name == given.command:
            values = shared | own
    for key, other in _EITHER.items():
        if getattr(given, key, None) not in (None, False):
            values.pop(other, None)
    if values.get("input") is not None and values.get("inputs") is not None:
        raise ConfigError(f"{path}: give input or inputs, not both")
    values["tiling"] = _tiling(tables.get("tiling", {}), f"{path}: [tiling]")
    commands[given.command].set_defaults(**values)


def make_config(options: Mapping[str, Any]) -> TilingConfig:
    """The tiling of a preset, or of :class:`~tbn_compiler.TilingConfig` itself, with further fields over it.

    Raises:
        ConfigError: a field is unknown or a value out of range.
    """
    fields = dict(options)
    preset = fields.pop("preset", None)
    return TilingConfig(**fields) if preset is None else PRESETS[preset](**fields)


def _options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """The options of a command, by their names in a file."""
    return {
        action.option_strings[-1 if len(action.option_strings[0]) == 2 else 0][2:].replace("-", "_"): action
        for action in parser._actions
        if action.option_strings and action.dest != "help"
    }


def _check_names(given: Mapping[str, Any], known: Collection[str], problem: str) -> None:
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise ConfigError(f"{problem} {name!r}{hint} Known: {', '.join(known)}")


def _shared(table: Mapping[str, Any], options: Mapping[str, argparse.Action], where: str) -> dict[str, Any]:
    """The options of ``[model]`` that a command has."""
    _check_names(table, _MODEL, f"{where} has no option")
    named = {name: value for key, value in table.items() for name in _MODEL[key] if name in options}
    return _values(named, options, where)


def _values(table: Mapping[str, Any], options: Mapping[str, argparse.Action], where: str) -> dict[str, Any]:
    """The values of a command's table, by the attributes that hold them."""
    _check_names(table, options, f"{where} has no option")
    return {options[name].dest: _value(options[name], value, f"{where} {name}") for name, value in table.items()}


def _value(action: argparse.Action, value: Any, where: str) -> Any:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, got {value!r}")
        return value
    if not isinstance(action, Repeated):
        return _one(action, value, where)
    shapes = action.dest == "input"
    if not isinstance(value, list) or (shapes and not all(isinstance(item, str | list) for item in value)):
        example = "[[1, 784]]" if shapes else f"[{value!r}]"
        raise ConfigError(f"{where} must be a list such as {example}, got {value!r}")
    # A list in the list is what the command line separates by commas.
    items = [",".join(map(str, item)) if isinstance(item, list) else item for item in value]
    return [_one(action, item, where) for item in items]


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    """One value, read as the command line reads it."""
    allowed = str if action.type in (None, Path) else str | int | float
    if isinstance(value, bool) or not isinstance(value, allowed):
        kind = "a string" if allowed is str else "a string or a number"
        raise ConfigError(f"{where} must be {kind}, got {value!r}")
    try:
        read = value if action.type is None else action.type(str(value))  # type: ignore[operator]
    except (ValueError, argparse.ArgumentTypeError) as error:
        raise ConfigError(f"{where}: {error}") from None
    if action.choices is not None and read not in action.choices:
        raise ConfigError(f"{where}={read!r} is not one of {', '.join(map(repr, action.choices))}")
    return read


def _tiling(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of ``[tiling]``, checked, with the filter function in place of its name."""
    options = dict(table)
    if "filter" in options:
        name = options["filter"]
        if not isinstance(name, str):
            raise ConfigError(f"{where} filter must be a string module:function, got {name!r}")
        options["filter"] = load_object(name, f"{where} filter")
    preset = options.get("preset")
    if "preset" in options and preset not in PRESETS:
        raise ConfigError(f"{where} preset={preset!r} is not one of {', '.join(map(repr, PRESETS))}")
    try:
        make_config(options)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    return options
