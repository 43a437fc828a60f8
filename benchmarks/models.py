"""Models to measure: the ViT of the paper's Table 7, PointNet, ResNet18."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention on ``[batch, tokens, dim]``, queries, keys and values from one projection."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of the normed tokens, without the residual."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        result: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


class ViT(nn.Module):
    """Vision transformer as in the paper's Table 7: 256 x 256, patches of 32, 54.6 M parameters.

    Pre-norm blocks, norms around the patch projection, a class token.
    """

    def __init__(
        self,
        image_size: int = 256,
        patch_size: int = 32,
        dim: int = 1024,
        depth: int = 6,
        heads: int = 16,
        mlp_dim: int = 2048,
        classes: int = 1000,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        pixels = 3 * patch_size**2
        self.embed = nn.Sequential(nn.LayerNorm(pixels), nn.Linear(pixels, dim), nn.LayerNorm(dim))
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, dim))
        self.attention = nn.ModuleList(Attention(dim, heads) for _ in range(depth))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, dim))
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of images ``[batch, 3, size, size]``."""
        size = self.patch_size
        patches = image.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 3, 5, 1)
        x = self.embed(patches.flatten(3).flatten(1, 2))
        x = torch.cat([self.token.expand(image.shape[0], -1, -1), x], 1) + self.position
        for attention, feed in zip(self.attention, self.feed, strict=True):
            x = x + attention(x)
            x = x + feed(x)
        result: Tensor = self.head(self.norm(x)[:, 0])
        return result


def _points(*sizes: int) -> nn.Sequential:
    """The same layers for each point: ``[batch, sizes[0], points] -> [batch, sizes[-1], points]``."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Conv1d(inputs, outputs, 1), nn.BatchNorm1d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def _dense(*sizes: int) -> nn.Sequential:
    """Layers on one vector, a function between them."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Transform(nn.Module):
    """A matrix for each cloud: identity plus what the cloud's largest features say."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.points = _points(size, 64, 128, 1024)
        self.dense = _dense(1024, 512, 256, size * size)

    def forward(self, cloud: Tensor) -> Tensor:
        """``[batch, size, points] -> [batch, size, points]``."""
        matrix = self.dense(self.points(cloud).amax(2)).unflatten(1, (self.size, self.size))
        return torch.bmm(matrix, cloud) + cloud


class PointNet(nn.Module):
    """PointNet for classification, with both transforms."""

    def __init__(self, classes: int = 40) -> None:
        super().__init__()
        self.first, self.second = Transform(3), Transform(64)
        self.low, self.high = _points(3, 64), _points(64, 64, 128, 1024)
        self.head = _dense(1024, 512, 256, classes)

    def forward(self, cloud: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of clouds ``[batch, 3, points]``."""
        x = self.second(self.low(self.first(cloud)))
        result: Tensor = self.head(self.high(x).amax(2))
        return result


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(classes: int = 1000, *, small_images: bool = False) -> nn.Sequential:
    """ResNet18 for 224 x 224 images, or for 32 x 32 ones, which are not made smaller before the blocks."""
    stem: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    if small_images:
        stem = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    blocks: list[nn.Module] = []
    for inputs, outputs in ((64, 64), (64, 128), (128, 256), (256, 512)):
        blocks += [BasicBlock(inputs, outputs, 1 if inputs == outputs else 2), BasicBlock(outputs, outputs, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))
