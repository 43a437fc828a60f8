"""Kernels in float that compute several results at once: results, choice, cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.mcu_costs import Attention, Function
from tbn_compiler.backends.c import Plan, export_c, ir
from tbn_compiler.backends.c.costs import INSTRUCTIONS
from tbn_compiler.backends.c.element_instances import INSTANCES as ELEMENT_INSTANCES
from tbn_compiler.backends.c.emit import template_names
from tbn_compiler.backends.c.float_instances import INSTANCES
from tbn_compiler.backends.c.geometry import inside, whole_places
from tbn_compiler.backends.c.mcu import CPUS, measure
from tbn_compiler.backends.c.plan import Implementation
from tbn_compiler.backends.c.registry import Context
from tests.backends.c.programs import Network, check
from tests.backends.c.toolchain import needs_arm, needs_cc


def conv(*arguments: int, **options: object) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(*arguments, **options)  # type: ignore[arg-type]


def conv1(*arguments: int, **options: object) -> Callable[[], nn.Module]:
    return lambda: nn.Conv1d(*arguments, **options)  # type: ignore[arg-type]


# Together they take every kernel of float_instances.
FLOAT_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{f"{k} columns": (conv(5, 6, (3, k), padding=(1, k // 2)), (1, 5, 6, 11)) for k in range(1, 9)},
    **{f"{k} columns, depthwise": (conv(3, 3, (2, k), padding=k // 2, groups=3), (1, 3, 5, 12)) for k in range(1, 9)},
    **{f"{k} columns, narrow": (conv(3, 3, (3, k), padding=k // 2, groups=3), (1, 3, 13, 4)) for k in range(1, 9)},
    "1 x 1": (conv(6, 7, 1), (2, 6, 5, 5)),
    "1 x 1, stride": (conv(6, 7, 1, 2), (1, 6, 5, 9)),
    "1 x 1, padding": (conv(4, 5, 1, padding=2), (1, 4, 5, 6)),
    "groups": (conv(6, 10, 3, 2, 1, groups=2, bias=False), (2, 6, 9, 10)),
    "groups of two": (conv(6, 6, 3, padding=1, groups=3), (1, 6, 9, 10)),
    "dilation": (conv(3, 5, 3, padding=2, dilation=2), (1, 3, 11, 12)),
    "dilation, depthwise": (conv(3, 3, 3, padding=2, dilation=2, groups=3, bias=False), (1, 3, 11, 12)),
    "dilation, stride": (conv(3, 5, 3, 2, padding=4, dilation=3), (1, 3, 12, 15)),
    "window outside the image": (conv(2, 4, 2, padding=3, dilation=4), (1, 2, 2, 2)),
    "window larger than the image": (conv(2, 4, 5, padding=2), (1, 2, 3, 2)),
    "window of the image": (conv(3, 6, (4, 5)), (1, 3, 4, 5)),
    "1-D": (conv1(5, 9, 3, padding=1), (1, 5, 20)),
    "1-D, stride": (conv1(5, 9, 5, 3, padding=4, bias=False), (2, 5, 20)),
    "1-D, depthwise": (conv1(6, 6, 3, padding=1, groups=6), (1, 6, 20)),
    "1-D, dilation": (conv1(4, 4, 3, padding=8, dilation=8), (1, 4, 20)),
    "linear": (lambda: nn.Linear(13, 10), (1, 13)),
    "linear, no bias": (lambda: nn.Linear(9, 4, bias=False), (1, 9)),
    "linear of an odd number of vectors": (lambda: nn.Linear(7, 6), (1, 5, 7)),
    "linear of vectors, no bias": (lambda: nn.Linear(6, 7, bias=False), (4, 6)),
    "product": (lambda: Function(lambda x: x @ x.mT), (2, 7, 9)),
    "product of few rows": (lambda: Function(lambda x: x[:, :3] @ x.mT), (2, 7, 9)),
    "product with a vector": (lambda: Function(lambda x: x @ x[0, 0]), (2, 7, 9)),
    "product of a vector": (lambda: Function(lambda x: x[0, 0] @ x.mT), (2, 7, 9)),
    "attention": (lambda: Attention(2), (1, 6, 36)),
    "attention, causal": (lambda: Attention(1, causal=True), (1, 9, 21)),
}


class Layers(nn.Module):
    """All layers, each on an input of its own, every other one with a ReLU: one start of the exporter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for make, _ in FLOAT_LAYERS.values())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        results = [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]
        return tuple(x.relu() if index % 2 else x for index, x in enumerate(results))


