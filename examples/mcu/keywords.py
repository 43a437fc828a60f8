"""Spoken digits: log-mel spectra of the Free Spoken Digit Dataset and a 1-D convolutional network.

The features are computed outside the network, on the host; the C program starts from the spectra.
"""

from __future__ import annotations

import wave
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from example_data import DataError
from torch import Tensor, nn

import tbn_compiler as tbn
from mcu.task import Dataset, Examples, Network, Recipe, Task

RATE = 8_000  # samples a second
_WINDOW, _HOP = 256, 160  # 32 ms every 20 ms
FRAMES, BANDS = 50, 24
_LOWEST_HZ = 60.0
_FLOOR = 1e-6  # power that the logarithm cannot tell from silence

# Of the 50 recordings of each speaker and digit. The first five are the official test set.
_TEST, _VALIDATION = range(5), range(5, 10)


def duration(frames: int) -> int:
    """Samples that so many frames cover."""
    return (frames - 1) * _HOP + _WINDOW


def mel_filters() -> np.ndarray:
    """Triangles ``[BANDS, _WINDOW / 2 + 1]``, evenly spaced on the mel scale ``2595 log10(1 + f / 700)``."""
    edges = np.linspace(_to_mel(_LOWEST_HZ), _to_mel(RATE / 2), BANDS + 2)
    low, centre, high = (700 * (10 ** (edges[i : BANDS + i, None] / 2595) - 1) for i in range(3))
    bins = np.fft.rfftfreq(_WINDOW, 1 / RATE)
    return np.maximum(0, np.minimum((bins - low) / (centre - low), (high - bins) / (high - centre)))


def _to_mel(hertz: float) -> float:
    return float(2595 * np.log10(1 + hertz / 700))


