"""Stored inputs and outputs of a model, for the command line."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from tbn_compiler.errors import ConfigError


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file by name, or the one of an ``.npy`` file as ``input``.

    Raises:
        ConfigError: the file is of another kind, missing or damaged, or an array is empty or holds no numbers.
    """
    if path.suffix not in (".npy", ".npz"):
        raise ConfigError(f"stored inputs must be .npy or .npz, got {path}")
    try:
        with path.open("rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                arrays = {"input": loaded}
            else:
                with loaded:
                    arrays = {name: loaded[name] for name in loaded.files}
    # What numpy and zipfile raise for damaged files has no common base class.
    except (OSError, ValueError, EOFError, KeyError, SyntaxError, NotImplementedError, RuntimeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except (MemoryError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of other members
            raise ConfigError(f"{name!r} in {path} is no array")
        if array.dtype.kind not in "fiub":
            raise ConfigError(f"array {name!r} in {path} is {array.dtype}: it holds no numbers")
        if not array.size:
            raise ConfigError(f"array {name!r} in {path} has the shape {list(array.shape)}: nothing to compare")
    return arrays
