"""Spoken digits and DS-CNN, the keyword network of MLPerf Tiny, on mel-frequency cepstral coefficients.

The coefficients are computed outside the network, on the host, from the spectra of :mod:`mcu.keywords`.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import scipy.fft
import torch
from torch import Tensor

import tbn_compiler as tbn
from mcu import keywords, tiny
from mcu.task import Dataset, Network, Recipe, Task

FRAMES, COEFFICIENTS = 49, 10
CLASSES = 10


def cepstrum(samples: np.ndarray) -> np.ndarray:
    """Coefficients of one recording.

    Args:
        samples: ``int16 [length]``, centred as :func:`mcu.keywords.log_mel` does.

    Returns:
        ``float32 [1, FRAMES, COEFFICIENTS]``: the first coefficients of each spectrum's cosine transform.
    """
    spectra = keywords.log_mel(samples, FRAMES)
    coefficients: np.ndarray = scipy.fft.dct(spectra, axis=0, norm="ortho")[:COEFFICIENTS]
    return coefficients.T[None]


def read(folder: Path) -> Dataset:
    """The recordings that :func:`mcu.keywords.read` reads; each coefficient is standardised over the training part.

    Raises:
        DataError: as there.
    """
    return keywords.read_features(folder, cepstrum, over=(0, 1, 2))


def made_up() -> Dataset:
    """Noise in front of ten random cepstra."""
    labels = torch.arange(320) % 10
    x = torch.randn(10, 1, 1, COEFFICIENTS)[labels] + 0.5 * torch.randn(320, 1, FRAMES, COEFFICIENTS)
    return keywords.made_up_dataset("made-up cepstra", x, labels, over=(0, 1, 2))


def augment(x: Tensor) -> Tensor:
    """Each recording moved by up to 100 ms, and louder or quieter, which is the first coefficient."""
    count = len(x)
    shift = torch.randint(-5, 6, (count, 1, 1, 1))
    frames = (torch.arange(FRAMES)[:, None] + shift) % FRAMES
    x = x.gather(2, frames.expand_as(x))
    x[..., 0] += 0.3 * torch.randn(count, 1, 1)
    return x


_TILED = Recipe(epochs=60, batch_size=64, distill=0.5)
_LAYOUT = "the four pointwise convolutions p = 4, one alpha per tile; all other layers p = 1"

TASK = Task(
    name="dscnn",
    title="Spoken digits, DS-CNN",
    model="keyword network of MLPerf Tiny on 10 coefficients x 49 frames: 10 x 4 stem of 64 channels, four pairs of "
    "depthwise and pointwise convolutions, mean, linear",
    build=functools.partial(tiny.keywords, CLASSES),
    load=read,
    made_up=made_up,
    run_as_c=300,
    emulated=50,
    augment=augment,
    calibration=512,
    networks={
        "float": Network("float", Recipe(epochs=60, batch_size=64, weight_decay=0.02)),
        "binary": Network("binary, p = 1", _TILED, tbn.TilingConfig(p=1, min_size=0)),
        "tbn4": Network("TBN, p = 4", _TILED, tbn.TilingConfig(p=4, alpha="tile", min_size=4_000), _LAYOUT),
        "hadamard4": Network(
            "TBN, p = 4, Hadamard",
            _TILED,
            tbn.TilingConfig(p=4, alpha="tile", min_size=4_000, replicate="hadamard"),
            f"{_LAYOUT}, copies with Hadamard signs",
        ),
    },
)