def log_mel(samples: np.ndarray, frames: int = FRAMES) -> np.ndarray:
    """Spectra of one recording.

    Args:
        samples: ``int16 [length]``; it is centred in the frames, padded with silence or cut at both ends.
        frames: their number.

    Returns:
        ``float32 [BANDS, frames]``: logarithms of the power in each band.
    """
    covered = duration(frames)
    surplus = len(samples) - covered
    if surplus > 0:
        samples = samples[surplus // 2 :][:covered]
    before = (covered - len(samples)) // 2
    signal = np.pad(samples / 32768, (before, covered - len(samples) - before))
    windows = np.lib.stride_tricks.sliding_window_view(signal, _WINDOW)[::_HOP] * np.hanning(_WINDOW)
    power = np.abs(np.fft.rfft(windows)) ** 2 / _WINDOW
    return np.log(mel_filters() @ power.T + _FLOOR).astype(np.float32)


def read(folder: Path) -> Dataset:
    """Spectra of the recordings in ``folder/fsdd``; each band is standardised over the training part.

    Raises:
        DataError: as :func:`read_features`.
    """
    return read_features(folder, log_mel, over=(0, 2))


def read_features(folder: Path, features: Callable[[np.ndarray], np.ndarray], over: tuple[int, ...]) -> Dataset:
    """Features of the recordings in ``folder/fsdd``.

    Read are ``recordings/{digit}_{speaker}_{index}.wav``, as the data set's repository (Jakobovski,
    free-spoken-digit-dataset) holds them, or all of them in one ``fsdd.npz`` with the arrays ``audio`` (``int16``, one
    recording behind the other), ``length``, ``label`` and ``index``.

    Args:
        folder: where they are.
        features: makes them from the ``int16 [length]`` of one recording.
        over: dimensions of ``[count, *features]`` over which mean and deviation are taken to standardise them.

    Raises:
        DataError: there are neither, or a file is not what its name says.
    """
    folder = folder / "fsdd"
    if (folder / "recordings").is_dir():
        recordings = list(_read_wavs(folder / "recordings"))
    elif (folder / "fsdd.npz").is_file():
        recordings = list(_read_npz(folder / "fsdd.npz"))
    else:
        raise DataError(
            f"no recordings/*.wav and no fsdd.npz in {folder}: it should hold the Free Spoken Digit Dataset"
        )
    if not recordings:
        raise DataError(f"no recordings in {folder}")
    x = torch.from_numpy(np.stack([features(samples) for samples, _, _ in recordings]))
    y = torch.tensor([label for _, label, _ in recordings])
    index = np.array([index for _, _, index in recordings])
    return _dataset(
        "Free Spoken Digit Dataset",
        "the official one: of each speaker and digit recordings 0 to 4 for testing (300), 5 to 9 for choices, "
        "10 to 49 for training; all six speakers are in every part",
        x,
        y,
        torch.from_numpy(np.isin(index, _TEST)),
        torch.from_numpy(np.isin(index, _VALIDATION)),
        over,
    )


def _read_wavs(folder: Path) -> Iterable[tuple[np.ndarray, int, int]]:
    for path in sorted(folder.glob("*.wav")):
        yield _read_wav(path)


def _read_wav(path: Path) -> tuple[np.ndarray, int, int]:
    try:
        label, _, index = path.stem.split("_")
        with wave.open(str(path)) as file:
            form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
            content = file.readframes(file.getnframes())
        if form != (RATE, 1, 2):
            raise DataError(f"{path} has (rate, channels, bytes a sample) {form}, expected {(RATE, 1, 2)}")
        return np.frombuffer(content, dtype="<i2"), int(label), int(index)
    except (ValueError, EOFError, OSError, wave.Error) as error:
        raise DataError(f"cannot read {path} as {{digit}}_{{speaker}}_{{index}}.wav: {error}") from error


def _read_npz(path: Path) -> Iterable[tuple[np.ndarray, int, int]]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            audio, length, label, index = (arrays[key] for key in ("audio", "length", "label", "index"))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if length.sum() != len(audio):
        raise DataError(f"{path} is damaged: its lengths add up to {length.sum()}, it holds {len(audio)} samples")
    parts = np.split(audio, np.cumsum(length)[:-1])
    return zip(parts, label.astype(int).tolist(), index.astype(int).tolist(), strict=True)


def _dataset(
    name: str, split: str, x: Tensor, y: Tensor, test: Tensor, validation: Tensor, over: tuple[int, ...]
) -> Dataset:
    """Standardised with mean and deviation of the training part ``over`` some dimensions."""
    train = ~(test | validation)
    mean, std = (f(x[train], dim=over, keepdim=True) for f in (torch.mean, torch.std))
    standardised = (x - mean) / std
    parts = [Examples(standardised[part], y[part]) for part in (train, validation, test)]
    return Dataset(name, split, parts[0], parts[1], parts[2], retrain=True)


def made_up() -> Dataset:
    """Noise in front of ten random spectra."""
    labels = torch.arange(320) % 10
    x = torch.randn(10, BANDS, 1)[labels] + 0.5 * torch.randn(320, BANDS, FRAMES)
    return made_up_dataset("made-up spectra", x, labels, over=(0, 2))


def made_up_dataset(name: str, x: Tensor, labels: Tensor, over: tuple[int, ...]) -> Dataset:
    """Three fifths of made-up features for training, one for choices, one for testing."""
    fifth = len(x) // 5
    part = torch.arange(len(x)) // fifth
    return _dataset(name, f"{3 * fifth} + {fifth} + {fifth} recordings", x, labels, part == 4, part == 3, over)


def model() -> nn.Module:
    """Three convolutions along time, the bands as channels; then the mean over time."""
    return nn.Sequential(
        *_conv(BANDS, 48, kernel=5, stride=2),  # 25 frames
        *_conv(48, 64, kernel=3, stride=1),
        *_conv(64, 64, kernel=3, stride=2),  # 13 frames
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _conv(inputs: int, outputs: int, kernel: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv1d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm1d(outputs), nn.ReLU()]


def augment(x: Tensor) -> Tensor:
    """Each recording moved by up to 100 ms, louder or quieter, and without a random band of up to 4 mel bands."""
    count = len(x)
    shift = torch.randint(-5, 6, (count, 1, 1))
    frames = (torch.arange(FRAMES) + shift) % FRAMES
    x = x.gather(2, frames.expand(-1, BANDS, -1)) + 0.3 * torch.randn(count, 1, 1)
    start, width = torch.randint(0, BANDS, (count, 1, 1)), torch.randint(0, 5, (count, 1, 1))
    bands = torch.arange(BANDS)[:, None]
    return x.masked_fill((bands >= start) & (bands < start + width), 0.0)


TASK = Task(
    name="keywords",
    title="Spoken digits, 1-D CNN",
    model="three 1-D convolutions (48, 64, 64 channels) with batch-norm on 24 mel bands x 50 frames, mean, linear",
    build=model,
    load=read,
    made_up=made_up,
    run_as_c=300,
    emulated=300,
    augment=augment,
    networks={
        "float": Network("float", Recipe(epochs=60, batch_size=64, weight_decay=0.02)),
        "binary": Network(
            "binary, p = 1", Recipe(epochs=60, batch_size=64, distill=0.5), tbn.TilingConfig(p=1, min_size=0)
        ),
        "tbn4": Network(
            "TBN, p = 4",
            Recipe(epochs=60, batch_size=64, distill=0.5),
            tbn.TilingConfig(p=4, alpha="tile", min_size=1_000),
            "convolutions p = 4, one alpha per tile; last layer p = 1",
        ),
    },
)
