"""Layers whose copies have Hadamard signs: every kernel of theirs, and whole layers, against PyTorch and NumPy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c, tiled_mixing, tiled_rows
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.tiled_instances import INSTANCES, PATCH_COLUMNS
from tbn_compiler.packing import pack_bits, packed_size
from tests import oracle
from tests.backends.c.programs import Network, check
from tests.backends.c.test_mcu import export_and_measure
from tests.backends.c.test_numerics import values_bytes
from tests.backends.c.test_tiled_kernels import FIXED_TARGET, edge_cases, fixed_reference
from tests.backends.c.toolchain import assert_matches_torch, needs_arm, needs_cc, run_strict

pytestmark = needs_cc

# Relative errors; block fixed point has 2 ** -precision for each input.
TOLERANCE = {"generic": 1e-5, "cortex-m3": 1e-4, "cortex-m0plus": 1e-4}
# Rows of the tile, inputs of each column group, and groups, that are and are not multiples of what a kernel takes.
SHAPES = [
    *((8, 32, 2), (32, 8, 4), (7, 12, 8), (40, 20, 2), (24, 5, 4), (12, 7, 4), (33, 4, 16), (1, 1, 32), (28, 3, 2)),
    *((64, 2, 4), (5, 36, 2), (3, 24, 4)),
]


class Groups(nn.Module):
    """Layers of random signs, all scales 1, on the same input; their results side by side.

    They are linear, or convolutions of one position, which gather their inputs.
    """

    def __init__(self, shapes: list[tuple[int, int, int]], gathered: bool) -> None:
        super().__init__()
        self.shapes, self.gathered = shapes, gathered
        for index, (rows, inputs, p) in enumerate(shapes):
            self.register_buffer(f"tile{index}", pack_bits(torch.randn(rows * inputs * p)))
        self.register_buffer("alpha", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for index, (rows, inputs, p) in enumerate(self.shapes):
            n, m = inputs * p, rows * p
            stored = (getattr(self, f"tile{index}"), self.alpha, None)
            if self.gathered:
                y = torch.ops.tbn.conv1d(x[..., :n, None], *stored, n, m, 1, p, hadamard=True).flatten(1)
            else:
                y = torch.ops.tbn.linear(x[..., :n], *stored, n, m, p, hadamard=True)
            results.append(y)
        return torch.cat(results, -1)

    def signs(self, index: int) -> np.ndarray:
        """``int64 [p rows, p inputs]``."""
        rows, inputs, p = self.shapes[index]
        bits = np.unpackbits(getattr(self, f"tile{index}").numpy(), count=rows * inputs * p, bitorder="little")
        weight: np.ndarray = oracle.hadamard_fill((rows * p, inputs * p), 2 * bits.astype(np.int64) - 1, np.ones(1))
        return weight.astype(np.int64)


Case = tuple[tuple[int, int, int], str]


def all_kernels(target: str, gathered: bool) -> list[Case]:
    """Each shape with each kernel that can compute it."""
    options = Options(target=target)  # type: ignore[arg-type]
    return [
        ((rows, inputs, p), candidate.kernel)
        for rows, inputs, p in SHAPES
        for candidate in tiled_rows.mixed_candidates(rows, inputs, p, options, strided=not gathered)
    ]


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Make the layers of the next model take the given kernels, in turn."""

    def force(kernels: list[str]) -> None:
        names = iter(kernels)

        def choose(*arguments: Any) -> tuple[tiled_rows.RowsKernel, str]:
            found = {candidate.kernel: candidate for candidate in tiled_rows.mixed_candidates(*arguments)}
            return found[next(names)], "forced"

        monkeypatch.setattr(tiled_mixing, "choose_mixed", choose)

    return force


