"""Train a tiled network with Hugging Face Accelerate, in bfloat16, and pack it.

    python examples/integrations/accelerate_loop.py
    accelerate launch examples/integrations/accelerate_loop.py

``prepare`` takes what ``transform`` returns as it is. ``unwrap_model(..., keep_fp32_wrapper=False)`` gives the model
back without mixed precision; with the wrapper it could be lowered just as well, and would go on computing in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import CONFIG, accuracy, datasets, network
from torch.utils.data import DataLoader

import tbn_compiler as tbn


def main(argv: Sequence[str] | None = None) -> float:
    """Train, pack and test; returns the accuracy of the packed network."""
    parser = argparse.ArgumentParser(description="Train a tiled network with Accelerate.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("digits.safetensors"), help="packed file")
    arguments = parser.parse_args(argv)
    set_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    train, test = datasets()
    model = tbn.transform(network(), CONFIG)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model, optimizer, batches = accelerator.prepare(model, optimizer, DataLoader(train, batch_size=64, shuffle=True))
    for _ in range(arguments.epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
    packed = tbn.lower(accelerator.unwrap_model(model, keep_fp32_wrapper=False).cpu())
    result = accuracy(packed, test)
    if accelerator.is_main_process:
        tbn.save(packed, arguments.output)
        print(f"{arguments.output}: {arguments.output.stat().st_size:,} bytes, test accuracy {result:.1%}")
    return result


if __name__ == "__main__":
    main()
