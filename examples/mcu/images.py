"""MNIST: the paper's MLP, and a small convolutional network."""

from __future__ import annotations

from pathlib import Path

import torch
from example_data import ImageData, read_mnist
from torch import Tensor, nn

import tbn_compiler as tbn
from mcu.task import Dataset, Examples, Network, Recipe, Task

_HELD_OUT = 10_000
_MEAN, _STD = 0.1307, 0.3081


def read(folder: Path) -> Dataset:
    """MNIST with standardised pixels, ``float32 [count, 784]``.

    Raises:
        DataError: ``folder/mnist`` does not hold the four idx files.
    """
    return _dataset(
        read_mnist(folder / "mnist"), _HELD_OUT, "60,000 training images (the last 10,000 for choices), 10,000 test"
    )


def made_up() -> Dataset:
    """Noisy copies of ten coarse random patterns."""
    labels = torch.arange(320) % 10
    patterns = torch.rand(10, 7, 7).round().repeat_interleave(4, 1).repeat_interleave(4, 2).flatten(1)
    images = (patterns[labels] + 0.1 * torch.randn(320, 784)).clamp(0, 1)
    data = ImageData("made-up images", images[:256], labels[:256], images[256:], labels[256:])
    return _dataset(data, 64, "192 + 64 + 64 images")


def _dataset(data: ImageData, held_out: int, split: str) -> Dataset:
    choices = data.hold_out(held_out)
    train, validation, test = (
        Examples((x - _MEAN) / _STD, y)
        for x, y in ((choices.train_x, choices.train_y), (choices.test_x, choices.test_y), (data.test_x, data.test_y))
    )
    return Dataset(data.name, split, train, validation, test, retrain=True)


def mlp() -> nn.Module:
    """784-128-10 without biases, the model of the paper's Table 6."""
    return nn.Sequential(nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False))


def cnn() -> nn.Module:
    """Three convolutions with batch-norm, then the mean over the image."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        *_conv(1, 16, kernel=5, stride=2),  # 14 x 14
        *_conv(16, 32),
        nn.MaxPool2d(2),  # 7 x 7
        *_conv(32, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(outputs), nn.ReLU()]


def move(x: Tensor) -> Tensor:
    """Each batch of images moved by up to two pixels; what moves in on the other side is nearly always background."""
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return x.view(-1, 28, 28).roll((down, right), dims=(1, 2)).flatten(1)


# Layers below the threshold (the last one, and the CNN's first) are binary, as the paper does with small layers.
_BINARY = tbn.TilingConfig(p=1, min_size=0)
_TBN4 = tbn.TilingConfig(p=4, alpha="tile", min_size=2_000)

MLP = Task(
    name="mlp",
    title="MNIST, MLP",
    model="784-128-10, no biases",
    build=mlp,
    load=read,
    made_up=made_up,
    run_as_c=10_000,
    emulated=1000,
    networks={
        "float": Network("float", Recipe(epochs=40, lr=1e-3)),
        "binary": Network("binary, p = 1", Recipe(epochs=40, lr=1e-3, distill=0.7), _BINARY),
        "tbn4": Network(
            "TBN, p = 4",
            Recipe(epochs=40, lr=1e-3, distill=0.7, alpha_start=(0.5, 1.0, 2.0, 4.0)),
            _TBN4,
            "first layer p = 4, one alpha per tile; last layer p = 1",
        ),
    },
)

CNN = Task(
    name="cnn",
    title="MNIST, CNN",
    model="conv 5 x 5 / 2 (16), conv 3 x 3 (32), max-pool, conv 3 x 3 (64), mean, linear",
    build=cnn,
    load=read,
    made_up=made_up,
    run_as_c=200,
    emulated=100,
    augment=move,
    networks={
        "float": Network("float", Recipe(epochs=5, lr=4e-3)),
        "binary": Network("binary, p = 1", Recipe(epochs=5, lr=4e-3, distill=0.5), _BINARY),
        "tbn4": Network(
            "TBN, p = 4",
            Recipe(epochs=5, lr=4e-3, distill=0.5),
            _TBN4,
            "second and third convolution p = 4, one alpha per tile; first and last layer p = 1",
        ),
    },
)