def test_the_shapes_reach_every_kernel() -> None:
    """Those of one column group, or of no other, are in ``test_tiled_kernels``."""
    pairs = [(target, gathered) for target in ("generic", FIXED_TARGET) for gathered in (False, True)]
    reached = {kernel for target, gathered in pairs for _, kernel in all_kernels(target, gathered)}
    others = ("signed_sums", "patch", "mix", "fixed", "filter", "int8", "pair")
    assert reached == {name for name in INSTANCES if not any(other in name for other in others)}


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("skip_zeros", [False, True])
def test_float_kernels(tmp_path: Path, in_turn: Callable[[list[str]], None], gathered: bool, skip_zeros: bool) -> None:
    torch.manual_seed(0)
    cases = all_kernels("generic", gathered)
    in_turn([kernel for _, kernel in cases])
    inputs = torch.randn(3, 96) * (torch.rand(3, 96) > 0.3)
    model = Groups([shape for shape, _ in cases], gathered)
    plan = export_c(model, inputs[:1], tmp_path / "net.c", name="net", skip_zeros=skip_zeros)
    assert {kernel for _, kernel in cases} <= set(plan.kernels)
    actual = torch.from_numpy(run_strict(tmp_path / "net.c", inputs, name="net"))
    torch.testing.assert_close(actual, model(inputs), rtol=0, atol=2e-5)


@pytest.mark.parametrize("gathered", [False, True])
def test_fixed_kernels_bit_for_bit(tmp_path: Path, in_turn: Callable[[list[str]], None], gathered: bool) -> None:
    """Mixing integers is exact: the same result as from all rows of the weight."""
    torch.manual_seed(0)
    cases = all_kernels(FIXED_TARGET, gathered)
    in_turn([kernel for _, kernel in cases])
    model, inputs = Groups([shape for shape, _ in cases], gathered), edge_cases(96)
    plan = export_c(model, torch.zeros(1, 96), tmp_path / "net.c", name="net", target=FIXED_TARGET)
    assert {kernel for _, kernel in cases} <= set(plan.kernels)
    actual = run_strict(tmp_path / "net.c", torch.from_numpy(inputs), name="net")
    for x, y in zip(inputs, actual, strict=True):
        expected = [fixed_reference(x[: n * p], model.signs(index)) for index, ((_, n, p), _) in enumerate(cases)]
        np.testing.assert_array_equal(y, np.concatenate(expected))


