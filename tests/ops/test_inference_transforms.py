"""``torch.func`` and forward-mode differentiation through the inference operators, against layers before packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import tbn_compiler
from tests import oracle

tbn = torch.ops.tbn
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by the first torch.func.jvp

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 16), (3, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1), (2, 4, 5, 5)),
    "conv2d groups": (lambda: nn.Conv2d(8, 16, 3, groups=2, stride=2), (2, 8, 7, 7)),
    "conv2d transposed": (lambda: nn.ConvTranspose2d(8, 4, 3), (2, 8, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 8, 2), (2, 2, 3, 3, 3)),
}
REPLICATE = ("repeat", "hadamard")


def tiled_and_packed(name: str, replicate: str, activation: str = "float") -> tuple[nn.Module, nn.Module, Tensor]:
    """A tiled layer, what it is lowered to, and an input, in float64."""
    make, shape = LAYERS[name]
    config = tbn_compiler.TilingConfig(p=4, min_size=0, replicate=replicate)
    tiled = tbn_compiler.transform(make().double(), config).eval()
    packed, x = tbn_compiler.lower(tiled), torch.randn(shape, dtype=torch.float64)
    return tiled, packed if activation == "float" else tbn_compiler.optimize(packed, x, activation=activation), x


def smooth(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A function with a second derivative."""
    return lambda x: module(x).sin().sum()


@pytest.mark.parametrize("replicate", REPLICATE)
@pytest.mark.parametrize("name", LAYERS)
def test_derivatives(name: str, replicate: str) -> None:
    tiled, packed, x = tiled_and_packed(name, replicate)
    direction = torch.randn_like(x)
    found: list[Any] = []
    for module in (packed, tiled):
        value, along = torch.func.jvp(module, (x,), (direction,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(module(forward_ad.make_dual(x, direction)))
        with torch.no_grad(), forward_ad.dual_level():
            silent = forward_ad.unpack_dual(module(forward_ad.make_dual(x, direction))).tangent
        each = torch.vmap(lambda v, module=module: torch.func.jvp(module, (v,), (v,))[1])(x)
        jacobians = torch.func.jacfwd(module)(x[:1]), torch.func.jacrev(module)(x[:1])
        second = torch.func.hessian(smooth(module))(x[:1])
        found.append((value, along, dual.primal, dual.tangent, silent, each, *jacobians, second))
    oracle.assert_close(*found, 1e-10)
    assert found[0][1].abs().max() > 0


@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
@pytest.mark.parametrize("name", [name for name in LAYERS if "transposed" not in name])
def test_vmap(name: str, activation: str) -> None:
    """Along any axis of the input, one sample each or several, and of two axes."""
    _, packed, x = tiled_and_packed(name, "repeat", activation)
    stacked = torch.stack([x, 2 * x - 1, x.flip(0)], 1)
    with torch.no_grad():
        by_hand = torch.stack([packed(v) for v in stacked.unbind(1)])
        oracle.assert_close(torch.vmap(packed, 1)(stacked), by_hand, 1e-12)
        oracle.assert_close(torch.vmap(packed)(x), packed(x), 1e-12)
        oracle.assert_close(torch.vmap(torch.vmap(packed), 1)(stacked), by_hand, 1e-12)


def test_vmap_of_scales() -> None:
    """Layers that differ in their alphas are computed one after the other."""
    x, tile = oracle.exact(3, 6, dtype=torch.float64), torch.zeros(2, dtype=torch.uint8)
    alphas = torch.arange(1.0, 9.0, dtype=torch.float64).view(2, 4)
    by_hand = torch.stack([tbn.linear(x, tile, alpha, None, 6, 8, 4) for alpha in alphas])
    found = torch.vmap(lambda alpha: tbn.linear(x, tile, alpha, None, 6, 8, 4))(alphas)
    assert torch.equal(found, by_hand)
    both = torch.vmap(lambda x, alpha: tbn.linear(x, tile, alpha, None, 6, 8, 4), (None, 0))(x, alphas)
    assert torch.equal(both, by_hand)


def test_weight_of_a_stored_tile() -> None:
    tile, alpha = torch.tensor([0b10110100, 0b0110], dtype=torch.uint8), torch.rand(4, dtype=torch.float64)
    weight = lambda alpha: tbn.unpack(tile, alpha, [8, 6], 4)  # noqa: E731
    direction = torch.randn_like(alpha)
    assert torch.equal(torch.func.jvp(weight, (alpha,), (direction,))[1], weight(direction))
    assert torch.equal(torch.func.jacfwd(weight)(alpha), torch.func.jacrev(weight)(alpha))
    rows = torch.stack([alpha, direction])
    assert torch.equal(torch.vmap(weight)(rows), torch.stack([weight(row) for row in rows]))


@pytest.mark.parametrize("activation", ["int8", "binary"])
def test_formats_without_a_gradient_are_refused(activation: str) -> None:
    """A rounded value has none, and what is summed would have a wrong one."""
    _, packed, x = tiled_and_packed("linear", "repeat", activation)
    with pytest.raises(RuntimeError, match=f"no gradient with activation='{activation}'"):
        torch.func.jvp(packed, (x,), (x,))
    with pytest.raises(RuntimeError, match=f"no gradient with activation='{activation}'"):
        torch.func.grad(smooth(packed))(x)
    with torch.no_grad():
        value, tangent = torch.func.jvp(lambda t: t * packed(x), (torch.ones(()),), (torch.ones(()),))
        assert torch.equal(value, tangent)  # what does not depend on it stays


def test_function_behind_a_layer() -> None:
    """``torch.func`` differentiates through it; ``backward`` refuses it."""
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8)).double()
    tiled = tbn_compiler.transform(model, tbn_compiler.TilingConfig(p=4, min_size=0)).eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    optimized = tbn_compiler.optimize(tbn_compiler.lower(tiled), x)
    oracle.assert_close(torch.func.jvp(optimized, (x,), (x,)), torch.func.jvp(tiled, (x,), (x,)), 1e-10)
    oracle.assert_close(torch.func.grad(smooth(optimized))(x), torch.func.grad(smooth(tiled))(x), 1e-10)


def test_compiled() -> None:
    tiled, packed, x = tiled_and_packed("linear", "repeat")
    along = torch.compile(lambda x: torch.func.jvp(packed, (x,), (x,))[1], backend="tbn")
    expected = torch.func.jvp(tiled, (x,), (x,))[1]
    oracle.assert_close(along(x), expected, 1e-10)
    oracle.assert_close(torch.func.jvp(torch.compile(packed, backend="tbn"), (x,), (x,))[1], expected, 1e-10)
