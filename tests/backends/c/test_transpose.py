"""Transpose convolutions on tiles, as convolutions, pixel by pixel and one weight at a time, against PyTorch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c
from tests.backends.c.programs import Network, check
from tests.backends.c.toolchain import needs_cc

TOLERANCE = {"generic": 1e-5, "cortex-m3": 1e-4}
LAYERS: dict[str, tuple[dict[str, Any], str]] = {
    "stride 1": ({"padding": 1}, "turned"),
    "groups, dilation": ({"groups": 2, "dilation": 2, "bias": False}, "turned"),
    "depthwise": ({"groups": 8, "padding": 1}, "turned"),
    "stride 2": ({"stride": 2, "output_padding": 1, "bias": False}, "pixels"),
    "stride, groups": ({"stride": (1, 3), "padding": 1, "groups": 2}, "pixels"),
    "a window that is cropped": ({"padding": 3}, "pixels"),
}
TILINGS: dict[str, dict[str, Any]] = {
    "plain": {"p": 4, "alpha": "tile"},
    "misaligned": {"p": 3},
    "rolled": {"p": 4, "alpha": "tile", "replicate": "roll"},
    "two axes": {"p": (2, 2), "alpha": "output"},
    "Hadamard": {"p": 2, "alpha": "tile", "replicate": "hadamard"},
    "scales inside rows": {"p": 9, "alpha": "tile"},
}
PIXELS = {"tiled_transpose_sums", "tiled_transpose_spread"}


class Sequence(nn.Module):
    """A transpose convolution and a ReLU."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose2d(8, 8, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).relu()


def _module(layer: str, tiling: str) -> nn.Module:
    return tbn.lower(tbn.transform(Sequence(**LAYERS[layer][0]), tbn.TilingConfig(min_size=0, **TILINGS[tiling])))


@needs_cc
@pytest.mark.parametrize(("target", "optimize"), [("generic", "speed"), ("cortex-m3", "speed"), ("generic", "size")])
def test_layouts(tmp_path: Path, target: str, optimize: str) -> None:
    torch.manual_seed(0)
    pairs = list(itertools.product(LAYERS, TILINGS))
    pairs = pairs[::5] + pairs[2::5] if (target, optimize) == ("generic", "speed") else pairs[1::7]
    options = {"target": target, "optimize": optimize}
    networks = [Network(_module(*p), [(torch.randn(2, 8, 5, 7),)], options, TOLERANCE[target]) for p in pairs]
    check(networks, tmp_path)
    if optimize == "size":
        return
    for (layer, tiling), network in zip(pairs, networks, strict=True):
        assert network.plan is not None
        kernels = set(network.plan.kernels)
        if tiling == "scales inside rows":
            assert kernels == {"conv_transpose_bits", "relu"}
        elif tiling == "plain":
            assert (kernels >= PIXELS) == (LAYERS[layer][1] == "pixels"), layer
        elif "groups" not in LAYERS[layer][0]:  # a few products for each group may be fewer instructions one by one
            assert "conv_transpose_bits" not in kernels, (layer, tiling)


def test_the_turned_tile_is_as_large_as_the_tile(tmp_path: Path) -> None:
    module = tbn.transform(nn.ConvTranspose2d(16, 24, 3, groups=2), tbn.TilingConfig(p=4, alpha="tile", min_size=0))
    plan = export_c(module, torch.zeros(1, 16, 4, 4), tmp_path / "net.c", optimize="speed")
    sums, convolution = plan.steps
    assert "sum channels with equal signs, 16 -> 8" in sums.title
    assert "tiled conv 8 -> 24 channels, 3 x 3, 2 groups" in convolution.title
    tile = 16 * 12 * 9 // 4 // 8
    assert plan.weight_bytes == tile + 4 * (4 + 24)


@needs_cc
def test_infinite_and_undefined_inputs_reach_what_reads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = []
    for stride in (1, 2):
        module = tbn.transform(nn.ConvTranspose2d(8, 4, 3, stride=stride), tbn.TilingConfig(p=2, min_size=0))
        x = torch.randn(3, 8, 4, 5)
        x[0, 1, 2, 3], x[1, 0, 0, 0], x[2, 3, 3, 4] = math.inf, -math.inf, math.nan
        networks.append(Network(tbn.lower(module), [(x,)], {"optimize": "speed"}, nan=True))
    check(networks, tmp_path)