def test_every_shape_has_a_kernel_that_stores_no_more_than_the_tile() -> None:
    for optimize in ("speed", "balanced", "size"):
        for target in ("cortex-m4", FIXED_TARGET):
            options = Options(optimize=optimize, target=target)  # type: ignore[arg-type]
            for rows in (1, 2, 3, 5, 8, 16, 21, 33):
                for inputs in (1, 2, 3, 4, 9, 16, 36):
                    for p in (2, 4, 8, 16, 64):
                        kernel, why = tiled_rows.choose_mixed(rows, inputs, p, options, strided=True)
                        assert why == "least code" if optimize == "size" else f"in {p} column groups" in why
                        calls = p // kernel.groups
                        signs = np.random.default_rng(0).random((rows, inputs * kernel.groups)) < 0.5
                        assert kernel.make_table(signs).nbytes == kernel.table_bytes
                        if optimize != "size" and rows % 4 == 0 and (rows * inputs) % 8 == 0:
                            assert kernel.table_bytes * calls <= 9 / 8 * (rows * inputs * p // 8) + 4


class WithAndWithoutBias(nn.Module):
    """The same layer twice, with and without a bias and a ReLU, so that one program tests both."""

    def __init__(self, make: Callable[[bool], nn.Module]) -> None:
        super().__init__()
        self.first, self.second = make(True), make(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x).relu()


LAYERS: dict[str, tuple[Callable[[bool], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda bias: nn.Linear(48, 32, bias), (48,)),
    "linear, tokens": (lambda bias: nn.Linear(16, 48, bias), (5, 16)),
    "3 x 3": (lambda bias: nn.Conv2d(16, 32, 3, padding=1, bias=bias), (16, 5, 4)),
    "1 x 1": (lambda bias: nn.Conv2d(32, 16, 1, bias=bias), (32, 4, 3)),
    "stride": (lambda bias: nn.Conv2d(16, 16, (3, 2), stride=(2, 1), padding=(1, 2), bias=bias), (16, 6, 5)),
    "dilation": (lambda bias: nn.Conv2d(16, 16, 3, dilation=2, padding=1, bias=bias), (16, 7, 6)),
    "1-D": (lambda bias: nn.Conv1d(16, 32, 3, padding=2, stride=2, bias=bias), (16, 11)),
    "groups": (lambda bias: nn.Conv2d(32, 32, 3, groups=2, padding=1, bias=bias), (32, 4, 4)),
    "transpose": (lambda bias: nn.ConvTranspose2d(16, 16, 2, stride=2, bias=bias), (16, 3, 4)),
}


SCALES: list[dict[str, Any]] = [{"alpha": "layer"}, {"alpha": "tile"}, {"alpha": "tile", "tile_dtype": "float"}]


@pytest.mark.parametrize("target", ["generic", "cortex-m0plus"])
def test_layers(tmp_path: Path, target: str) -> None:
    """Every layer with every number of copies; scales, kinds of tiles and what is optimised for take turns."""
    torch.manual_seed(0)
    found = []
    turns = zip(itertools.product(LAYERS.values(), (2, 4, 8, 16)), itertools.cycle(SCALES), strict=False)
    for ((make, shape), p), scales in turns:
        config = tbn.TilingConfig(p=p, min_size=0, replicate="hadamard", **scales)
        module = tbn.transform(WithAndWithoutBias(make), config)
        options = {"target": target, "optimize": ("speed", "size", "balanced", "speed", "size")[len(found) % 5]}
        found.append(Network(module, [(torch.randn(2, *shape),)], options, TOLERANCE[target]))
    check(found, tmp_path)


def test_windows_of_every_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    widths = [*PATCH_COLUMNS, max(PATCH_COLUMNS) + 1]
    config = tbn.TilingConfig(p=2, min_size=0, replicate="hadamard")
    found = []
    for width in widths:
        module = tbn.transform(nn.Sequential(nn.Conv1d(6, 4, width, padding=2)), config)
        found.append(Network(module, [(torch.randn(1, 6, 9),)]))
    check(found, tmp_path)
    kernels = {kernel for network in found for kernel in (network.plan.kernels if network.plan else ())}
    assert {name for name in INSTANCES if "patch" in name and "groups" in name} <= kernels


class Stored(nn.Module):
    """Layers that a pass makes: an input that stands for scaled copies, and an alpha for each row."""

    def __init__(self, shape: tuple[int, ...], p: int, replicas: int, packed: bool) -> None:
        super().__init__()
        self.shape, self.p, self.replicas = shape, p, replicas
        tile = torch.randn(math.prod(shape) // p)
        self.register_buffer("tile", pack_bits(tile) if packed else tile)
        self.register_buffer("alpha", torch.rand(shape[0]) + 0.5)
        self.register_buffer("bias", torch.randn(shape[0]))
        self.register_buffer("input_alpha", torch.rand(replicas) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        m, n, *kernel = self.shape
        stored = (self.tile, self.alpha, self.bias, n, m)
        if kernel:
            return torch.ops.tbn.conv2d(x, *stored, kernel, self.p, self.input_alpha, hadamard=True)
        return torch.ops.tbn.linear(x, *stored, self.p, self.input_alpha, hadamard=True)


@pytest.mark.parametrize("target", ["generic", "cortex-m3"])
def test_inputs_that_stand_for_copies(tmp_path: Path, target: str) -> None:
    torch.manual_seed(0)
    found, whys = [], []
    for packed in (True, False):
        for shape, p, replicas, size in (
            *(((8, 24), 4, 3, (8,)), ((8, 24), 4, 4, (6,)), ((16, 16), 8, 1, (16,)), ((6, 12, 3, 2), 2, 3, (4, 5, 4))),
            ((6, 12, 3, 2), 2, 4, (3, 5, 4)),
        ):
            samples = [(torch.randn(2, *size),)]
            module = Stored(shape, p, replicas, packed)
            found.append(Network(module, samples, {"target": target}, TOLERANCE[target]))
            whole = shape[1] // replicas % p == 0
            apart = f"full-precision tile in {p} column groups" if not packed else f"in {p} column groups"
            inside = "column groups are not mixed" if packed else "full-precision tile"
            whys.append(apart if whole else inside)
    check(found, tmp_path)
    for network, why in zip(found, whys, strict=True):
        assert network.plan is not None
        assert why in network.plan.steps[0].choice


def test_the_plan_says_what_is_not_mixed_and_why(tmp_path: Path) -> None:
    config = tbn.TilingConfig(p=4, min_size=0, replicate="hadamard")
    module = tbn.transform(nn.Conv2d(16, 16, 3, groups=2), config)
    (step,) = export_c(module, torch.zeros(1, 16, 5, 5), tmp_path / "net.c").steps
    assert step.choice.startswith("2 groups with 2 tables of rows; column groups are not mixed: 16 different rows are")


def test_a_layer_stores_its_bits_and_no_copy_of_its_input(tmp_path: Path) -> None:
    """The outputs hold the products on the way; a vector of inputs is read where it is."""
    config = tbn.TilingConfig(p=4, min_size=0, alpha="tile", replicate="hadamard")
    module = tbn.transform(nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 32)), config)
    plan = assert_matches_torch(module, torch.randn(3, 96), tmp_path)
    scales = 4 * (4 + 64 + 4 + 32)
    assert plan.weight_bytes == packed_size(96 * 64 // 4) + packed_size(64 * 32 // 4) + scales
    assert values_bytes(plan) == [4 * 64]
    assert all("memory" in space for step in plan.steps for space in step.workspace)


def test_networks_of_plain_and_hadamard_layers(tmp_path: Path) -> None:
    """Copies that a plain layer passes on reach a layer with signs; batch-norm folds into one scale a row."""
    torch.manual_seed(0)
    found = []
    for target in ("generic", "cortex-m3"):
        for optimize in ("speed", "balanced", "size"):
            net = nn.Sequential(
                *(nn.Conv2d(4, 16, 3, padding=1, bias=False), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False)),
                *(nn.BatchNorm2d(16), nn.GELU(), nn.Conv2d(16, 16, 1), nn.ReLU(), nn.Flatten()),
                *(nn.Linear(64, 16, bias=False), nn.ReLU(), nn.Linear(16, 12)),
            )
            signs: dict[str, Any] = {"replicate": "hadamard", "alpha": "tile"}
            config = tbn.TilingConfig(p=2, min_size=0, overrides={"2": signs, "8": {"p": 4}, "10": signs})
            module = tbn.transform(net.eval(), config)
            options = {"target": target, "optimize": optimize}
            found.append(Network(module, [(torch.randn(1, 4, 4, 4),)], options, TOLERANCE[target]))
    check(found, tmp_path)
    for network in found:
        assert network.plan is not None
        assert "tiled_expand" in network.plan.kernels
        assert sum("mix" in step.kernel for step in network.plan.steps) == 2


COUNTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "3 x 3": (lambda: nn.Conv2d(64, 64, 3, padding=1), (64, 8, 8)),
    "1 x 1": (lambda: nn.Conv2d(64, 64, 1), (64, 25, 5)),
    "linear": (lambda: nn.Linear(784, 128), (784,)),
}


@needs_arm
@pytest.mark.parametrize(
    ("layer", "optimize", "most"),
    [
        *(("3 x 3", "speed", 1.5), ("3 x 3", "balanced", 1.5), ("3 x 3", "size", 1.1)),
        *(("1 x 1", "speed", 1.2), ("1 x 1", "size", 1.2), ("linear", "speed", 1.6), ("linear", "balanced", 1.5)),
    ],
)
def test_signs_take_little_more_than_plain_copies(tmp_path: Path, layer: str, optimize: str, most: float) -> None:
    make, size = COUNTED[layer]
    torch.manual_seed(0)
    net, inputs = nn.Sequential(make(), nn.ReLU()), torch.randn(1, *size)
    counts, flash = [], []
    for replicate in ("repeat", "hadamard"):
        config = tbn.TilingConfig(p=4, min_size=0, alpha="tile", replicate=replicate)  # type: ignore[arg-type]
        result = export_and_measure(tmp_path, tbn.transform(net, config), inputs, "cortex-m4", optimize=optimize)
        counts.append(result.instructions[0])
        flash.append(result.flash_bytes)
    assert counts[1] <= most * counts[0]
    assert flash[1] <= flash[0] + 400


@needs_arm
@pytest.mark.parametrize("cpu", ["cortex-m4", "cortex-m3", "cortex-m0plus"])
@pytest.mark.parametrize("optimize", ["speed", "size"])
def test_estimates_are_near_the_counts(tmp_path: Path, cpu: str, optimize: str) -> None:
    torch.manual_seed(0)
    config = tbn.TilingConfig(p=4, min_size=0, alpha="tile", replicate="hadamard")
    module, inputs = tbn.transform(nn.Sequential(nn.Conv2d(16, 32, 3, padding=1)), config), torch.randn(1, 16, 8, 8)
    result = export_and_measure(tmp_path, module, inputs, cpu, optimize=optimize)
    options: dict[str, Any] = {"target": cpu, "optimize": optimize}
    plan = export_c(module, inputs, tmp_path / "net.c", **options)
    assert plan.cost == pytest.approx(result.instructions[0], rel=0.25)
