"""What several commands share: the options that name a model, its inputs and how to tile it, and loading them."""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from tbn_compiler.cli.arrays import load_arrays
from tbn_compiler.cli.checkpoints import Tiling, load_float_state, restore
from tbn_compiler.cli.config_file import PRESETS, add_config, make_config
from tbn_compiler.cli.options import Repeated, load_object, parse_copies, parse_positive, parse_shape
from tbn_compiler.compiler import transform
from tbn_compiler.config import AlphaMode, AlphaSource, Replication, SmallLayers, TileDType, TilingConfig
from tbn_compiler.errors import ConfigError
from tbn_compiler.graph.records import get_records
from tbn_compiler.torch_private import original_module


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
    add_config(parser)
    group = parser.add_argument_group(
        "tiling", "how to tile a float model; refused where the model or its checkpoint is tiled already, and says how"
    )
    group.add_argument("--preset", choices=tuple(PRESETS), help="the paper's settings (default: TilingConfig's own)")
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
        "--keep-float", metavar="PATTERN", action=Repeated, help="layers to keep in float; may be repeated"
    )


def add_inputs(parser: argparse.ArgumentParser, use: str) -> None:
    """The options ``--input`` and ``--inputs``; ``use`` says what the inputs are for."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--input",
        type=parse_shape,
        action=Repeated,
        metavar="SHAPE",
        help=f"shape of a random input, e.g. 1,3,224,224, once for each input: {use}",
    )
    group.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="stored inputs instead: .npy, or .npz with an array for each parameter of forward",
    )


def example_inputs(arguments: argparse.Namespace, model: nn.Module) -> tuple[Tensor, ...]:
    """The inputs that the arguments name, in the order of ``forward``: normally distributed, or stored ones.

    Stored floating point is taken as float32, bytes as they are, other integers as int64.

    Raises:
        ConfigError: there are none, or they cannot be read, or their names are not those of ``forward``.
    """
    if arguments.inputs is not None:
        return tuple(_stored(arguments.inputs, model))
    if not arguments.input:
        raise ConfigError("give the shape of each input with --input, or stored inputs with --inputs")
    generator = torch.Generator().manual_seed(0)  # a test on zeros would see little
    return tuple(torch.randn(shape, generator=generator) for shape in arguments.input)


def self_test_inputs(path: Path, model: nn.Module, example: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """Several inputs like an example: arrays as for :func:`example_inputs`, longer along their first axis.

    Raises:
        ConfigError: the file cannot be read, or an array is not a multiple of the example, or longer than another one.
    """
    stored = _stored(path, model)
    shapes = [list(tensor.shape) for tensor in stored]
    said = f"{path} holds {', '.join(map(str, shapes))}"
    wanted = [list(tensor.shape) for tensor in example]
    if [shape[1:] for shape in shapes] != [shape[1:] for shape in wanted] or not all(shapes) or not all(wanted):
        raise ConfigError(f"{said}, which are not inputs {', '.join(map(str, wanted))} one behind the other")
    counts = {divmod(len(tensor), len(like)) for tensor, like in zip(stored, example, strict=True)}
    if len(counts) > 1 or counts.pop()[1]:
        raise ConfigError(f"{said}, which is not the same number of inputs {', '.join(map(str, wanted))}")
    parts = [tensor.split(len(like)) for tensor, like in zip(stored, example, strict=True)]
    return list(zip(*parts, strict=True))


def optional_inputs(arguments: argparse.Namespace, model: nn.Module) -> tuple[Tensor, ...] | None:
    """:func:`example_inputs`, or ``None`` where the arguments name none."""
    return example_inputs(arguments, model) if arguments.input or arguments.inputs else None


def _stored(path: Path, model: nn.Module) -> list[Tensor]:
    """The arrays of a file as inputs, in the order of ``forward``."""
    return [torch.from_numpy(array.astype(_dtype(array.dtype))) for array in _in_order(load_arrays(path), model, path)]


def _dtype(stored: np.dtype[Any]) -> np.dtype[Any]:
    if stored.kind == "f":
        return np.dtype(np.float32)
    return np.dtype(np.int64) if stored.kind in "iu" and stored.itemsize > 1 else stored


def _in_order(arrays: dict[str, np.ndarray], model: nn.Module, path: Path) -> list[np.ndarray]:
    """Arrays in the order of the parameters of ``forward``; a single one, or ``arr_0``, ..., need no names."""
    if len(arrays) == 1 or list(arrays) == [f"arr_{index}" for index in range(len(arrays))]:
        return list(arrays.values())
    names = [name for name in inspect.signature(original_module(model).forward).parameters if name in arrays]
    if len(names) != len(arrays):
        strange = ", ".join(repr(name) for name in arrays if name not in names)
        raise ConfigError(f"{path} holds {strange}, which is no parameter of forward of {type(model).__name__}")
    return [arrays[name] for name in names]


def _tiling(arguments: argparse.Namespace) -> Tiling:
    """The tiling options of the command line, over those of the file."""
    names = ("p", "alpha", "alpha_source", "tile_dtype", "replicate", "shift", "min_size", "small")
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.keep_float:
        given["float_layers"] = tuple(arguments.keep_float)
    explicit = bool(given) or arguments.preset is not None
    if not arguments.tiling and not explicit:
        return Tiling()
    preset = {} if arguments.preset is None else {"preset": arguments.preset}
    return Tiling(make_config({**arguments.tiling, **preset, **given}), None if explicit else arguments.config)


def _build(spec: str) -> nn.Module:
    """Import ``module:factory`` (the current folder comes first) and call it."""
    with redirect_stdout(sys.stderr):  # what it prints is no result of a command
        model = load_object(spec, "the model")()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{spec} returned a {type(model).__name__}, not an nn.Module")
    return model


def add_float_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a float model, and what its layers have whatever becomes of them."""
    parser.add_argument("model", help="module:factory, a callable without arguments that returns the float nn.Module")
    parser.add_argument("--checkpoint", type=Path, help="state_dict (.safetensors, .pt) of the float model")
    add_config(parser)
    parser.add_argument("--alpha", choices=get_args(AlphaMode), help="one scale per layer, or copy (default: layer)")
    parser.add_argument(
        "--keep-float", metavar="PATTERN", action=Repeated, help="layers to keep in float; may be repeated"
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
    return model, make_config(arguments.tiling | {name: value for name, value in given.items() if value})


def load_model(arguments: argparse.Namespace) -> nn.Module:
    """The tiled or lowered model that the arguments name, with its checkpoint.

    Raises:
        ConfigError: tiling options for a model that is tiled already.
        SerializationError: the checkpoint does not fit.
    """
    model, tiling = _build(arguments.model), _tiling(arguments)
    if arguments.checkpoint is not None:
        return restore(model, arguments.checkpoint, tiling)
    if get_records(model) is None:
        return transform(model, tiling.config)
    tiling.refuse("the model is tiled already")
    return model
