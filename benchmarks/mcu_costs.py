"""Fits the figures of ``tbn_compiler/backends/c/costs.py`` to counts on emulated cores.

    python -m benchmarks.mcu_costs [--core CORE] [--counts FILE [--again GROUP]]

Each group of kernels is measured in small models. What its steps cost beyond units that are known already is divided
among the units that are new, by least squares of the relative error, none of them negative. Printed are the new table,
and for every group the largest relative error of a model.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c
from tbn_compiler.backends.c.costs import CORES, INSTRUCTIONS
from tbn_compiler.backends.c.mcu import CPUS, measure


class Function(nn.Module):
    """A function of the input as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """Call it."""
        return self.function(x)


@dataclass(frozen=True)
class Probe:
    """A small model that is measured.

    Attributes:
        module: what is exported.
        shape: of the input, without the batch.
        optimize: which kernels are taken.
        positive: whether inputs are between 0.5 and 1.5, not normally distributed.
        dtype: of the input; integers are from 0 to 99.
    """

    module: nn.Module
    shape: tuple[int, ...]
    optimize: Any = "speed"
    positive: bool = False
    dtype: torch.dtype = torch.float32


def _functions(functions: Sequence[Callable[..., Any]], positive: bool = False) -> list[Probe]:
    return [Probe(Function(function), (7, 40), positive=positive) for function in functions]


def _image(function: Callable[..., Any], *shapes: tuple[int, ...], optimize: str = "speed") -> list[Probe]:
    return [Probe(Function(function), shape, optimize) for shape in shapes]


def _conv(*arguments: Any, size: tuple[int, ...] = (16, 16), optimize: str = "speed", **options: Any) -> Probe:
    make = nn.Conv2d if len(size) == 2 else nn.Conv1d
    return Probe(make(*arguments, **options), (arguments[0], *size), optimize)


def _two(first: Probe, second: nn.Module) -> Probe:
    """A model with two layers, in which the compiler cannot take the sizes of one for granted."""
    return Probe(nn.Sequential(first.module, second), first.shape, first.optimize)


class Attention(nn.Module):
    """Attention with several heads."""

    def __init__(self, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        """``[1, tokens, 3 * width]`` to ``[1, tokens, width]``."""
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in x.chunk(3, 2))
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)


class Find(nn.Module):
    """Where a row's extreme element is, as a row of a table: an emulated model has no integers as outputs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function, self.table = function, nn.Embedding(40, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``[1, rows, 40]`` or less to ``[1, rows, 4]``."""
        rows: Tensor = self.table(self.function(x, 2))
        return rows


def _tiled(module: nn.Module, shape: tuple[int, ...], **options: Any) -> Probe:
    return Probe(tbn.lower(tbn.transform(nn.Sequential(module), tbn.TilingConfig(min_size=0, **options))), shape)


def _behind(conv: nn.Conv2d) -> nn.Module:
    return nn.Sequential(conv, nn.Conv2d(conv.out_channels, 8, 3, groups=2))


