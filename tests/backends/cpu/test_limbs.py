"""float32 convolutions as products of the three bytes of 24-bit integers, and the samples that are looked up instead.

Levels that multiply floats as they are keep the same bound, with room: their sums are rounded, their inputs are not.

The bound is that of ``docs/cpu.md``: an input is off by at most 2^-23 of its sample's largest magnitude, sums are
exact, and the sum, its products with alpha and scale, and the bias are rounded as float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import conv, library
from tbn_compiler.ops.reference import KERNELS
from tests import oracle

tbn = torch.ops.tbn
CONVS = {1: F.conv1d, 2: F.conv2d}
LEVELS = [level for level in cpu.info().available if library.has_limbs(level) or library.keeps_floats(level)]
levels = pytest.mark.parametrize("level", LEVELS)
both_formats = pytest.mark.parametrize("last", [False, True], ids=["planes", "channels_last"])

GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": 2},
    {"stride": 3, "padding": 2, "dilation": 2},
]


@pytest.fixture(autouse=True)
def _every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are computed so, or looked up, that are left to others because these are faster."""
    monkeypatch.setattr(conv, "MAX_LIMB_WEIGHTS", {})
    monkeypatch.setattr(conv, "MIN_FLOAT_FILTERS", 1)
    monkeypatch.setattr(conv, "MIN_FILTERS", dict.fromkeys(cpu.LEVELS, 1))
    monkeypatch.setattr(conv, "MIN_MIXED_FILTERS", 1)
    monkeypatch.setattr(conv, "MIN_CHANNELS", 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(shape: tuple[int, ...], p: int, alphas: int) -> tuple[Tensor, Tensor]:
    """``(packed tile, alpha)`` of a weight of this shape."""
    rng = np.random.default_rng(0)
    tile = torch.from_numpy(oracle.pack(rng.standard_normal(math.prod(shape) // p)))
    return tile, torch.from_numpy(rng.uniform(0.01, 2.0, alphas)).float()


def run(level: str, x: Tensor, *args: Any, **kw: Any) -> Tensor:
    """The native kernel's result, and nobody else's."""
    declined = cpu.info().declined
    with cpu.use_level(level):
        got: Tensor = getattr(tbn, f"conv{x.dim() - 2}d")(x, *args, **kw)
    assert cpu.info().declined == declined, "PyTorch computed it"
    return got


def look_up(level: str, x: Tensor, tile: Tensor, *args: Any, **kw: Any) -> Tensor:
    """The result of the level's lookups. Plans belong to a tile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conv, "multiplies_bytes", lambda call: False)
        return run(level, x, tile.clone(), *args, **kw)


def same(got: Tensor, expected: Tensor) -> None:
    """Bit for bit, and NaN in the same places."""
    torch.testing.assert_close(got, expected, rtol=0.0, atol=0.0, equal_nan=True)


def check(level: str, x: Tensor, shape: tuple[int, ...], p: int, geometry: dict[str, Any], **options: Any) -> None:
    """Every output against the exact one, by the bound."""
    d = x.dim() - 2
    tile, alpha = stored(shape, p, p)
    bias = normal(shape[0], seed=1)
    axes = {key: [value] * d for key, value in geometry.items()}
    args = (tile, alpha, bias, shape[1], shape[0], shape[2:], p)
    got = run(level, x, *args, **axes, **options)
    weight = KERNELS["unpack"](tile, alpha.double(), shape, p, **options)
    exact = CONVS[d](x.double(), weight, None, **geometry)
    wide_bias = bias.double().view(-1, *[1] * d)
    most = x.abs().amax(dim=tuple(range(1, d + 2)), keepdim=True).double()
    inputs = math.prod(shape[1:]) * 2.0**-23 * most * weight.abs().amax(dim=tuple(range(1, d + 2))).view(-1, *[1] * d)
    rounding = 2.0**-22 * (exact.abs() + inputs + wide_bias.abs())
    assert bool(((got.double() - exact - wide_bias).abs() <= inputs + rounding).all())
    assert torch.equal(run(level, x, *args, **axes, **options, epilogue="relu"), got.relu())


@levels
@both_formats
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("p", [1, 4, 3])
def test_bound(p: int, geometry: dict[str, Any], last: bool, level: str) -> None:
    x = normal(3, 20, 11, 19) * torch.tensor([1.0, 3e-25, 5e20]).view(-1, 1, 1, 1)  # a scale for each sample
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    check(level, x, (48, 20, 3, 3), p, geometry)
    if not last:
        check(level, x[..., 0, :].contiguous(), (48, 20, 5), p, geometry)


@levels
def test_groups_do_not_share_a_power_of_two(level: str) -> None:
    """Groups are looked up: the inputs of one may be much smaller than those of another."""
    x = normal(1, 32, 8, 9)
    x[:, 16:] *= 1e-5
    tile, alpha = stored((64, 16, 3, 3), 4, 1)
    got = run(level, x, tile, alpha, None, 32, 64, (3, 3), 4, groups=2)
    exact = F.conv2d(x.double(), KERNELS["unpack"](tile, alpha.double(), (64, 16, 3, 3), 4), groups=2)
    for part, right in zip(got.double().chunk(2, 1), exact.chunk(2, 1), strict=True):
        assert (part - right).abs().max() <= 1e-5 * right.abs().max()


@levels
@both_formats
@pytest.mark.parametrize("options", [{"hadamard": True}, {"shift": 5}], ids=str)
def test_other_layouts(options: dict[str, Any], last: bool, level: str) -> None:
    x = normal(2, 24, 7, 18)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    check(level, x, (48, 24, 3, 3), 4, {"padding": 1}, **options)


@levels
@both_formats
def test_inputs_that_are_summed_or_scaled_first(last: bool, level: str) -> None:
    tile, alpha = stored((32, 24, 3, 3), 4, 1)
    x = normal(2, 24, 7, 18)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    replicas = torch.tensor([0.5, 2.0, 1.0])
    cases: list[tuple[int, tuple[Tensor, ...], dict[str, Any]]] = [(24, (), {"p_in": 2}), (8, (replicas,), {})]
    for channels, rest, kw in cases:
        args: tuple[Any, ...] = (tile, alpha, None, 24, 32, [3, 3], 4, *rest)
        got = run(level, x[:, :channels], *args, **kw)
        torch.testing.assert_close(got, KERNELS["conv2d"](x[:, :channels], *args, **kw), rtol=1e-5, atol=2e-4)


@levels
@both_formats
@pytest.mark.parametrize("channels", [1, 3, 5, 16, 17, 36])
def test_channels(channels: int, last: bool, level: str) -> None:
    """Bytes are made of 16 and of 4 planes at a time, images of few channels are folded, and others are spread."""
    x = normal(2, channels, 9, 21)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    check(level, x, (24, channels, 7, 7), 4, {"stride": 2, "padding": 3})


@levels
def test_integers_of_the_largest_magnitudes(level: str) -> None:
    """2 - 2^-23 would round to an integer of 25 bits; powers of two are the smallest largest magnitudes of a scale."""
    for largest in (2.0 - 2.0**-23, 1.0, -2.0 + 2.0**-23, -1.0):
        x = normal(1, 16, 5, 5).clamp(-0.9, 0.9)
        x[0, :, 2, 1:] = largest
        check(level, x, (32, 16, 3, 3), 1, {"padding": 1})


@levels
@both_formats
@pytest.mark.parametrize("shape", [(32, 12, 3, 3), (32, 3, 7, 7)], ids=str)
def test_what_integers_do_not_hold_is_looked_up(shape: tuple[int, ...], last: bool, level: str) -> None:
    """Those samples have the bits of lookups, and no other one sees them. Floats as they are hold more."""
    args = (*stored(shape, 4, 4), normal(32, seed=1), shape[1], 32, list(shape[2:]), 4)
    kw: dict[str, Any] = {"padding": [1, 1]}
    clean = normal(9, shape[1], 12, 19)
    x = clean.clone()
    x[0, 1, 2, 3] = math.nan
    x[2, 1, 2, 3], x[2, 2, 7, 8] = math.inf, -math.inf
    x[4] *= 2.0**126
    x[5] *= 2.0**-130  # denormal
    x[6] *= 2.0**-101
    x[8, 1, 2, 3] = 1e4  # the integers of the others would have 11 bits
    special, zero = [0, 2, 4] if library.keeps_floats(level) else [0, 2, 4, 5, 6, 8], 3
    x[zero] = 0.0
    given, clean = (t.contiguous(memory_format=torch.channels_last) if last else t for t in (x, clean))
    got = run(level, given, *args, **kw)
    assert torch.equal(got[special].nan_to_num(7.0), look_up(level, x, *args, **kw)[special].nan_to_num(7.0))
    assert torch.equal(got[zero], args[2].view(-1, 1, 1).expand_as(got[zero]))
    others = [1, 7]
    assert torch.equal(got[others], run(level, clean, *args, **kw)[others])
    if shape[1] > 3 or not library.keeps_floats(level):  # lookups, too, sum three channels at a time
        assert not torch.equal(got[others], look_up(level, x, *args, **kw)[others])


@levels
@pytest.mark.parametrize("special", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan_in_both_formats(special: float, level: str) -> None:
    args = (*stored((32, 12, 3, 3), 4, 4), None, 12, 32, [3, 3], 4)
    x = normal(2, 12, 8, 9)
    x[1, 5, 4, 4] = special
    for form in (torch.contiguous_format, torch.channels_last):
        got = run(level, x.contiguous(memory_format=form), *args)
        oracle_result = KERNELS["conv2d"](x, *args)
        assert torch.equal(got.isfinite(), oracle_result.isfinite())
        assert torch.equal(got.isnan(), oracle_result.isnan())


@levels
def test_threads_batches_and_formats_change_no_bit(level: str) -> None:
    args = (*stored((40, 20, 3, 3), 4, 4), normal(40, seed=1), 20, 40, [3, 3], 4)
    kw: dict[str, Any] = {"padding": [1, 1]}
    x = normal(3, 20, 30, 23)
    x[1, 0, 0, 0] = math.inf
    expected = run(level, x, *args, **kw)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            same(run(level, x, *args, **kw), expected)
            for i in range(3):
                same(run(level, x[i : i + 1], *args, **kw), expected[i : i + 1])
            last = run(level, x.contiguous(memory_format=torch.channels_last), *args, **kw)
            same(last.contiguous(), expected)
    finally:
        torch.set_num_threads(1)
    for other in LEVELS:
        if library.keeps_floats(other) == library.keeps_floats(level):
            same(run(other, x, *args, **kw), expected)


@levels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, level: str) -> None:
    args = (*stored((32, 12, 3, 3), 4, 4), normal(32, seed=1), 12, 32, [3, 3], 4)
    x = normal(2, 12, 8, 9).to(dtype)
    got = run(level, x, *(a.to(dtype) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))
    expected = run(level, x.float(), args[0], *(a.to(dtype).float() for a in args[1:3]), *args[3:])
    assert torch.equal(got, expected.to(dtype))


@levels
def test_sums_are_as_good_as_those_of_floats(level: str) -> None:
    """What one scale for a sample costs is less than the rounding of sums in float32."""
    tile, alpha = stored((64, 64, 3, 3), 1, 1)
    x = normal(1, 64, 14, 14).relu()
    weight = KERNELS["unpack"](tile, alpha, [64, 64, 3, 3], 1)
    exact = F.conv2d(x.double(), weight.double())
    error = (run(level, x, tile, alpha, None, 64, 64, [3, 3], 1).double() - exact).square().mean()
    # One product after the other: PyTorch's own sums are in another order on each machine.
    plain = torch.zeros(64, 144)
    for column, factors in zip(F.unfold(x, 3)[0], weight.flatten(1).T, strict=True):
        plain += factors[:, None] * column
    assert error <= (plain.view_as(exact).double() - exact).square().mean()


@pytest.mark.skipif("avx512vnni" not in LEVELS, reason="the machine lacks the level")
def test_where_lookups_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the level of VNNI many filters are looked up; everywhere, sums that could leave 32 bits."""
    monkeypatch.undo()

    def looked_up(level: str, filters: int, size: int, channels: int = 16) -> bool:
        args = (*stored((filters, channels, size, size), 1, 1), None, channels, filters, [size, size], 1)
        x = normal(1, channels, 8, 8)
        return torch.equal(run(level, x, *args), look_up(level, x, *args))

    assert not looked_up("avx512vnni", 56, 3)
    assert looked_up("avx512vnni", 64, 3)
    assert not looked_up("avx512vnni", 512, 1)
    assert looked_up("avx512vnni", 544, 1)
    for level in LEVELS:
        if library.keeps_floats(level):
            continue
        if level not in conv.MAX_LIMB_WEIGHTS:
            assert not looked_up(level, 64, 3)
        monkeypatch.setattr(conv, "MAX_LIMB_INPUTS", 16 * 9 - 1)
        assert looked_up(level, 32, 3)
        monkeypatch.undo()
