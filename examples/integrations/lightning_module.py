"""Train a tiled ``LightningModule`` and pack it.

    python examples/integrations/lightning_module.py

``transform`` gives a copy of the same class: its ``training_step`` and optimisers are those that were written. Its
checkpoints hold how each layer is tiled, and load into a module that was tiled in the same way.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import lightning
import torch
import torch.nn.functional as F
from digits import CONFIG, accuracy, datasets, network
from torch import Tensor
from torch.utils.data import DataLoader

import tbn_compiler as tbn


class Digits(lightning.LightningModule):
    """The network with its loss and optimiser."""

    def __init__(self, lr: float = 2e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.network = network()

    def forward(self, images: Tensor) -> Tensor:
        """Scores ``[n, 10]`` for images ``[n, 1, 8, 8]``."""
        scores: Tensor = self.network(images)
        return scores

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        """Cross entropy of one batch."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.hparams["lr"])


def main(argv: Sequence[str] | None = None) -> float:
    """Train, pack and test; returns the accuracy of the packed network."""
    parser = argparse.ArgumentParser(description="Train a tiled LightningModule.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), help="folder of the checkpoint")
    arguments = parser.parse_args(argv)
    lightning.seed_everything(0, verbose=False)
    train, test = datasets()
    module = tbn.transform(Digits(), CONFIG)
    trainer = lightning.Trainer(
        max_epochs=arguments.epochs, default_root_dir=arguments.output, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(train, batch_size=64, shuffle=True))
    checkpoint = arguments.output / "last.ckpt"
    trainer.save_checkpoint(checkpoint, weights_only=True)

    again = tbn.transform(Digits(), CONFIG)
    again.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    packed = tbn.lower(again)
    result = accuracy(packed, test)
    tbn.save(packed, arguments.output / "digits.safetensors")
    print(f"{arguments.output / 'digits.safetensors'}: test accuracy {result:.1%}")
    return result


if __name__ == "__main__":
    main()
