"""A model with the weights of a checkpoint, tiled as the checkpoint says."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tbn_compiler.compiler import lower_model, tile_model, transform
from tbn_compiler.config import PAPER_MIN_SIZE, TilingConfig
from tbn_compiler.errors import ConfigError, LoweringError, SerializationError
from tbn_compiler.graph.records import get_records, split_key, state_tilings, tile_key
from tbn_compiler.graph.tiled_parameters import STRENGTH
from tbn_compiler.graph.tiling_data import describe_spec
from tbn_compiler.serialize import load
from tbn_compiler.training import init_from_float


@dataclass(frozen=True)
class Tiling:
    """How the user wants a float model to be tiled.

    Attributes:
        config: the options; ``None`` if there are none.
        file: the file that all of them come from; ``None`` if one was given on the command line.
    """

    config: TilingConfig | None = None
    file: Path | None = None

    def refuse(self, why: str) -> None:
        """Refuse options for a model that is tiled already; those of a file, which serves other commands, get a note.

        Raises:
            ConfigError: options were given on the command line.
        """
        if self.config is not None and self.file is None:
            raise ConfigError(f"{why}: leave the tiling options out")
        if self.config is not None:
            print(f"note: {why}: [tiling] in {self.file} is not used", file=sys.stderr)


def restore(model: nn.Module, path: Path, tiling: Tiling) -> nn.Module:
    """The tiled or lowered model of a checkpoint.

    Args:
        model: the architecture: the float model, or one that is tiled already.
        path: a packed file; or a ``state_dict`` (``.safetensors``, or of ``torch.save``), of the trained or lowered
            module, which says itself how it is tiled, or of the float model.
        tiling: how to tile where neither model nor checkpoint says so.

    Raises:
        SerializationError: the file is damaged or does not fit the model, or does not say how its layers are tiled.
        ConfigError: options for a model or checkpoint that is tiled already.
        OSError: the file cannot be read.
    """
    if _is_packed(path):
        tiling.refuse(f"{path} is a packed file")
        return load(path, model)
    state = _read(path)
    tilings = state_tilings(state)
    if get_records(model) is not None:
        tiling.refuse("the model is tiled already")
        return _fill(model, state, path)
    if tilings:
        tiling.refuse(f"{path} says how its layers are tiled")
        gradual = any(split_key(key)[1] == STRENGTH for key in state)
        tiled = tile_model(model, TilingConfig(gradual=gradual), tilings)
        found = {record.weight: record for record in get_records(tiled) or ()}
        for name, spec in tilings.items():
            if name not in found:
                raise SerializationError(f"{path}: the model has no linear or conv weight {name!r}")
            if found[name].spec is None:
                reason = f"is tiled ({describe_spec(spec)}), which it cannot be in this model: {found[name].reason}"
                raise SerializationError(f"{path}: weight {name!r} {reason}")
        if any(tile_key(name) in state for name in tilings):
            try:
                lower_model(tiled, {key: value for key, value in state.items() if isinstance(value, Tensor)})
            except LoweringError as error:
                raise SerializationError(f"{path} does not fit the model: {error}") from error
        return _fill(tiled, state, path)
    trained = [key for key in state if key.endswith(("alpha_source", "_tile"))]
    if trained and tiling.config is None:
        raise SerializationError(
            f"{path} was trained with tiles ({trained[0]}), but does not say how: it is of version 0.1. Give the "
            "options that it was trained with (--p, --alpha, --min-size, ...)"
        )
    config = tiling.config
    if trained and config is not None and config.min_size is None:
        config = config.replace(min_size=PAPER_MIN_SIZE)  # what version 0.1 tiled with where nothing else was said
    tiled = transform(model, config)
    if trained:
        return _fill(tiled, state, path)
    init_from_float(tiled, state)
    print(f"note: {path} is a float checkpoint: alphas are the mean magnitudes of its weights", file=sys.stderr)
    return tiled


def load_float_state(model: nn.Module, path: Path) -> None:
    """Load a ``state_dict`` of the float model into it.

    Raises:
        SerializationError: the file is damaged, is one of a tiled model, or does not fit.
        OSError: the file cannot be read.
    """
    if _is_packed(path):
        raise SerializationError(f"{path} is a packed file, and no checkpoint of the float model")
    state = _read(path)
    if state_tilings(state):
        raise SerializationError(f"{path} is of a tiled model, and no checkpoint of the float model")
    _fill(model, state, path)


def _fill(model: nn.Module, state: Mapping[str, Any], path: Path) -> nn.Module:
    try:
        model.load_state_dict(state, strict=True)
    except (RuntimeError, TypeError) as error:
        raise SerializationError(f"{path} does not fit the model: {error}") from error
    return model


def _is_packed(path: Path) -> bool:
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return "tbn" in (file.metadata() or {})
    except safetensors.SafetensorError as error:
        raise SerializationError(f"{path} is truncated or no safetensors file: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    """A plain ``state_dict``."""
    if path.suffix == ".safetensors":
        return dict(safetensors.torch.load_file(path))
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise SerializationError(f"{path} is damaged or holds more than tensors: {error}") from error
    if not isinstance(state, Mapping):
        raise SerializationError(f"{path} holds a {type(state).__name__}, no state_dict")
    return dict(state)
