"""What several commands share: the options that name a model and how to tile it, and loading it."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any, get_args

from torch import nn

from tbn_compiler.cli.checkpoints import load_float_state, restore
from tbn_compiler.compiler import transform
from tbn_compiler.config import AlphaMode, AlphaSource, Replication, SmallLayers, TileDType, TilingConfig
from tbn_compiler.errors import ConfigError
from tbn_compiler.graph.records import get_records

_PRESETS = {"paper": TilingConfig.paper, "imagenet": TilingConfig.imagenet, "time-series": TilingConfig.time_series}


def add_model(parser: argparse.ArgumentParser, *, checkpoint: str = "--checkpoint") -> None:
    """The options that name a model and how to tile it; ``checkpoint`` is the name of the option for its weights."""
    defaults = TilingConfig()
    parser.add_argument("model", help="module:factory, a callable without arguments that returns an nn.Module")
    parser.add_argument(
        checkpoint,
        dest="checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="packed file of tbn_compiler.save, or a state_dict (.safetensors, .pt) of the float or the tiled model",
    )
    group = parser.add_argument_group(
        "tiling", "how to tile a float model; refused where the model or its checkpoint is tiled already, and says how"
    )
    group.add_argument("--preset", choices=tuple(_PRESETS), help="the paper's settings (default: TilingConfig's own)")
    group.add_argument(
        "--p", type=parse_copies, help=f"copies of the tile, or OUTxIN along both axes (default: {defaults.p})"
    )
    group.add_argument(
        "--alpha",
        choices=get_args(AlphaMode),
        help=f"one scale per layer, copy along the output, or copy (default: {defaults.alpha})",
    )
    group.add_argument(
        "--alpha-source",
        choices=get_args(AlphaSource),
        help=f"where scales come from (default: the preset's, or {defaults.alpha_source})",
    )
    group.add_argument("--tile-dtype", choices=get_args(TileDType), help=f"default: {defaults.tile_dtype}")
    group.add_argument("--replicate", choices=get_args(Replication), help=f"default: {defaults.replicate}")
    group.add_argument(
        "--shift", type=parse_positive, help=f"elements that 'roll' rolls each copy by (default: {defaults.shift})"
    )
    group.add_argument(
        "--min-size",
        type=int,
        help="smaller layers are not tiled (default: the preset's, or derived from the model: at most 64,000, and half "
        "of the weights are tiled)",
    )
    group.add_argument(
        "--small", choices=get_args(SmallLayers), help=f"what smaller layers become (default: {defaults.small})"
    )
    group.add_argument(
        "--keep-float", metavar="PATTERN", action="append", help="layers to keep in float; may be repeated"
    )


def parse_positive(text: str) -> int:
    """A number of at least 1, for ``type=`` of an option."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse_copies(text: str) -> int | tuple[int, int]:
    """A number of copies, for ``type=`` of an option."""
    parts = text.split("x")
    try:
        numbers = [parse_positive(part) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of copies such as 4 or 2x2") from None
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has more than two axes")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def parse_shape(text: str) -> tuple[int, ...]:
    """A shape, for ``type=`` of an option."""
    try:
        return tuple(parse_positive(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1,3,224,224") from None


def _config(arguments: argparse.Namespace) -> TilingConfig | None:
    """The tiling options; ``None`` if none were given."""
    names = ("p", "alpha", "alpha_source", "tile_dtype", "replicate", "shift", "min_size", "small")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.keep_float:
        options["float_layers"] = tuple(arguments.keep_float)
    if not options and arguments.preset is None:
        return None
    return TilingConfig(**options) if arguments.preset is None else _PRESETS[arguments.preset](**options)


def load_object(spec: str) -> Any:
    """What ``module:name`` stands for; the current folder comes first.

    Raises:
        ConfigError: it is not of this form, or there is no such thing.
    """
    module_name, _, name = spec.partition(":")
    if not module_name or not name:
        raise ConfigError(f"{spec!r} is not of the form module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"cannot import {module_name!r}: {error}") from error
    try:
        return getattr(module, name)
    except AttributeError:
        raise ConfigError(f"module {module_name!r} has no {name!r}") from None


def _build(spec: str) -> nn.Module:
    """Import ``module:factory`` and call it."""
    model = load_object(spec)()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{spec} returned a {type(model).__name__}, not an nn.Module")
    return model


def add_float_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a float model, and what its layers have whatever becomes of them."""
    parser.add_argument("model", help="module:factory, a callable without arguments that returns the float nn.Module")
    parser.add_argument("--checkpoint", type=Path, help="state_dict (.safetensors, .pt) of the float model")
    parser.add_argument("--alpha", choices=get_args(AlphaMode), help="one scale per layer, or copy (default: layer)")
    parser.add_argument(
        "--keep-float", metavar="PATTERN", action="append", help="layers to keep in float; may be repeated"
    )


def load_float_model(arguments: argparse.Namespace) -> tuple[nn.Module, TilingConfig]:
    """The float model that the arguments name, with its checkpoint, and what its layers have.

    Raises:
        SerializationError: the checkpoint does not fit.
    """
    model = _build(arguments.model)
    if arguments.checkpoint is not None:
        load_float_state(model, arguments.checkpoint)
    given = {"alpha": arguments.alpha, "float_layers": arguments.keep_float}
    return model, TilingConfig(**{name: value for name, value in given.items() if value})


def load_model(arguments: argparse.Namespace) -> nn.Module:
    """The tiled or lowered model that the arguments name, with its checkpoint.

    Raises:
        ConfigError: tiling options for a model that is tiled already.
        SerializationError: the checkpoint does not fit.
    """
    model, config = _build(arguments.model), _config(arguments)
    if arguments.checkpoint is not None:
        return restore(model, arguments.checkpoint, config)
    if get_records(model) is None:
        return transform(model, config)
    if config is not None:
        raise ConfigError("the model is tiled already: leave the tiling options out")
    return model
