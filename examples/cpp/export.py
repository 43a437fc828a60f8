"""Make the package that ``main.cpp`` runs: a small convolutional network on scanned digits, tiled, trained and packed.

    python export.py                 # writes digits.pt2, images.bin and classes.txt
    python export.py --activation int8

The package holds compiled code for this kind of processor, the packed layers with their tiles in the order in which the
kernels read them, and whatever else the network computes. Batches may have any size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import tbn_compiler as tbn
from tbn_compiler.backends import cpu

IMAGES = 16


def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A tiled network after a short training, and all images with their labels."""
    torch.manual_seed(0)
    data, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(data / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)
    network = nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1024, 10)),
    )
    # A class whose row of weights is a copy of another's could not be told from it.
    qat = tbn.transform(network, tbn.TilingConfig(p=4, min_size=0, overrides={"8": {"p": 1}}))
    optimizer = torch.optim.Adam(qat.parameters(), lr=2e-3)
    for _ in range(4):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(qat(x[batch]), y[batch]).backward()
            optimizer.step()
    return qat, x, y


def main(argv: Sequence[str] | None = None) -> float:
    """Write the files; returns the share of right answers on the training images."""
    parser = argparse.ArgumentParser(description="Write a package for the C++ program.")
    parser.add_argument("--activation", choices=("float", "int8"), default="float")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the files (default: this one)")
    arguments = parser.parse_args(argv)
    qat, x, y = trained()
    options: dict[str, Any] = {}
    if arguments.activation == "int8":
        options = {"activation": "int8", "calibration": [x[:256]], "intermediates": "int8"}
    packed = tbn.optimize(tbn.lower(qat), x[:2], **options)
    stored = cpu.bind(packed, stored=True)
    shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    with torch.no_grad():
        program = torch.export.export(stored, (x[:2],), dynamic_shapes=shapes)
        answers = stored(x).argmax(1)
    arguments.output.mkdir(parents=True, exist_ok=True)
    torch._inductor.aoti_compile_and_package(program, package_path=str(arguments.output / "digits.pt2"))
    (arguments.output / "images.bin").write_bytes(x[:IMAGES].numpy().tobytes())
    (arguments.output / "classes.txt").write_text("".join(f"{answer}\n" for answer in answers[:IMAGES].tolist()))
    return float((answers == y).float().mean())


if __name__ == "__main__":
    print(f"accuracy on the images that it was trained with: {main():.1%}")
