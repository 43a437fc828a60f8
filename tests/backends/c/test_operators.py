"""Every operator against PyTorch, many in one program."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import host
from tests.backends.c.elements import (
    CHOICES,
    COMPARISONS,
    INDICES,
    INTEGERS,
    MATH,
    ORDERS,
    RESIZED,
    ROUNDING,
    STATISTICS,
)
from tests.backends.c.programs import Network, check
from tests.backends.c.toolchain import needs_cc

pytestmark = needs_cc

IMAGE, TOKENS, VOLUME = (1, 4, 8, 6), (1, 6, 8), (1, 4, 5, 6, 7)


class Function(nn.Module):
    """A function of its inputs and of some stored tensors."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.row = nn.Parameter(torch.randn(1, 1, 8))
        self.channel = nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("mask", torch.ones(6, 6, dtype=torch.bool).tril())
        self.register_buffer("bytes", torch.arange(250, 256, dtype=torch.uint8))

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


ACTIVATIONS: dict[str, Callable[..., Any]] = {
    **{
        name: (lambda m, x, name=name: getattr(F, name)(3 * x))
        for name in [
            "relu",
            "relu6",
            "leaky_relu",
            "gelu",
            "silu",
            "sigmoid",
            "tanh",
            "hardswish",
            "hardsigmoid",
            "elu",
            "softplus",
            "mish",
            "hardtanh",
            "logsigmoid",
            "softsign",
            "selu",
            "celu",
        ]
    },
    "gelu tanh": lambda m, x: F.gelu(x, approximate="tanh"),
    "prelu": lambda m, x: F.prelu(x, m.channel.flatten()) + F.prelu(x, m.row[0, 0, :1]),
    "prelu of features": lambda m, x: F.prelu(x.mean((2, 3)), m.channel.flatten()),
}
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "numbers": lambda m, x: (1 - x) * 2 / 3 - 4 + 5 / (x.abs() + 1),
    "roots": lambda m, x: (x.abs() + 0.1).sqrt() + (x.abs() + 0.1).rsqrt() + (x.abs() + 0.1) ** 1.5,
    "functions": lambda m, x: x.exp() + (x.abs() + 0.1).log() + x**2 + x.square() + x.sin() * x.cos() + x.erf(),
    "clamp": lambda m, x: x.clamp(0, 1) + x.clamp(min=0.1) + x.clamp(max=0.5) - (x.abs() + 1).reciprocal(),
    "extrema": lambda m, x: torch.maximum(x, -x) + torch.minimum(x, 2 * x),
    "extrema per channel": lambda m, x: torch.maximum(x, m.channel) + torch.minimum(x, m.channel),
    "stored number": lambda m, x: m.row[0, 0, 0] / (x.abs() + 1) + (x - m.row[0, 0, 1]),
    "factors": lambda m, x: torch.sub(x, x.exp(), alpha=3) + torch.add(x, 1, alpha=2) - torch.rsub(x, 1, alpha=2),
    "per channel": lambda m, x: x * m.channel - x / (m.channel.abs() + 1),
    "broadcast of a part": lambda m, x: x[:, :1] + x,
    "broadcast of a mean": lambda m, x: x - x.mean((2, 3), keepdim=True),
    "broadcast of both": lambda m, x: x[0, 0, 0].view(1, 6, 1) - x[0, 0, 1].view(1, 1, 6),
    "a value and its transpose": lambda m, x: (2 * x)[..., :6, :] + (2 * x)[..., :6, :].mT,
    "in place on a transposed": lambda m, x: (y := 2 * x[..., :6, :]).relu() + (y + y.mT),
    "in place as a statement": lambda m, x: (y := x + 1, F.silu(y, inplace=True), y.view(-1).mul_(2))[0],
    "stored bytes": lambda m, x: (
        x * m.bytes + (x + m.bytes[0]) + torch.cat([x, m.bytes.expand(1, 4, 1, 6)], 2)[:, :, 1:]
    ),
    "stored": lambda m, x: torch.zeros(1, 4, 8, 6) + x * torch.arange(6) + torch.ones_like(x) + m.channel.exp(),
}
MOVES: dict[str, Callable[..., Any]] = {
    "slices": lambda m, x: (x[:, :2], x[:, 1:, 2:-1], x[:, ::2], x[..., 1::3]),
    "select": lambda m, x: (x[:, 1], x.select(2, -1), x.narrow(1, -3, 2)),
    "split": lambda m, x: (*x.chunk(2, 1), *x.chunk(2, 2), *x.split([1, 3], 1), x.unbind(1)[2]),
    "computed parts": lambda m, x: (y := x + 1)[:, :2] * y[:, 2:] + y.flip(1)[:, 1:3],
    "order": lambda m, x: (x.flip(1, 3), torch.roll(x, 1, 1), torch.roll(x, -2, 3), x.mT, x.permute(0, 2, 3, 1)),
    "repeat": lambda m, x: ((x + 0).expand(3, 4, 8, 6), x.repeat(1, 2, 1, 3), torch.stack([x, 2 * x], 2)),
    "join": lambda m, x: (torch.cat([x, x * 2, x[:, :1]], 1), torch.cat([x, x * 2], 3), torch.stack([x, x])),
    "join what is used again": lambda m, x: (y := x.exp()) + torch.cat([y, y * 2], 1)[:, 2:6],
    "pad": lambda m, x: (F.pad(x, (1, 2)), F.pad(x, (1, -1, -2, 0), value=2.0)),
    "pad reflect": lambda m, x: F.pad(x, (1, 2, 2, 1), mode="reflect"),
    "pad replicate": lambda m, x: F.pad(x, (1, 1, 2, 1), mode="replicate"),
    "pad circular": lambda m, x: F.pad(x, (1, 1, 2, 1), mode="circular"),
    "shuffle": lambda m, x: (F.pixel_shuffle(x, 2), F.channel_shuffle(x, 2)),
    "nearest": lambda m, x: (F.interpolate(x, (16, 12)), F.interpolate(x, (11, 7)), F.interpolate(x, scale_factor=2)),
    "glu": lambda m, x: F.glu(x, 1),
    "five dimensions": lambda m, x: x.view(2, 2, 2, 4, 6).permute(3, 0, 4, 1, 2) * 2,
}
REDUCTIONS: dict[str, Callable[..., Any]] = {
    "mean": lambda m, x: (x.mean((2, 3)), x.mean(), x.mean((1, 3)), x.mean(0)),
    "sum": lambda m, x: (x.sum(1), x.sum(), x.prod(3), x.sum((0, 2), keepdim=True)),
    "extrema": lambda m, x: (x.amax(1), x.max(2).values, x.max(), x.min(1).values, x.amin((1, 3))),
    "indices": lambda m, x: (x.argmax(1), x.max(2).indices, x.argmin(3), x.argmax()),
    "norms": lambda m, x: F.normalize(x, dim=1) + torch.linalg.norm(x, ord=1, dim=(1,), keepdim=True),
    "softmax": lambda m, x: (F.softmax(x, 1), F.log_softmax(x, -1), F.softmax(50 * x, 2)),
    "layer norm": lambda m, x: (F.layer_norm(x, (6,)), F.layer_norm(x, (8, 6)), F.instance_norm(x)),
    "rms norm": lambda m, x: F.rms_norm(x, (6,)),
    "group norm": lambda m, x: F.group_norm(x, 2, m.channel.flatten(), None),
    "max pool": lambda m, x: (F.max_pool2d(x, 3, 2, 1, ceil_mode=True), F.max_pool2d(x, 2, 1, 1, dilation=2)),
    "avg pool": lambda m, x: (
        *(F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=include) for include in (False, True)),
        F.avg_pool2d(x, (3, 2), 2, 1, divisor_override=5),
    ),
    "1-D pool": lambda m, x: (F.max_pool1d(x[0], 3, 2, 1), F.avg_pool1d(x[0], 3, 2, 1)),
    "adaptive pool": lambda m, x: (F.adaptive_avg_pool2d(x, (3, 4)), F.adaptive_max_pool2d(x, (3, 1))),
    "adaptive 1-D pool": lambda m, x: (F.adaptive_avg_pool1d(x[0], 4), F.adaptive_max_pool1d(x[0], 1)),
}


