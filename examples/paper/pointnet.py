"""PointNet (Qi et al., arXiv 1612.00593) for classification, part segmentation and semantic segmentation.

Sizes are those of the widely used PyTorch version (yanx27/Pointnet_Pointnet2_pytorch), which has batch-norm in its
transforms, no ReLU before the maximum over the points, and wider part segmentation than the paper's figure.
Clouds are ``[batch, channels, points]`` with the coordinates in the first three channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def _stack(layer: type[nn.Conv1d] | type[nn.Linear], sizes: Sequence[int], *, last_relu: bool = True) -> nn.Sequential:
    """Layers with norm and ReLU; a ``Conv1d`` of size 1 does the same to each point."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        new = nn.Conv1d(inputs, outputs, 1) if layer is nn.Conv1d else nn.Linear(inputs, outputs)
        layers += [new, nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers[: None if last_relu else -1])


def _points(*sizes: int, last_relu: bool = True) -> nn.Sequential:
    return _stack(nn.Conv1d, sizes, last_relu=last_relu)


def _dense(*sizes: int) -> nn.Sequential:
    return _stack(nn.Linear, sizes)


class Transform(nn.Module):
    """A matrix for each cloud, from its largest features: ``[batch, channels, points]`` to ``[batch, size, size]``."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.points = _points(channels, 64, 128, 1024)
        self.dense = _dense(1024, 512, 256)
        self.matrix = nn.Linear(256, size * size)

    def forward(self, cloud: Tensor) -> Tensor:
        """The matrix, as a difference from the identity plus the identity."""
        found: Tensor = self.matrix(self.dense(self.points(cloud).amax(2)))
        eye = torch.eye(self.size, dtype=found.dtype, device=found.device)
        matrix: Tensor = found.unflatten(1, (self.size, self.size)) + eye
        return matrix


def _apply(matrix: Tensor, cloud: Tensor) -> Tensor:
    """Each point, as a row, times the matrix: ``[batch, size, points]`` stays so."""
    return torch.bmm(matrix.transpose(1, 2), cloud)


def _align(transform: Transform, cloud: Tensor) -> Tensor:
    """The cloud with its coordinates transformed and its other channels as they are."""
    return torch.cat([_apply(transform(cloud), cloud[:, :3]), cloud[:, 3:]], 1)


def orthogonality(matrix: Tensor) -> Tensor:
    """How far feature transforms ``[batch, size, size]`` are from orthogonal; the loss gets 0.001 of it."""
    eye = torch.eye(matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    distance: Tensor = (torch.bmm(matrix, matrix.transpose(1, 2)) - eye).flatten(1).norm(dim=1).mean()
    return distance


class Encoder(nn.Module):
    """What classification and semantic segmentation share: features of each point, and of the whole cloud."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input_transform = Transform(channels, 3)
        self.low = _points(channels, 64)
        self.feature_transform = Transform(64, 64)
        self.high = _points(64, 128, 1024, last_relu=False)

    def forward(self, cloud: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features ``[batch, 64, points]`` and ``[batch, 1024]``, and the feature transform ``[batch, 64, 64]``."""
        x = self.low(_align(self.input_transform, cloud))
        matrix: Tensor = self.feature_transform(x)
        x = _apply(matrix, x)
        return x, self.high(x).amax(2), matrix


class PointNetClassification(nn.Module):
    """A class for each cloud; 40 classes is ModelNet40."""

    def __init__(self, classes: int = 40, channels: int = 3) -> None:
        super().__init__()
        self.encoder = Encoder(channels)
        self.dense = nn.Sequential(
            nn.Linear(1024, 512), nn.BatchNorm1d(512), nn.ReLU(),
            nn.Linear(512, 256), nn.Dropout(0.4), nn.BatchNorm1d(256), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(256, classes)

    def logits_and_transform(self, cloud: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, classes]``, and the feature transform for :func:`orthogonality`."""
        _, features, matrix = self.encoder(cloud)
        return self.head(self.dense(features)), matrix

    def forward(self, cloud: Tensor) -> Tensor:
        """Logits ``[batch, classes]``."""
        return self.logits_and_transform(cloud)[0]


class PointNetSemanticSegmentation(nn.Module):
    """A class for each point; 9 channels (coordinates, colours, place in the room) and 13 classes are S3DIS."""

    def __init__(self, classes: int = 13, channels: int = 9) -> None:
        super().__init__()
        self.encoder = Encoder(channels)
        self.points = _points(1024 + 64, 512, 256, 128)
        self.head = nn.Conv1d(128, classes, 1)

    def logits_and_transform(self, cloud: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, classes, points]``, and the feature transform for :func:`orthogonality`."""
        low, features, matrix = self.encoder(cloud)
        whole = features[:, :, None].expand(-1, -1, cloud.shape[2])
        return self.head(self.points(torch.cat([whole, low], 1))), matrix

    def forward(self, cloud: Tensor) -> Tensor:
        """Logits ``[batch, classes, points]``."""
        return self.logits_and_transform(cloud)[0]


class PointNetPartSegmentation(nn.Module):
    """A part for each point, given the object's category; 50 parts of 16 categories are ShapeNet.

    The head reads the results of all layers, the largest features and the category, 4,944 channels in all.
    """

    def __init__(self, parts: int = 50, channels: int = 3, categories: int = 16) -> None:
        super().__init__()
        self.input_transform = Transform(channels, 3)
        self.low = nn.ModuleList(_points(*sizes) for sizes in ((channels, 64), (64, 128), (128, 128)))
        self.feature_transform = Transform(128, 128)
        self.high = nn.ModuleList((_points(128, 512), _points(512, 2048, last_relu=False)))
        self.points = _points(64 + 128 + 128 + 512 + 2 * 2048 + categories, 256, 256, 128)
        self.head = nn.Conv1d(128, parts, 1)

    def logits_and_transform(self, cloud: Tensor, category: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, parts, points]``, and the feature transform for :func:`orthogonality`."""
        x = _align(self.input_transform, cloud)
        results: list[Tensor] = []
        for layer in self.low:
            x = layer(x)
            results.append(x)
        matrix: Tensor = self.feature_transform(x)
        x = _apply(matrix, x)
        for layer in self.high:
            x = layer(x)
            results.append(x)
        whole = torch.cat([x.amax(2), category.to(x.dtype)], 1)
        results.append(whole[:, :, None].expand(-1, -1, cloud.shape[2]))
        return self.head(self.points(torch.cat(results, 1))), matrix

    def forward(self, cloud: Tensor, category: Tensor) -> Tensor:
        """Logits ``[batch, parts, points]``; the categories are ``[batch, categories]``, one-hot."""
        return self.logits_and_transform(cloud, category)[0]