def sample() -> tuple[Tensor, ...]:
    return tuple(torch.randn(shape) for _, shape in FLOAT_LAYERS.values())


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Plan]:
    folder, module = tmp_path_factory.mktemp("plans"), Layers().eval()
    return {
        (target, optimize): export_c(module, sample(), folder / "net.c", target=target, optimize=optimize)  # type: ignore[arg-type]
        for target in ("cortex-m4", "cortex-m3")
        for optimize in ("size", "balanced")
    }


@needs_cc
def test_they_compute_what_pytorch_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, samples = Layers().eval(), [sample() for _ in range(2)]
    options: list[dict[str, str]] = [{"target": "cortex-m4"}, {"optimize": "size"}]
    check([Network(module, samples, dict(each), outputs=list(FLOAT_LAYERS)) for each in options], tmp_path)


def test_every_kernel_is_used(plans: dict[tuple[str, str], Plan]) -> None:
    """One that nothing takes would be tested nowhere."""
    helpers = ("_block", "_edge_by_1", "_edge_by_4")  # and those that go down columns are chosen for few windows
    called = {
        kernel
        for kernel in INSTANCES
        if not kernel.endswith(helpers) and not kernel.startswith(("conv_columns", "conv_down"))
    }
    used = set(plans["cortex-m4", "balanced"].kernels)
    assert called - used == set()
    assert any(kernel.startswith("conv_down") for kernel in used)


def test_size_takes_the_small_kernels(plans: dict[tuple[str, str], Plan]) -> None:
    for target in ("cortex-m4", "cortex-m3"):
        assert not set(plans[target, "size"].kernels) & {*INSTANCES, "attention_by_4"}


def test_no_core_expects_to_be_slower_than_with_the_small_kernels(plans: dict[tuple[str, str], Plan]) -> None:
    for target in ("cortex-m4", "cortex-m3"):
        for small, fast in zip(plans[target, "size"].steps, plans[target, "balanced"].steps, strict=True):
            assert fast.cost <= small.cost


@needs_cc
def test_what_is_not_finite_spreads_as_in_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = []
    for make, shape in ((conv(3, 5, 3, padding=1), (1, 3, 7, 8)), (conv(3, 3, 3, padding=1, groups=3), (1, 3, 9, 8))):
        x = torch.randn(shape)
        x[0, 0, 0, 0], x[0, 1, 4, 4], x[0, 2, 6, 7] = math.inf, math.nan, -math.inf
        networks.append(Network(make().eval(), [(x,)], {"target": "cortex-m4"}, nan=True))
    check(networks, tmp_path)


def test_geometry_counts_what_lies_inside() -> None:
    window = ir.Window((5, 9), (5, 5), (3, 3), (1, 2), (1, 1))
    assert inside(window, 0) == [2, 3, 3, 3, 2]
    assert inside(window, 1) == [2, 3, 3, 3, 2]
    assert whole_places(window, 1) == (1, 4)
    assert whole_places(ir.Window((1, 2), (1, 4), (1, 3), padding=(0, 2)), 1) == (0, 0)


def test_costs_are_of_kernels_that_exist() -> None:
    """Units have the names of kernels, or of what several of those do."""
    shared = {"call", "broadcast", "conv_by_1_any", "conv_by_4_any", "reduce", "tiled_store"}
    assert {unit.split(".")[0] for unit in INSTRUCTIONS} - set(template_names()) <= shared
    assert all(min(figures) >= 0 for figures in INSTRUCTIONS.values())


# Layer, shape of its input, and the most instructions for a multiply-add on a Cortex-M4.
_BOUNDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "3 x 3": (conv(16, 16, 3, padding=1), (16, 16, 16), 2.6),
    "stem": (conv(3, 16, 3, 2, padding=1), (3, 32, 32), 3.1),
    "1 x 1": (conv(32, 32, 1), (32, 10, 10), 2.6),
    "groups": (conv(16, 32, 3, padding=1, groups=4), (16, 16, 16), 3.0),
    "depthwise": (conv(16, 16, 3, padding=1, groups=16), (16, 24, 24), 4.0),
    "1-D": (conv1(16, 32, 5, padding=2), (16, 50), 2.2),
    "linear": (lambda: nn.Linear(256, 64), (256,), 2.9),
    "linear of vectors": (lambda: nn.Linear(32, 64), (12, 32), 2.5),
}


