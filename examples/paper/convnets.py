"""Convolutional networks of the paper: ResNets for CIFAR and ImageNet, VGG-small."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Shortcut = Literal["pad", "project"]
Stem = Literal["cifar", "imagenet"]


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def _conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, stride, bias=False)


class PadShortcut(nn.Module):
    """Option A of He et al.: every ``stride``-th pixel, new channels zero; no parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before, self.after = (outputs - inputs) // 2, (outputs - inputs + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def _shortcut(kind: Shortcut, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    if kind == "pad":
        return PadShortcut(inputs, outputs, stride)
    return nn.Sequential(_conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions beside a shortcut: ``[N, inputs, H, W]`` to ``[N, width, H / stride, W / stride]``."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = _conv3x3(inputs, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(shortcut, inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's result after its last ReLU."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions: ``[N, inputs, H, W]`` to ``[N, 4 * width, H / stride, W / stride]``.

    The 3 x 3 convolution has the stride, as in all public PyTorch versions; He et al. give it to the first one.
    """

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = _conv1x1(inputs, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv1x1(width, outputs)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample = _shortcut(shortcut, inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """The block's result after its last ReLU."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """A residual network (He et al., arXiv 1512.03385) with the ``state_dict`` keys that torchvision uses.

    Args:
        block: kind of block.
        depths: blocks in each stage; each stage but the first halves height and width.
        widths: channels of each stage, before the block's expansion.
        classes: number of classes.
        stem: ``"imagenet"``, a 7 x 7 convolution with stride 2 and a max-pool, or ``"cifar"``, a 3 x 3 convolution
            that keeps the size.
        shortcut: where the shape changes, ``"project"``, a 1 x 1 convolution and a norm (option B), or ``"pad"``
            (option A).
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        depths: Sequence[int],
        widths: Sequence[int] = (64, 128, 256, 512),
        classes: int = 10,
        stem: Stem = "cifar",
        shortcut: Shortcut = "project",
    ) -> None:
        super().__init__()
        channels = widths[0]
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False) if stem == "imagenet" else _conv3x3(3, channels)
        self.bn1 = nn.BatchNorm2d(channels)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if stem == "imagenet" else nn.Identity()
        self.stages = len(depths)
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks: list[nn.Module] = []
            for place in range(depth):
                stride = 2 if index > 0 and place == 0 else 1
                blocks.append(block(channels, width, stride, shortcut))
                channels = block.expansion * width
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, 3, H, W]``."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(image))))
        for index in range(self.stages):
            x = self.get_submodule(f"layer{index + 1}")(x)
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


def resnet18_cifar(classes: int = 10) -> ResNet:
    """ResNet18 for 32 x 32 images: 11,173,962 parameters with 10 classes."""
    return ResNet(BasicBlock, (2, 2, 2, 2), classes=classes)


def resnet50_cifar(classes: int = 10) -> ResNet:
    """ResNet50 for 32 x 32 images: 23,520,842 parameters with 10 classes."""
    return ResNet(Bottleneck, (3, 4, 6, 3), classes=classes)


def resnet34_imagenet(classes: int = 1000) -> ResNet:
    """ResNet34 for 224 x 224 images: 21,797,672 parameters with 1000 classes."""
    return ResNet(BasicBlock, (3, 4, 6, 3), classes=classes, stem="imagenet")


def small_resnet(depth: int, classes: int = 10, shortcut: Shortcut = "pad") -> ResNet:
    """He et al.'s family for CIFAR: ``depth = 6 n + 2`` layers in three stages of 16, 32 and 64 channels.

    Option A is theirs; binary networks such as IR-Net's ResNet20 are published with either.

    Raises:
        ValueError: ``depth`` is not ``6 n + 2``.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6 n + 2 (8, 14, 20, ...), got {depth}")
    return ResNet(BasicBlock, (blocks,) * 3, (16, 32, 64), classes, shortcut=shortcut)


def resnet8(classes: int = 10) -> ResNet:
    """ResNet8 for CIFAR, shortcuts of option A: 75,290 parameters."""
    return small_resnet(8, classes)


def resnet20(classes: int = 10) -> ResNet:
    """ResNet20 for CIFAR, shortcuts of option A: 269,722 parameters."""
    return small_resnet(20, classes)


class VGGSmall(nn.Module):
    """The small VGG of binary networks (LQ-Nets, IR-Net): six 3 x 3 convolutions, one linear layer, 32 x 32 images.

    Every second convolution is followed by a max-pool of 2. The published binary versions put Hardtanh where this one,
    whose activations are not binary, has ReLU.
    """

    def __init__(self, classes: int = 10, widths: Sequence[int] = (128, 256, 512)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in widths:
            for pool in (False, True):
                layers.append(_conv3x3(channels, width))
                layers += [nn.MaxPool2d(2)] if pool else []
                layers += [nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels * 4 * 4, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[N, classes]`` of images ``[N, 3, 32, 32]``."""
        logits: Tensor = self.fc(self.features(image).flatten(1))
        return logits
