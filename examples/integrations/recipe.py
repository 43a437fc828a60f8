"""A training recipe as torchtune writes them: one class with ``setup``, ``train``, ``save_checkpoint``; it resumes.

    python examples/integrations/recipe.py                    # a checkpoint after every epoch
    python examples/integrations/recipe.py --resume           # goes on where the last run stopped

The ``state_dict`` of a tiled model is an ordinary one. It says how each layer is tiled, so that resuming with another
tiling is an error.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits import CONFIG, accuracy, datasets, network

import tbn_compiler as tbn


class TileFinetuneRecipe:
    """Trains a tiled network on one device.

    Args:
        options: ``epochs``, ``p``, ``lr``, ``batch_size``, ``output`` and ``resume``.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.epochs_run = 0

    def setup(self) -> None:
        """Data, model and optimiser, from the last checkpoint if one is asked for."""
        torch.manual_seed(0)
        self.data, self.test_data = datasets()
        self.model = tbn.transform(network(), CONFIG.replace(p=self.options.p))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.options.lr)
        self.shuffle = torch.Generator().manual_seed(0)
        if self.options.resume:
            self.load_checkpoint(torch.load(self._path, weights_only=True))

    @property
    def _path(self) -> Path:
        return Path(self.options.output) / "recipe.pt"

    def load_checkpoint(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.shuffle.set_state(state["shuffle"])
        self.epochs_run = state["epochs_run"]

    def save_checkpoint(self) -> None:
        """Write all that going on takes."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"shuffle": self.shuffle.get_state(), "epochs_run": self.epochs_run}, self._path)

    def train(self) -> None:
        """All epochs that are left, with a checkpoint after each."""
        x, y = self.data.tensors
        while self.epochs_run < self.options.epochs:
            for batch in torch.randperm(len(x), generator=self.shuffle).split(self.options.batch_size):
                self.optimizer.zero_grad()
                F.cross_entropy(self.model(x[batch]), y[batch]).backward()
                self.optimizer.step()
            self.epochs_run += 1
            self.save_checkpoint()

    def cleanup(self) -> float:
        """Pack the network and test it."""
        packed = tbn.lower(self.model)
        tbn.save(packed, Path(self.options.output) / "digits.safetensors")
        return accuracy(packed, self.test_data)


def main(argv: Sequence[str] | None = None) -> float:
    """Run the recipe; returns the accuracy of the packed network."""
    parser = argparse.ArgumentParser(description="Train a tiled network by a recipe.")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--p", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("runs/recipe"))
    parser.add_argument("--resume", action="store_true")
    recipe = TileFinetuneRecipe(parser.parse_args(argv))
    recipe.setup()
    recipe.train()
    result = recipe.cleanup()
    print(f"{recipe.options.output}: test accuracy {result:.1%}")
    return result


if __name__ == "__main__":
    main()
