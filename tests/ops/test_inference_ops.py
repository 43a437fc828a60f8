"""``tbn::linear`` and ``tbn::conv1d/2d/3d`` against PyTorch's dense layers on the oracle's weight."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tbn_compiler.backends import cpu
from tests import oracle

tbn = torch.ops.tbn
CONVS: dict[int, tuple[Any, Any]] = {1: (tbn.conv1d, F.conv1d), 2: (tbn.conv2d, F.conv2d), 3: (tbn.conv3d, F.conv3d)}


def operands(
    shape: tuple[int, ...], p: int, num_alphas: int, *, packed: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """``(stored tile, alpha, dense weight)``; the dense weight is the oracle's."""
    q = math.prod(shape) // p
    t = oracle.array(oracle.exact(q))
    t = np.where(t > 0, 1.0, -1.0) if packed else t
    alpha = np.random.default_rng(p).integers(1, 9, num_alphas) / 8
    tile = torch.from_numpy(oracle.pack(t)) if packed else torch.from_numpy(t).to(dtype)
    return tile, torch.from_numpy(alpha).to(dtype), torch.from_numpy(oracle.fill(shape, t, alpha)).to(dtype)


def all_distinct(shape: tuple[int, ...], p: int) -> bool:
    return shape[0] % p != 0 and len(set(oracle.row_starts(shape, p))) == shape[0]


# Linear

# The names say how the tile lies on the rows: R is the number of unique rows.
LINEAR = {
    "binary": (6, 5, 1),
    "aligned": (8, 6, 4),
    "one row": (4, 6, 4),
    "half a row": (4, 6, 8),
    "misaligned, R=3 of 6": (6, 8, 4),
    "misaligned, R=5 of 10": (10, 12, 4),
    "misaligned, q mod 8": (9, 10, 6),
}


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("per_tile", [False, True], ids=["1 alpha", "p alphas"])
@pytest.mark.parametrize("case", LINEAR)
def test_linear(case: str, per_tile: bool, lead: tuple[int, ...]) -> None:
    m, n, p = LINEAR[case]
    x, bias = oracle.exact(*lead, n, dtype=torch.float64), oracle.exact(m, dtype=torch.float64)
    for packed, b in itertools.product((True, False), (None, bias)):
        tile, alpha, weight = operands((m, n), p, p if per_tile else 1, packed=packed)
        # Every product and sum is exact in float64.
        assert torch.equal(tbn.linear(x, tile, alpha, b, n, m, p), F.linear(x, weight, b))


@pytest.mark.parametrize("mnp", [(3, 16, 2), (5, 784, 4), (1, 12, 3), (15, 8, 2)], ids=str)
def test_linear_all_rows_distinct_and_an_alpha_per_copy(mnp: tuple[int, int, int]) -> None:
    m, n, p = mnp
    assert all_distinct((m, n), p)
    tile, alpha, weight = operands((m, n), p, p)
    x = oracle.exact(4, n, dtype=torch.float64)
    assert torch.equal(tbn.linear(x, tile, alpha, None, n, m, p), F.linear(x, weight))


@given(st.integers(1, 12), st.integers(1, 12), st.booleans(), st.booleans(), st.data())
def test_linear_property(m: int, n: int, per_tile: bool, packed: bool, data: st.DataObject) -> None:
    p = data.draw(st.sampled_from(oracle.divisors(m * n)))
    tile, alpha, weight = operands((m, n), p, p if per_tile else 1, packed=packed)
    x, bias = oracle.exact(3, n, dtype=torch.float64), oracle.exact(m, dtype=torch.float64)
    assert torch.equal(tbn.linear(x, tile, alpha, bias, n, m, p), F.linear(x, weight, bias))


# Convolution


def convolve(
    d: int, x: Tensor, shape: tuple[int, ...], p: int, num_alphas: int, geometry: dict[str, Any], *, packed: bool = True
) -> None:
    tile, alpha, weight = operands(shape, p, num_alphas, packed=packed)
    op, dense = CONVS[d]
    for bias in (None, oracle.exact(shape[0], dtype=torch.float64)):
        got = op(x, tile, alpha, bias, shape[1] * geometry.get("groups", 1), shape[0], shape[2:], p, **geometry)
        assert torch.equal(got, dense(x, weight, bias, **geometry))


