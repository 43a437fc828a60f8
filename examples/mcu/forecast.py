"""Electricity transformer temperature: a one-block transformer encoder forecasts seven series (ETTh1)."""

from __future__ import annotations

import csv
import gzip
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from example_data import DataError
from torch import Tensor, nn

import tbn_compiler as tbn
from mcu.task import Dataset, Examples, Network, Recipe, Task

LOOK_BACK = HORIZON = 96  # hours
SERIES = 7
_MONTH = 30 * 24
_PATCH = 8  # hours a token
_TOKENS = LOOK_BACK // _PATCH
_WIDTH, _HEADS = 32, 4


def read(folder: Path) -> Dataset:
    """``folder/ett/ETTh1.csv``, gzipped or not.

    Raises:
        DataError: the file is missing or is not that table.
    """
    names = ("ETTh1.csv", "ETTh1.csv.gz")
    path = next((folder / "ett" / name for name in names if (folder / "ett" / name).is_file()), None)
    if path is None:
        raise DataError(f"no ETTh1.csv in {folder / 'ett'} (the table of ETDataset, gzipped or not)")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
        header, *rows = csv.reader(text.splitlines())
        values = np.array([row[1:] for row in rows], dtype=np.float64)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(header) != 1 + SERIES or len(values) < 20 * _MONTH:
        raise DataError(f"{path} has {len(header)} columns and {len(values)} rows; expected 8 and at least 14,400")
    return _dataset(
        "ETTh1",
        "12 / 4 / 4 months for training, choices and testing; standardised with mean and deviation of the training "
        "months; every window of 96 + 96 hours",
        values,
        (12 * _MONTH, 16 * _MONTH, 20 * _MONTH),
    )


def _dataset(name: str, split: str, values: np.ndarray, ends: tuple[int, int, int]) -> Dataset:
    """Cut ``values [hours, SERIES]`` at ``ends``; what is forecast lies in its part, the look-back may reach before."""
    train = values[: ends[0]]
    series = torch.from_numpy(((values - train.mean(0)) / train.std(0)).astype(np.float32))
    starts = (0, ends[0] - LOOK_BACK, ends[1] - LOOK_BACK)
    parts = [_windows(series[start:end]) for start, end in zip(starts, ends, strict=True)]
    return Dataset(name, split, parts[0], parts[1], parts[2], retrain=False)


def _windows(series: Tensor) -> Examples:
    """All windows as ``[count, LOOK_BACK, SERIES]`` and ``[count, HORIZON, SERIES]``, without copies."""
    windows = series.unfold(0, LOOK_BACK + HORIZON, 1).transpose(1, 2)
    return Examples(windows[:, :LOOK_BACK], windows[:, LOOK_BACK:])


def made_up() -> Dataset:
    """Seven noisy daily waves."""
    hours, phase = torch.arange(700)[:, None], torch.rand(SERIES) * 2 * math.pi
    values = torch.sin(hours * 2 * math.pi / 24 + phase) + 0.1 * torch.randn(700, SERIES)
    return _dataset("made-up waves", "three parts in time", values.double().numpy(), (300, 500, 700))


class Forecaster(nn.Module):
    """A transformer encoder with one block that forecasts each series by itself, with the same weights.

    Each series is taken relative to its last value and cut into tokens of :data:`_PATCH` hours; what the block makes of
    them is mapped to the forecast at once. Shapes: ``[batch, LOOK_BACK, SERIES] -> [batch, HORIZON, SERIES]``.
    """

    def __init__(self, dropout: float = 0.2) -> None:
        super().__init__()
        self.embed = nn.Linear(_PATCH, _WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(_TOKENS, _WIDTH))
        self.norm1 = nn.LayerNorm(_WIDTH)
        self.query = nn.Linear(_WIDTH, _WIDTH)
        self.key = nn.Linear(_WIDTH, _WIDTH)
        self.value = nn.Linear(_WIDTH, _WIDTH)
        self.project = nn.Linear(_WIDTH, _WIDTH)
        self.norm2 = nn.LayerNorm(_WIDTH)
        self.widen = nn.Linear(_WIDTH, 2 * _WIDTH)
        self.narrow = nn.Linear(2 * _WIDTH, _WIDTH)
        self.norm3 = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_TOKENS * _WIDTH, HORIZON)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast."""
        last = x[:, -1:]
        tokens = (x - last).transpose(1, 2).reshape(-1, _TOKENS, _PATCH)  # a series is a sequence
        tokens = self.embed(tokens) + self.position
        tokens = tokens + self.dropout(self.attend(self.norm1(tokens)))
        tokens = tokens + self.dropout(self.narrow(F.gelu(self.widen(self.norm2(tokens)))))
        change = self.head(self.dropout(self.norm3(tokens).flatten(1)))
        forecast: Tensor = change.reshape(-1, SERIES, HORIZON).transpose(1, 2) + last
        return forecast

    def attend(self, tokens: Tensor) -> Tensor:
        """Attention with several heads, ``[sequences, tokens, width]``."""
        q, k, v = (
            layer(tokens).reshape(-1, _TOKENS, _HEADS, _WIDTH // _HEADS).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.project(mixed.transpose(1, 2).reshape(-1, _TOKENS, _WIDTH))
        return projected


TASK = Task(
    name="forecast",
    title="ETTh1, transformer encoder",
    model="one block, width 32, 4 heads, 12 tokens of 8 hours for each of 7 series; 96 hours from 96",
    build=Forecaster,
    load=read,
    made_up=made_up,
    run_as_c=300,
    emulated=300,
    networks={
        "float": Network("float", Recipe(epochs=6, lr=1e-3, weight_decay=0.02)),
        "binary": Network("binary, p = 1", Recipe(epochs=6, lr=3e-3), tbn.TilingConfig(p=1, min_size=0)),
        "tbn4": Network(
            "TBN, p = 2 x 2",
            Recipe(epochs=6, lr=3e-3),
            tbn.TilingConfig(p=(2, 2), alpha="output", min_size=1_000),
            "attention, feed-forward and output layers p = (2, 2), one alpha per output copy; embedding p = 1",
        ),
    },
)
