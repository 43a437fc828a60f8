"""Counted memory: the paper's Table 7, and what the count follows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import memory
from benchmarks.memory import MIB, PAPER, account, account_model


@pytest.fixture(scope="module")
def vit() -> dict[str, memory.Memory]:
    return {column: account_model("ViT", column) for column in PAPER}


def test_the_paper_s_model() -> None:
    with torch.device("meta"):
        model = memory.ViT()
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 54.6
    image = torch.randn(2, 3, 64, 64)
    small = memory.ViT(image_size=64, dim=32, depth=1, heads=2, mlp_dim=48, classes=5)
    assert small(image).shape == (2, 5)


@pytest.mark.parametrize("column", PAPER)
def test_table_7(vit: dict[str, memory.Memory], column: str) -> None:
    """Peaks are below the paper's; tiles are what the paper counts as parameters, to its digits."""
    peak, parameters = PAPER[column]
    found = vit[column]
    assert found.parameters < found.peak < peak * MIB
    if column == "full precision":
        assert found.parameters == pytest.approx(54.6e6 * 4, rel=2e-3)
    else:
        assert round(found.tiles / MIB, 1) == parameters
        # The rest stays in float32: norms, biases, the positions, the class token, and one scale for each layer.
        assert found.parameters - found.tiles < 0.51 * MIB


def test_the_pages_hold_what_is_counted(vit: dict[str, memory.Memory]) -> None:
    assert memory.counted()[1] in memory.DOCUMENT.read_text()
    readme = (memory.DOCUMENT.parents[1] / "README.md").read_text()
    assert f"TBN 4 takes {vit['TBN 4'].peak / MIB:.1f} MiB" in readme


def test_layers(vit: dict[str, memory.Memory]) -> None:
    for column in PAPER:
        assert len(vit[column].layers) == 1 + 6 * 4 + 1
    weights = [sum(layer.weight for layer in vit[column].layers) for column in PAPER]
    assert weights == sorted(weights, reverse=True)


def test_lifetimes() -> None:
    """A chain of three: two activations live at a time, the first one freed; steps of 512 bytes."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(16, 16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x @ self.weight
            y = y.relu()
            y = y.exp()
            return y[:1] + 1

    with torch.device("meta"):
        found = account(Chain(), [torch.zeros(100, 16)])
    activation = 13 * 512  # 6,400 bytes
    assert found.parameters == 1024
    assert found.peak == 1024 + 3 * activation  # the input, and two of the chain
    assert [(layer.operator, layer.weight, layer.live) for layer in found.layers] == [("mm", 1024, 2 * activation)]


def test_pointnet_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert memory.PointNet()(torch.randn(2, 3, 30)).shape == (2, 40)
    full, tiled = (account_model("PointNet", column) for column in ("full precision", "TBN 4"))
    assert tiled.peak < full.peak
    assert tiled.parameters < full.parameters / 20
    assert len(full.layers) == len(tiled.layers) == 2 * 6 + 4 + 3
    memory.plot("PointNet", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
