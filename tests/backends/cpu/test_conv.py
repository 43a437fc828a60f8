"""The native ``tbn::conv1d`` and ``tbn::conv2d`` at every vector level against PyTorch on the oracle's weight."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import conv, library
from tbn_compiler.ops import reference
from tbn_compiler.tiling import TileLayout
from tests import oracle

tbn = torch.ops.tbn
CONVS: dict[int, tuple[Any, Any]] = {1: (tbn.conv1d, F.conv1d), 2: (tbn.conv2d, F.conv2d)}
AVAILABLE = cpu.info().available
every_level = pytest.mark.parametrize("level", AVAILABLE)


@pytest.fixture(autouse=True)
def _take_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compute small convolutions too, which they leave to PyTorch because it is faster."""
    monkeypatch.setattr(conv, "MIN_FILTERS", dict.fromkeys(cpu.LEVELS, 1))
    monkeypatch.setattr(conv, "MIN_MIXED_FILTERS", 1)
    monkeypatch.setattr(conv, "MIN_CHANNELS", 1)


def operands(shape: tuple[int, ...], p: int, num_alphas: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """``(packed tile, alpha, dense float64 weight)``, alphas of 3 bits."""
    rng = np.random.default_rng(seed)
    t = np.where(rng.random(math.prod(shape) // p) < 0.5, -1.0, 1.0)
    alpha = rng.integers(1, 9, num_alphas) / 8
    rows = np.resize(t, math.prod(shape)).reshape(shape[0], -1) * np.repeat(alpha, shape[0] // num_alphas)[:, None]
    return torch.from_numpy(oracle.pack(t)), torch.from_numpy(alpha).float(), torch.from_numpy(rows.reshape(shape))


def exact_input(*shape: int, seed: int = 0) -> Tensor:
    return oracle.exact(*shape, generator=torch.Generator().manual_seed(seed))


def check(
    level: str, x: Tensor, shape: tuple[int, ...], p: int, num_alphas: int, geometry: dict[str, Any], **kw: str
) -> None:
    """Float sums are exact here, in any order."""
    d = len(shape) - 2
    op, dense = CONVS[d]
    tile, alpha, weight = operands(shape, p, num_alphas)
    bias = exact_input(shape[0], seed=1)
    declined = cpu.info().declined
    in_channels = shape[1] * geometry.get("groups", 1)
    with cpu.use_level(level):
        got = op(x, tile, alpha, bias, in_channels, shape[0], shape[2:], p, **geometry, **kw)
    assert cpu.info().declined == declined, "PyTorch computed it"
    assert torch.equal(got.double(), dense(x.double(), weight, bias.double(), **geometry))


GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"padding": 1},
    {"stride": 2, "padding": 1},
    {"padding": 2, "dilation": 2},
    {"stride": 3, "padding": 2, "dilation": 2},
    {"groups": 2, "padding": 1},
]


@every_level
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize(("p", "per"), [(1, "layer"), (4, "tile"), (4, "row"), (3, "layer"), (5, "row")])
@pytest.mark.parametrize("d", [1, 2])
def test_geometry(d: int, p: int, per: str, geometry: dict[str, Any], level: str) -> None:
    groups = geometry.get("groups", 1)
    shape = (16, 15, *(3, 5)[:d])  # p = 3 and 5 are misaligned
    axes = {key: value if key == "groups" else [value] * d for key, value in geometry.items()}
    x = exact_input(2, 15 * groups, *(13, 18)[:d])
    check(level, x, shape, p, {"layer": 1, "tile": p, "row": 16}[per], axes)


@every_level
@pytest.mark.parametrize("channels", [4, 5, 33, 130])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (3, 40), (30, 2)], ids=str)
def test_sizes(size: tuple[int, int], channels: int, level: str) -> None:
    check(level, exact_input(1, channels, *size), (48, channels, 1, 1), 4, 4, {})
    check(level, exact_input(2, channels, *size), (48, channels, 3, 3), 4, 4, {"padding": [1, 1]})


@every_level
def test_geometry_differs_by_axis(level: str) -> None:
    geometry = {"stride": [2, 1], "padding": [0, 3], "dilation": [1, 2]}
    check(level, exact_input(2, 8, 9, 8), (8, 8, 2, 3), 4, 4, geometry)
    geometry = {"stride": [1, 3], "padding": [2, 0], "dilation": [3, 1]}
    check(level, exact_input(2, 8, 9, 17), (8, 8, 3, 2), 4, 4, geometry)


