"""The ``tbn-compiler`` command."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import safetensors.torch
import torch
from rich.console import Console
from torch import nn

import tbn_compiler
from tbn_compiler.compiler import lower, optimize, transform
from tbn_compiler.config import AlphaMode, AlphaSource, Replication, SmallLayers, TileDType, TilingConfig
from tbn_compiler.errors import ConfigError, SerializationError, TBNError
from tbn_compiler.layers import get_records
from tbn_compiler.serialize import load
from tbn_compiler.summary import summary

_PRESETS = {"paper": TilingConfig.paper, "imagenet": TilingConfig.imagenet, "time-series": TilingConfig.time_series}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 1 after a message on standard error."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (TBNError, OSError) as error:
        print(f"tbn-compiler: error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tbn-compiler", description="A compiler for Tiled Bit Networks.")
    parser.add_argument("--version", action="version", version=f"tbn-compiler {tbn_compiler.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, lower and run a small network on scanned digits, in C too")
    demo.add_argument("--out", type=Path, default=Path("tbn-demo"), help="folder for the files (default: %(default)s)")
    demo.add_argument("--epochs", type=_positive, default=30, help="epochs per network (default: %(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="random seed (default: %(default)s)")
    demo.set_defaults(run=_demo)

    table = commands.add_parser("summary", help="show what is tiled in a model and what it saves")
    _add_model(table)
    table.add_argument(
        "--input", type=_shape, action="append", help="shape of an input, e.g. 1,3,224,224: counts MACs for it"
    )
    table.add_argument("--optimize", action="store_true", help="count the module that optimize makes")
    table.add_argument("--format", choices=("table", "markdown", "json"), default="table", help="default: %(default)s")
    table.set_defaults(run=_summary)

    export = commands.add_parser("export-c", help="write a model as one standalone C99 file and a header")
    _add_model(export)
    export.add_argument("--input", type=_shape, action="append", required=True, help="shape of the input, e.g. 1,784")
    export.add_argument("-o", "--output", type=Path, default=Path("model.c"), help="C file (default: %(default)s)")
    export.add_argument("--optimize", action="store_true", help="fold norms and leave out copies first")
    export.add_argument("--name", default="model", help="prefix of the C symbols (default: %(default)s)")
    export.add_argument(
        "--scratch",
        choices=("static", "caller"),
        default="static",
        help="who owns the scratch memory (default: %(default)s)",
    )
    export.set_defaults(run=_export_c)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a model and how to tile it."""
    defaults = TilingConfig()
    parser.add_argument("model", help="module:factory, a callable without arguments that returns an nn.Module")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="packed file of tbn_compiler.save, or a state_dict (.safetensors, .pt) of the float or the tiled model",
    )
    group = parser.add_argument_group("tiling", "ignored for a model that is tiled already, and for a packed file")
    group.add_argument("--preset", choices=tuple(_PRESETS), default="paper", help="default: %(default)s")
    group.add_argument(
        "--p",
        type=_copies,
        default=defaults.p,
        help="copies of the tile, or OUTxIN along both axes (default: %(default)s)",
    )
    group.add_argument(
        "--alpha",
        choices=get_args(AlphaMode),
        help=f"one scale per layer, copy along the output, or copy (default: {defaults.alpha})",
    )
    group.add_argument(
        "--alpha-source", choices=get_args(AlphaSource), help="where scales come from (default: the preset's)"
    )
    group.add_argument("--tile-dtype", choices=get_args(TileDType), help=f"default: {defaults.tile_dtype}")
    group.add_argument("--replicate", choices=get_args(Replication), help=f"default: {defaults.replicate}")
    group.add_argument(
        "--shift", type=_positive, help=f"elements that 'roll' rolls each copy by (default: {defaults.shift})"
    )
    group.add_argument("--min-size", type=int, help="smaller layers are not tiled (default: the preset's)")
    group.add_argument(
        "--small", choices=get_args(SmallLayers), help=f"what smaller layers become (default: {defaults.small})"
    )
    group.add_argument(
        "--keep-float", metavar="PATTERN", action="append", help="layers to keep in float; may be repeated"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _copies(text: str) -> int | tuple[int, int]:
    parts = text.split("x")
    try:
        numbers = [_positive(part) for part in parts]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of copies such as 4 or 2x2") from None
    if len(numbers) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} has more than two axes")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(_positive(part) for part in text.split(","))
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1,3,224,224") from None


