"""Every kernel for tiles of whole rows: against PyTorch in floating point, bit for bit against NumPy in fixed point."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c, tiled_kernels, tiled_rows
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.tiled_instances import INSTANCES
from tbn_compiler.packing import pack_bits
from tbn_compiler.tiling import TileLayout
from tests.backends.c.toolchain import needs_cc, run_strict

# Rows and inputs that are and are not multiples of what a kernel takes at a time, and several passes.
SHAPES = [(8, 32), (32, 20), (7, 30), (40, 36), (24, 5), (64, 12), (33, 68), (1, 1), (28, 3), (12, 7)]
FIXED_TARGET = "cortex-m3"


class Rows(nn.Module):
    """Layers of random signs, all scales 1, on the same input; their results side by side."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = shapes
        for index, (rows, inputs) in enumerate(shapes):
            self.register_buffer(f"tile{index}", pack_bits(torch.randn(rows, inputs)))
        self.register_buffer("alpha", torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for index, (rows, inputs) in enumerate(self.shapes):
            tile = getattr(self, f"tile{index}")
            results.append(torch.ops.tbn.linear(x[..., :inputs], tile, self.alpha, None, inputs, rows, 1, None))
        return torch.cat(results, -1)

    def signs(self, index: int) -> np.ndarray:
        """``int64 [rows, inputs]``."""
        rows, inputs = self.shapes[index]
        bits = np.unpackbits(getattr(self, f"tile{index}").numpy(), count=rows * inputs, bitorder="little")
        return 2 * bits.astype(np.int64).reshape(rows, inputs) - 1


def _all_kernels(target: str) -> list[tuple[tuple[int, int], str]]:
    """Each shape with each kernel that can compute it."""
    options = Options(target=target)  # type: ignore[arg-type]
    return [(shape, candidate.kernel) for shape in SHAPES for candidate in tiled_rows.candidates(*shape, options)]


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Make the layers of the next model take the given kernels, in turn."""

    def force(kernels: list[str]) -> None:
        names = iter(kernels)

        def choose(rows: int, inputs: int, options: Options) -> tuple[tiled_rows.RowsKernel, str]:
            found = {c.kernel: c for c in tiled_rows.candidates(rows, inputs, options)}
            return found[next(names)], "forced"

        monkeypatch.setattr(tiled_kernels, "choose", choose)

    return force


def test_the_shapes_reach_every_kernel() -> None:
    """Those that take column groups are in ``test_mixing``, filters in ``test_filters``."""
    reached = {kernel for target in ("generic", FIXED_TARGET) for _, kernel in _all_kernels(target)}
    others = ("signed_sums", "patch", "filter", "mix", "block", "strided", "groups", "int8", "pair")
    assert reached == {name for name in INSTANCES if not any(other in name for other in others)}


@needs_cc
@pytest.mark.parametrize("skip_zeros", [False, True])
def test_float_kernels(tmp_path: Path, in_turn: Callable[[list[str]], None], skip_zeros: bool) -> None:
    torch.manual_seed(0)
    cases = _all_kernels("generic")
    in_turn([kernel for _, kernel in cases])
    inputs = torch.randn(3, 68) * (torch.rand(3, 68) > 0.3)
    model = Rows([s for s, _ in cases])
    plan = export_c(model, inputs[:1], tmp_path / "net.c", name="net", skip_zeros=skip_zeros)
    assert {kernel for _, kernel in cases} <= set(plan.kernels)
    actual = torch.from_numpy(run_strict(tmp_path / "net.c", inputs, name="net"))
    torch.testing.assert_close(actual, model(inputs), rtol=0, atol=1e-5)


def fixed_reference(x: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """What ``templates/tiled_fixed.c`` promises, in NumPy integers."""
    bits = np.abs(x).view(np.uint32)
    if not np.isfinite(x).all():
        return np.full(len(signs), np.nan, np.float32)
    # The smallest power of two above the largest magnitude; the smallest float is 2 ** -149.
    largest = int(bits.max())
    exponent = (largest >> 23) - 126 if largest >> 23 else largest.bit_length() - 149
    step = max(exponent - tiled_rows.precision(len(x)), -149)
    quotients = np.ldexp(x.astype(np.float64), -step)
    integers = (np.sign(quotients) * np.floor(np.abs(quotients) + 0.5)).astype(np.int64)
    sums = signs @ integers
    assert np.abs(signs).sum(1).max() * np.abs(integers).max() < 2**31
    with np.errstate(over="ignore"):
        return sums.astype(np.float32) * np.ldexp(np.float32(1), step)


def edge_cases(size: int) -> np.ndarray:
    """Vectors whose exponents are awkward."""
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((4, size)).astype(np.float32)
    tiny, largest = np.finfo(np.float32).tiny, np.finfo(np.float32).max
    mixed = normal[0] * np.exp2(rng.integers(-120, 120, size)).astype(np.float32)
    denormal = normal[1] * np.float32(tiny / 8)
    one_denormal = np.zeros(size, np.float32)
    one_denormal[0] = np.finfo(np.float32).smallest_subnormal
    around = np.where(np.arange(size) % 2, np.float32(tiny), -np.nextafter(np.float32(tiny), np.float32(0)))
    ties = (np.arange(size) + 0.5).astype(np.float32)
    infinite, undefined = normal[2].copy(), normal[3].copy()
    infinite[0], undefined[0] = np.inf, np.nan
    powers = np.exp2(rng.integers(-30, 1, size)).astype(np.float32)
    rows = [
        *(normal[0], np.zeros(size), -np.zeros(size), mixed, denormal, one_denormal, around, ties, -ties, powers),
        *(np.full(size, largest), np.full(size, -largest), np.full(size, tiny), infinite, undefined),
    ]
    return np.stack(rows).astype(np.float32)


@needs_cc
@pytest.mark.parametrize("skip_zeros", [False, True])
def test_fixed_kernels_bit_for_bit(tmp_path: Path, in_turn: Callable[[list[str]], None], skip_zeros: bool) -> None:
    torch.manual_seed(0)
    cases = _all_kernels(FIXED_TARGET)
    in_turn([kernel for _, kernel in cases])
    model, inputs = Rows([s for s, _ in cases]), edge_cases(68)
    plan = export_c(
        model, torch.zeros(1, 68), tmp_path / "net.c", name="net", target=FIXED_TARGET, skip_zeros=skip_zeros
    )
    assert {kernel for _, kernel in cases} <= set(plan.kernels)
    actual = run_strict(tmp_path / "net.c", torch.from_numpy(inputs), name="net")
    for x, y in zip(inputs, actual, strict=True):
        expected = [fixed_reference(x[: shape[1]], model.signs(index)) for index, (shape, _) in enumerate(cases)]
        np.testing.assert_array_equal(y, np.concatenate(expected))


def test_fixed_error_is_within_the_stated_bound() -> None:
    """n inputs are off by at most max|x| * 2 ** -precision each; the sum is exact, and rounded once."""
    rng = np.random.default_rng(1)
    for inputs in (1, 3, 64, 784, 5000):
        signs = 2 * rng.integers(0, 2, (8, inputs)) - 1
        for scale in (1e-42, 1e-20, 1.0, 1e30):
            x = (rng.standard_normal(inputs) * scale).astype(np.float32)
            exact = signs @ x.astype(np.float64)
            bound = inputs * float(np.abs(x).max()) * 2.0 ** -tiled_rows.precision(inputs)
            rounding = np.abs(exact) * 2.0**-23 + np.finfo(np.float32).smallest_subnormal
            assert (np.abs(fixed_reference(x, signs) - exact) <= bound + rounding).all()


@pytest.mark.parametrize("inputs", [1, 2, 127, 128, 129, 784, 1023, 1024, 1025, 2**20, 2**24])
def test_fixed_precision_is_the_most_that_cannot_overflow(inputs: int) -> None:
    bits = tiled_rows.precision(inputs)
    assert inputs * 2**bits < 2**31
    assert bits == 24 or inputs * 2 ** (bits + 1) >= 2**31


@pytest.mark.parametrize(
    ("optimize", "target", "kernel"),
    [
        ("speed", "cortex-m4", "tiled_bucket8x4"),
        ("balanced", "cortex-m4", "tiled_bucket8x1"),
        ("size", "cortex-m4", "tiled_table"),
        ("speed", "cortex-m0plus", "tiled_fixed_bucket8x4"),
        ("balanced", "cortex-m3", "tiled_fixed_bucket4x8"),
    ],
)
def test_the_choice_depends_on_the_options(optimize: str, target: str, kernel: str) -> None:
    options = Options(optimize=optimize, target=target)  # type: ignore[arg-type]
    chosen, why = tiled_rows.choose(32, 784, options)
    assert chosen.kernel == kernel
    if optimize == "size":
        assert why == "least code"
    else:
        assert 4 * chosen.memory <= {"speed": 4096, "balanced": 1024}[optimize]
        assert f"about {chosen.instructions:,} instructions" in why
        assert chosen.instructions == min(
            other.instructions for other in tiled_rows.candidates(32, 784, options) if other.memory <= chosen.memory
        )


def test_short_rows_take_lookups_and_small_tiles_little_padding() -> None:
    assert tiled_rows.choose(40, 32, Options(optimize="speed"))[0].kernel == "tiled_lookup"
    for rows in range(1, 70):
        for inputs in (3, 9, 27, 64, 144):
            chosen, _ = tiled_rows.choose(rows, inputs, Options())
            assert chosen.table_bytes <= max(9 / 8 * -(-rows * inputs // 8) + 4, -(-4 * inputs // 8))
            signs = np.random.default_rng(0).random((rows, inputs)) < 0.5
            assert chosen.make_table(signs).nbytes == chosen.table_bytes


def test_a_few_long_rows_have_a_kernel_whatever_it_fills_up() -> None:
    """Three rows of 72 signs are 27 bytes, and 36 in every order that a kernel reads."""
    for optimize, memory in (("balanced", 1024), ("speed", 4096)):
        for target in ("generic", FIXED_TARGET):
            options = Options(optimize=optimize, target=target)  # type: ignore[arg-type]
            shapes = [*itertools.product(range(1, 8), range(1, 400)), *itertools.product(range(8, 40), range(1, 66))]
            for rows, inputs in shapes:
                chosen, _ = tiled_rows.choose(rows, inputs, options)
                found = tiled_rows.candidates(rows, inputs, options)
                smallest = min(candidate.table_bytes for candidate in found if 4 * candidate.memory <= memory)
                assert chosen.table_bytes <= max(smallest, 9 / 8 * -(-rows * inputs // 8) + 4, -(-4 * inputs // 8))


def test_a_layout_that_the_kernels_do_not_know_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = tbn.lower(tbn.transform(nn.Sequential(nn.Linear(8, 8)), tbn.TilingConfig(p=2, min_size=0)))
    monkeypatch.setattr(TileLayout, "kind", "spiral")
    with pytest.raises(tbn.ExportError, match="its tile has the layout 'spiral'"):
        export_c(module, torch.zeros(1, 8), tmp_path / "net.c")


def test_the_plan_says_why_a_layer_has_a_slower_kernel(tmp_path: Path) -> None:
    larger = "different rows would take more flash than the tile, or fall into many pieces of different scales"
    layers = {
        larger: (nn.Conv2d(4, 6, 3), {"p": 4}, "size"),
        "full-precision tile": (nn.Conv2d(4, 8, 3), {"p": 4, "tile_dtype": "float"}, "speed"),
    }
    for why, (layer, options, optimize) in layers.items():
        module = tbn.lower(tbn.transform(layer, tbn.TilingConfig(min_size=0, **options)))  # type: ignore[arg-type]
        plan = export_c(module, torch.zeros(1, 4, 5, 5), tmp_path / "net.c", optimize=optimize)  # type: ignore[arg-type]
        assert [step.choice for step in plan.steps] == [why]


def test_kernels_read_as_if_a_person_wrote_them(tmp_path: Path) -> None:
    """Where a pass has one lane there is no index, loop or array of lanes, which an analyser would find outgrown."""
    for bits, target in itertools.product((4, 8), ("cortex-m4", FIXED_TARGET)):
        module = tbn.transform(nn.Linear(784, bits), tbn.TilingConfig(p=1, min_size=0))
        plan = export_c(module, torch.zeros(1, 784), tmp_path / "net.c", target=target)  # type: ignore[arg-type]
        assert f"bucket{bits}x1" in plan.steps[0].kernel
        text = (tmp_path / "net.c").read_text()
        for odd in ("[-0]", "* 1]", "lane", "buckets)[1]", "bucket += 16" if bits == 4 else "[-0]"):
            assert odd not in text, odd
