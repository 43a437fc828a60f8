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
        each = torch.vmap(lambda v, module=module: torch.func.jvp(module, (v,), (v,))[1])(x)
        jacobians = torch.func.jacfwd(module)(x[:1]), torch.func.jacrev(module)(x[:1])
        second = torch.func.hessian(smooth(module))(x[:1])
        found.append((value, along, each, *jacobians, second))
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


def test_inputs_that_a_layer_refuses_are_refused_when_mapped() -> None:
    _, linear, x = tiled_and_packed("linear", "repeat")
    _, conv, image = tiled_and_packed("conv2d", "repeat")
    with pytest.raises(RuntimeError, match="at least one dimension"):
        torch.vmap(linear)(x[0])
    with pytest.raises(RuntimeError, match=r"3 \(unbatched\) or 4 dimensions, got 2"):
        torch.vmap(conv)(image[0])
    with pytest.raises(RuntimeError, match=r"3 \(unbatched\) or 4 dimensions, got 5"):
        torch.vmap(conv)(image.expand(2, 3, *image.shape))


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
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            value, tangent = torch.func.jvp(lambda t: t * packed(x), (torch.ones(()),), (torch.ones(()),))
            assert torch.equal(value, tangent)  # what does not depend on it stays


def test_forward_mode_without_torch_func_is_refused() -> None:
    """Code of Inductor's drops tangents, and nobody can tell it from other callers."""
    _, packed, x = tiled_and_packed("linear", "repeat")
    for module in (packed, torch.compile(packed, backend="tbn"), torch.compile(packed, backend="inductor")):
        with torch.no_grad():
            module(x)
            for grad in (True, False):
                with torch.set_grad_enabled(grad), forward_ad.dual_level():
                    with pytest.raises(NotImplementedError, match=r"no forward derivative|must implement the jvp"):
                        module(forward_ad.make_dual(x, x))
                    factor = forward_ad.make_dual(torch.ones(()).double(), torch.ones(()).double())
                    assert torch.equal(forward_ad.unpack_dual(module(x) * factor).tangent, module(x))


def test_stored_tiles_are_constant() -> None:
    tile, alpha = torch.randn(12), torch.ones(4)
    layer = lambda tile: tbn.linear(torch.ones(2, 6), tile, alpha, None, 6, 8, 4).sum()  # noqa: E731
    assert not torch.func.grad(layer)(tile).any()
    assert not torch.func.jvp(layer, (tile,), (tile,))[1].any()


def test_operands_of_a_weight_are_checked() -> None:
    with pytest.raises(ValueError, match="must have shape"):
        torch.func.jvp(lambda a: tbn.unpack(torch.zeros(5).byte(), a, [8, 6], 4), (torch.ones(4),), (torch.ones(4),))


def test_function_behind_a_layer() -> None:
    """``torch.func`` differentiates through it; ``backward`` refuses it."""
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 8)).double()
    tiled = tbn_compiler.transform(model, tbn_compiler.TilingConfig(p=4, min_size=0)).eval()
    x = torch.randn(3, 12, dtype=torch.float64)
    optimized = tbn_compiler.optimize(tbn_compiler.lower(tiled), x)
    oracle.assert_close(torch.func.jvp(optimized, (x,), (x,)), torch.func.jvp(tiled, (x,), (x,)), 1e-10)
    oracle.assert_close(torch.func.grad(smooth(optimized))(x), torch.func.grad(smooth(tiled))(x), 1e-10)


@pytest.mark.parametrize("backend", ["tbn", "inductor"])
def test_compiled_vmap_of_any_size(backend: str) -> None:
    _, packed, x = tiled_and_packed("conv2d", "repeat")
    mapped = torch.compile(torch.vmap(packed), backend=backend, dynamic=True)
    with torch.no_grad():
        for count in (3, 4):
            several = torch.stack([x] * count)
            oracle.assert_close(mapped(several), torch.stack([packed(x)] * count), 1e-10)


def test_compiled() -> None:
    tiled, packed, x = tiled_and_packed("linear", "repeat")
    along = torch.compile(lambda x: torch.func.jvp(packed, (x,), (x,))[1], backend="tbn")
    expected = torch.func.jvp(tiled, (x,), (x,))[1]
    oracle.assert_close(along(x), expected, 1e-10)
    oracle.assert_close(torch.func.jvp(torch.compile(packed, backend="tbn"), (x,), (x,))[1], expected, 1e-10)