@every_level
@pytest.mark.parametrize(
    ("out_channels", "in_per_group", "groups", "p"),
    [(8, 1, 8, 4), (12, 2, 2, 6), (12, 2, 2, 3), (20, 6, 2, 5), (12, 3, 3, 2), (12, 2, 2, 8), (18, 2, 3, 4)],
)
def test_groups(out_channels: int, in_per_group: int, groups: int, p: int, level: str) -> None:
    """Groups that hold whole copies, start inside one, and share no rows; see the reference's tests."""
    x = exact_input(2, in_per_group * groups, 6, 5)
    check(level, x, (out_channels, in_per_group, 3, 2), p, 1, {"groups": groups, "padding": [1, 1]})


@every_level
@settings(max_examples=30)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.data())
def test_property(level: str, d: int, groups: int, rows: int, channels: int, data: st.DataObject) -> None:
    shape = (groups * rows, channels, *data.draw(st.tuples(*[st.integers(1, 4)] * d)))
    p = data.draw(st.sampled_from(oracle.divisors(math.prod(shape), 24)))
    size = data.draw(st.tuples(*[st.integers(1, 20)] * d))
    geometry: dict[str, Any] = {
        name: data.draw(st.lists(st.integers(low, 3), min_size=d, max_size=d), label=name)
        for name, low in (("stride", 1), ("padding", 0), ("dilation", 1))
    }
    spans = zip(size, geometry["padding"], geometry["dilation"], shape[2:], strict=True)
    assume(all(s + 2 * pad > dil * (k - 1) for s, pad, dil, k in spans))
    check(level, exact_input(1, channels * groups, *size), shape, p, 1, geometry | {"groups": groups})


@every_level
def test_rows_of_several_bands_and_wide_rows(level: str) -> None:
    """Tables of the whole image do not fit the cache: it is computed in bands of rows, and a band of one row."""
    check(level, exact_input(1, 10, 70, 64), (8, 10, 3, 3), 2, 2, {"padding": [1, 1]})
    check(level, exact_input(1, 6, 4, 3000), (4, 6, 3, 3), 2, 2, {"stride": [1, 2]})


@every_level
@pytest.mark.parametrize("threads", [2, 3, 8])
def test_threads(threads: int, level: str) -> None:
    torch.set_num_threads(threads)
    try:
        for batch in (1, 5):
            check(level, exact_input(batch, 8, 9, 11), (16, 4, 3, 3), 4, 4, {"groups": 2, "padding": [1, 1]})
    finally:
        torch.set_num_threads(1)


@every_level
@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("channels", [12, 300])
def test_integers(channels: int, activation: str, level: str) -> None:
    tile, alpha, _ = operands((16, channels, 3, 3), 4, 4)
    x, bias = torch.randn(3, channels, 6, 7) * 10, torch.randn(16)
    args = (x, tile, alpha, bias, channels, 16, [3, 3], 4)
    kw: dict[str, Any] = {"padding": [1, 1], "activation": activation}
    with cpu.use_level(level):
        got = tbn.conv2d(*args, **kw)
    expected = reference.KERNELS["conv2d"](*args, **kw)
    if activation == "int8":
        assert torch.equal(got, expected)
    else:  # the mean is summed in another order
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))


@every_level
@pytest.mark.parametrize("geometry", [*GEOMETRIES, {"groups": 4}], ids=str)
@pytest.mark.parametrize(("p", "hadamard"), [(1, False), (4, False), (3, False), (4, True)])
@pytest.mark.parametrize(("d", "last"), [(1, False), (2, False), (2, True)])
def test_integers_of_every_geometry(
    d: int, p: int, hadamard: bool, geometry: dict[str, Any], last: bool, level: str
) -> None:
    """int8 sums are exact, and the result is in the memory format of the input."""
    groups = geometry.get("groups", 1)
    tile, alpha, _ = operands((48, 12, *(3, 5)[:d]), p, p)
    x, bias = torch.randn(2, 12 * groups, *(13, 40)[:d]), torch.randn(48)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    axes = {key: value if key == "groups" else [value] * d for key, value in geometry.items()}
    args = (x, tile, alpha, bias, 12 * groups, 48, [3, 5][:d], p)
    kw = {**axes, "hadamard": hadamard, "activation": "int8", "epilogue": "relu"}
    name, declined = f"conv{d}d", cpu.info().declined
    with cpu.use_level(level):
        got = getattr(tbn, name)(*args, **kw)
    assert cpu.info().declined == declined
    assert torch.equal(got, reference.KERNELS[name](*args, **kw))
    assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    with FakeTensorMode() as mode:
        fake = getattr(tbn, name)(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args), **kw)
    assert fake.stride() == got.stride()


