"""``tbn::tile`` and ``tbn::scale``: values and gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tbn_compiler  # noqa: F401  (registers the operators)
from tests import oracle

tbn = torch.ops.tbn
Tiling = tuple[tuple[int, ...], int, Tensor, Tensor]


@given(oracle.tilings(), st.booleans())
def test_tile_values(tiling: Tiling, binary: bool) -> None:
    shape, p, w, _ = tiling
    expected = oracle.tile(oracle.array(w), p) if binary else oracle.sums(oracle.array(w), p)
    bits = tbn.tile(w, p, binary=binary)
    assert bits.dtype == w.dtype
    assert bits.is_contiguous()
    np.testing.assert_array_equal(oracle.array(bits), oracle.fill(shape, expected, np.ones(1)))


@given(oracle.tilings(), st.booleans())
def test_scale_values(tiling: Tiling, per_tile: bool) -> None:
    shape, p, w, a = tiling
    num_alphas = p if per_tile else 1
    used = tbn.scale(tbn.tile(w, p), a, num_alphas)
    assert used.shape == shape
    assert used.dtype == w.dtype
    expected = oracle.weight(oracle.array(w), oracle.array(a), p, num_alphas)
    np.testing.assert_allclose(oracle.array(used), expected, rtol=2 * torch.finfo(w.dtype).eps, atol=0)


@given(oracle.tilings())
def test_straight_through_gradient_is_the_identity(tiling: Tiling) -> None:
    """Eq. 6: the gradient of B reaches W unchanged, element by element - neither summed over copies nor clipped."""
    shape, p, w, _ = tiling
    w.requires_grad_()
    upstream = torch.arange(1, w.numel() + 1, dtype=torch.float64).reshape(shape).to(w.dtype)
    tbn.tile(w, p).backward(upstream)
    assert w.grad is not None
    assert torch.equal(w.grad, upstream)


def test_straight_through_does_not_clip_large_weights() -> None:
    w = torch.tensor([-50.0, 0.0, 50.0, 3.0], requires_grad=True)
    tbn.tile(w, 2).sum().backward()
    assert w.grad is not None
    assert w.grad.tolist() == [1.0] * 4


def test_tile_gradient_through_a_strided_weight() -> None:
    base = torch.randn(6, 4, requires_grad=True)
    upstream = torch.randn(4, 6)
    tbn.tile(base.t(), 4).backward(upstream)
    assert base.grad is not None
    assert torch.equal(base.grad, upstream.t())


def operators(w: Tensor, a: Tensor, p: int, num_alphas: int) -> Tensor:
    return tbn.scale(tbn.tile(w, p), a, num_alphas)


def plain_weight(w: Tensor, a: Tensor, p: int, num_alphas: int) -> Tensor:
    """The method in differentiable PyTorch with the detach trick."""
    b = torch.where(w.reshape(p, -1).sum(0) > 0, 1.0, -1.0).to(w.dtype).repeat(p).reshape(w.shape)
    b = w + (b - w).detach()
    alpha = a.reshape(num_alphas, -1).abs().mean(1, keepdim=True)
    return (alpha * b.reshape(num_alphas, -1)).reshape(w.shape)


@pytest.mark.parametrize("alpha_source", ["A", "W"])
@given(tiling=oracle.tilings(), per_tile=st.booleans())
def test_gradients_equal_autograd_of_the_plain_formula(alpha_source: str, tiling: Tiling, per_tile: bool) -> None:
    shape, p, w, a = tiling
    num_alphas = p if per_tile else 1
    upstream = torch.randn(shape, dtype=torch.float64)
    grads = []
    for formula in (operators, plain_weight):
        weight, source = (v.detach().to(torch.float64).requires_grad_() for v in (w, a))
        formula(weight, weight if alpha_source == "W" else source, p, num_alphas).backward(upstream)
        grads.append((weight.grad, source.grad))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-12, atol=1e-12)


def test_gradients_written_out() -> None:
    """One alpha per tile: dL/dW = alpha_i * G; dL/dA = sign(A) * mean over the copy of G * B."""
    w = torch.tensor([[1.0, -2.0], [3.0, 1.0]], requires_grad=True)  # sums 4, -1: tile +1, -1
    a = torch.tensor([[2.0, -4.0], [0.0, 1.0]], requires_grad=True)  # alphas 3, 0.5
    g = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    tbn.scale(tbn.tile(w, 2), a, 2).backward(g)
    assert w.grad is not None
    assert a.grad is not None
    assert w.grad.tolist() == [[3.0, 6.0], [1.5, 2.5]]
    assert a.grad.tolist() == [[-0.5, 0.5], [0.0, -1.0]]


@pytest.mark.parametrize("num_alphas", [1, 4])
def test_gradcheck_scale(num_alphas: int) -> None:
    bits, source = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda b, s: tbn.scale(b, s, num_alphas), (bits, source))
    assert torch.autograd.gradgradcheck(lambda b, s: tbn.scale(b, s, num_alphas), (bits, source))


@pytest.mark.parametrize("num_alphas", [1, 3])
def test_gradcheck_float_tile(num_alphas: int) -> None:
    """A full-precision tile is differentiable: no straight-through step, also with alphas from W itself."""
    w = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: tbn.tile(w, 3, binary=False), (w,))
    assert torch.autograd.gradcheck(lambda w: tbn.scale(tbn.tile(w, 3, binary=False), w, num_alphas), (w,))


@pytest.mark.parametrize("dtype", oracle.FLOATS)
def test_gradient_dtype_is_the_parameters(dtype: torch.dtype) -> None:
    w = oracle.exact(4, 8, dtype=dtype).requires_grad_()
    a = oracle.exact(4, 8, dtype=torch.float32).requires_grad_()
    used = tbn.scale(tbn.tile(w, 4), a, 4)
    assert used.dtype == dtype
    used.sum().backward()
    assert w.grad is not None
    assert a.grad is not None
    assert (w.grad.dtype, a.grad.dtype) == (dtype, torch.float32)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_tile(binary: bool, dtype: torch.dtype) -> None:
    for w, p in ((torch.randn(4, 6), 4), (torch.randn(3, 5, 2).mT, 5), (torch.randn(7), 1)):
        weight = w.to(dtype).detach().requires_grad_()
        torch.library.opcheck(tbn.tile.default, (weight, p), {"binary": binary})


@pytest.mark.parametrize("num_alphas", [1, 4])
def test_opcheck_scale(num_alphas: int) -> None:
    for bits, source in (
        (torch.randn(4, 6), torch.randn(4, 6)),
        (torch.randn(4, 6), torch.randn(6, 4).t()),
        (torch.randn(2, 4, 3).bfloat16(), torch.randn(2, 4, 3)),
    ):
        bits, source = bits.detach().requires_grad_(), source.detach().requires_grad_()
        torch.library.opcheck(tbn.scale.default, (bits, source, num_alphas))


def test_opcheck_scale_of_strided_bits() -> None:
    torch.library.opcheck(tbn.scale.default, (torch.randn(6, 4).t(), torch.randn(4, 6), 4))


BAD_CALLS = [
    ("tile does not divide", lambda f: tbn.tile(f(8), 3), ValueError, "p=3 does not divide the 8 elements"),
    ("tile p=0", lambda f: tbn.tile(f(8), 0), ValueError, "p=0 does not divide"),
    ("tile dtype", lambda f: tbn.tile(f(8).long(), 2), TypeError, "tbn::tile: weight must be floating point"),
    ("scale shapes", lambda f: tbn.scale(f(8), f(2, 4), 2), ValueError, "must have the same shape"),
    ("scale count", lambda f: tbn.scale(f(8), f(8), 3), ValueError, "num_alphas=3 does not divide the 8 elements"),
    ("scale zero", lambda f: tbn.scale(f(8), f(8), 0), ValueError, "num_alphas=0"),
    ("scale dtype", lambda f: tbn.scale(f(8), f(8).long(), 2), TypeError, "source must be floating point"),
    (
        "unpack dtype",
        lambda f: tbn.unpack_bits(f(1), 8, dtype=torch.float32),
        TypeError,
        "tbn::unpack_bits: packed must be uint8, got torch.float32",
    ),
    (
        "unpack size",
        lambda f: tbn.unpack_bits(f(1).byte(), 9, dtype=torch.float32),
        ValueError,
        r"tbn::unpack_bits: 9 elements take 2 bytes, got shape \(1,\)",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), [c[1:] for c in BAD_CALLS], ids=[c[0] for c in BAD_CALLS])
def test_bad_calls_fail_while_tracing(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with FakeTensorMode(), pytest.raises(error, match=message):
        call(torch.zeros)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [pytest.param(*c[1:], id=c[0]) for c in BAD_CALLS],
)
def test_bad_calls_fail_in_eager_mode(call, error: type[Exception], message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call(torch.zeros)


@given(st.integers(1, 70), st.sampled_from(oracle.FLOATS))
def test_unpack_values(numel: int, dtype: torch.dtype) -> None:
    t = np.where(np.arange(numel) * 37 % 11 > 4, 1.0, -1.0)
    got = tbn.unpack_bits(torch.from_numpy(oracle.pack(t)), numel, dtype=dtype)
    assert got.dtype == dtype
    np.testing.assert_array_equal(oracle.array(got), t)


@pytest.mark.parametrize("dtype", oracle.FLOATS)
@pytest.mark.parametrize("numel", [1, 8, 13])
def test_opcheck_unpack(numel: int, dtype: torch.dtype) -> None:
    packed = torch.randint(0, 256, ((numel + 7) // 8,), dtype=torch.uint8)
    torch.library.opcheck(tbn.unpack_bits.default, (packed, numel), {"dtype": dtype})
