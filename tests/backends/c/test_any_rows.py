"""Layers whose tile is not simply the rows of the weight: decoded rows, and whole layers against PyTorch."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c, ir
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.plan import Implementation
from tbn_compiler.backends.c.registry import Context, implement
from tbn_compiler.backends.c.tiled_decoding import Decoded, decode
from tbn_compiler.packing import pack_bits
from tbn_compiler.tiling import TileLayout
from tests.backends.c.programs import Network, check
from tests.backends.c.toolchain import needs_cc

CONVOLUTIONS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "groups": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=2), (8, 5, 4)),
    "misaligned": (lambda: nn.Conv2d(6, 10, 3, dilation=2, padding=2, bias=False), (6, 5, 4)),
    "misaligned groups": (lambda: nn.Conv1d(8, 12, 3, stride=2, groups=2), (8, 9)),
    "linear": (lambda: nn.Linear(68, 30), (68,)),
}
TILINGS: dict[str, dict[str, Any]] = {
    "one alpha": {"p": 4},
    "alphas": {"p": 8, "alpha": "tile"},
    "rolled": {"p": 4, "alpha": "tile", "replicate": "roll", "shift": 5},
    "two axes": {"p": (2, 2), "alpha": "tile"},
    "Hadamard": {"p": 2, "alpha": "tile", "replicate": "hadamard"},
}
TOLERANCE = {"generic": 1e-5, "cortex-m3": 1e-4}


@needs_cc
@pytest.mark.parametrize(("target", "optimize"), [("generic", "speed"), ("cortex-m3", "speed"), ("generic", "size")])
def test_layouts_and_kinds(tmp_path: Path, target: str, optimize: str) -> None:
    torch.manual_seed(0)
    pairs = list(itertools.product(CONVOLUTIONS.values(), TILINGS.values()))[::2]
    networks = []
    for (make, shape), tiling in pairs if (target, optimize) == ("generic", "speed") else pairs[::3]:
        module = tbn.transform(nn.Sequential(make(), nn.ReLU()), tbn.TilingConfig(min_size=0, **tiling))
        options = {"target": target, "optimize": optimize}
        networks.append(Network(tbn.lower(module), [(torch.randn(2, *shape),)], options, TOLERANCE[target]))
    check(networks, tmp_path)
    used = {kernel for network in networks if network.plan for kernel in network.plan.kernels}
    if optimize == "speed":
        assert {"tiled_finish_rows", "tiled_combine"} <= used
        assert not used & {"tiled_conv_bits", "tiled_linear_bits", "tiled_linear_bytes"}
    if len(networks) == len(pairs):
        assert {"tiled_regroup", "tiled_patch_groups"} <= used


class Stored(nn.Module):
    """A linear layer of a given layout, with inputs that stand for scaled copies."""

    def __init__(self, layout: TileLayout, num_alphas: int, replicas: int | None) -> None:
        super().__init__()
        self.layout = layout
        self.register_buffer("tile", pack_bits(torch.randn(layout.tile_size)))
        self.register_buffer("alpha", torch.rand(num_alphas) + 0.5)
        self.register_buffer("input_alpha", torch.randn(replicas) if replicas else None)

    def forward(self, x: Tensor) -> Tensor:
        layout, stored = self.layout, (self.tile, self.alpha, None)
        sizes = (layout.row_size, layout.rows, layout.p)
        return torch.ops.tbn.linear(x, *stored, *sizes, self.input_alpha, p_in=layout.p_in, shift=layout.shift)


@needs_cc
def test_replicas_in_other_layouts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cases = [
        *(
            (TileLayout((10, 64), 4), 10, None),
            (TileLayout((18, 60), 8), 8, 5),
            (TileLayout((6, 20), 4, shift=7), 4, 5),
        ),
        *((TileLayout((16, 40), 8, 2), 8, 2), (TileLayout((24, 60), 16, shift=3), 16, 2)),
    ]
    networks = [
        Network(Stored(*case), [(torch.randn(3, case[0].row_size // (case[2] or 1)),)], {"optimize": "speed"})
        for case in cases
    ]
    check(networks, tmp_path)
    for network in networks:
        assert network.plan is not None
        assert not {"tiled_linear_bits", "tiled_linear_bytes"} & set(network.plan.kernels)


@needs_cc
def test_infinity_stays_infinity_where_scales_change_inside_a_row(tmp_path: Path) -> None:
    """A row is the sum of two rows of signs there, which would make NaN of it."""
    torch.manual_seed(0)
    module = Stored(TileLayout((10, 60), 4), 4, None)
    x = torch.randn(62, 60)
    for position in range(60):
        x[position, position] = math.inf if position % 2 else -math.inf
    x[60, 7] = math.nan
    network = Network(module, [(x,)], {"optimize": "speed"}, nan=True)
    check([network], tmp_path)
    assert network.plan is not None
    assert "tiled_combine" in network.plan.kernels
    assert module(x).isinf().any(0).all()


def _layer(layout: TileLayout, num_alphas: int, groups: int, replicas: int | None) -> ir.TiledConv:
    rng = np.random.default_rng(0)
    numbers = [rng.random(size, np.float32) + np.float32(0.5) for size in (num_alphas, replicas or 1)]
    tile = pack_bits(torch.from_numpy(rng.standard_normal(layout.tile_size))).numpy()
    channels = layout.shape[1] * groups // (replicas or 1)
    return ir.TiledConv(
        "y",
        "layer",
        (ir.Value("x", (1, channels, 1, 1)),),
        ir.Value("y", (1, layout.rows, 1, 1)),
        tile=ir.Constant("tile", tile, packed=True),
        alpha=ir.Constant("alpha", numbers[0]),
        bias=None,
        input_alpha=ir.Constant("input_alpha", numbers[1]) if replicas else None,
        layout=layout,
        window=ir.Window((1, 1), (1, 1), (1, 1)),
        groups=groups,
    )


def _layers() -> list[ir.TiledConv]:
    """Every small layer: layouts, alphas, groups, replicas."""
    found = []
    for rows, inputs in itertools.product((1, 2, 3, 4, 6), (1, 2, 3, 4, 6)):
        shape = (rows, inputs, 1, 1)
        size = rows * inputs
        layouts = [TileLayout(shape, p, shift=s) for p in range(1, size + 1) if size % p == 0 for s in (0, 1, 5)]
        layouts += [
            TileLayout(shape, p_out * p_in, p_in)
            for p_out, p_in in itertools.product((1, 2, 3), (2, 3))
            if rows % p_out == inputs % p_in == 0
        ]
        layouts += [TileLayout(shape, p, hadamard=True) for p in (2, 4) if rows % p == inputs % p == 0]
        for layout in layouts:
            for alphas in {1, layout.p_out, layout.p, rows}:
                found += [_layer(layout, alphas, groups, None) for groups in (1, 2, 3) if rows % groups == 0]
                found += [_layer(layout, alphas, 1, k) for k in (1, 2, 3) if inputs % k == 0]
    return found


def _weight(layer: ir.TiledConv, decoded: Decoded) -> np.ndarray:
    """What decoded rows multiply the inputs with: ``[m, groups * n / replicas]``, replicas added up."""
    groups, inputs = layer.groups, decoded.inputs
    neighbours = decoded.pieces // groups
    weight = np.zeros((layer.layout.rows, neighbours, groups * inputs))
    signs = 2.0 * decoded.tables - 1
    row_alphas = layer.layout.row_alphas(torch.from_numpy(np.array(layer.alpha.array))).numpy()
    factor = decoded.factor if decoded.factor is not None else np.broadcast_to(row_alphas, layer.layout.rows)[:, None]

    def add(output: int, piece: int, row: int, times: float) -> None:
        start = piece % groups * inputs
        place = weight[output, piece // groups, start : start + inputs]
        place += times * signs[piece % len(signs), row]

    for output, term in np.ndindex(*decoded.piece.shape):
        add(output, decoded.piece[output, term], decoded.row[output, term], factor[output, term])
    for one in decoded.corrections:
        add(one.output, one.piece, one.row, one.factor)
    return weight.transpose(0, 2, 1).reshape(layer.layout.rows, -1)


def test_decoded_rows_are_the_weight() -> None:
    decoded_layers = 0
    for layer in _layers():
        decoded = decode(layer)
        if decoded is None:
            continue
        decoded_layers += 1
        layout, groups = layer.layout, layer.groups
        bits = np.unpackbits(layer.tile.array, count=layout.tile_size, bitorder="little")
        signs = layout.replicate(torch.from_numpy(2.0 * bits - 1))
        whole = layout.scale(signs, torch.from_numpy(layer.alpha.array.astype(np.float64))).reshape(layout.rows, -1)
        expected = np.zeros((layout.rows, groups, layout.row_size // layer.replicas))
        for row in range(layout.rows):
            scales = layer.input_alpha.array.reshape(-1, 1) if layer.input_alpha else np.ones((1, 1))
            parts = whole[row].numpy().reshape(layer.replicas, -1)
            expected[row, row // (layout.rows // groups)] = (scales * parts).sum(0)
        np.testing.assert_allclose(_weight(layer, decoded), expected.reshape(layout.rows, -1), atol=1e-5)
    assert decoded_layers > 1000


def test_every_small_layer_has_the_cheapest_of_its_kernels() -> None:
    for optimize, target in itertools.product(("speed", "balanced", "size"), ("cortex-m4", "cortex-m3")):
        for layer in _layers()[::29]:
            context = Context(Options(optimize=optimize, target=target))  # type: ignore[arg-type]
            made: Implementation = implement(layer, context)
            assert made.cost > 0
            assert made.choice
            stored = sum(table.array.nbytes for call in made.calls for table in _tables(call.arguments))
            if optimize == "size":
                assert stored <= 9 / 8 * layer.tile.array.nbytes + 8


def _tables(arguments: tuple[Any, ...]) -> list[ir.Constant]:
    operands = [getattr(argument, "operand", argument) for argument in arguments]
    return [operand for operand in operands if isinstance(operand, ir.Constant)]


@pytest.mark.parametrize(("groups", "tables", "rows"), [(1, 1, 4), (2, 1, 4), (4, 1, 4), (8, 2, 2), (16, 4, 1)])
def test_groups_share_a_table_where_their_rows_are_equal(groups: int, tables: int, rows: int) -> None:
    """16 filters, p = 4: four rows differ, which groups of four filters all have."""
    decoded = decode(_layer(TileLayout((16, 6, 3, 3), 4), 4, groups, None))
    assert decoded is not None
    assert decoded.tables.shape == (tables, rows, 54)
    assert decoded.pieces == groups


def test_the_plan_says_what_a_layout_costs_and_which_width_is_faster(tmp_path: Path) -> None:
    module = tbn.transform(nn.Linear(256, 62), tbn.TilingConfig(p=4, alpha="tile", min_size=0))
    (step,) = export_c(module, torch.zeros(1, 256), tmp_path / "net.c", optimize="speed").steps
    stored = "32 different rows and the factors of their products are stored, 1,412 bytes in place of 496"
    assert step.choice.startswith(f"rows begin inside the tile and scales change inside 2 rows: {stored}; about ")
    assert step.choice.endswith("; slower than 64 outputs, a multiple of p = 4, whose different rows are 16")