FOLDED = {
    "7 x 7, 3 channels": ((64, 3, 7, 7), {"stride": [2, 2], "padding": [3, 3]}),
    "3 x 3, 1 channel": ((16, 1, 3, 3), {"padding": [1, 1]}),
    "5 x 1, 2 channels": ((16, 2, 5, 1), {"padding": [2, 0], "dilation": [2, 1]}),
    "3 x 3, 5 channels apart": ((16, 5, 3, 3), {"dilation": [1, 2]}),
    "3 x 3, 8 channels, groups": ((16, 8, 3, 3), {"padding": [1, 1], "groups": 2}),
    "4 x 3, 4 channels": ((20, 4, 4, 3), {"stride": [3, 1]}),
}


@pytest.mark.parametrize("level", [level for level in AVAILABLE if library.has_dots(level)])
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", FOLDED)
def test_kernels_of_few_channels(name: str, last: bool, hadamard: bool, level: str) -> None:
    """Their rows are put into one where that makes fewer products of bytes."""
    shape, geometry = FOLDED[name]
    if hadamard and (shape[1] % 4 or geometry.get("groups", 1) > 1):
        shape, geometry = (shape[0], 4, *shape[2:]), {key: geometry[key] for key in geometry if key != "groups"}
    tile, alpha, _ = operands(shape, 4, 4)
    x = torch.randn(2, shape[1] * geometry.get("groups", 1), 11, 20, generator=torch.Generator().manual_seed(0))
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    arguments = (x, tile, alpha, exact_input(shape[0], seed=1), x.shape[1], shape[0], shape[2:], 4)
    options = {**geometry, "hadamard": hadamard, "activation": "int8"}
    with cpu.use_level(level):
        got = tbn.conv2d(*arguments, **options)
    assert torch.equal(got, reference.KERNELS["conv2d"](*arguments, **options))


# samples, channels of a group, filters of a group and copy, size, geometry; groups in the end
SHARED: dict[str, tuple[int, int, int, tuple[int, int], dict[str, Any], int]] = {
    "blocks that do not fit": (1, 64, 16, (13, 11), {"padding": 1}, 1),
    "more blocks than lanes": (1, 64, 48, (30, 29), {"padding": 1}, 1),
    "more samples than lanes": (35, 64, 32, (5, 4), {"padding": 1}, 1),
    "samples of several blocks": (3, 128, 24, (14, 14), {"padding": 1}, 1),
    "stride": (2, 64, 32, (15, 17), {"padding": 1, "stride": 2}, 1),
    "strides that share nothing": (2, 64, 32, (19, 23), {"stride": (4, 3)}, 1),
    "dilation": (2, 64, 32, (16, 15), {"padding": 2, "dilation": (2, 3)}, 1),
    "both": (2, 64, 32, (21, 17), {"padding": 2, "dilation": (2, 1), "stride": (1, 2)}, 1),
    "groups": (2, 64, 16, (12, 12), {"padding": 1}, 2),
    "one row": (9, 64, 32, (3, 40), {}, 1),
}