def heads(x: Tensor, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens as so many heads of queries and of keys."""
    q, k = (x[..., : 2 * count].unflatten(2, (count, 2)).transpose(1, 2) for count in (queries, keys))
    return q, k, 2 * k


PRODUCTS: dict[str, Callable[..., Any]] = {
    "matmul": lambda m, x: (x @ x.mT, torch.bmm(x, x.mT), x @ x[0].T, x[0] @ x[0, 0], x[0, 0] @ x[0].T),
    "einsum": lambda m, x: torch.einsum("bij,bkj->bik", x, 2 * x),
    "addmm": lambda m, x: torch.addmm(x[0, :1, :6], x[0], x[0].T) + torch.baddbmm(x[..., :6], x, x.mT),
    "factors": lambda m, x: (
        torch.addmm(x[0, :1, :6], x[0], x[0].T, alpha=2, beta=0.5),
        torch.addmm(x[0, :1, :6], x[0], x[0].T, beta=0),
        torch.baddbmm(x[..., :6], x, x.mT, beta=3),
    ),
    "bilinear": lambda m, x: (
        F.bilinear(x, 2 * x[..., :6], m.row[0, :, :, None] * torch.ones(3, 8, 6)),
        F.bilinear(x, x, m.row.mT @ m.row, m.row[0, 0, :1]),
    ),
    "computed weight and bias": lambda m, x: F.linear(x, x[0], m.row[0, 0, :6]),
    "batches": lambda m, x: x.view(2, 1, 3, 8) @ x.view(1, 2, 3, 8).mT,
    "heads": lambda m, x: x.view(1, 6, 2, 4).transpose(1, 2) @ x.view(1, 6, 2, 4).permute(0, 2, 3, 1),
    "computed weight": lambda m, x: F.linear(x, x[0]),
    "attention": lambda m, x: F.scaled_dot_product_attention(x, 2 * x, x + 1),
    "causal": lambda m, x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3),
    "mask": lambda m, x: F.scaled_dot_product_attention(x, x, x, m.mask),
    "mask to add": lambda m, x: F.scaled_dot_product_attention(x, x, x, (x @ x.mT)[0]),
    "computed mask": lambda m, x: F.scaled_dot_product_attention(x, x, x, (x @ x.mT)[0] > 0),
    "fewer heads of keys": lambda m, x: (
        F.scaled_dot_product_attention(*heads(x, 4, 2), enable_gqa=True),
        F.scaled_dot_product_attention(*heads(x.expand(2, -1, -1) + m.row, 4, 2), enable_gqa=True, is_causal=True),
        F.scaled_dot_product_attention(*heads(x, 4, 1), m.mask, enable_gqa=True),
        F.scaled_dot_product_attention(*heads(x.repeat(2, 1, 1), 4, 2), (x @ x.mT)[:, None] > 0, enable_gqa=True),
        F.scaled_dot_product_attention(*heads(x, 4, 1)),
    ),
    "class token": lambda m, x: torch.cat([m.row.expand(1, -1, -1), x], 1) + m.row,
}
FAMILIES = {
    "activations": (ACTIVATIONS, IMAGE),
    "arithmetic": (ARITHMETIC, IMAGE),
    "moves": (MOVES, IMAGE),
    "reductions": (REDUCTIONS, IMAGE),
    "products": (PRODUCTS, TOKENS),
    "comparisons": (COMPARISONS, IMAGE),
    "choices": (CHOICES, IMAGE),
    "rounding": (ROUNDING, IMAGE),
    "math": (MATH, IMAGE),
    "statistics": (STATISTICS, IMAGE),
    "integers": (INTEGERS, IMAGE),
    "indices": (INDICES, IMAGE),
    "resized": (RESIZED, IMAGE),
    "orders": (ORDERS, IMAGE),
}
# What is compared on NaN, infinity, zeros of either sign, and equal elements, too.
SPECIAL = ("comparisons", "choices", "rounding", "math", "statistics", "integers", "orders")


class Family(nn.Module):
    """All functions of a family on one input; ``names`` says which output is whose."""

    def __init__(self, name: str) -> None:
        super().__init__()
        functions, self.shape = FAMILIES[name]
        self.functions = nn.ModuleDict({name: Function(function) for name, function in functions.items()})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.names: list[str] = []
        outputs: list[Tensor] = []
        for name, function in self.functions.items():
            result = function(x)
            for output in result if isinstance(result, tuple) else (result,):
                outputs.append(output)
                self.names.append(name)
        return tuple(outputs)


def family_network(name: str) -> Network:
    family = Family(name)
    family(torch.randn(family.shape))
    samples = [(torch.randn(family.shape),) for _ in range(3)]
    if name in SPECIAL:
        samples += special_samples(family.shape)
    return Network(family, samples, outputs=family.names, nan=name in SPECIAL)


def special_samples(shape: tuple[int, ...]) -> list[tuple[Tensor]]:
    """Random numbers with special ones between them, and special numbers alone."""
    special = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 0.5, -0.5, 1.5, 1.0])
    mixed = torch.where(torch.rand(shape) < 0.3, special[torch.randint(len(special), shape)], torch.randn(shape))
    alone = [torch.full(shape, number) for number in (math.nan, -math.inf, -0.0)]
    return [(x,) for x in (mixed, special[torch.randint(3, len(special), shape)], *alone)]


@pytest.mark.parametrize("family", FAMILIES)
def test_operators(family: str, tmp_path: Path) -> None:
    check([family_network(family)], tmp_path)


def with_statistics(module: nn.Module) -> nn.Module:
    """Batch-norms as a trained network has them."""
    for part in module.modules():
        if isinstance(part, nn.modules.batchnorm._BatchNorm):
            for tensor in (part.running_mean, part.weight, part.bias):
                nn.init.normal_(tensor)  # type: ignore[arg-type]
            nn.init.uniform_(part.running_var, 0.5, 2)  # type: ignore[arg-type]
    return module


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 1)), IMAGE),
    "conv, groups": (lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2, padding=2, bias=False), IMAGE),
    "conv, same": (lambda: nn.Conv2d(4, 8, (4, 2), padding="same"), IMAGE),
    "conv, reflect": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), IMAGE),
    "conv 1-D": (lambda: nn.Conv1d(6, 4, 3, dilation=2, padding="same"), TOKENS),
    "transpose conv": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=2), IMAGE),
    "transpose conv, dilated": (lambda: nn.ConvTranspose2d(4, 6, (3, 2), 1, (1, 0), dilation=2, bias=False), IMAGE),
    "transpose conv 1-D": (lambda: nn.ConvTranspose1d(6, 4, 2, 2), TOKENS),
    "conv 3-D": (lambda: nn.Conv3d(4, 6, (3, 2, 3), stride=(2, 1, 2), padding=(1, 0, 2)), VOLUME),
    "conv 3-D, groups": (lambda: nn.Conv3d(4, 8, 2, groups=2, dilation=(2, 1, 2), padding=1, bias=False), VOLUME),
    "conv 3-D, same": (lambda: nn.Conv3d(4, 8, (4, 3, 2), padding="same"), (2, *VOLUME[1:])),
    "conv 3-D, depthwise": (lambda: nn.Conv3d(4, 4, 3, groups=4, padding=1), VOLUME),
    "conv 3-D, all of the depth": (
        lambda: nn.Sequential(nn.Conv3d(4, 8, (5, 3, 3), bias=False), nn.BatchNorm3d(8), nn.ReLU()),
        VOLUME,
    ),
    "conv 3-D, no batch": (lambda: nn.Conv3d(4, 8, (1, 3, 3)), VOLUME[1:]),
    "transpose conv 3-D": (lambda: nn.ConvTranspose3d(4, 6, (3, 2, 3), (2, 1, 2), (1, 0, 1), (1, 0, 1), 2), VOLUME),
    "transpose conv 3-D, dilated": (lambda: nn.ConvTranspose3d(4, 6, 3, 1, 2, dilation=2), VOLUME),
    "transpose conv 3-D, stride": (lambda: nn.ConvTranspose3d(4, 6, 2, 2, bias=False), (2, 4, 3, 3, 2)),
    "volumes": (
        lambda: nn.Sequential(nn.MaxPool3d(3, 2, 1), nn.AvgPool3d(2, 1, 1), nn.AdaptiveAvgPool3d((2, 3, 2))),
        VOLUME,
    ),
    "maxima of volumes": (lambda: nn.Sequential(nn.AdaptiveMaxPool3d((3, 2, 4)), nn.LocalResponseNorm(3)), VOLUME),
    "averages of volumes": (
        lambda: nn.Sequential(
            nn.AvgPool3d(3, 2, 1, ceil_mode=True, count_include_pad=False),
            nn.AvgPool3d((2, 3, 2), 2, divisor_override=5),
        ),
        VOLUME,
    ),
    "folded norms": (
        lambda: nn.Sequential(
            *(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8, bias=False)),
            *(nn.BatchNorm2d(8), nn.Tanh(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)),
        ),
        IMAGE,
    ),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), TOKENS),
    "attention, norm first": (
        lambda: nn.TransformerEncoderLayer(8, 4, 16, batch_first=True, norm_first=True, activation="gelu"),
        TOKENS,
    ),
    "recurrent": (lambda: nn.GRU(8, 4, batch_first=True), TOKENS),
}


TILINGS: list[dict[str, Any]] = [
    *({"p": 4, "alpha": "tile"}, {"p": 6}, {"p": 2, "replicate": "roll"}),
    *({"p": (2, 2), "alpha": "output"}, {"p": 2, "replicate": "hadamard"}),
]


@pytest.mark.filterwarnings("ignore:.* is stored decoded", "ignore:.*no layer has copies")
def test_layers(tmp_path: Path) -> None:
    """Layers in float, and those that can be tiled on tiles: transpose convolutions are nowhere else."""
    networks = []
    for make, shape in LAYERS.values():
        module = with_statistics(make())
        samples = [(torch.randn(shape),) for _ in range(2)]
        networks.append(Network(module, samples))
        for config in TILINGS:
            try:
                tiled = tbn.transform(module, tbn.TilingConfig(min_size=0, **config))
            except tbn.TransformError:  # nothing is tiled in it
                continue
            networks.append(Network(tiled, samples))
    check(networks, tmp_path)


class Extreme(nn.Module):
    """What compares and limits, and attention with a mask that hides every key from query 1."""

    def __init__(self) -> None:
        super().__init__()
        shown = torch.ones(8, 8, dtype=torch.bool).tril()
        shown[1] = False
        self.register_buffer("shown", shown)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (
            *(torch.maximum(x, x.flip(3)), torch.minimum(x, x.flip(3))),
            *(torch.maximum(x, x[:, :1]), torch.minimum(x[..., :1], x)),
            *(x.amax(3), x.amin(3), x.max(2).values, x.min()),
            *(x.argmax(3), x.argmin(3), x.argmax(2), x.max(1).indices, x.argmin()),
            *(F.max_pool2d(x, 3, 2, 1), F.max_pool1d(x[0], 2), F.adaptive_max_pool2d(x, (3, 4))),
            *(x.clamp(0, 1), x.clamp(0.5, -0.5), x.clamp(min=0), x.clamp(max=0), x.relu(), F.relu6(x), F.hardswish(x)),
            *(x.softmax(3), x.log_softmax(2)),
            F.scaled_dot_product_attention(x, x, x, self.shown),
        )


def test_nan_infinity_and_limits_are_treated_as_pytorch_does(tmp_path: Path) -> None:
    torch.manual_seed(0)
    special = torch.tensor([math.nan, math.inf, -math.inf])
    plain = torch.randn(IMAGE)
    mixed = torch.where(torch.rand(IMAGE) < 0.15, special[torch.randint(3, IMAGE)], plain)
    samples = [(x,) for x in (plain, mixed, torch.full(IMAGE, math.nan), torch.full(IMAGE, -math.inf))]
    module = Extreme()
    assert (module(plain)[-1][:, :, 1] == 0).all()
    check([Network(module, samples, nan=True)], tmp_path)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.head(self.tokens(ids) + offset)
        return scores, scores.argmax(-1)


def test_several_inputs_and_outputs_have_names_and_types(tmp_path: Path) -> None:
    samples = [(torch.randint(0, 10, (1, 5)), torch.randn(1, 5, 8)) for _ in range(2)]
    network = Network(Lookup(), samples, {"scratch": "caller"})
    check([network], tmp_path)
    header = (tmp_path / "net0.h").read_text()
    signature = "const int32_t *ids, const float *offset, float *out0, int32_t *out1, void *scratch"
    assert f"void net0_run({signature});" in header
    sizes = {"IDS": 5, "OFFSET": 40, "OUT0": 15, "OUT1": 5}
    assert all(f"#define NET0_{name}_SIZE {size} " in header for name, size in sizes.items())


def test_outputs_may_be_inputs_parts_and_each_other(tmp_path: Path) -> None:
    def outputs(m: Function, x: Tensor, y: Tensor) -> Any:
        z = x + y
        return x, z, z, z[:, :2], x[:, 1:], z.relu(), y

    check([Network(Function(outputs), [(torch.randn(IMAGE), torch.randn(IMAGE))])], tmp_path)


def test_a_fixed_batch(tmp_path: Path) -> None:
    """Convolutions loop over samples, layers over vectors."""
    net = with_statistics(
        nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(192, 6))
    )
    tiled = tbn.transform(net, tbn.TilingConfig(min_size=0))
    samples = [(torch.randn(3, 4, 8, 6),)]
    check([Network(net, samples), Network(tiled, samples)], tmp_path)


def test_the_host_runner_names_what_it_cannot_feed(tmp_path: Path) -> None:
    tbn.export_c(Lookup(), (torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, 5, 8)), tmp_path / "net.c")
    with pytest.raises(tbn.ExportError, match="has several arrays, some of integers: run_arrays runs it"):
        host.run(tmp_path / "net.c", torch.zeros(1, 5))