@needs_arm
@pytest.mark.parametrize("name", _BOUNDS)
def test_instructions_for_a_multiply_add(name: str, tmp_path: Path) -> None:
    make, shape, bound = _BOUNDS[name]
    layer = make().eval()
    x = torch.randn(1, *shape)
    y = layer(x)
    export_c(nn.Sequential(layer, nn.ReLU()), x, tmp_path / "net.c", name="net", target="cortex-m4")
    result = measure(tmp_path / "net.c", CPUS["cortex-m4"], x.flatten(1), y.relu().flatten(1))
    assert result.max_error is not None
    assert result.max_error < 1e-5
    assert result.instructions[0] <= bound * y.numel() * layer.weight[0].numel()  # type: ignore[index,operator,union-attr]


class Residual(nn.Module):
    """Norms, pooling, a skip and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, 2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + F.relu(self.pointwise(F.relu(self.depthwise(x))))
        return F.softmax(self.head(F.max_pool2d(x, 2).flatten(1)), 1)


class Encoder(nn.Module):
    """A block of a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inputs, self.heads = nn.LayerNorm(16), nn.Linear(16, 48), Attention(2)
        self.wide, self.narrow = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.heads(self.inputs(self.norm(x)))
        return x + self.narrow(F.gelu(self.wide(x)))


_ESTIMATED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "residual": (Residual, (1, 16, 16), "balanced"),
    "residual, size": (Residual, (1, 16, 16), "size"),
    "encoder": (Encoder, (10, 16), "balanced"),
    "1-D": (
        lambda: nn.Sequential(
            *(nn.Conv1d(8, 16, 3, 2), nn.BatchNorm1d(16), nn.Tanh(), nn.Conv1d(16, 16, 3), nn.ReLU()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(16, 4), nn.Sigmoid()),
        ),
        (8, 40),
        "speed",
    ),
    "moves": (
        lambda: Function(lambda x: torch.cat([F.pad(x.mT + 1, (1, 1)), x.mT[..., :9]], 2).mean(1)),
        (12, 20),
        "speed",
    ),
    "masks": (
        lambda: Function(lambda x: (x.masked_fill(x > 1, 0).cumsum(2) / x.std(2, keepdim=True)).floor().logsumexp(1)),
        (12, 20),
        "speed",
    ),
}


@needs_arm
@pytest.mark.parametrize("name", _ESTIMATED)
def test_plans_are_within_a_quarter_of_the_count(name: str, tmp_path: Path) -> None:
    make, shape, optimize = _ESTIMATED[name]
    torch.manual_seed(0)
    x = torch.randn(1, *shape)
    plan = export_c(make().eval(), x, tmp_path / "net.c", name="net", target="cortex-m4", optimize=optimize)  # type: ignore[arg-type]
    count = measure(tmp_path / "net.c", CPUS["cortex-m4"], x.flatten(1)).instructions[0]
    assert plan.cost == pytest.approx(count, rel=0.25)


def test_every_function_has_a_cost() -> None:
    """Kernels that are made of a common loop are units of their own."""
    loops = ("unary", "binary", "reduce", "reduce_index", "scan")
    functions = {name for name, text in ELEMENT_INSTANCES.items() if any(f"loops/{loop}.c" in text for loop in loops)}
    assert functions <= set(INSTRUCTIONS)
    assert {"divide_into_scalar", "running_sum_int32"} <= functions


@needs_cc
def test_kernels_that_go_down_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are chosen for few windows; here for every width."""

    class Narrow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Conv2d(3, 3, (3, width), padding=width // 2, groups=3) for width in range(1, 10)
            )

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return tuple(layer(x) for layer in self.layers)

    def last(self: Context, small: Implementation, *others: Implementation) -> Implementation:
        return others[-1] if others else small

    monkeypatch.setattr(Context, "fastest", last)
    network = Network(Narrow().eval(), [(torch.randn(1, 3, 13, 9),)])
    check([network], tmp_path)
    assert network.plan is not None
    assert {kernel for kernel in INSTANCES if kernel.startswith("conv_down") and not kernel.endswith("_block")} <= set(
        network.plan.kernels
    )
