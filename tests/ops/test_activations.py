"""Inputs in a number format while training: values of inference, gradients straight through."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tbn_compiler.ops.activations import REACH
from tbn_compiler.ops.formats import binarize, quantize_int8

quantize = torch.ops.tbn.quantize_input.default
FORMATS = ["int8", "binary"]


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("activation", FORMATS)
def test_values_are_those_of_inference(activation: str, dims: int) -> None:
    x = torch.randn(3, 4, 5, 6) * 3
    values, scale = (quantize_int8 if activation == "int8" else binarize)(x, tuple(range(-dims, 0)))
    assert torch.equal(quantize(x, activation, dims), values * scale)
    assert scale.shape == (*x.shape[:-dims], *[1] * dims)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("activation", FORMATS)
def test_dtype_is_that_of_the_input(activation: str, dtype: torch.dtype) -> None:
    x = torch.randn(4, 8).to(dtype).requires_grad_()
    y = quantize(x, activation, 1)
    y.sum().backward()
    assert x.grad is not None
    assert y.dtype == x.grad.dtype == dtype


def test_int8_passes_the_gradient_unchanged() -> None:
    x, g = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    (grad,) = torch.autograd.grad(quantize(x, "int8", 1), x, g)
    assert torch.equal(grad, g)


@pytest.mark.parametrize("dims", [1, 2])
def test_binary_gradient_is_that_of_scale_and_clipped_sign(dims: int) -> None:
    """Against the definition: what is clipped moves as the input does, and the mean is differentiated."""
    x, g = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, 5, dtype=torch.float64)
    beta = x.abs().mean(tuple(range(-dims, 0)), keepdim=True)
    through = x.clamp(-REACH * beta.detach(), REACH * beta.detach())
    expected = torch.where(x > 0, 1.0, -1.0) * beta + through - through.detach()
    (found,) = torch.autograd.grad(quantize(x, "binary", dims), x, g)
    torch.testing.assert_close(found, torch.autograd.grad(expected, x, g)[0])


@pytest.mark.parametrize("activation", FORMATS)
def test_gradient_does_not_depend_on_the_unit(activation: str) -> None:
    """Inputs 1,000 times as large, as without a norm, pass the same gradient."""
    x, g = torch.randn(4, 64), torch.randn(4, 64)
    grads = []
    for unit in (1.0, 1000.0):
        scaled = (x * unit).requires_grad_()
        grads += torch.autograd.grad(quantize(scaled, activation, 1), scaled, g)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("activation", FORMATS)
def test_torch_func_differentiates_it_alike(activation: str) -> None:
    x, weight = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return (quantize(x, activation, 1) * weight).sum()

    plain = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(loss(plain), plain)
    torch.testing.assert_close(torch.func.grad(loss)(x), expected)
    torch.testing.assert_close(torch.func.vmap(lambda row: quantize(row, activation, 1))(x), quantize(x, activation, 1))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", FORMATS)
def test_torch_func_rounds_once(activation: str, dtype: torch.dtype, given: bool) -> None:
    """Integers and their scale are multiplied before they are brought into half precision."""
    x = (torch.randn(4, 64) * 1e-5).to(dtype)
    scale = torch.tensor([1e-7]) if given else None
    found, _ = torch.func.vjp(lambda value: quantize(value, activation, 1, scale), x)
    assert torch.equal(found, quantize(x, activation, 1, scale))


@pytest.mark.parametrize("activation", FORMATS)
def test_compiles_without_a_break(activation: str) -> None:
    def step(x: Tensor) -> Tensor:
        return F.relu(quantize(x, activation, 1)).sum()

    x = torch.randn(4, 8)
    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        value = x.clone().requires_grad_()
        function(value).backward()
        grads.append(value.grad)
    torch.testing.assert_close(*grads)


def one_scale(x: Tensor, scale: Tensor, activation: str) -> Tensor:
    """The definition, from functions whose derivatives are the ones that straight-through estimators pass on."""
    if activation == "binary":
        sign = torch.where(x > 0, 1.0, -1.0).to(x.dtype)
        through = x.clamp(-REACH * scale.detach(), REACH * scale.detach())
        return scale * sign + through - through.detach()
    v = (x / scale).clamp(-127, 127)
    return scale * (v + (v.round() - v).detach())


@pytest.mark.parametrize("activation", FORMATS)
def test_gradients_of_one_scale(activation: str) -> None:
    x, g = (torch.randn(3, 4, 5, dtype=torch.float64) * 2 for _ in range(2))
    scale = torch.tensor([0.02 if activation == "int8" else 0.5], dtype=torch.float64)  # clips beyond 2.54, or 2

    def loss(x: Tensor, scale: Tensor) -> Tensor:
        return (quantize(x, activation, 1, scale) * g).sum()

    found, expected = ([value.clone().requires_grad_() for value in (x, scale)] for _ in range(2))
    result, right = quantize(found[0], activation, 1, found[1]), one_scale(*expected, activation)
    torch.testing.assert_close(result, right)
    grads = torch.autograd.grad(result, found, g)
    torch.testing.assert_close(grads, torch.autograd.grad(right, expected, g))
    torch.testing.assert_close(torch.func.grad(loss, (0, 1))(x, scale), grads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", FORMATS)
def test_one_scale_has_its_own_dtype(activation: str, dtype: torch.dtype) -> None:
    """The sum of its gradient has as many terms as the input has elements: it is not made in half precision."""
    x, scale = torch.ones(1, 1 << 16).to(dtype).requires_grad_(), torch.tensor([1 / 64]).requires_grad_()
    y = quantize(x, activation, 1, scale)
    y.backward(torch.ones_like(y))
    assert y.dtype == dtype
    assert x.grad is not None
    assert scale.grad is not None
    assert (x.grad.dtype, scale.grad.dtype) == (dtype, torch.float32)
    by_parts = torch.func.grad(lambda value: quantize(x.detach(), activation, 1, value).float().sum())(scale.detach())
    torch.testing.assert_close(by_parts, scale.grad)
    # 64 steps, rounded exactly: nothing to gain by another scale; signs sum up.
    assert scale.grad.item() == (0 if activation == "int8" else 1 << 16)


@pytest.mark.parametrize("activation", FORMATS)
def test_zeros_and_nothing(activation: str) -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    y = quantize(x, activation, 1)
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert quantize(torch.zeros(0, 3), activation, 1).shape == (0, 3)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ((torch.ones(2), "float", 1), ValueError),
        ((torch.ones(2), "int4", 1), ValueError),
        ((torch.ones(2), "int8", 2), ValueError),
        ((torch.ones(2), "int8", 0), ValueError),
        ((torch.ones(2, dtype=torch.int64), "int8", 1), TypeError),
        ((torch.ones(2), "int8", 1, torch.ones(2)), ValueError),
    ],
)
def test_other_arguments_are_refused(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="tbn::quantize_input"):
        quantize(*arguments)