GEOMETRIES: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": 2, "dilation": 2},
    {"stride": 3, "padding": 2, "dilation": 2},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("per_tile", [False, True], ids=["1 alpha", "p alphas"])
@pytest.mark.parametrize("p", [1, 2, 4, 3, 5, 6])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_conv(d: int, p: int, per_tile: bool, geometry: dict[str, Any]) -> None:
    kernel = (3, 2, 2)[:d]
    shape = (8, 5 * 3, *kernel)  # p = 3, 5, 6 are misaligned
    geometry = {key: [value] * d for key, value in geometry.items()}
    x = oracle.exact(2, 15, *(7, 6, 5)[:d], dtype=torch.float64)
    for packed in (True, False):
        convolve(d, x, shape, p, p if per_tile else 1, geometry, packed=packed)


def test_conv_geometry_differs_by_dimension() -> None:
    geometry = {"stride": [2, 1], "padding": [0, 3], "dilation": [1, 2]}
    convolve(2, oracle.exact(2, 4, 9, 8, dtype=torch.float64), (8, 4, 2, 3), 4, 4, geometry)


@pytest.mark.parametrize("per_tile", [False, True], ids=["1 alpha", "p alphas"])
@pytest.mark.parametrize(
    ("out_channels", "in_per_group", "groups", "p"),
    [
        (8, 1, 8, 4),  # depthwise: one row a group
        (16, 1, 8, 4),  # depthwise with a channel multiplier; R = 4 > 2 rows a group
        (12, 2, 2, 6),  # R = 2 < 6 rows a group, 6 a multiple of 2
        (12, 2, 2, 2),  # R = 6 = 6 rows a group
        (12, 2, 2, 3),  # R = 4 < 6 rows a group, 6 no multiple of 4: groups start inside a copy
        (20, 3, 2, 5),  # R = 4 < 10 rows a group, no multiple
        (12, 3, 3, 2),  # R = 6 > 4 rows a group, no multiple
        (12, 2, 2, 8),  # misaligned, R = 3 < 6 rows a group
        (20, 2, 4, 8),  # misaligned, R = 5 = 5 rows a group
        (20, 2, 2, 8),  # misaligned, R = 5 < 10
        (18, 2, 3, 4),  # misaligned, R = 9 > 6 rows a group
        (12, 2, 4, 24),  # q = half a row
    ],
)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_conv_groups(d: int, out_channels: int, in_per_group: int, groups: int, p: int, per_tile: bool) -> None:
    shape = (out_channels, in_per_group, *(3, 2, 2)[:d])
    x = oracle.exact(2, in_per_group * groups, *(6, 5, 4)[:d], dtype=torch.float64)
    convolve(d, x, shape, p, p if per_tile else 1, {"groups": groups, "padding": [1] * d})


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.booleans(), st.data())
def test_conv_groups_property(d: int, groups: int, rows: int, cin: int, per_tile: bool, data: st.DataObject) -> None:
    shape = (groups * rows, cin, *data.draw(st.tuples(*[st.integers(1, 3)] * d)))
    p = data.draw(st.sampled_from(oracle.divisors(math.prod(shape), 24)))
    x = oracle.exact(1, cin * groups, *[4] * d, dtype=torch.float64)
    convolve(d, x, shape, p, p if per_tile else 1, {"groups": groups})


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_conv_unbatched_and_empty_batch(d: int, groups: int) -> None:
    shape, sizes = (8, 4 // groups, *(3,) * d), (5,) * d
    for p in (4, 3 if d != 2 or groups == 2 else 9):
        convolve(d, oracle.exact(4, *sizes, dtype=torch.float64), shape, p, 1, {"groups": groups})
        convolve(d, oracle.exact(0, 4, *sizes, dtype=torch.float64), shape, p, 1, {"groups": groups})


# Layouts and dtypes


def test_non_contiguous_operands() -> None:
    tile, alpha, weight = operands((8, 6), 4, 4)
    wide = oracle.exact(6, 5, 3, dtype=torch.float64)
    x = wide.permute(2, 1, 0)
    expected = F.linear(x, weight)
    assert torch.equal(tbn.linear(x, tile, alpha, None, 6, 8, 4), expected)
    stretched = torch.stack([tile, tile], 1)[:, 0], torch.stack([alpha, alpha], 1)[:, 0]
    assert torch.equal(tbn.linear(x, *stretched, None, 6, 8, 4), expected)
    assert torch.equal(tbn.linear(x[:, ::2], tile, alpha, None, 6, 8, 4), expected[:, ::2])


@pytest.mark.parametrize("p", [4, 3])
def test_channels_last_values(p: int) -> None:
    x = oracle.exact(2, 6, 5, 5, dtype=torch.float64).to(memory_format=torch.channels_last)
    convolve(2, x, (8, 6, 3, 3), p, 1, {})


@pytest.mark.parametrize("dtype", oracle.FLOATS)
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("m", "n", "p"), [(8, 6, 4), (6, 8, 4)])
def test_dtypes(dtype: torch.dtype, packed: bool, m: int, n: int, p: int) -> None:
    """Result in the dtype of the input, whatever the alphas and the bias are stored in."""
    tile, alpha, weight = operands((m, n), p, p, packed=packed, dtype=torch.float32)
    x, bias = oracle.exact(3, n, dtype=dtype), oracle.exact(m)
    got = tbn.linear(x, tile, alpha, bias, n, m, p)
    assert got.dtype == dtype
    expected = F.linear(x.double(), weight.double(), bias.double())
    # Alphas have 3 bits here, so that only the sums (at most 8 + 1 terms) round.
    tolerance = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    conv = tbn.conv1d(x.reshape(1, -1, 1).expand(1, 3 * n, 4)[:, :n], tile, alpha, bias, n, m, [1], p)
    assert conv.dtype == dtype
    torch.testing.assert_close(conv.double()[0, :, 0], expected[0], rtol=0, atol=tolerance)


