"""Split the layers of a tiled network over processes, train it, and gather and pack it.

    torchrun --nproc-per-node 2 examples/integrations/tensor_parallel.py

Every process sees the whole batch. The first hidden layer is split by its outputs, the second by its inputs, in the
manner of PyTorch's tensor parallel plans; with ``latent="tile"`` a process trains and multiplies its share of tiles.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from digits import CONFIG, accuracy, datasets, network
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

import tbn_compiler as tbn
from tbn_compiler.integrations.tensor_parallel import parallelize_module

PLAN = {"1": ColwiseParallel(), "3": RowwiseParallel()}


def main(argv: Sequence[str] | None = None) -> float:
    """Train, gather, pack and test; returns the accuracy of the packed network."""
    parser = argparse.ArgumentParser(description="Train a tiled network that is split over processes.")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("digits.safetensors"), help="packed file")
    arguments = parser.parse_args(argv)
    torch.manual_seed(0)
    train, test = datasets()
    config = CONFIG.replace(latent="tile")
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(tbn.transform(network(), config), mesh, PLAN)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    x, y = train.tensors
    for _ in range(arguments.epochs):
        for batch in torch.randperm(len(x)).split(64):  # the same order in every process: the seed is
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    whole = tbn.transform(network(), config)
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    packed = tbn.lower(whole)
    result = accuracy(packed, test)
    if dist.get_rank() == 0:
        tbn.save(packed, arguments.output)
        size = arguments.output.stat().st_size
        print(f"{arguments.output}: {size:,} bytes from {mesh.size()} processes, test accuracy {result:.1%}")
    dist.destroy_process_group()
    return result


if __name__ == "__main__":
    main()
