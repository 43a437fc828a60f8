"""Train a tiled network on one process or several, with the same file.

    python examples/distributed_mlp.py
    torchrun --nproc-per-node 2 examples/distributed_mlp.py

A 64-256-256-10 network learns scikit-learn's scanned digits (8 x 8, a stratified fifth held out). What ``transform``
returns is an ordinary module, so ``DistributedDataParallel`` takes it as it is. Rank 0 lowers the trained network,
tests it and prints the summary. The batch is split over the processes, so the steps are the same for any number.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # before a group is made: its default arguments would keep that group for good
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tbn_compiler as tbn

BATCH = 64


def load_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images ``[n, 64]`` in [0, 1], test images, training labels ``[n]`` and test labels."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16.0, labels, test_size=0.2, random_state=0, stratify=labels)
    train_x, test_x = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    train_y, test_y = (torch.tensor(part) for part in split[2:])
    return train_x, test_x, train_y, test_y


def train(module: nn.Module, x: Tensor, y: Tensor, epochs: int, rank: int, processes: int) -> None:
    """An ordinary loop; each process takes its share of every batch."""
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    shuffle = torch.Generator().manual_seed(0)  # the same order in every process
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=shuffle)
        for batch in order[: len(x) // BATCH * BATCH].split(BATCH):
            share = batch[rank::processes]
            optimizer.zero_grad()
            F.cross_entropy(module(x[share]), y[share]).backward()
            optimizer.step()
        schedule.step()


def main() -> None:
    """Train, lower and report."""
    parser = argparse.ArgumentParser(description="Train a tiled network, alone or under torchrun.")
    parser.add_argument("--epochs", type=int, default=40)
    epochs = parser.parse_args().epochs
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if processes > 1:
        dist.init_process_group("gloo")

    torch.manual_seed(0)  # the same start in every process
    net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    qat = tbn.transform(net, tbn.TilingConfig(p=4, min_size=10_000))
    train_x, test_x, train_y, test_y = load_data()
    train(DistributedDataParallel(qat) if processes > 1 else qat, train_x, train_y, epochs, rank, processes)

    if rank == 0:
        packed = tbn.lower(qat)
        with torch.no_grad():
            correct = packed(test_x).argmax(1) == test_y
        print(f"test accuracy {100 * correct.float().mean().item():.1f} %, {processes} process(es)")
        print(tbn.summary(packed))
    if processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