class Rounded(nn.Module):
    """A function of int8 that gives int8, and the ways in and out."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """Any shape."""
        return _rounded(self.function(_rounded(x)), 0.02)


def _rounded(x: Tensor, scale: float = 0.03) -> Tensor:
    """Numbers that int8 holds."""
    return torch.fake_quantize_per_tensor_affine(x, scale, 0, -127, 127)


def _integers() -> list[Probe]:
    ways = [Probe(Rounded(function), shape) for function in (F.hardswish, F.silu) for shape in ((7, 40), (100,))]
    ways += [Probe(Function(_rounded), (280,))]
    # Means in floats tell the way in from the way out: one of all elements, and two of them.
    ways += [Probe(Function(lambda x: _rounded(x).mean(2)), shape) for shape in ((6, 40), (40, 6))]
    ways += [Probe(Function(lambda x: torch.cat([_rounded(x).mean(2), _rounded(x).mean(1)], 1)), (12, 20))]
    sums = [Probe(Rounded(lambda x: x + x.flip(0)), shape) for shape in ((7, 40), (20, 20))]
    sums += [Probe(Rounded(lambda x: x * x.flip(0)), shape) for shape in ((7, 40), (20, 20))]
    sums += [Probe(Rounded(lambda x: x * _rounded(x.mean(2, keepdim=True))), shape) for shape in ((7, 40), (40, 6))]
    means = [Probe(Rounded(lambda x: x.mean(2)), shape) for shape in ((6, 40), (40, 6))]
    moves = [
        *(Probe(Rounded(lambda x: x.permute(0, 2, 3, 1)), shape) for shape in ((8, 10, 10), (3, 40, 4))),
        *(Probe(Rounded(lambda x: F.pad(x, (1, 1, 1, 1))), shape) for shape in ((8, 10, 10), (3, 30, 6))),
        *(Probe(Rounded(lambda x: F.max_pool2d(x, 3, 2, 1)), shape) for shape in ((8, 12, 12), (2, 30, 30))),
        *(Probe(Rounded(lambda x: F.max_pool2d(x, 2)), shape) for shape in ((8, 12, 12), (2, 30, 30))),
    ]
    return [*ways, *sums, *means, *moves]


def _elements() -> dict[str, list[Probe]]:
    """Conversions first: inputs and outputs are floats. Where half of the elements go on, both ways are told apart.

    What an integer becomes as a float takes longer for some than for others without floating-point instructions; what a
    boolean does not.
    """
    signs = [torch.eq, torch.ne, torch.lt, torch.le, torch.gt, torch.ge]
    compared = [
        *(lambda x, f=f: f(x, 0.1).float() for f in signs),
        *(lambda x, f=f: f(x[:, 3:], x[:, :4]).float() for f in signs),
        *(lambda x: x.isnan().float(), lambda x: x.isinf().float()),
        *(lambda x, f=f: f(x.int(), 1).float() for f in signs),
        *(lambda x, f=f: f(x.int()[:, 3:], x.int()[:, :4]).float() for f in signs),
    ]
    joined = [torch.logical_and, torch.logical_or, torch.logical_xor]
    logic = [lambda x, f=f: f((x > 0)[:, 3:], (x > 0)[:, :4]).float() for f in joined]
    one: list[Callable[[Tensor], Tensor]] = [
        *(torch.neg, torch.abs, torch.sign, torch.bitwise_not, lambda i: i + 3, lambda i: i * 3, lambda i: i // 3),
        *(lambda i: i % 3, lambda i: i.clamp(min=1), lambda i: i.clamp(max=1)),
    ]
    two: list[Callable[[Tensor, Tensor], Tensor]] = [
        *(torch.add, torch.sub, torch.mul, torch.maximum, torch.minimum, torch.floor_divide, torch.remainder),
        *(lambda a, b: torch.div(a, b, rounding_mode="trunc"), torch.bitwise_and, torch.bitwise_or, torch.bitwise_xor),
    ]
    sums: list[Callable[[Tensor], Tensor]] = [
        *(lambda i: i.sum(2), lambda i: i.prod(2), lambda i: i.amax(2), lambda i: i.amin(2)),
        *(lambda i: i.cumsum(2), lambda i: i.cumprod(2)),
    ]
    shapes = ((6, 40), (40, 6))
    return {
        "conversions": [
            *_functions(
                [lambda x: x.int().float(), lambda x: x.int()[:, :3].float(), lambda x: (x > 0)[:, :3].float()]
            ),
            *_functions([lambda x: (x > 0).float(), lambda x: x.bool().float(), lambda x: x.bool()[:, :3].float()]),
            *_functions([lambda x: x.int().bool().float(), lambda x: (x > 0).int().float()]),
        ],
        "comparisons": _functions(compared),
        "logic": _functions([*logic, lambda x: torch.logical_not(x > 0).float()]),
        "choices": _functions([lambda x: torch.where(x > 0, x, 0.5), lambda x: torch.where(x > 0, x, x.flip(0))]),
        "integers": _functions(
            [
                *(lambda x, f=f: f(x.int()).bool().float() for f in one),
                *(lambda x, f=f: f(x.int()[:, 3:], x.int()[:, :4] + 9).bool().float() for f in two),
            ]
        ),
        "reductions of integers": [
            Probe(Function(lambda x, f=f: f(x.int()).bool().float()), s) for f in sums for s in shapes
        ]
        + [Probe(Find(lambda x, d, f=f: f(x.int(), d)), s) for f in (torch.argmax, torch.argmin) for s in shapes]
        + [
            Probe(Function(lambda x, f=f: f(x > 0, 2).float()), s)
            for f in (torch.any, torch.all, torch.sum)
            for s in shapes
        ],
        "statistics": [
            Probe(Function(function), shape)
            for shape in shapes
            for function in (
                *(lambda x: x.var(2), lambda x: x.logsumexp(2), lambda x: x.cumsum(2), lambda x: x.cumprod(2)),
            )
        ],
        "order": [Probe(Find(lambda x, d: x.topk(1, d).indices[:, :, 0]), shape) for shape in shapes]
        + [Probe(Function(lambda x: x.topk(3, 2).values), shape) for shape in shapes],
        "resize linearly": _image(lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"), (8, 7, 7), (2, 20, 20)),
    }


def probes() -> dict[str, list[Probe]]:
    """The models of each group, in an order in which what a group shares with others is known before."""
    unary: list[Callable[..., Any]] = [
        *(F.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.sigmoid, F.tanh, F.hardswish, F.hardsigmoid, F.elu),
        *(F.softplus, F.mish, F.logsigmoid, torch.exp, torch.sin, torch.cos, torch.erf, torch.abs, torch.neg),
        *(torch.square, lambda x: x + 1, lambda x: x - 2, lambda x: x * 3, lambda x: x / 3, lambda x: 1 - x),
        *(lambda x: x.clamp(min=0.1), lambda x: x.clamp(max=0.1), lambda x: F.gelu(x, approximate="tanh")),
        *(lambda x: 2 / x, lambda x: x.reciprocal()),
        *(torch.exp2, torch.expm1, torch.erfc, torch.tan, torch.atan, torch.sinh, torch.cosh, torch.asinh),
        *(torch.floor, torch.ceil, torch.trunc, torch.round, torch.sign),
    ]
    binary: list[Callable[..., Any]] = [
        *(lambda x: x[:, 3:] + x[:, :4], lambda x: x[:, 3:] - x[:, :4], lambda x: x[:, 3:] * x[:, :4]),
        *(lambda x: x[:, 3:] / x[:, :4], lambda x: torch.maximum(x[:, 3:], x[:, :4])),
        lambda x: torch.minimum(x[:, 3:], x[:, :4]),
        *(
            lambda x, f=f: f(x[:, 3:], x[:, :4])
            for f in (
                *(torch.fmod, torch.remainder, torch.floor_divide),
                *(torch.atan2, torch.hypot, torch.fmax, torch.fmin),
            )
        ),
    ]
    positive: list[Callable[..., Any]] = [
        *(torch.log, torch.sqrt, torch.rsqrt, lambda x: x**1.5, torch.log2, torch.log10, torch.log1p),
        *(
            lambda x: (x - 0.5).asin(),
            lambda x: (x - 0.5).acos(),
            lambda x: (x + 0.5).acosh(),
            lambda x: (x - 0.6).atanh(),
        ),
        lambda x: x[:, 3:] ** x[:, :4],
    ]
    convs = {
        "size": [_two(_conv(*a, size=s, optimize="size", **o), next_layer) for *a, s, o, next_layer in _SMALL_CONVS],
        "speed": [
            _conv(16, 16, 3, padding=1, size=(8, 8)),
            *(_conv(3, 16, 3, 2, padding=1, size=(32, 32)), _conv(1, 16, 5, 2, padding=2, size=(28, 28))),
            *(_conv(16, 32, 1), _conv(16, 32, 1, 2), _conv(24, 10, 2, size=(9, 9))),
            _conv(16, 32, 3, groups=4, padding=1),
            *(_conv(16, 32, 5, padding=2, size=(50,)), _conv(40, 32, 3, 2, padding=1, size=(50,))),
            *(_conv(8, 8, 3, dilation=2, padding=2), _conv(8, 12, 3, dilation=3, padding=3), _conv(2, 8, 9, padding=4)),
            _conv(8, 8, 3, dilation=4, padding=4, size=(80,)),
            _two(_conv(16, 32, 3, padding=1, size=(8, 8)), nn.Conv2d(32, 16, 3, 2)),
            _two(_conv(16, 32, 1, size=(12, 12)), nn.Conv2d(32, 16, 1)),
            # Windows without a loop of their own, images that are all border.
            *(_conv(4, 4, 9, padding=4, groups=4, size=(20, 20)), _conv(8, 8, 7, padding=3, groups=8, size=(7, 7))),
            *(_conv(8, 8, 5, padding=2, groups=8, size=(25, 5)), _conv(8, 8, (2, 9), groups=8, size=(9, 20))),
            *(
                _conv(4, 8, 8, size=(14, 14)),
                _conv(8, 8, 5, padding=2, size=(3, 3)),
                _conv(8, 8, 3, dilation=2, size=(9, 9)),
            ),
            *(_conv(16, 16, 5, padding=2, groups=16), _conv(16, 16, 3, 2, padding=1, groups=16, size=(32, 32))),
            *(_conv(16, 16, 3, 2, padding=1, groups=16, size=(12, 12)), _conv(6, 2, 3, padding=1)),
            *(_conv(16, 16, 3, dilation=2, padding=2, groups=16), _conv(8, 8, 3, padding=1, groups=8, size=(4, 4))),
            _two(_conv(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 16, 3, 2, padding=1, groups=16)),
            *(
                _two(
                    _conv(16, 16, 3, padding=1, groups=16, size=size),
                    nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
                )
                for size in ((25, 5), (12, 12))
            ),
            *(_conv(8, 3, 1), _conv(16, 16, 3, padding=1, groups=16, size=(40,))),
        ],
    }
    linears = [(784, 128), (64, 10), (20, 33)]
    return {
        "calls": [
            *(Probe(nn.Identity(), (n,)) for n in (8, 64, 500)),
            *(Probe(Function(lambda x: x.relu().view(-1)), (n,)) for n in (4, 16, 200)),
        ],
        "conversions": [
            Probe(Function(lambda x, to=to: x.to(to)), (n,), dtype=given)
            for given, to in (
                *((torch.uint8, torch.float32), (torch.int8, torch.float32), (torch.int64, torch.float32)),
                *((torch.uint8, torch.int64), (torch.int8, torch.int64)),
            )
            for n in (64, 500)
        ],
        "unary": _functions(unary),
        "positive": _functions(positive, positive=True),
        "binary": _functions(binary),
        "broadcast": [
            *(Probe(nn.PReLU(), shape) for shape in ((7, 40), (20, 20))),
            *_image(lambda x: x - x[:, :1], (8, 10, 10), (3, 40, 4)),
            *_image(lambda x: x * x[:, :, :1], (8, 10, 10), (3, 40, 4)),
        ],
        "moves": [
            *_image(lambda x: x.permute(0, 2, 3, 1), (8, 10, 10), (3, 40, 4)),
            *_image(lambda x: x.flip(2), (8, 10, 10), (3, 40, 4)),
            *_image(lambda x: F.pad(x, (1, 1, 1, 1)), (8, 10, 10), (3, 30, 6)),
            *_image(lambda x: torch.cat([x, x], 3), (8, 10, 10), (3, 40, 4)),
        ],
        "affine": [Probe(nn.BatchNorm2d(c), (c, n, n)) for c, n in ((8, 12), (32, 4))],
        "reductions": [
            Probe(Function(function), shape)
            for shape in ((6, 40), (40, 6))
            for function in (
                *(lambda x: x.mean(2), lambda x: x.mean(1), lambda x: x.sum(2), lambda x: x.prod(2)),
                *(lambda x: x.amax(2), lambda x: x.amin(2)),
            )
        ]
        + [Probe(Find(function), shape) for function in (torch.argmax, torch.argmin) for shape in ((6, 40), (40, 6))],
        "softmax": [
            Probe(Function(lambda x, f=f, d=d: f(x, d)), (6, 40)) for f in (F.softmax, F.log_softmax) for d in (1, 2)
        ],
        "norm": [Probe(nn.LayerNorm(n), (9, n)) for n in (8, 32, 100)],
        "max pool": _image(lambda x: F.max_pool2d(x, 2), (8, 12, 12), (2, 30, 30))
        + _image(lambda x: F.max_pool2d(x, 3, 2, 1), (8, 12, 12), (2, 30, 30))
        + _image(lambda x: F.max_pool2d(x, 6), (8, 12, 12), (2, 30, 30)),
        "avg pool": _image(lambda x: F.avg_pool2d(x, 2), (8, 12, 12), (2, 30, 30))
        + _image(lambda x: F.avg_pool2d(x, 3, 2, 1), (8, 12, 12), (2, 30, 30))
        + _image(lambda x: F.avg_pool2d(x, 6), (8, 12, 12), (2, 30, 30)),
        "adaptive pool": _image(lambda x: F.adaptive_avg_pool2d(x, 1), (16, 7, 7), (64, 4, 4))
        + _image(lambda x: F.adaptive_avg_pool2d(x, 3), (16, 7, 7), (64, 4, 4))
        + _image(lambda x: F.adaptive_max_pool2d(x, 1), (16, 7, 7), (64, 4, 4))
        + _image(lambda x: F.adaptive_max_pool2d(x, 3), (16, 7, 7), (64, 4, 4)),
        "resize": _image(lambda x: F.interpolate(x, scale_factor=2), (8, 7, 7), (2, 20, 20)),
        "linear": [Probe(nn.Linear(n, m), (n,), "size") for n, m in linears],
        "linear by 4": [Probe(nn.Linear(n, m), (n,)) for n, m in linears]
        + [_two(Probe(nn.Linear(64, 64), (64,)), nn.Linear(64, 20))],
        "linear of vectors": [Probe(nn.Linear(n, m), (v, n)) for n, m, v in ((32, 64, 12), (64, 10, 5), (8, 32, 84))]
        + [_two(Probe(nn.Linear(32, 64), (12, 32)), nn.Linear(64, 32))],
        "matmul": [
            *_image(lambda x: x @ x.mT, (2, 12, 20), (1, 30, 8), optimize="size"),
            *_image(lambda x: x @ x.mT, (2, 12, 20), (1, 30, 8)),
            *_image(lambda x: x @ x[:, :, 0, :, None], (2, 12, 12), (1, 40, 40)),
        ],
        "attention": [
            Probe(Attention(heads, causal), shape, optimize)
            for optimize in ("size", "speed")
            for heads, causal, shape in _ATTENTIONS
        ],
        **{f"convs for {optimize}": found for optimize, found in convs.items()},
        "transpose convs": [
            Probe(nn.ConvTranspose2d(*a, **o), (a[0], n, n))
            for a, o, n in (((8, 8, 3), {"padding": 1}, 8), ((8, 4, 4, 2), {"padding": 1}, 8), ((16, 8, 2, 2), {}, 6))
        ],
        "tiled linear": [
            *(_tiled(nn.Linear(n, m), (n,), p=p, replicate="roll") for n, m, p in ((40, 16, 4), (64, 64, 2))),
            *(_tiled(nn.Linear(n, m), (n,), p=4, tile_dtype="float") for n, m in ((40, 16), (64, 64))),
            *(_tiled(nn.Linear(n, m), (n,), p=8) for n, m in ((32, 12), (64, 20))),
        ],
        "int8": _integers(),
        **_elements(),
        "sums": [_tiled(nn.Linear(n, m), (n,), p=(4, 2), alpha="output") for n, m in ((64, 16), (200, 16))],
        "tiled conv": [
            *(_tiled(_behind(nn.Conv2d(*a, **o)), (a[0], 8, 8), p=4) for a, o in _TILED_CONVS),
            *(_tiled(_behind(nn.Conv2d(*a, **o)), (a[0], 8, 8), p=4, tile_dtype="float") for a, o in _TILED_CONVS),
        ],
        "tiled transpose conv": [
            _tiled(nn.ConvTranspose2d(*a, **o), (a[0], 6, 6), p=4, tile_dtype=dtype)
            for a, o in _TILED_CONVS
            for dtype in ("binary", "float")
        ],
    }


# Heads, whether causal, tokens and three times their width.
_ATTENTIONS: list[Any] = [
    *((4, False, (12, 96)), (2, True, (20, 24)), (1, False, (20, 192))),
    *((2, False, (4, 96)), (1, False, (48, 24)), (2, False, (32, 48))),
]
_SMALL_CONVS: list[Any] = [
    (16, 16, 3, (8, 8), {"padding": 1}, nn.Conv2d(16, 16, 3, 2)),
    (3, 16, 3, 2, (20, 20), {"padding": 1}, nn.Conv2d(16, 20, 3)),
    (16, 16, 1, (10, 10), {}, nn.Conv2d(16, 20, 1)),
    (16, 32, 1, 2, (10, 10), {}, nn.Conv2d(32, 20, 1)),
    (16, 32, 3, (10, 10), {"groups": 4, "padding": 1}, nn.Conv2d(32, 10, 1)),
    (16, 16, 5, (50,), {"padding": 2}, nn.Conv1d(16, 20, 3)),
    (16, 16, 3, (12, 12), {"groups": 16, "padding": 1}, nn.Conv2d(16, 16, 3, groups=16)),
]
_TILED_CONVS: list[Any] = [
    ((8, 8, 3), {"padding": 1, "groups": 2}),
    ((8, 16, 3), {"groups": 4, "stride": 2}),
    ((8, 16, 1), {"groups": 2}),
]


def run(probe: Probe, core: str) -> tuple[dict[str, float], int]:
    """The work of a probe's model, and the instructions of a run."""
    torch.manual_seed(0)
    module = probe.module.eval()
    inputs = torch.rand(2, *probe.shape) + 0.5 if probe.positive else torch.randn(2, *probe.shape)
    if probe.dtype != torch.float32:
        inputs = torch.randint(100, (2, *probe.shape), dtype=probe.dtype)
    work: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "net.c")
        plan = export_c(module, inputs[:1], path, name="net", optimize=probe.optimize, target=core)  # type: ignore[arg-type]
        result = measure(path, CPUS[core], inputs.flatten(1))
    for step in plan.steps:
        for unit, count in step.implementation.work.items():
            work[unit] = work.get(unit, 0) + count
    return work, max(result.instructions)


