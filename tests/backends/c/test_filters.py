"""Convolutions whose groups have few input channels: every kernel that slides filters over images, against PyTorch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c, ir, tiled_filters
from tbn_compiler.backends.c.tiled_instances import FILTER_COLUMNS, FILTER_STRIDES, INSTANCES
from tests.backends.c.programs import Network, check
from tests.backends.c.toolchain import needs_cc, run_strict

TOLERANCE = {"generic": 1e-5, "cortex-m3": 1e-4}


class Beside(nn.Module):
    """Layers on the same input, some with a ReLU; all their results."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x).relu() if index % 2 else layer(x) for index, layer in enumerate(self.layers))


def _depthwise(*kernel: int, groups: int = 4, **options: Any) -> nn.Module:
    return nn.Conv2d(4, 8, kernel, groups=groups, **options)


def _layers() -> list[nn.Module]:
    """Each kernel on 13 columns and more, so that 8, 4 and 1 positions are taken at a time."""
    found = []
    for columns, stride in itertools.product(FILTER_COLUMNS, FILTER_STRIDES):
        rows = max(2, 8 // columns)  # a shorter filter is not worth a tile
        options = {"stride": (1, stride), "padding": (rows // 2, columns // 2), "bias": columns % 2 == 0}
        found.append(_depthwise(rows, columns, **options))
    for groups, stride in itertools.product((4, 2), FILTER_STRIDES):
        found.append(_depthwise(3, 3, groups=groups, stride=stride, padding=1, bias=False))
        found.append(_depthwise(3, 3, groups=groups, stride=stride, dilation=(2, 1)))
    found.append(_depthwise(3, 2, stride=3, padding=1))
    found.append(_depthwise(2, 3, dilation=(1, 3), padding=(0, 3), groups=2, bias=False))
    return found


@needs_cc
@pytest.mark.parametrize(("target", "optimize"), [("generic", "speed"), ("generic", "size"), ("cortex-m3", "balanced")])
def test_every_kernel(tmp_path: Path, target: str, optimize: str) -> None:
    torch.manual_seed(0)
    layers = _layers() if optimize == "speed" else _layers()[::3]
    # Filters that follow one another in the tile, begin inside it, and are rolled; a layer with a long image.
    tilings: list[dict[str, Any]] = [
        {"p": 4, "alpha": "tile"},
        {"p": 9},
        {"p": 4, "alpha": "tile", "replicate": "roll"},
    ]
    networks = []
    for index, tiling in enumerate(tilings):
        module = tbn.transform(Beside(layers if index == 0 else layers[-4:]), tbn.TilingConfig(min_size=0, **tiling))
        sample = (torch.randn(2, 4, 5, 26),)
        networks.append(
            Network(tbn.lower(module), [sample], {"target": target, "optimize": optimize}, TOLERANCE[target])
        )
    check(networks, tmp_path)
    used = {kernel for network in networks if network.plan for kernel in network.plan.kernels}
    if optimize == "speed":
        assert {name for name in INSTANCES if "filter" in name} | {"tiled_filter", "tiled_planes"} <= used
    else:
        assert {kernel for kernel in used if "filter" in kernel} == {f"tiled_{'fixed_' * (target != 'generic')}filter"}


@needs_cc
def test_infinite_and_undefined_inputs_reach_what_reads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = tbn.transform(nn.Conv2d(4, 4, 3, padding=1, groups=4), tbn.TilingConfig(p=2, min_size=0))
    x = torch.randn(3, 4, 6, 7)
    x[0, 1, 2, 3], x[1, 0, 0, 0], x[2, 3, 5, 6] = math.inf, -math.inf, math.nan
    check([Network(tbn.lower(module), [(x,)], nan=True)], tmp_path)


@needs_cc
def test_one_undefined_input_makes_its_channel_undefined_in_fixed_point(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = tbn.lower(tbn.transform(nn.Conv1d(2, 2, 3, groups=2), tbn.TilingConfig(p=1, min_size=0)))
    x = torch.randn(1, 2, 9)
    x[0, 0, 8] = math.nan
    plan = export_c(module, x, tmp_path / "net.c", name="net", target="cortex-m3")
    assert plan.kernels == ("tiled_fixed_planes", "tiled_fixed_filter")
    actual = torch.from_numpy(run_strict(tmp_path / "net.c", x, name="net")).reshape(2, 7)
    assert actual[0].isnan().all()
    torch.testing.assert_close(actual[1], module(x)[0, 1].detach(), rtol=1e-4, atol=1e-4)


def test_an_image_without_padding_is_not_copied(tmp_path: Path) -> None:
    module = tbn.transform(nn.Conv2d(8, 8, 3, groups=8), tbn.TilingConfig(p=4, min_size=0))
    plan = export_c(module, torch.zeros(1, 8, 9, 9), tmp_path / "net.c", optimize="speed")
    assert plan.kernels == ("tiled_filter3x3",)
    assert plan.steps[0].choice.startswith("filters slide over images: about ")
    assert plan.weight_bytes == 8 * 9 // 4 // 8 + 1 + 4 * (1 + 8)


def test_images_of_a_group_take_little_memory(tmp_path: Path) -> None:
    """Two groups of 32 channels: their padded images would be half of the input."""
    module = tbn.transform(nn.Conv2d(64, 8, 3, padding=1, groups=2), tbn.TilingConfig(p=4, min_size=0))
    plan = export_c(module, torch.zeros(1, 64, 20, 20), tmp_path / "net.c", optimize="speed")
    assert "tiled_planes" not in plan.kernels
    assert plan.scratch_bytes < 4096


def test_planes_hold_all_that_windows_reach() -> None:
    for size, kernel, stride, padding, dilation in itertools.product(range(1, 9), (1, 2, 3), (1, 2, 3), (0, 1), (1, 2)):
        output = (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        if output < 1:
            continue
        both = [(n, n) for n in (size, output, kernel, stride, padding, dilation)]
        height, width = tiled_filters._plane(ir.Window(*both))
        assert height == width
        assert height >= max(padding + size, (output - 1) * stride + (kernel - 1) * dilation + 1)
        assert height <= size + 2 * padding
