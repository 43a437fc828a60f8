"""Convolutions of volumes: what they become, in float, on tiles, with int8 activations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c
from tests.backends.c.programs import Network, check
from tests.backends.c.test_operators import VOLUME, with_statistics
from tests.backends.c.toolchain import needs_cc

pytestmark = needs_cc

TILINGS: dict[str, dict[str, Any]] = {
    "copies": {"p": 4, "alpha": "tile"},
    "two axes": {"p": (2, 2), "alpha": "output"},
    "signs": {"p": 4, "replicate": "hadamard"},
    "float": {"p": 2, "tile_dtype": "float"},
}
# Layouts that no kernel on tiles computes: their weights are stored decoded.
DECODED = ("two axes", "signs")


def network(tiling: str) -> nn.Module:
    """No biases, so that copies are passed on to the next layer."""
    convs = (nn.Conv3d(4, 8, 3, bias=False), nn.Conv3d(8, 8, (2, 3, 3), bias=False), nn.Conv3d(8, 4, 1))
    net = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
    return tbn.lower(tbn.transform(net, tbn.TilingConfig(min_size=0, **TILINGS[tiling])))


@pytest.mark.filterwarnings("ignore:.* is stored decoded")
def test_tiled_networks(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, batches = torch.randn(VOLUME), [torch.randn(VOLUME) for _ in range(4)]
    networks = []
    for tiling in TILINGS:
        packed = network(tiling)
        networks.append(Network(packed, [(x,)]))
        options: dict[str, Any] = {"activation": "int8", "calibration": batches}
        networks.append(Network(tbn.optimize(packed, x, **options), [(x,)], tolerance=0.02))
        small = tbn.optimize(packed, x, **options, intermediates="int8")
        networks.append(Network(small, [(x,)], tolerance=0.05))
    check(networks, tmp_path)
    plans = [network.plan for network in networks]
    assert all(plan is not None for plan in plans)
    for tiling, plan in zip(TILINGS, plans[::3], strict=True):
        assert plan is not None
        kernels = [kernel for kernel in plan.kernels if not kernel.startswith("strided_copy")]
        assert all(kernel.startswith("conv_by" if tiling in DECODED else "tiled_") for kernel in kernels)
        assert bool(any(step.notes for step in plan.steps)) == (tiling in DECODED)
    # In int8 the slices of one layer's result are those of the next one's input, with one copy between them.
    assert plans[1] is not None
    assert sum("strided_copy" in step.kernel for step in plans[1].steps) == 4


def test_norms_and_functions_go_into_the_layer(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv3d(4, 8, 3), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 8, 3, padding=1), nn.ReLU())
    network = Network(with_statistics(net), [(torch.randn(2, *VOLUME[1:]),)])
    check([network], tmp_path)
    assert network.plan is not None
    assert {"relu", "channel_affine"}.isdisjoint(network.plan.kernels)
    assert sum("ReLU" in step.title for step in network.plan.steps) == 2


def test_a_result_that_is_read_elsewhere_keeps_its_function_behind(tmp_path: Path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv3d(4, 8, 3), nn.BatchNorm3d(8)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            y = self.conv(x)
            return y, self.norm(y).relu(), y.relu().flip(2)

    check([Network(with_statistics(Twice()), [(torch.randn(VOLUME),)])], tmp_path)


def test_all_of_the_depth_is_read_where_it_lies(tmp_path: Path) -> None:
    """A window as deep as the volume copies nothing."""
    plan = export_c(nn.Conv3d(4, 8, (5, 3, 3)), torch.randn(VOLUME), tmp_path / "net.c")
    assert plan.kernels == ("conv_by_4_columns3",)
