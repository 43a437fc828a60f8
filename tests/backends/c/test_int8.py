"""Networks on int8: against PyTorch, and bit for bit against the same arithmetic in NumPy."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler import ExportError
from tbn_compiler.backends.c import Plan, export_c, ir, tiled_int8
from tbn_compiler.backends.c.frontend.importer import import_graph
from tbn_compiler.backends.c.fuse import simplify
from tbn_compiler.backends.c.mcu import CPUS, measure
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.package import single_file, write_files
from tbn_compiler.backends.c.planner import build_plan
from tbn_compiler.backends.c.tiled_instances import INSTANCES
from tbn_compiler.backends.c.tiled_rows import integer_candidates
from tests.backends.c import int8_oracle, programs
from tests.backends.c.toolchain import needs_arm, needs_cc


class Residual(nn.Module):
    """Two branches and their sum, functions and a mean."""

    def __init__(self, channels: int, function: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.last = nn.Linear(channels, 8)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        x = self.function(self.first(x))
        x = torch.relu(x + self.second(x))
        return self.last(x.mean((2, 3)))


class Gated(nn.Module):
    """Channels that are weighted by what a small network makes of their means, and a product of two branches."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.squeeze, self.excite = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.last = nn.Linear(channels, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        gate = torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))
        y = y * torch.nn.functional.hardsigmoid(self.excite(gate))
        y = torch.relu(y * self.second(x))
        return self.last(y.mean((2, 3)))


class Joined(nn.Module):
    """Branches side by side, moved and padded."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 8, 3, padding=1)
        self.last = nn.Conv2d(16, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), torch.nn.functional.max_pool2d(self.right(x), 3, 1, 1)], 1)
        x = torch.nn.functional.pad(x, (1, 0, 1, 0)).transpose(2, 3)
        return self.last(x)


@dataclass
class Case:
    """A network, the shape of a sample, and the options of its tiling and export.

    ``intermediates`` says whether what passes between layers is int8 too.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tiling: dict[str, Any]
    intermediates: bool = False
    target: str = "generic"
    batch: int = 1


def _chain(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*layers)


