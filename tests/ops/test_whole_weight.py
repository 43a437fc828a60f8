"""``tbn::train_*`` where the whole weight is multiplied, against ``tbn::tile``, ``tbn::scale`` and PyTorch's layer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import tbn_compiler as tbn
from tbn_compiler.ops import training, whole_weight
from tbn_compiler.ops.latents import used_weight
from tbn_compiler.ops.training import multiplied_rows
from tests import oracle
from tests.ops.test_training_autograd import LOW, OneDtype, weight_count
from tests.ops.test_training_layers import LAYERS, Layer, latents, leaves

# Every layer and number of alphas with which nothing is shared.
WHOLE = {
    f"{name} k={k}": (layer, k)
    for name, layer in LAYERS.items()
    for k in layer.alphas()
    if multiplied_rows(layer.call(k)) is None
}
# One copy, whose tile is the weight; rolled; alphas within rows, along the inputs; groups; each kind.
SOME = [
    "linear one copy k=1",
    "linear rolled k=4",
    "linear misaligned k=4",
    "linear two-axis k=4",
    "conv1d one copy k=1",
    "conv2d one copy k=1",
    "conv2d depthwise k=1",
    "conv_transpose2d one copy k=1",
    "conv_transpose2d groups k=4",
]
every_whole = pytest.mark.parametrize(("layer", "k"), WHOLE.values(), ids=WHOLE)
some_whole = pytest.mark.parametrize(("layer", "k"), [WHOLE[name] for name in SOME], ids=SOME)


def chain(layer: Layer, operands: Any, k: int, binary: bool = True) -> Tensor:
    """The layer in three steps."""
    x, weight, source, bias = operands
    return layer.float_layer(x, used_weight(weight, source, layer.call(k).layout, k, binary), bias)


def both(layer: Layer, held: bool, k: int, *batch: int, **options: Any) -> tuple[Any, Any]:
    weight, source, bias = layer.operands(held, held, k, **options)
    x = layer.input(*batch, **options)
    return leaves(x, weight, source, bias), leaves(x, weight, source, bias)


def backward(y: Tensor) -> None:
    y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape))


def assert_equal_gradients(mine: Any, theirs: Any, rtol: float) -> None:
    for name, a, e in zip(("input", "weight", "source", "bias"), mine, theirs, strict=True):
        assert (a.grad is None) == (e.grad is None), name
        if a.grad is not None:
            assert a.grad.dtype == e.grad.dtype
            oracle.assert_close(a.grad, e.grad, rtol * (20 if name == "source" else 1))  # much of the sum cancels


def test_layouts() -> None:
    """Whatever keeps rows from being shared is among the layers."""
    assert {"linear no rows repeat k=3", "linear inputs only k=3", "conv2d groups share no result k=1", *SOME} <= {
        *WHOLE
    }


@latents
@every_whole
@pytest.mark.parametrize("binary", [True, False])
def test_values_and_gradients(layer: Layer, k: int, held: bool, binary: bool) -> None:
    for batch in ((), (2,)):
        mine, theirs = both(layer, held, k, *batch)
        y, expected = layer(*mine, k, binary=binary), chain(layer, theirs, k, binary)
        oracle.assert_close(y, expected, 1e-13)
        backward(y)
        backward(expected)
        assert_equal_gradients(mine, theirs, 1e-12)


@latents
@some_whole
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_dtypes(layer: Layer, k: int, held: bool, dtype: torch.dtype) -> None:
    mine, theirs = both(layer, held, k, 3, dtype=dtype)
    rtol = 8 * torch.finfo(dtype).eps
    y, expected = layer(*mine, k), chain(layer, theirs, k)
    oracle.assert_close(y, expected, rtol)
    backward(y)
    backward(expected)
    assert_equal_gradients(mine, theirs, rtol)


@latents
@some_whole
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast(layer: Layer, k: int, held: bool, dtype: torch.dtype) -> None:
    mine, theirs = both(layer, held, k, 3, dtype=torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        y, expected = layer(*mine, k), chain(layer, theirs, k)
    assert y.dtype == dtype
    rtol = 8 * torch.finfo(dtype).eps
    oracle.assert_close(y, expected, rtol)
    with OneDtype():
        backward(y)
    backward(expected)
    assert_equal_gradients(mine, theirs, rtol)


def test_gradients_keep_what_half_precision_drops() -> None:
    """Under autocast an alpha may be below float16, and its product with a gradient, too."""
    layer = LAYERS["linear one copy"]
    (x, weight, source, _), _ = both(layer, True, 1, 3, dtype=torch.float32)
    with torch.no_grad():
        source.fill_(1e-8)
    with torch.autocast("cpu", dtype=torch.float16):
        y = layer(x, weight, source, None, 1)
    y.backward(torch.ones_like(y))
    expected = x.detach().half().float().sum(0).expand(layer.shape)
    oracle.assert_close(weight.grad, 1e-8 * expected.reshape(-1), 0.01)
    signs = torch.where(weight.reshape(layer.shape) > 0, 1.0, -1.0)
    oracle.assert_close(source.grad, (expected * signs).sum().view(1) / weight_count(layer, 1), 0.05)


@latents
@some_whole
def test_only_what_is_asked_for_gets_a_gradient(layer: Layer, k: int, held: bool) -> None:
    for wanted in itertools.product([False, True], repeat=4):
        if not any(wanted):
            continue
        mine, theirs = both(layer, held, k, 3)
        for values in (mine, theirs):
            for value, needed in zip(values, wanted, strict=True):
                value.requires_grad_(needed)
        backward(layer(*mine, k))
        backward(chain(layer, theirs, k))
        assert_equal_gradients(mine, theirs, 1e-12)


@latents
@some_whole
def test_gradient_penalty(layer: Layer, k: int, held: bool) -> None:
    mine, theirs = both(layer, held, k, 3)
    for operands, y in ((mine, layer(*mine, k)), (theirs, chain(layer, theirs, k))):
        grads = torch.autograd.grad(y.square().sum(), operands, create_graph=True)
        (sum(grad.square().sum() for grad in grads) + y.sum()).backward()
    assert_equal_gradients(mine, theirs, 1e-10)


@latents
@some_whole
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(layer: Layer, k: int, held: bool, dynamic: bool) -> None:
    """One graph, forward and backward, that serves another batch where sizes are dynamic."""
    torch.compiler.reset()
    compiled = torch.compile(
        lambda *operands: layer(*operands, k), backend="aot_eager", fullgraph=True, dynamic=dynamic
    )
    for batch in (3, 5):
        mine, theirs = both(layer, held, k, batch)
        y, expected = compiled(*mine), layer(*theirs, k)
        oracle.assert_close(y, expected, 1e-13)
        backward(y)
        backward(expected)
        assert_equal_gradients(mine, theirs, 1e-12)


def kept(layer: Layer, operands: Any, run: Any) -> int:
    """Elements that are kept for the backward beside the operands."""
    own = {value.untyped_storage().data_ptr() for value in operands}
    found: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes() // value.element_size()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        run()
    return sum(found.values())


@latents
@every_whole
def test_nothing_but_the_operands_is_kept(layer: Layer, k: int, held: bool) -> None:
    mine, theirs = both(layer, held, k, 2)
    assert kept(layer, mine, lambda: layer(*mine, k)) == 0
    assert kept(layer, theirs, lambda: chain(layer, theirs, k)) > 0


@some_whole
def test_a_frozen_layer_keeps_no_input(layer: Layer, k: int) -> None:
    (x, *rest), _ = both(layer, True, k, 3)
    weight, source, bias = (value.detach() for value in rest)
    if layer.dims:  # PyTorch's convolution keeps it
        assert layer(x, weight, source, bias, k).grad_fn is not None
        return
    assert kept(layer, (weight, source, bias), lambda: layer(x, weight, source, bias, k)) <= weight.numel() * layer.p


@pytest.mark.parametrize("binary", [True, False])
def test_a_weight_in_another_order(binary: bool) -> None:
    """A transposed view as the latent weight and as its source."""
    layer = LAYERS["linear one copy"]
    weight, _, bias = layer.operands(False, False, 1)
    x = layer.input(3)
    found: list[Any] = []
    for run in (layer, lambda *operands, binary: chain(layer, operands[:4], 1, binary)):
        a, base, b = leaves(x, weight.t().contiguous(), bias)
        backward(run(a, base.t(), base.t(), b, 1, binary=binary))
        found.append((a.grad, base.grad, b.grad))
    oracle.assert_close(*found, 1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by the first dual level
@latents
@pytest.mark.parametrize("name", ["linear flat", "linear one copy", "conv2d one copy"])
def test_forward_mode(name: str, held: bool) -> None:
    """Tangents go through, whether rows repeat or not."""
    layer = LAYERS[name]
    (x, weight, source, bias), _ = both(layer, held, 1, 3)
    direction = torch.randn_like(x)
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x.detach(), direction), weight, source, bias, 1)
        tangent = forward_ad.unpack_dual(y).tangent
    oracle.assert_close(tangent, layer(direction, weight, source, None, 1).detach(), 1e-12)


FORMS: list[dict[str, Any]] = [
    {"p": 1},
    {"p": 4},
    {"p": 4, "latent": "tile"},
    {"p": 4, "replicate": "hadamard"},
    {"p": 4, "replicate": "roll", "shift": 3},
    {"p": 4, "tile_dtype": "float"},
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_forward_mode_of_what_is_trained(options: dict[str, Any], requires_grad: bool) -> None:
    """The derivative in a direction is that of the gradient."""
    model = tbn.transform(torch.nn.Linear(16, 16), tbn.TilingConfig(min_size=0, **options)).double()
    x = torch.randn(3, 16, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        direction = torch.randn_like(parameter)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(parameter.detach().requires_grad_(requires_grad), direction)
            tangent = forward_ad.unpack_dual(torch.func.functional_call(model, {name: dual}, (x,))).tangent
        assert tangent is not None, name
        (gradient,) = torch.autograd.grad(model(x).sum(), parameter)
        oracle.assert_close(tangent.sum().detach(), (gradient * direction).sum(), 1e-9)


# Sums by BLAS


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(
    "layer",
    [LAYERS["linear long"], Layer("conv2d", (512, 4, 3, 3), 4), LAYERS["conv2d groups"], Layer("linear", (4, 40), 1)],
    ids=["linear", "conv2d", "groups", "whole"],
)
def test_sums_of_large_products(layer: Layer, k: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large results are summed: without a product that is written, piece by piece."""
    if k not in layer.alphas() or (last and not layer.dims):
        pytest.skip("nothing to sum so")
    monkeypatch.setattr(training, "LARGE", 1)
    monkeypatch.setattr(whole_weight, "LARGE", 7)
    weight, source, bias = layer.operands(True, True, k)
    x = layer.input(2)
    if last:
        x = x.to(memory_format=torch.channels_last)
    mine, theirs = leaves(x, weight, source, bias), leaves(x, weight, source, bias)
    backward(layer(*mine, k))
    backward(chain(layer, theirs, k))
    assert_equal_gradients(mine, theirs, 1e-12)


def test_long_dot_products_keep_their_digits() -> None:
    """As a plain sum does."""
    a, b = torch.rand(3_000_001), torch.rand(3_000_001)
    exact = torch.dot(a.double(), b.double())
    assert abs(whole_weight.dot(a, b).double() - exact) < 1e-6 * exact