def _config(arguments: argparse.Namespace) -> TilingConfig:
    names = ("p", "alpha", "alpha_source", "tile_dtype", "replicate", "shift", "min_size", "small")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if arguments.keep_float:
        options["float_layers"] = tuple(arguments.keep_float)
    return _PRESETS[arguments.preset](**options)


def _build(spec: str) -> nn.Module:
    """Import ``module:factory`` (the current folder comes first) and call it."""
    module_name, _, factory_name = spec.partition(":")
    if not module_name or not factory_name:
        raise ConfigError(f"{spec!r} is not of the form module:factory")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"cannot import {module_name!r}: {error}") from error
    try:
        factory = getattr(module, factory_name)
    except AttributeError:
        raise ConfigError(f"module {module_name!r} has no {factory_name!r}") from None
    model = factory()
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{spec} returned a {type(model).__name__}, not an nn.Module")
    return model


def _load_model(arguments: argparse.Namespace) -> nn.Module:
    """The tiled or lowered model that the arguments name, with its checkpoint."""
    model, checkpoint = _build(arguments.model), arguments.checkpoint
    if checkpoint is not None and _is_packed(checkpoint):
        return load(checkpoint, model)
    tiled = model if get_records(model) is not None else transform(model, _config(arguments))
    if checkpoint is not None:
        _load_state(tiled, checkpoint)
    return tiled


def _is_packed(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return "tbn" in (file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise SerializationError(f"{path} is truncated or no safetensors file: {error}") from error


def _load_state(model: nn.Module, path: Path) -> None:
    """Load a plain state_dict. One of a float model has no alpha sources: they keep their initial values."""
    if path.suffix == ".safetensors":
        state = safetensors.torch.load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    try:
        result = model.load_state_dict(state, strict=False)
    except (RuntimeError, TypeError) as error:
        raise SerializationError(f"{path} does not fit the model: {error}") from error
    missing = [key for key in result.missing_keys if not key.endswith("alpha_source")]
    if missing or result.unexpected_keys:
        raise SerializationError(
            f"{path} does not fit the model: missing {missing}, unexpected {result.unexpected_keys}"
        )
    if result.missing_keys:
        count = len(result.missing_keys)
        print(f"note: {path} is a float checkpoint; {count} alpha sources keep their initial values", file=sys.stderr)


def _demo(arguments: argparse.Namespace) -> None:
    from tbn_compiler.demo import run

    run(arguments.out, arguments.epochs, arguments.seed)


def _summary(arguments: argparse.Namespace) -> None:
    inputs: Any = tuple(torch.zeros(shape) for shape in arguments.input) if arguments.input else None
    model = _load_model(arguments)
    result = summary(optimize(model, inputs) if arguments.optimize else model, inputs)
    if arguments.format == "json":
        print(json.dumps(result.to_dict(), indent=2))
    elif arguments.format == "markdown":
        print(result.to_markdown(), end="")
    else:
        Console().print(result.table())


def _export_c(arguments: argparse.Namespace) -> None:
    from tbn_compiler.backends.c import export_c

    model = _load_model(arguments)
    inputs = tuple(torch.zeros(shape) for shape in arguments.input)
    packed = optimize(model, inputs) if arguments.optimize else lower(model)
    plan = export_c(packed, inputs, arguments.output, name=arguments.name, scratch=arguments.scratch)
    header = arguments.output.with_suffix(".h")
    sizes = f"{plan.weight_bytes:,} bytes of constants, {plan.scratch_bytes:,} of scratch"
    print(f"wrote {arguments.output} and {header}: {sizes}")


if __name__ == "__main__":
    sys.exit(main())