def fit(found: Sequence[tuple[dict[str, float], int]], known: dict[str, float]) -> float:
    """Add to ``known`` what units cost that are not in it; returns the largest relative error of a model."""
    units = sorted({unit for work, _ in found for unit in work} - set(known))
    counts = np.array([[work.get(unit, 0) for unit in units] for work, _ in found], np.float64)
    measured = np.array([count for _, count in found], np.float64)
    rest = measured - [sum(n * known[unit] for unit, n in work.items() if unit in known) for work, _ in found]
    costs = np.zeros(len(units))
    free = np.arange(len(units))
    while len(free):
        solved = np.linalg.lstsq(counts[:, free] / measured[:, None], rest / measured, rcond=1e-6)[0]
        if solved.min() >= 0:
            costs[free] = solved
            break
        free = np.delete(free, solved.argmin())
    known |= dict(zip(units, costs.tolist(), strict=True))
    errors = (counts @ costs - rest) / measured
    return float(np.abs(errors).max())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every group on every core; print the errors and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--core", choices=CORES, action="append", help="only this one; can be repeated")
    parser.add_argument("--counts", type=Path, metavar="FILE", help="keep counts here, and measure only what it lacks")
    parser.add_argument("--again", metavar="GROUP", action="append", default=[], help="measure this group in any case")
    arguments = parser.parse_args(argv)
    counts = json.loads(arguments.counts.read_text()) if arguments.counts and arguments.counts.exists() else {}
    table = {core: {unit: figures[i] for unit, figures in INSTRUCTIONS.items()} for i, core in enumerate(CORES)}
    for core in arguments.core or CORES:
        known: dict[str, float] = {}
        for group, models in probes().items():
            key = f"{core}, {group}"
            if key not in counts or group in arguments.again:
                counts[key] = [run(probe, core) for probe in models]
                if arguments.counts:
                    arguments.counts.write_text(json.dumps(counts))
            error = fit(counts[key], known)
            print(f"# {key}: within {error:.0%}", flush=True)
        table[core] = known
    for unit in dict.fromkeys(unit for core in CORES for unit in table[core]):
        print(f'    "{unit}": ({", ".join(f"{table[core].get(unit, 0):.3g}" for core in CORES)}),')


if __name__ == "__main__":
    main()
