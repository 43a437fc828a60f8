"""CIFAR-10 and ResNet8, the image network of MLPerf Tiny."""

from __future__ import annotations

from pathlib import Path

import torch
from paper.data import Images, read_images
from paper.tasks import crop_and_flip
from torch import Tensor

import tbn_compiler as tbn
from mcu import tiny
from mcu.task import Dataset, Examples, Network, Recipe, Task

_HELD_OUT = 5_000
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def read(folder: Path) -> Dataset:
    """CIFAR-10 with standardised pixels, ``float32 [count, 3, 32, 32]``.

    Raises:
        DataError: ``folder/cifar10`` does not hold it in a form that :func:`paper.data.read_images` reads.
    """
    data = read_images(folder, "cifar10")
    note = f" ({data.note})" if data.note else ""
    split = f"50,000 training images (the last {_HELD_OUT:,} for choices), {len(data.test_y):,} test{note}"
    return _dataset(data, _HELD_OUT, split)


def made_up() -> Dataset:
    """Noisy copies of ten coarse random patterns."""
    labels = torch.arange(160) % 10
    patterns = torch.randint(64, 192, (10, 3, 4, 4)).repeat_interleave(8, 2).repeat_interleave(8, 3)
    images = (patterns[labels] + 20 * torch.randn(160, 3, 32, 32)).clamp(0, 255).byte()
    data = Images("made-up images", images[:128], labels[:128], images[128:], labels[128:])
    return _dataset(data, 32, "96 + 32 + 32 images")


def _dataset(data: Images, held_out: int, split: str) -> Dataset:
    mean, std = (255 * torch.tensor(values)[:, None, None] for values in (_MEAN, _STD))
    train, test = (
        Examples(images.float().sub_(mean).div_(std), labels)
        for images, labels in ((data.train_x, data.train_y), (data.test_x, data.test_y))
    )
    validation = Examples(train.x[-held_out:], train.y[-held_out:])
    return Dataset(data.name, split, train.head(len(train) - held_out), validation, test, retrain=True)


def augment(x: Tensor) -> Tensor:
    """Each image moved by up to four pixels in both directions, the mean colour around it, and mirrored or not.

    What is returned is ``channels_last``, in which a CPU trains convolutions faster.
    """
    return crop_and_flip(x, torch.default_generator).contiguous(memory_format=torch.channels_last)


_EPOCHS, _RATE = 6, 4e-3
_TILED = Recipe(epochs=_EPOCHS, lr=_RATE, from_float=True)
_LAYOUT = "the four 3 x 3 convolutions of the second and third block p = 4, one alpha per tile; all other layers p = 1"

TASK = Task(
    name="resnet8",
    title="CIFAR-10, ResNet8",
    model="image network of MLPerf Tiny: 3 x 3 stem of 16 channels, three blocks of 16, 32 and 64, mean, linear",
    build=tiny.images,
    load=read,
    made_up=made_up,
    run_as_c=1000,
    emulated=10,
    augment=augment,
    calibration=512,
    networks={
        "float": Network("float", Recipe(epochs=_EPOCHS, lr=_RATE)),
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