@every_level
@pytest.mark.parametrize("hadamard", [False, True])
@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
@pytest.mark.parametrize("name", SHARED)
def test_pixels_that_share_their_tables(name: str, activation: str, hadamard: bool, level: str) -> None:
    """Whole steps of channels: results are the reference's. With sums that are rounded they are the same whatever the
    threads, the other samples and the order of the image are."""
    samples, channels, filters, (height, width), geometry, groups = SHARED[name]
    p = 2
    inputs, outputs = channels * groups * (p if hadamard else 1), filters * groups * p
    tile, alpha, _ = operands((outputs, inputs // groups, 3, 3), p, p)
    x = exact_input(samples, inputs, height, width)
    names = ("stride", "padding", "dilation")
    sizes = {key: np.broadcast_to(geometry[key], 2).tolist() for key in names if key in geometry}
    options = {**sizes, "groups": groups, "activation": activation, "hadamard": hadamard}

    def run(x: Tensor) -> Tensor:
        result: Tensor = tbn.conv2d(x, tile, alpha, None, inputs, outputs, [3, 3], p, **options)
        return result

    expected = reference.KERNELS["conv2d"](x, tile, alpha, None, inputs, outputs, [3, 3], p, **options)
    inexact = torch.randn_like(x)
    threads = torch.get_num_threads()
    with cpu.use_level(level):
        assert torch.equal(run(x), expected)
        found = run(inexact)
        assert torch.equal(run(inexact.contiguous(memory_format=torch.channels_last)), found)
        assert torch.equal(torch.cat([run(sample) for sample in inexact.split(1)]), found)
        try:
            torch.set_num_threads(3)
            assert torch.equal(run(inexact), found)
        finally:
            torch.set_num_threads(threads)


@every_level
@pytest.mark.parametrize("epilogue", ["relu", "gelu", "gelu_tanh", "silu"])
def test_epilogues(epilogue: str, level: str) -> None:
    tile, alpha, _ = operands((16, 12, 3, 3), 4, 4)
    args = (exact_input(2, 12, 6, 7), tile, alpha, exact_input(16, seed=1), 12, 16, [3, 3], 4)
    with cpu.use_level(level):
        got = tbn.conv2d(*args, epilogue=epilogue)
    assert torch.equal(got, reference.KERNELS["conv2d"](*args, epilogue=epilogue))


@every_level
@pytest.mark.parametrize(("p", "p_in", "shift"), [(8, 2, 0), (4, 4, 0), (4, 1, 5)])
def test_other_layouts(p: int, p_in: int, shift: int, level: str) -> None:
    layout = TileLayout((16, 8, 3, 3), p, p_in, shift)
    tile = torch.from_numpy(oracle.pack(np.random.default_rng(0).standard_normal(layout.tile_size)))
    args = (exact_input(2, 8, 6, 7), tile, torch.ones(1), None, 8, 16, [3, 3], p)
    declined = cpu.info().declined
    with cpu.use_level(level):
        got = tbn.conv2d(*args, p_in=p_in, shift=shift)
    assert cpu.info().declined == declined
    assert torch.equal(got, reference.KERNELS["conv2d"](*args, p_in=p_in, shift=shift))


@every_level
def test_inputs_of_every_kind(level: str) -> None:
    tile, alpha, weight = operands((16, 12, 3, 3), 4, 4)
    x = exact_input(2, 12, 6, 7)
    rest = (tile, alpha, None, 12, 16, [3, 3], 4)
    expected = F.conv2d(x.double(), weight)
    shifted = torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)
    with cpu.use_level(level):
        for given_x in (x.to(memory_format=torch.channels_last), shifted, torch.stack([x, x], 4)[..., 0]):
            got = tbn.conv2d(given_x, *rest)
            last = given_x.is_contiguous(memory_format=torch.channels_last)
            assert got.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
            assert torch.equal(got.double(), expected)
        assert torch.equal(tbn.conv2d(x[0], *rest).double(), expected[0])
        assert tbn.conv2d(x[:0], *rest).shape == (0, 16, 4, 5)
        half = tbn.conv2d(x.bfloat16(), *rest)
        assert torch.equal(half, F.conv2d(x.bfloat16().double(), weight).to(torch.bfloat16))
        copies = torch.tensor([0.5, 2.0, 1.0])
        got = tbn.conv2d(x[:, :4], *rest, copies)
        assert torch.equal(got, reference.KERNELS["conv2d"](x[:, :4], *rest, copies))


@every_level
@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_default_dtype_is_not_that_of_results(default: torch.dtype, activation: str, level: str) -> None:
    tile, alpha, _ = operands((16, 8, 3, 3), 4, 4)
    x = torch.randn(2, 8, 6, 5).contiguous(memory_format=torch.channels_last)
    args, kw = (x, tile, alpha, None, 8, 16, [3, 3], 4), {"activation": activation}
    expected = reference.KERNELS["conv2d"](*args, **kw)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with cpu.use_level(level):
            got = tbn.conv2d(*args, **kw)
    finally:
        torch.set_default_dtype(before)
    assert got.stride() == expected.contiguous(memory_format=torch.channels_last).stride()
    oracle.assert_close(got, expected)


@every_level
@pytest.mark.parametrize(("name", "value"), [("padding", -1), ("stride", 0), ("dilation", 0)])
def test_geometry_that_makes_no_sense_is_an_error(name: str, value: int, level: str) -> None:
    tile, alpha, _ = operands((16, 8, 3, 3), 4, 4)
    with cpu.use_level(level), pytest.raises(ValueError, match=f"{name} must be at least {value + 1}"):
        tbn.conv2d(torch.randn(1, 8, 9, 9), tile, alpha, None, 8, 16, [3, 3], 4, **{name: [value, value]})


@every_level
@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
def test_an_empty_image_is_pytorchs_error(activation: str, level: str) -> None:
    tile, alpha, _ = operands((16, 8, 3, 3), 4, 4)
    kw: dict[str, Any] = {"padding": [2, 2], "activation": activation}
    with cpu.use_level(level):
        tbn.conv2d(torch.randn(1, 8, 4, 4), tile, alpha, None, 8, 16, [3, 3], 4, **kw)
        with pytest.raises((RuntimeError, IndexError)):
            tbn.conv2d(torch.randn(1, 8, 0, 4), tile, alpha, None, 8, 16, [3, 3], 4, **kw)


def test_a_kernel_that_does_not_fit_is_pytorchs_error() -> None:
    tile, alpha, _ = operands((16, 12, 3, 3), 4, 4)
    args = (tile, alpha, None, 12, 16, [3, 3], 4)
    tbn.conv2d(exact_input(1, 12, 6, 7), *args)  # the plan exists
    with pytest.raises(RuntimeError, match=r"[Kk]ernel size"):
        tbn.conv2d(exact_input(1, 12, 2, 7), *args)


@pytest.mark.skipif(not AVAILABLE, reason="no library; test_library checks that")
def test_what_is_left_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv, "MIN_FILTERS", dict.fromkeys(["avx512amx", "avx512vnni", "avx512", "avx2"], 32))
    monkeypatch.setattr(conv, "MIN_CHANNELS", 4)

    def reasons(level: str, shape: tuple[int, ...], groups: int = 1, size: int = 8) -> str:
        tile, alpha, weight = operands(shape, 2, 1)
        x = exact_input(1, shape[1] * groups, *[size] * (len(shape) - 2))
        before = cpu.info().declined
        op = (tbn.conv1d, tbn.conv2d, tbn.conv3d)[len(shape) - 3]
        with cpu.use_level(level):
            got = op(x, tile, alpha, None, shape[1] * groups, shape[0], shape[2:], 2, groups=groups)
        dense = (F.conv1d, F.conv2d, F.conv3d)[len(shape) - 3]
        assert torch.equal(got.double(), dense(x.double(), weight, groups=groups))
        after = cpu.info().declined
        return ", ".join(text for text in after if after[text] != before.get(text))

    assert "PyTorch convolves" in reasons("portable", (64, 8, 3, 3))
    assert "three dimensions" in reasons("portable", (8, 8, 3, 3, 3))
    best = library.level()
    assert best is not None
    assert "fewer than 4 input channels" in reasons(best, (64, 1, 3, 3), groups=8)
    assert "rows wider than" in reasons(best, (4, 8, 3), size=20000)
    for level in set(AVAILABLE) & set(conv.MIN_FILTERS):
        few = reasons(level, (8, 8, 3, 3))
        assert few == "" if library.has_limbs(level) else "different filters in a group" in few
        assert reasons(level, (128, 8, 3, 3)) == ""


@every_level
def test_opcheck(level: str) -> None:
    tile, alpha, _ = operands((16, 12, 3, 3), 4, 4)
    x = torch.randn(2, 12, 6, 7, requires_grad=True)
    with cpu.use_level(level):
        args = (x, tile, alpha, torch.randn(16), 12, 16, [3, 3], 4)
        torch.library.opcheck(tbn.conv2d.default, args, {"padding": [1, 1]})
        args = (torch.randn(2, 12, 9), tile, alpha, None, 12, 48, [3], 4)
        torch.library.opcheck(tbn.conv1d.default, args, {"stride": [2], "activation": "int8"})