# Gradients


@pytest.mark.parametrize("lead", [(), (3,), (2, 2)], ids=str)
@pytest.mark.parametrize("per_tile", [False, True])
@pytest.mark.parametrize(("m", "n", "p"), [(4, 6, 2), (6, 8, 4)])
def test_gradcheck_linear(m: int, n: int, p: int, per_tile: bool, lead: tuple[int, ...]) -> None:
    tile, alpha, _ = operands((m, n), p, p if per_tile else 1)
    x, bias = torch.randn(*lead, n, dtype=torch.float64), torch.randn(m, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, alpha, bias))
    assert torch.autograd.gradcheck(lambda x, a, b: tbn.linear(x, tile, a, b, n, m, p), inputs)


@pytest.mark.parametrize("batch", [(), (2,)], ids=["unbatched", "batched"])
@pytest.mark.parametrize(("p", "num_alphas", "groups"), [(2, 2, 1), (4, 1, 2), (3, 3, 1), (3, 1, 2)])
@pytest.mark.parametrize("d", [1, 2, 3])
def test_gradcheck_conv(d: int, p: int, num_alphas: int, groups: int, batch: tuple[int, ...]) -> None:
    shape = (4, 6 // groups, *(2,) * d)
    tile, alpha, _ = operands(shape, p, num_alphas)
    x, bias = torch.randn(*batch, 6, *(3,) * d, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    inputs = tuple(t.requires_grad_() for t in (x, alpha, bias))
    geometry = {"stride": [2] * d, "padding": [1] * d, "groups": groups}
    assert torch.autograd.gradcheck(
        lambda x, a, b: CONVS[d][0](x, tile, a, b, 6, 4, shape[2:], p, **geometry), inputs, fast_mode=True
    )


def test_gradient_of_an_empty_batch() -> None:
    tile, alpha, _ = operands((8, 6), 4, 4)
    alpha.requires_grad_()
    tbn.linear(torch.zeros(0, 6, dtype=torch.float64), tile, alpha, None, 6, 8, 4).sum().backward()
    assert alpha.grad is not None
    assert alpha.grad.tolist() == [0.0] * 4


# opcheck


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(("m", "n", "p", "num_alphas"), [(8, 6, 4, 1), (8, 6, 4, 4), (6, 8, 4, 1), (6, 8, 4, 4)])
def test_opcheck_linear(m: int, n: int, p: int, num_alphas: int, packed: bool) -> None:
    tile, alpha, _ = operands((m, n), p, num_alphas, packed=packed, dtype=torch.float32)
    alpha.requires_grad_()
    for x, bias in ((torch.randn(3, n), torch.randn(m)), (torch.randn(n, 2, 3).permute(1, 2, 0), None)):
        args = (x.detach().requires_grad_(), tile, alpha, bias, n, m, p)
        torch.library.opcheck(tbn.linear.default, args)


@pytest.mark.parametrize(
    ("p", "num_alphas", "groups"), [(4, 4, 1), (4, 1, 2), (3, 1, 1), (3, 3, 2)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("d", [1, 2, 3])
def test_opcheck_conv(d: int, p: int, num_alphas: int, groups: int) -> None:
    shape = (8, 6 // groups, *(3,) * d)
    tile, alpha, _ = operands(shape, p, num_alphas, dtype=torch.float32)
    alpha.requires_grad_()
    x = torch.randn(2, 6, *(7, 8, 9)[:d], requires_grad=True)
    geometry = {"stride": [2] * d, "padding": [1] * d, "dilation": [2] * d, "groups": groups}
    torch.library.opcheck(CONVS[d][0].default, (x, tile, alpha, torch.randn(8), 6, 8, shape[2:], p), geometry)
    torch.library.opcheck(
        CONVS[d][0].default, (x[0].detach(), tile, alpha, None, 6, 8, shape[2:], p), {"groups": groups}
    )


@pytest.mark.parametrize(("p", "groups"), [(4, 1), (4, 2), (3, 1)])
def test_opcheck_conv_channels_last(p: int, groups: int) -> None:
    tile, alpha, _ = operands((8, 6 // groups, 3, 3), p, 1, dtype=torch.float32)
    x = torch.randn(2, 6, 7, 7).to(memory_format=torch.channels_last)
    torch.library.opcheck(tbn.conv2d.default, (x, tile, alpha, None, 6, 8, [3, 3], p), {"groups": groups})


# Only the unique rows are multiplied


def multiply_adds(function: Any, *args: Any, **kwargs: Any) -> int:
    """Multiply-adds of the matrix products and 2-d convolutions that run, custom operators looked through."""
    with cpu.use_level("none"), torch.profiler.profile(record_shapes=True, with_flops=True) as profile:
        function(*args, **kwargs)
    names = ("aten::mm", "aten::addmm", "aten::bmm", "aten::conv2d")
    return sum(event.flops for event in profile.key_averages() if event.key in names) // 2


@pytest.mark.parametrize("num_alphas", [1, 4])
def test_linear_multiplies_unique_rows_only(num_alphas: int) -> None:
    tile, alpha, weight = operands((32, 24), 4, num_alphas, dtype=torch.float32)
    x = torch.randn(5, 24)
    assert multiply_adds(F.linear, x, weight) == 5 * 32 * 24
    assert multiply_adds(tbn.linear, x, tile, alpha, None, 24, 32, 4) == 5 * 8 * 24


@pytest.mark.parametrize(("num_alphas", "rows"), [(1, 3), (4, 6)])
def test_misaligned_linear_multiplies_unique_rows_only_if_rows_have_one_alpha(num_alphas: int, rows: int) -> None:
    tile, alpha, _ = operands((6, 8), 4, num_alphas, dtype=torch.float32)
    assert multiply_adds(tbn.linear, torch.randn(5, 8), tile, alpha, None, 8, 6, 4) == 5 * rows * 8


@pytest.mark.parametrize(("groups", "filters"), [(1, 4), (2, 8), (4, 16)])
def test_conv_runs_the_different_filters_of_each_group_only(groups: int, filters: int) -> None:
    """m = 16, p = 4: R = 4 filters; groups read different inputs, so each needs min(16 / groups, 4) of its own."""
    tile, alpha, weight = operands((16, 8 // groups, 3, 3), 4, 4, dtype=torch.float32)
    x = torch.randn(1, 8, 6, 6)
    dense = multiply_adds(F.conv2d, x, weight, groups=groups)
    assert dense > 0
    got = multiply_adds(tbn.conv2d, x, tile, alpha, None, 8, 16, [3, 3], 4, groups=groups)
    assert got * 16 == dense * filters


# Errors, in eager mode and while tracing


def bits(*sizes: int) -> Tensor:
    return torch.zeros(*sizes, dtype=torch.uint8)


# 8 x 6, p = 4: q = 12, 2 bytes
GOOD_LINEAR = {
    "input": torch.zeros(3, 6),
    "tile": bits(2),
    "alpha": torch.ones(1),
    "bias": None,
    "in_features": 6,
    "out_features": 8,
    "p": 4,
}
BAD_LINEAR: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input dtype": ({"input": bits(3, 6).long()}, TypeError, "input must be floating point, got torch.int64"),
    "tile dtype": ({"tile": bits(2).int()}, TypeError, r"tile must be uint8 \(packed bits\) .* got torch.int32"),
    "tile size": ({"tile": bits(3)}, ValueError, r"tile of a weight \(8, 6\) with p=4 must have shape \(2,\)"),
    "tile rank": ({"tile": bits(2, 1)}, ValueError, r"must have shape \(2,\) as torch.uint8, got \(2, 1\)"),
    "float tile size": ({"tile": torch.zeros(2)}, ValueError, r"must have shape \(12,\) as torch.float32, got \(2,\)"),
    "in_features": ({"input": torch.zeros(3, 16)}, RuntimeError, "expected 6 input features, got an input with 16"),
    "alpha count": ({"alpha": torch.ones(2)}, ValueError, r"alpha must have one element, .* got shape \(2,\)"),
    "alpha rank": ({"alpha": torch.tensor(1.0)}, ValueError, r"alpha must have .* got shape \(\)"),
    "bias": ({"bias": torch.zeros(6)}, ValueError, r"bias must have shape \(8,\), got \(6,\)"),
    "p": ({"p": 5}, ValueError, "p=5 does not divide the 48 elements"),
    "scalar": ({"input": torch.tensor(1.0)}, RuntimeError, "input must have at least one dimension"),
    "device": ({"tile": bits(2).to("meta")}, ValueError, "tile is on meta, input on cpu"),
}
# 8 x 4 x 3 x 3, p = 4: q = 72, 9 bytes
GOOD_CONV = {
    "input": torch.zeros(1, 4, 5, 5),
    "tile": bits(9),
    "alpha": torch.ones(1),
    "bias": None,
    "in_channels": 4,
    "out_channels": 8,
    "kernel_size": [3, 3],
    "p": 4,
}
BAD_CONV: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "rank": ({"input": torch.zeros(4, 5)}, RuntimeError, r"input must have 3 \(unbatched\) or 4 dimensions, got 2"),
    "channels": ({"input": torch.zeros(1, 5, 5, 5)}, RuntimeError, "expected 4 input channels, got an input with 5"),
    "groups": ({"groups": 3}, ValueError, "groups=3 must divide 4 input and 8 output channels"),
    "no groups": ({"groups": 0}, ValueError, "groups=0 must divide"),
    "bias": ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(8,\), got \(4,\)"),
}


def call(op: Any, arguments: dict[str, Any], *, tracing: bool) -> None:
    if not tracing:
        op(**arguments)
        return
    with FakeTensorMode() as mode:
        op(**{key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in arguments.items()})


@pytest.mark.parametrize("tracing", [False, True], ids=["eager", "fake"])
@pytest.mark.parametrize("case", BAD_LINEAR)
def test_bad_linear_calls(case: str, tracing: bool) -> None:
    changes, error, message = BAD_LINEAR[case]
    if tracing and case == "device":
        message = "two different devices|is on meta"  # fake tensors check devices themselves
        error = Exception
    call(tbn.linear, GOOD_LINEAR, tracing=tracing)
    with pytest.raises(error, match=message):
        call(tbn.linear, GOOD_LINEAR | changes, tracing=tracing)


@pytest.mark.parametrize("tracing", [False, True], ids=["eager", "fake"])
@pytest.mark.parametrize("case", BAD_CONV)
def test_bad_conv_calls(case: str, tracing: bool) -> None:
    changes, error, message = BAD_CONV[case]
    call(tbn.conv2d, GOOD_CONV, tracing=tracing)
    with pytest.raises(error, match=message):
        call(tbn.conv2d, GOOD_CONV | changes, tracing=tracing)


def test_input_of_the_wrong_width_is_refused_whatever_its_width() -> None:
    with pytest.raises(RuntimeError, match="expected 6 input features, got an input with 7"):
        call(tbn.linear, GOOD_LINEAR | {"input": torch.zeros(3, 7)}, tracing=False)


def test_conv_kernel_larger_than_input_fails_while_tracing() -> None:
    with FakeTensorMode(), pytest.raises(RuntimeError, match=r"kernel \[3, 3\] does not fit the input \[1, 4, 2, 5\]"):
        tbn.conv2d(torch.zeros(1, 4, 2, 5), bits(9), torch.ones(1), None, 4, 8, [3, 3], 4)
