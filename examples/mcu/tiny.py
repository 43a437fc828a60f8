"""The networks of MLPerf Tiny (Banbury et al., arXiv 2106.07597), and what int8 kernels for them take.

Sizes are those of its reference models: keyword spotting, image classification, visual wake words, anomaly detection.
Biases that a batch-norm follows, which the reference models have, are left out, and so is dropout.
"""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from torch import Tensor, nn

# Instructions for each multiply-add of CMSIS-NN's int8 kernels on a Cortex-M4, GCC -O2, measured elsewhere on layers of
# these networks. Kernels for linear layers are taken to be like those for windows of one pixel.
INT8_RATES = {"depthwise": 7.2, "pointwise": 2.1, "dense": 1.8}


def _normed(layer: nn.Module, channels: int, norm: type[nn.Module] = nn.BatchNorm2d) -> list[nn.Module]:
    return [layer, norm(channels), nn.ReLU()]


def keywords(classes: int = 12) -> nn.Module:
    """DS-CNN: 49 x 10 coefficients of a second of speech, ``[N, 1, 49, 10]``, to 12 words."""
    layers = _normed(nn.Conv2d(1, 64, (10, 4), (2, 2), (5, 1), bias=False), 64)
    for _ in range(4):
        layers += _normed(nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False), 64)
        layers += _normed(nn.Conv2d(64, 64, 1, bias=False), 64)
    return nn.Sequential(*layers, nn.AvgPool2d((25, 5)), nn.Flatten(), nn.Linear(64, classes))


class _Block(nn.Module):
    """Two convolutions and what they are added to."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        first = _normed(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), outputs)
        second = [nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*first, *second)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        return torch.relu(self.body(x) + self.shortcut(x))


def images() -> nn.Module:
    """ResNet8: 32 x 32 pixels in colour to 10 classes."""
    stem = _normed(nn.Conv2d(3, 16, 3, padding=1, bias=False), 16)
    blocks = (_Block(16, 16, 1), _Block(16, 32, 2), _Block(32, 64, 2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def wake_words() -> nn.Module:
    """MobileNetV1 of width 0.25: 96 x 96 pixels in colour to whether somebody is there."""
    layers = _normed(nn.Conv2d(3, 8, 3, 2, 1, bias=False), 8)
    sizes = [(8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2)]
    sizes += [(128, 128, 1)] * 5 + [(128, 256, 2), (256, 256, 1)]
    for inputs, outputs, stride in sizes:
        layers += _normed(nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), inputs)
        layers += _normed(nn.Conv2d(inputs, outputs, 1, bias=False), outputs)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 2))


def anomalies() -> nn.Module:
    """An autoencoder of 640 spectral coefficients."""
    widths = [640, *[128] * 4, 8, *[128] * 4]
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += _normed(nn.Linear(inputs, outputs, bias=False), outputs, nn.BatchNorm1d)
    return nn.Sequential(*layers, nn.Linear(128, 640))


NETWORKS = {
    "keywords, DS-CNN": (keywords, (1, 49, 10)),
    "images, ResNet8": (images, (3, 32, 32)),
    "wake words, MobileNetV1 0.25": (wake_words, (3, 96, 96)),
    "anomalies, autoencoder": (anomalies, (640,)),
}


def with_statistics(model: nn.Module) -> nn.Module:
    """Give norms statistics and factors as after training, so that nothing they are folded into is special."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def multiply_adds(model: nn.Module, shape: tuple[int, ...]) -> Counter[str]:
    """Multiply-adds of the layers of a network for one input of ``shape``, by kind of kernel in :data:`INT8_RATES`."""
    found: Counter[str] = Counter()

    def count(layer: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            found["pointwise"] += layer.weight.numel() * (output.numel() // layer.out_features)
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d):
            transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
            positions = output[0, 0].numel()
            if transposed:  # each weight meets every input pixel
                positions //= int(torch.tensor(layer.stride).prod())
            small = all(size == 1 for size in layer.kernel_size)
            kind = "depthwise" if 1 < layer.groups == layer.in_channels else "pointwise" if small else "dense"
            found[kind] += layer.weight.numel() * positions

    handles = [module.register_forward_hook(count) for module in model.modules()]
    with torch.no_grad():
        model(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return found


def int8_instructions(model: nn.Module, shape: tuple[int, ...]) -> int:
    """What int8 kernels would take for the layers of a network, at :data:`INT8_RATES`; computed, not measured."""
    return round(sum(INT8_RATES[kind] * count for kind, count in multiply_adds(model, shape).items()))
