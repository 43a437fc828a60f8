"""Transformers of the paper: ViT and Swin for images, and an encoder that forecasts time series."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paper.mixers import patches


def _feed_forward(dim: int, width: int, dropout: float = 0.0) -> nn.Sequential:
    """Norm, two linear layers with GELU between them; for every token."""
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, width), nn.GELU(), nn.Dropout(dropout),
        nn.Linear(width, dim), nn.Dropout(dropout),
    )  # fmt: skip


def _heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[..., heads, tokens, dim / heads]`` of ``[..., tokens, 3 * dim]``."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(-2, -3) for part in qkv.chunk(3, -1))
    return q, k, v


class Attention(nn.Module):
    """Self-attention of the normed tokens ``[N, tokens, dim]``; one projection without bias gives q, k and v."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """The attention without the residual."""
        q, k, v = _heads(self.qkv(self.norm(x)), self.heads)
        result: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return result


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., arXiv 2010.11929): pre-norm blocks, a class token.

    The defaults are the paper's ViT for CIFAR, which is that of a public training collection
    (kentaroy47/vision-transformers-cifar10) without norms around the patch projection.

    Args:
        classes: number of classes.
        image_size: height and width of the images.
        patch_size: height and width of a patch.
        dim: channels.
        depth: blocks.
        heads: attention heads.
        mlp_dim: width of the feed-forward layers.
        dropout: behind the position embedding and the linear layers of the blocks.
    """

    def __init__(
        self,
        classes: int = 10,
        image_size: int = 32,
        patch_size: int = 4,
        dim: int = 512,
        depth: int = 6,
        heads: int = 8,
        mlp_dim: int = 512,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.embed = nn.Linear(3 * patch_size**2, dim)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.position = nn.Parameter(torch.randn(1, (image_size // patch_size) ** 2 + 1, dim))
        self.dropout = nn.Dropout(dropout)
        self.attention = nn.ModuleList(Attention(dim, heads, dropout) for _ in range(depth))
        self.feed = nn.ModuleList(_feed_forward(dim, mlp_dim, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, 3, size, size]``."""
        x = self.embed(patches(image, self.patch_size))
        x = self.dropout(torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position)
        for attention, feed in zip(self.attention, self.feed, strict=True):
            x = x + attention(x)
            x = x + feed(x)
        logits: Tensor = self.head(self.norm(x)[:, 0])
        return logits


class PatchMerging(nn.Module):
    """``factor x factor`` neighbours as one token.

    ``[N, H, W, inputs]`` to ``[N, H / factor, W / factor, outputs]``.
    """

    def __init__(self, inputs: int, outputs: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.linear = nn.Linear(inputs * factor**2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The merged tokens."""
        split = x.unflatten(2, (-1, self.factor)).unflatten(1, (-1, self.factor))  # [N, h, f, w, f, C]
        merged: Tensor = self.linear(split.transpose(2, 3).flatten(3))
        return merged


class WindowAttention(nn.Module):
    """Attention within windows of ``window x window`` tokens of an image ``[N, H, W, dim]``.

    Shifted windows wrap around the image's edges, and a mask keeps apart what is no neighbour. Windows are shifted in
    a stage of one window too, as in the public version that the counts fit. The heads share one table of position
    biases, a bare parameter.
    """

    mask: Tensor
    relative: Tensor

    def __init__(self, dim: int, heads: int, size: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, window // 2 if shifted else 0
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.position = nn.Parameter(torch.randn(2 * window - 1, 2 * window - 1))
        self.out = nn.Linear(dim, dim)
        place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
        offset = place[None] - place[:, None] + window - 1  # [window**2, window**2, 2]
        self.register_buffer("relative", offset[..., 0] * (2 * window - 1) + offset[..., 1], persistent=False)
        # After the shift the last rows and columns come from the other side of the image.
        wrapped = torch.arange(size) >= size - self.shift
        region = 2 * wrapped[:, None].long() + wrapped[None].long()
        windows = self._windows(region[None, :, :, None])[0, :, :, 0]  # [windows, window**2]
        self.register_buffer("mask", windows[:, None] == windows[..., None], persistent=False)

    def _windows(self, x: Tensor) -> Tensor:
        """``[N, H, W, C]`` to ``[N, windows, window**2, C]``."""
        split = x.unflatten(2, (-1, self.window)).unflatten(1, (-1, self.window))
        windows: Tensor = split.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return windows

    def forward(self, x: Tensor) -> Tensor:
        """The attention without the residual."""
        samples, count = x.shape[0], x.shape[1] // self.window
        if self.shift:
            x = x.roll((-self.shift, -self.shift), (1, 2))
        # Windows are samples of their own: compilers and exporters know attention of four dimensions.
        q, k, v = _heads(self.qkv(self._windows(self.norm(x)).flatten(0, 1)), self.heads)
        bias = self.position.flatten()[self.relative].masked_fill(~self.mask, -math.inf)
        y = F.scaled_dot_product_attention(q, k, v, bias[:, None].repeat(samples, 1, 1, 1))
        y = self.out(y.transpose(1, 2).flatten(2)).unflatten(0, (samples, -1))  # [N, windows, window**2, dim]
        y = y.unflatten(2, (self.window, -1)).unflatten(1, (count, -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        result: Tensor = y.roll((self.shift, self.shift), (1, 2)) if self.shift else y
        return result


class SwinBlock(nn.Module):
    """Window attention and feed-forward layers with residuals on ``[N, H, W, dim]``."""

    def __init__(self, dim: int, heads: int, size: int, window: int, *, shifted: bool) -> None:
        super().__init__()
        self.attention = WindowAttention(dim, heads, size, window, shifted=shifted)
        self.feed = _feed_forward(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """The block's result, of the same shape."""
        x = x + self.attention(x)
        result: Tensor = x + self.feed(x)
        return result


class Swin(nn.Module):
    """Swin transformer (Liu et al., arXiv 2103.14030).

    The form is that of a public version (berniwal/swin-transformer-pytorch), which differs from the authors': merging
    is a linear layer with bias and without norm, and the heads share their position biases. The defaults are Swin-t for
    32 x 32 images, whose last stage keeps its size.

    Args:
        classes: number of classes.
        image_size: height and width of the images.
        downscaling: factor by which each stage shrinks height and width.
        window: height and width of a window in tokens; it divides the size of every stage.
        dim: channels of the first stage; each further stage doubles them.
        depths: blocks of each stage; every second one has shifted windows.
        heads: attention heads of each stage.
    """

    def __init__(
        self,
        classes: int = 10,
        image_size: int = 32,
        downscaling: Sequence[int] = (2, 2, 2, 1),
        window: int = 4,
        dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        heads: Sequence[int] = (3, 6, 12, 24),
    ) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels, size = 3, image_size
        for index, (factor, depth, count) in enumerate(zip(downscaling, depths, heads, strict=True)):
            width = dim * 2**index
            size //= factor
            blocks = (SwinBlock(width, count, size, window, shifted=place % 2 == 1) for place in range(depth))
            stages.append(nn.Sequential(PatchMerging(channels, width, factor), *blocks))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, 3, size, size]``."""
        x = self.stages(image.permute(0, 2, 3, 1))
        logits: Tensor = self.head(self.norm(x.mean((1, 2))))
        return logits


def swin_imagenet(classes: int = 1000) -> Swin:
    """Swin-t for 224 x 224 images: patches of 4, windows of 7."""
    return Swin(classes, 224, (4, 2, 2, 2), window=7)


class ProjectedAttention(nn.Module):
    """Multi-head attention behind linear layers for queries, keys and values, beside those that it has itself."""

    def __init__(self, dim: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        self.attention = nn.MultiheadAttention(dim, heads, dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """The attention of ``[N, time, dim]``, without the residual."""
        result: Tensor = self.attention(self.query(x), self.key(x), self.value(x), need_weights=False)[0]
        return result


class EncoderLayer(nn.Module):
    """Attention and feed-forward layers with the norms behind the residuals, on ``[N, time, dim]``."""

    def __init__(self, dim: int, heads: int, width: int, dropout: float) -> None:
        super().__init__()
        self.attention = ProjectedAttention(dim, heads, dropout)
        self.norm1 = nn.LayerNorm(dim)
        self.feed = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim), nn.Dropout(dropout))
        self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result, of the same shape."""
        x = self.norm1(x + self.attention(x))
        result: Tensor = self.norm2(x + self.feed(x))
        return result


class TimeSeriesTransformer(nn.Module):
    """The encoder that forecasts all features one step ahead: ``[N, time, features]`` to ``[N, features]``.

    Electricity has 321 features and ``dim`` 512, Weather 21 and 128. Positions are sines and cosines, no parameters.
    The counts fix every layer's size; heads, norms' places and dropout are the usual ones.
    """

    def __init__(
        self, features: int, dim: int, depth: int = 2, heads: int = 8, width: int = 256, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(features, dim)
        self.layers = nn.Sequential(*(EncoderLayer(dim, heads, width, dropout) for _ in range(depth)))
        self.head = nn.Linear(dim, features)

    def forward(self, series: Tensor) -> Tensor:
        """The step after the last one of each series."""
        x = self.embed(series)
        forecast: Tensor = self.head(self.layers(x + positions(x))[:, -1])
        return forecast


def positions(x: Tensor) -> Tensor:
    """Sines and cosines of the places in ``[N, time, dim]`` (Vaswani et al., arXiv 1706.03762): ``[time, dim]``."""
    time = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)[:, None]
    rate = torch.exp(torch.arange(0, x.shape[2], 2, dtype=x.dtype, device=x.device) * (-math.log(1e4) / x.shape[2]))
    return torch.stack([torch.sin(time * rate), torch.cos(time * rate)], -1).flatten(1)
