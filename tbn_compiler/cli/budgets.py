"""Budgets, candidates and sensitivities as the command line writes them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tbn_compiler.cli.arrays import load_arrays
from tbn_compiler.cli.options import Repeated, parse_copies
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError
from tbn_compiler.files import replacing
from tbn_compiler.planning import Sensitivity, sensitivity
from tbn_compiler.planning.options import DEFAULT_CANDIDATES, Candidate


def parse_budget(text: str) -> dict[str, float]:
    """``20000`` (bytes), or ``flash=20000,ram=4096``, for ``type=`` of an option."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, limit = part.rpartition("=")
        try:
            found[name or "bytes"] = float(limit) if "." in limit or "e" in limit else int(limit)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a budget such as 20000 or flash=20000,ram=4096"
            ) from None
    return found


def parse_candidate(text: str) -> Candidate:
    """``float``, ``binary``, ``4``, ``2x2`` or ``4,replicate=hadamard``, for ``type=`` of an option."""
    first, *rest = text.split(",")
    if first in ("float", "binary") and not rest:
        return first
    options = dict(part.partition("=")[::2] for part in rest)
    try:
        p = parse_copies(first)
    except argparse.ArgumentTypeError:
        p = 0
    if not p or not all(options.values()):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a candidate such as float, binary, 4, 2x2 or 4,replicate=hadamard"
        )
    if not options:
        return p
    return {"p": p, **{name: int(value) if value.isdecimal() else value for name, value in options.items()}}


def add_sensitivity(parser: argparse.ArgumentParser) -> None:
    """The options that say what the layers' changes are."""
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE.npz",
        help="arrays 'inputs' and 'targets' that the loss is measured on: cross entropy for integers, else mean square "
        "error (default: relative errors of the weights, without data)",
    )
    parser.add_argument("--batch-size", type=int, default=64, help="of the data (default: %(default)s)")
    parser.add_argument(
        "--sensitivity",
        type=Path,
        metavar="FILE.json",
        help="what was measured: read where there is such a file, else written",
    )
    parser.add_argument(
        "--candidate",
        type=parse_candidate,
        action=Repeated,
        help="what a layer may become: float, binary, 4, 2x2 or 4,replicate=hadamard; may be repeated (default: "
        f"{', '.join(map(str, DEFAULT_CANDIDATES))})",
    )


def find_sensitivity(arguments: argparse.Namespace, model: nn.Module, config: TilingConfig) -> Sensitivity:
    """The sensitivity that the arguments name, measured or read.

    Raises:
        ConfigError: the data or the file is not usable, or both are given although the file is there.
    """
    path: Path | None = arguments.sensitivity
    if path is not None and path.exists():
        if arguments.data is not None:
            raise ConfigError(f"{path} holds what was measured already: leave --data out, or name another file")
        try:
            return Sensitivity.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ConfigError(f"{path}: {error}") from error
    batches = None if arguments.data is None else _batches(arguments.data, arguments.batch_size)
    loss = F.cross_entropy if batches is None or not batches[0][1].is_floating_point() else _mean_squares
    candidates = arguments.candidate or DEFAULT_CANDIDATES
    found = sensitivity(model, batches, loss=loss, config=config, candidates=candidates)
    if path is not None:
        write_json(path, found.to_dict())
    return found


def _mean_squares(output: Tensor, target: Tensor) -> Tensor:
    if output.shape != target.shape:
        raise ConfigError(f"targets are {tuple(target.shape)}, the model gives {tuple(output.shape)}")
    return F.mse_loss(output, target)


def _batches(path: Path, size: int) -> list[tuple[Tensor, Tensor]]:
    arrays = load_arrays(path)
    if not {"inputs", "targets"} <= arrays.keys():
        raise ConfigError(f"{path} is not an .npz file with arrays 'inputs' and 'targets': it has {sorted(arrays)}")
    if size < 1:
        raise ConfigError(f"--batch-size must be at least 1, got {size}")
    inputs, targets = (torch.from_numpy(arrays[name]) for name in ("inputs", "targets"))
    if not inputs.dim() or not targets.dim() or len(inputs) != len(targets):
        raise ConfigError(f"{path} has {list(inputs.shape)} inputs and {list(targets.shape)} targets: one for each")
    inputs = inputs.float() if inputs.is_floating_point() else inputs.long()
    targets = targets.float() if targets.is_floating_point() else targets.long()
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def write_json(path: Path, data: Any) -> None:
    """Write plain data, or leave the file as it was."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
