"""The models behind the files in ``tests/data/v0.1``, which version 0.1 wrote and every later one must load.

Run as a script it writes the files anew. That is only right with the code of version 0.1 (format version 1, commit
1af6b04), from the repository root: ``python -m tests.files_v01``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tbn_compiler as tbn

FOLDER = Path(__file__).parent / "data" / "v0.1"


class Convolutions(nn.Module):
    """Alphas per tile, grouped and strided convolutions, a norm's buffers, and a layer left in float."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 16, 3, stride=2, groups=2)
        self.hidden = nn.Linear(16, 24)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = self.grouped(x).relu().mean((2, 3))
        return self.head(F.relu(self.hidden(x)))


class Layouts(nn.Module):
    """One layer of each layout, alpha source and tile dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.Linear(12, 16)
        self.pair_conv = nn.Conv1d(4, 8, 3, padding=1)
        self.rolled = nn.Linear(16, 12)
        self.from_weight = nn.Linear(12, 16)
        self.real = nn.Linear(16, 12)
        self.misaligned = nn.Linear(12, 10)
        self.up = nn.ConvTranspose1d(8, 4, 4, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.rolled(F.relu(self.pair(x)))
        x = self.misaligned(F.relu(self.real(F.relu(self.from_weight(x)))))
        return self.up(self.pair_conv(x))


class Shared(nn.Module):
    """Tied weights, weights that are plain parameters, and a weight stored as ``[in, out]``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.again = nn.Linear(16, 16)
        self.again.weight = self.first.weight
        self.mix = nn.Parameter(torch.randn(16, 16) / 4)
        self.product = nn.Parameter(torch.randn(16, 24) / 4)
        self.conv1d = Conv1D(12, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(F.relu(self.first(x)))
        x = F.linear(x, self.mix)
        return self.conv1d(F.relu(x @ self.product))


class Attention(nn.Module):
    """Projections that are three views of one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.attention(x, x, x, need_weights=False)[0])
        return self.out(x)


class Parts(nn.Module):
    """A forward with an optional argument and control flow on data: version 0.1 traced its children one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        if mask is not None:
            x = x * mask
        return self.head(x)


_TILE = tbn.TilingConfig(p=4, alpha="tile", min_size=0)
# By file name: the model, its tiling, and the shape of its input.
MODELS: dict[str, tuple[Callable[[], nn.Module], tbn.TilingConfig, tuple[int, ...]]] = {
    "convolutions": (Convolutions, _TILE.replace(float_layers=("head",)), (2, 3, 8, 8)),
    "layouts": (
        Layouts,
        _TILE.replace(
            overrides={
                "pair": {"p": (2, 2)},
                "pair_conv": {"p": (2, 2), "alpha": "output"},
                "rolled": {"replicate": "roll", "shift": 5},
                "from_weight": {"alpha_source": "W", "alpha": "layer"},
                "real": {"tile_dtype": "float"},
                "misaligned": {"p": 7},
            }
        ),
        (2, 4, 12),
    ),
    "shared": (Shared, _TILE, (3, 16)),
    "attention": (Attention, _TILE, (2, 5, 8)),
    "parts": (Parts, _TILE.replace(overrides={"blocks.1.*": {"p": 2, "alpha": "layer"}}), (2, 3)),
}


def example_input(name: str) -> Tensor:
    """The input whose output is stored; it does not depend on a random generator's version."""
    _, _, shape = MODELS[name]
    values = torch.arange(int(np.prod(shape)), dtype=torch.float64).reshape(shape)
    return (values % 10).long() if name == "parts" else torch.sin(values).float()


def main() -> None:
    """Write the files, and all outputs to one more."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    outputs: dict[str, Any] = {}
    for name, (build, config, _) in MODELS.items():
        torch.manual_seed(0)
        qat = tbn.transform(build(), config)
        x = example_input(name)
        qat(x)  # moves running statistics
        packed = tbn.lower(qat)
        tbn.save(packed, FOLDER / f"{name}.safetensors")
        outputs[name] = packed(x).detach().numpy()
    np.savez_compressed(FOLDER / "outputs.npz", **outputs)


if __name__ == "__main__":
    main()
