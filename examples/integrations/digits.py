"""Scikit-learn's scanned digits (8 x 8), and the small network that the examples here train on them."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import tbn_compiler as tbn

CONFIG = tbn.TilingConfig(p=4, min_size=0, alpha="tile")


def datasets() -> tuple[TensorDataset, TensorDataset]:
    """Training and test images ``[n, 1, 8, 8]`` in [0, 1] with labels ``[n]``; a stratified fifth is for testing."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    x = [torch.tensor(part, dtype=torch.float32).view(-1, 1, 8, 8) for part in split[:2]]
    y = [torch.tensor(part) for part in split[2:]]
    return TensorDataset(x[0], y[0]), TensorDataset(x[1], y[1])


def network() -> nn.Module:
    """A 64-256-256-10 network."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    """Share of right answers, from 0 to 1."""
    x, y = data.tensors
    with torch.no_grad():
        answers: Tensor = model(x)
    return (answers.argmax(1) == y).float().mean().item()