def _two(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Twice the same kind of layer, so that the first one writes integers."""
    return lambda: nn.Sequential(make(), nn.ReLU(), make())


HADAMARD = {"p": 4, "replicate": "hadamard"}
CASES: dict[str, Case] = {
    "linear": Case(_chain(nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 16), nn.Linear(16, 10)), (40,), {"p": 4}),
    "tokens": Case(_two(lambda: nn.Linear(24, 24)), (5, 24), {"p": 4, "alpha": "tile"}, batch=2),
    "long rows": Case(_two(lambda: nn.Linear(700, 700)), (2, 700), {"p": 100}),
    "conv": Case(_two(lambda: nn.Conv2d(8, 8, 3, padding=1)), (8, 6, 7), {"p": 4}, batch=2),
    "strided": Case(_chain(nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU6(), nn.Conv2d(8, 8, 5, 2, 2)), (4, 9, 11), {"p": 2}),
    "dilated": Case(_chain(nn.Conv2d(4, 8, 3, dilation=2), nn.Conv2d(8, 8, (1, 4), (1, 3))), (4, 9, 14), {"p": 2}),
    "windows of seven": Case(
        _chain(nn.Conv2d(4, 4, 7, padding=3), nn.Conv2d(4, 4, 7, 2, padding=3)), (4, 8, 17), {"p": 2}
    ),
    **{
        f"windows of {columns} columns": Case(
            _chain(
                nn.Conv2d(2, 2, (1, columns), (1, 1), (0, columns // 2)),
                nn.Conv2d(2, 2, (1, columns), (1, 2), (0, (columns - 1) // 2)),
            ),
            (2, 2, 13),
            {"p": 1},
        )
        for columns in (1, 2, 4, 5, 6)
    },
    "wide windows": Case(_two(lambda: nn.Conv2d(2, 2, 9, padding=4)), (2, 10, 10), {"p": 1}),
    "pixels": Case(_two(lambda: nn.Conv2d(16, 16, 1)), (16, 3, 5), {"p": 4, "alpha": "tile"}, batch=2),
    "one dimension": Case(_chain(nn.Conv1d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv1d(8, 8, 5, 2)), (4, 17), {"p": 4}),
    "groups": Case(_two(lambda: nn.Conv2d(16, 16, 3, padding=1, groups=4)), (16, 5, 6), {"p": 2, "alpha": "tile"}),
    "depthwise": Case(_two(lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8)), (8, 5, 5), {"p": 2}, batch=2),
    "depthwise, strided": Case(
        _chain(nn.Conv2d(4, 8, 3, 2, 1, groups=4), nn.ReLU6(), nn.Conv2d(8, 8, (5, 2), groups=8)), (4, 12, 11), {"p": 2}
    ),
    "misaligned": Case(_two(lambda: nn.Conv2d(6, 6, 3)), (6, 7, 7), {"p": 4, "alpha": "layer"}),
    "rolled": Case(_two(lambda: nn.Conv2d(8, 8, 3)), (8, 7, 7), {"p": 4, "replicate": "roll", "shift": 5}),
    "two axes": Case(_two(lambda: nn.Linear(16, 16)), (16,), {"p": (2, 2)}),
    "two axes, scales inside rows": Case(_two(lambda: nn.Linear(16, 16)), (16,), {"p": (2, 2), "alpha": "tile"}),
    "signs": Case(_two(lambda: nn.Conv2d(8, 8, 3, padding=1)), (8, 6, 6), HADAMARD),
    "signs, linear": Case(_two(lambda: nn.Linear(16, 16)), (3, 16), HADAMARD | {"alpha": "tile"}),
    "depthwise, any window": Case(_two(lambda: nn.Conv2d(4, 4, (3, 2), groups=4)), (4, 8, 8), {"p": 2}),
    "depthwise, bounded": Case(
        _chain(
            *(nn.Conv2d(4, 4, 3, 2, 1, groups=4), nn.Hardtanh(-1, 1), nn.Conv2d(4, 4, 5, 1, 2, groups=4)),
            *(nn.Hardtanh(-1, 1), nn.Conv2d(4, 4, 3, 2, 1, groups=4)),
        ),
        (4, 12, 12),
        {"p": 2},
    ),
    "without bias": Case(_chain(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 8, 3, bias=False)), (4, 6, 6), {"p": 2}),
    "scales inside rows": Case(_two(lambda: nn.Linear(12, 12)), (12,), {"p": 9, "alpha": "tile"}),
    "one padded pixel": Case(_two(lambda: nn.Conv2d(4, 4, 3, padding=1)), (4, 1, 1), {"p": 2}),
    "one strided position": Case(_chain(nn.Conv2d(4, 8, 3, 4), nn.Conv2d(8, 8, 1)), (4, 5, 5), {"p": 2}),
    "groups of one position": Case(
        _chain(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 1, groups=2)), (4, 3, 3), {"p": 2}
    ),
    **{
        f"groups that end inside the {alpha}": Case(
            _two(lambda: nn.Conv2d(12, 12, 3, padding=1, groups=2)), (12, 4, 5), {"p": 3, "alpha": alpha}
        )
        for alpha in ("layer", "tile")
    },
    "residual": Case(lambda: Residual(8), (8, 6, 6), {"p": 2}, intermediates=True, batch=2),
    "functions": Case(lambda: Residual(8, nn.Hardswish()), (8, 5, 6), {"p": 2}, intermediates=True),
    "more functions": Case(lambda: Residual(8, nn.GELU("tanh")), (8, 5, 6), {"p": 2}, intermediates=True),
    "gated": Case(lambda: Gated(8), (8, 5, 6), {"p": 2}, intermediates=True, batch=2),
    "joined": Case(Joined, (4, 7, 8), {"p": 2}, intermediates=True, batch=2),
    "pools": Case(
        _chain(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(72, 8)),
        (4, 7, 7),
        {"p": 2},
    ),
    "pools with padding": Case(
        _chain(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 8, 3)), (4, 9, 9), {"p": 2}
    ),
    "average": Case(
        _chain(nn.Conv2d(4, 8, 1), nn.Sigmoid(), nn.AvgPool2d((4, 6)), nn.Flatten(), nn.Linear(8, 8)),
        (4, 4, 6),
        {"p": 2},
        intermediates=True,
    ),
    "mean at the end": Case(
        _chain(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)), (4, 4, 6), {"p": 2}, intermediates=True
    ),
    "transposed": Case(
        _chain(nn.Conv2d(4, 8, 1), nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(4, 4, 3)), (4, 5, 5), {"p": 2}
    ),
    "smallest core": Case(lambda: Residual(8), (8, 6, 6), {"p": 2}, intermediates=True, target="cortex-m0plus"),
}


@functools.cache
def imported(name: str) -> tuple[nn.Module, list[tuple[Tensor, ...]], ir.Graph]:
    """One of the cases, inputs and its graph; tests share it."""
    module, samples = prepare(CASES[name])
    return module, samples, import_graph(module, samples[0])


def prepare(case: Case, seed: int = 0) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    """An optimised network with random scales and biases, and inputs with values beyond the calibrated range."""
    torch.manual_seed(seed)
    config = tbn.TilingConfig(min_size=0, **case.tiling)
    packed = tbn.lower(tbn.transform(case.make().eval(), config))
    for name, tensor in packed.state_dict().items():
        if name.endswith("alpha"):
            tensor.mul_(torch.rand_like(tensor) + 0.5)
    batch = torch.randn(16, *case.shape)
    between: Any = "int8" if case.intermediates else "float"
    optimized = tbn.optimize(packed, batch[:1], activation="int8", calibration=[batch], intermediates=between)
    samples = [(1.2 * torch.randn(case.batch, *case.shape),) for _ in range(3)]
    return optimized, samples


@needs_cc
def test_programs_equal_the_oracle_bit_for_bit(tmp_path: Path) -> None:
    """The graph that is planned, in NumPy: floats may differ by their last digit, and integers not at all."""
    networks, graphs = [], []
    for index, (name, case) in enumerate(CASES.items()):
        module, samples, graph = imported(name)
        plan = build_plan(graph, Options(f"net{index}", optimize="speed", target=case.target))  # type: ignore[arg-type]
        write_files(single_file(plan, tmp_path / f"net{index}.c", None))
        graphs.append(graph)
        networks.append(programs.Network(module, samples, plan=plan))
    found = programs._run(networks, tmp_path)
    in_float = set()
    for name, network, graph, results in zip(CASES, networks, graphs, found, strict=True):
        if any(isinstance(x, ir.Tiled) and x.input_scale is None for x in simplify(graph)[0]):
            in_float.add(name)  # compared with PyTorch
            continue
        _assert_equal_to_the_oracle(name, network, graph, results)
    assert in_float == {"scales inside rows", "transposed", "two axes, scales inside rows"}
    _compare_with_torch(networks, found)


@needs_cc
def test_depthwise_convolutions_of_any_size(tmp_path: Path) -> None:
    """Four positions at a time: lines of all lengths, images that end before or behind the windows, several filters."""
    networks, graphs, names = [], [], []
    for size, stride, padding, filters in itertools.product((3, 4, 5, 6, 9), (1, 2), (0, 1, 2), (1, 2)):
        if (size + 2 * padding - 3) // stride < 2:
            continue  # fewer than three positions
        width = size + 4
        first = nn.Conv2d(2, 2 * filters, 3, stride, padding, groups=2, bias=padding == 1)
        layers = (first, nn.ReLU() if padding else nn.Hardtanh(-1, 1), nn.Conv2d(2 * filters, 8, 1))
        case = Case(_chain(*(layers if size % 2 else layers[:1])), (2, width, size), {"p": 2}, batch=1 + filters)
        module, samples = prepare(case)
        graph = import_graph(module, samples[0])
        plan = build_plan(graph, Options(f"net{len(networks)}", optimize="speed"))
        names.append((size, stride, padding, filters))
        assert any("by4" in kernel for kernel in plan.kernels), names[-1]
        write_files(single_file(plan, tmp_path / f"net{len(networks)}.c", None))
        networks.append(programs.Network(module, samples, plan=plan))
        graphs.append(graph)
    for name, network, graph, results in zip(names, networks, graphs, programs._run(networks, tmp_path), strict=True):
        _assert_equal_to_the_oracle(name, network, graph, results)


def _assert_equal_to_the_oracle(name: object, network: programs.Network, graph: ir.Graph, found: Any) -> None:
    operations, outputs = simplify(graph)
    for sample, result in zip(network.samples, found, strict=True):
        values = int8_oracle.run(operations, dict(zip(graph.inputs, sample, strict=True)))
        for value, actual in zip(outputs, result, strict=True):
            expected = values[value].flatten().float()
            error = (torch.from_numpy(actual) - expected).abs().max()
            assert error <= 1e-6 * expected.abs().max(), (name, error)


def _compare_with_torch(networks: Sequence[programs.Network], found: Sequence[Any]) -> None:
    """PyTorch rounds products and sums in float32: a number near the middle of two integers may become either.

    Such a step is passed on. So most elements are equal, and none is far off.
    """
    for name, network, results in zip(CASES, networks, found, strict=True):
        for sample, (actual,) in zip(network.samples, results, strict=True):
            with torch.no_grad():
                expected = network.module(*sample).flatten()
            error = (torch.from_numpy(actual) - expected).abs() / expected.abs().max()
            assert error.max() <= 0.03, (name, error.max())
            assert (error <= 1e-5).float().mean() >= 0.95, (name, error.sort().values)


def test_whole_networks_stay_integers(tmp_path: Path) -> None:
    plan = _export(CASES["residual"], tmp_path)
    kernels = [step.kernel for step in plan.steps]
    assert sum("quantize" in kernel.split(", ") for kernel in kernels) == 1  # the input
    assert not any("dequantize" in kernel for kernel in kernels)
    assert {buffer.dtype for buffer in plan.buffers} == {"int8", "uint8", "int32"}
    assert kernels[-1].endswith("finish_float")
    assert any("int8_sum" in kernel for kernel in kernels)
    assert any("int8_mean_int8" in kernel for kernel in kernels)


def test_products_and_what_weights_channels_stay_integers(tmp_path: Path) -> None:
    """Of an image and a number for each channel, and of two images; not of what else is broadcast."""
    plan = _export(CASES["gated"], tmp_path)
    assert plan.kernels.count("int8_product") == 1
    assert sum("int8_product" in step.kernel for step in plan.steps) == 2
    assert not {"dequantize", "multiply", "broadcast_multiply"} & set(plan.kernels)

    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return self.last(y * y.mean(2, keepdim=True))

    plan = _export(Case(Columns, (4, 5, 6), {"p": 2}, intermediates=True), tmp_path)
    assert "broadcast_multiply" in plan.kernels


def test_pools_behind_a_relu_take_integers(tmp_path: Path) -> None:
    assert "max_pool_int8" in _export(CASES["pools with padding"], tmp_path).kernels


def test_functions_become_tables(tmp_path: Path) -> None:
    plan = _export(CASES["functions"], tmp_path)
    assert [step.title for step in plan.steps if "by table" in step.title]
    assert not any("hardswish" in step.kernel for step in plan.steps)


def test_activations_take_a_quarter_of_the_memory(tmp_path: Path) -> None:
    case = Case(_two(lambda: nn.Conv2d(8, 8, 3, padding=1)), (8, 32, 32), {"p": 4}, intermediates=True)
    module, samples = prepare(case)
    floats = export_c(
        tbn.lower(tbn.transform(case.make(), tbn.TilingConfig(p=4, min_size=0))), samples[0], tmp_path / "f.c"
    )
    integers = export_c(module, samples[0], tmp_path / "i.c")
    between = [buffer for buffer in integers.buffers if buffer.nbytes > 4096]
    assert all(buffer.nbytes == 8 * 32 * 32 for buffer in between)
    assert integers.scratch_bytes < floats.scratch_bytes


def _export(case: Case, folder: Path) -> Plan:
    module, samples = prepare(case)
    return export_c(module, samples[0], folder / "net.c", target=case.target)  # type: ignore[arg-type]


def test_layers_without_integer_kernels_take_the_same_numbers_as_floats(tmp_path: Path) -> None:
    """They are in the comparison with PyTorch above."""
    plan = _export(CASES["scales inside rows"], tmp_path)
    assert [step.kernel for step in plan.steps].count("dequantize") == 2
    assert _export(CASES["transposed"], tmp_path).kernels.count("dequantize") == 0  # its input was never quantised


def test_a_scale_for_each_token_is_refused(tmp_path: Path) -> None:
    packed = tbn.lower(tbn.transform(nn.Sequential(nn.Linear(8, 8)), tbn.TilingConfig(min_size=0)))
    tokens = tbn.optimize(packed, torch.randn(1, 8), activation="int8")
    with pytest.raises(ExportError, match=r"each token has a scale of its own.*calibration=batches"):
        export_c(tokens, torch.randn(1, 8), tmp_path / "net.c")
    signs = tbn.optimize(packed, torch.randn(1, 8), activation="binary", calibration=[torch.randn(4, 8)])
    with pytest.raises(ExportError, match="inputs are floats or int8 in C"):
        export_c(signs, torch.randn(1, 8), tmp_path / "net.c")


def test_other_fake_quantisations_are_refused(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fake_quantize_per_tensor_affine(x, 0.1, 3, -128, 127)

    with pytest.raises(ExportError, match=r"zero point and limits are \(3, -128, 127\)"):
        export_c(Shifted(), torch.randn(1, 8), tmp_path / "net.c")


@needs_cc
def test_numbers_that_are_not_finite_end_at_the_range(tmp_path: Path) -> None:
    """NaN becomes 0; halves go to the even number."""

    class Rounded(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fake_quantize_per_tensor_affine(x, 0.5, 0, -127, 127)

    values = torch.tensor([[math.nan, math.inf, -math.inf, 3e38, -3e38, 0.25, 0.75, -0.25, 63.4, -63.9, 1e-30]])
    network = programs.Network(Rounded(), [(values,)])
    network.plan = export_c(network.module, (values,), tmp_path / "net0.c", name="net0")
    ((actual,),) = programs._run([network], tmp_path)[0]
    assert actual.tolist() == [0, 63.5, -63.5, 63.5, -63.5, 0, 1, 0, 63.5, -63.5, 0]


@needs_cc
def test_padding_within_limits_and_windows_in_the_padding(tmp_path: Path) -> None:
    """Zeros around an image are limited as it is; the largest of no elements is minus infinity, as in PyTorch."""

    def rounded(x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.125, 0, -127, 127)

    class Padded(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            padded = [torch.nn.functional.pad(x * factor, (1, 1)) for factor in (2, 3, 4)]
            return rounded(padded[0].clamp(max=-0.5)), rounded(padded[1].clamp(min=0.5)), rounded(padded[2].relu())

    class Apart(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.max_pool2d(rounded(x), (1, 2), 1, (0, 1), dilation=3)

    networks = [
        programs.Network(Padded(), [(torch.randn(1, 3, 4),)]),
        programs.Network(Apart(), [(torch.randn(1, 1, 2, 2),)], nan=True),
    ]
    programs.check(networks, tmp_path)


@pytest.mark.parametrize("seed", range(4))
def test_fixed_point_rounds_to_the_nearest(seed: int) -> None:
    """Against fractions: never further from the exact number than a half and a little."""
    generator = np.random.default_rng(seed)
    for _ in range(200):
        inputs = int(generator.integers(1, 5000))
        largest = 127 * inputs
        ratios = np.exp(generator.normal(-np.log(inputs), 3, size=int(generator.integers(1, 4))))
        ratios *= generator.choice([-1, 1], size=ratios.shape)
        addends = generator.normal(scale=40, size=ratios.shape)
        factor, multipliers, offsets, shift = tiled_int8.fixed_point(ratios, addends, largest)
        assert largest * factor < 2**31
        assert 1 <= shift <= 22
        for ratio, addend, multiplier, offset in zip(ratios, addends, multipliers, offsets, strict=True):
            for total in (0, 1, -1, largest, -largest, *map(int, generator.integers(-largest, largest + 1, 5))):
                product = (total * factor * int(multiplier)) >> 32
                assert -(2**31) <= product + int(offset) < 2**31
                result = min(max((product + int(offset)) >> shift, -127), 127)
                exact = Fraction(float(ratio)) * total + Fraction(float(addend))
                # The largest ratio has 30 bits; a smaller one has fewer, and with it the same absolute error.
                slack = Fraction(1, 2) + Fraction(2, 2**shift) + Fraction(largest * factor, 2**33 * 2**shift)
                assert abs(result - min(max(exact, -127), 127)) <= slack, (ratio, addend, total)


def test_every_kernel_for_integers_is_reached() -> None:
    """Those for rows have a test of their own."""
    used: set[str] = set()
    for name, target in itertools.product(CASES, ("generic", "cortex-m0plus")):
        used.update(build_plan(imported(name)[2], Options(optimize="speed", target=target)).kernels)  # type: ignore[arg-type]
    wanted = {name for name in INSTANCES if name.startswith(("tiled_int8", "tiled_pair"))}
    rows = {
        kernel.kernel
        for arithmetic, shape, optimize in itertools.product(("int8", "pair"), _SHAPES, ("speed", "size"))
        for kernel in integer_candidates(*shape, arithmetic, Options(optimize=optimize))  # type: ignore[arg-type]
    }
    assert wanted - rows - used == set()


_SHAPES = [(8 * n, 32) for n in range(1, 5)] + [(4 * n, 32) for n in range(1, 9)] + [(3, 5)]


class Rows(nn.Module):
    """Layers of random signs on the same input; their results side by side."""

    def __init__(self, shapes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.inputs = [inputs for _, inputs in shapes]
        self.layers = nn.ModuleList(nn.Linear(inputs, rows, bias=False) for rows, inputs in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x[..., :n]) for layer, n in zip(self.layers, self.inputs, strict=True)], -1)


@needs_cc
def test_kernels_for_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel on shapes that it takes, with the largest sums that fit, exactly."""
    networks = []
    for index, arithmetic in enumerate(("int8", "pair")):
        kernels = [
            (shape, kernel)
            for shape in [(32, 64), (24, 36), (20, 8), (28, 8), (7, 5), (33, 256)]
            for optimize in ("speed", "size")
            for kernel in integer_candidates(*shape, arithmetic, Options(optimize=optimize))  # type: ignore[arg-type]
        ]
        turns = iter(kernels)
        monkeypatch.setattr(tiled_int8, "_choose", lambda *_, turns=turns: ([next(turns)[1]], "forced"))
        layers = Rows([shape for shape, _ in kernels])
        shape = (256,) if arithmetic == "int8" else (3, 256)
        module, _ = prepare(Case(lambda layers=layers: layers, shape, {"p": 1}))
        signs = 200.0 * layers.layers[-1].weight[0].sign().expand(1, *shape).contiguous().detach()
        samples = [(torch.randint(-200, 201, (1, *shape)).float(),), (signs,), (-signs,)]
        plan = export_c(module, samples[0], tmp_path / f"net{index}.c", name=f"net{index}", optimize="speed")
        assert {kernel.kernel for _, kernel in kernels} <= set(plan.kernels)
        networks.append(programs.Network(module, samples, plan=plan))
    for network, results in zip(networks, programs._run(networks, tmp_path), strict=True):
        for sample, (actual,) in zip(network.samples, results, strict=True):
            with torch.no_grad():
                expected = network.module(*sample).flatten()
            torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-6, atol=1e-6)


@needs_arm
def test_instructions_on_a_core(tmp_path: Path) -> None:
    """Below int8 kernels written by hand: 7.2 instructions a multiply-add of single channels, 1.8 of others.

    Single channels take little more than half of that, others less than a quarter.
    """
    depthwise = lambda: nn.Conv2d(32, 32, 3, padding=1, groups=32)  # noqa: E731
    whole = lambda: nn.Conv2d(32, 32, 3, padding=1)  # noqa: E731
    for make, most, macs in ((depthwise, 4.0, 9 * 32 * 64), (whole, 1.8 / 4, 9 * 32 * 32 * 64)):
        counts = []
        for layers in (2, 3):
            chain = [part for _ in range(layers) for part in (make(), nn.ReLU())]
            module, samples = prepare(Case(_chain(*chain), (32, 8, 8), {"p": 4}))
            export_c(module, samples[0], tmp_path / "net.c", name="net", optimize="speed", target="cortex-m4")
            result = measure(tmp_path / "net.c", CPUS["cortex-m4"], samples[0][0].flatten(1), None)
            counts.append(max(result.instructions))
        assert counts[1] - counts[0] <= most * macs
