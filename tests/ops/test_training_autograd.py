"""``tbn::train_*`` among PyTorch's features: dtypes, autocast, memory formats, and every kind of differentiation."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from tests import oracle
from tests.ops.test_training_layers import FEW, LAYERS, Layer, few_layers, latents, leaves

LOW = [torch.bfloat16, torch.float16]


def run(layer: Layer, held: bool, chain: bool, *operands: Any, k: int = 1, **options: Any) -> Tensor:
    result: Tensor = (layer.chain if chain else layer)(*operands, k, **options)
    return result


def both(layer: Layer, held: bool, k: int = 1, batch: tuple[int, ...] = (3,), **options: Any) -> tuple[Any, Any]:
    """Equal operands, input first, for the operator and for the chain."""
    weight, source, bias = layer.operands(held, held, k, **options)
    x = layer.input(*batch, **options)
    return leaves(x, weight, source, bias), leaves(x, weight, source, bias)


def assert_equal_gradients(layer: Layer, mine: Any, theirs: Any, held: bool, k: int, rtol: float = 1e-11) -> None:
    for name, a, e in zip(("input", "weight", "source", "bias"), mine, theirs, strict=True):
        assert (a.grad is None) == (e.grad is None), name
        if a.grad is None:
            continue
        count = weight_count(layer, k) if name == "source" and held else 1
        # That of an alpha is one sum over everything, of which much cancels.
        oracle.assert_close(a.grad, (e.grad / count).to(a.grad.dtype), rtol * (20 if name == "source" else 1))


def weight_count(layer: Layer, k: int) -> float:
    """Weights that one alpha scales."""
    return float(torch.Size(layer.shape).numel() / k)


# Dtypes


@latents
@few_layers
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=str)
def test_module_dtypes(layer: Layer, held: bool, dtype: torch.dtype) -> None:
    mine, theirs = both(layer, held, dtype=dtype)
    theirs = leaves(*(value.double() for value in theirs))
    y, expected = run(layer, held, False, *mine), run(layer, held, True, *theirs)
    rtol = 8 * torch.finfo(dtype).eps
    assert y.dtype == dtype
    oracle.assert_close(y, expected.to(dtype), rtol)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad.double())
    assert [value.grad.dtype for value in mine] == [dtype] * 4
    assert_equal_gradients(layer, mine, theirs, held, 1, rtol)


@latents
@few_layers
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast(layer: Layer, held: bool, dtype: torch.dtype) -> None:
    """Dtypes are those of the float layer, of the result and of every gradient."""
    mine, theirs = both(layer, held, dtype=torch.float32)
    results: list[Any] = []
    for chain, operands in ((False, mine), (True, theirs)):
        with torch.autocast("cpu", dtype=dtype):
            y = run(layer, held, chain, *operands)
        results.append(y)
        (y.float() * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum().backward()
    assert results[0].dtype == results[1].dtype == dtype
    rtol = 8 * torch.finfo(dtype).eps
    oracle.assert_close(*results, rtol)
    assert [value.grad.dtype for value in mine] == [torch.float32] * 4
    assert_equal_gradients(layer, mine, theirs, held, 1, rtol)


class OneDtype(TorchDispatchMode):
    """Refuses convolutions whose operands have different dtypes, as cuDNN does, and the CPU does not."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
            dtypes = {value.dtype for value in args if isinstance(value, Tensor)}
            assert len(dtypes) == 1, f"{func} of {dtypes}"
        return func(*args, **(kwargs or {}))


@latents
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("frozen", [False, True])
def test_convolutions_under_autocast_have_one_dtype(layer: Layer, held: bool, frozen: bool) -> None:
    """``frozen``: an input that needs no gradient, as a network's first layer has it."""
    operands, _ = both(layer, held, dtype=torch.float32)
    operands[0].requires_grad_(not frozen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(layer, held, False, *operands)
    with OneDtype():
        y.float().sum().backward()


@few_layers
def test_autocast_leaves_float64_and_integers_alone(layer: Layer) -> None:
    mine, theirs = both(layer, True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(layer, True, False, *mine)
        with pytest.raises(RuntimeError):
            run(layer, True, False, mine[0].detach().long(), *mine[1:])
        with pytest.raises(RuntimeError):
            layer.float_layer(mine[0].detach().long(), torch.zeros(layer.shape), None)
        with pytest.raises(RuntimeError, match="same dtype"):
            run(layer, True, False, mine[0].double(), *(value.float() for value in mine[1:]))
    assert y.dtype == torch.float64
    oracle.assert_close(y, run(layer, True, True, *theirs), 1e-12)


@latents
@pytest.mark.parametrize("name", FEW)
def test_autocast_of_a_half_module(name: str, held: bool) -> None:
    """The weights may have another low dtype than autocast's."""
    layer = LAYERS[name]
    mine, theirs = both(layer, held, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.float16):
        y, expected = run(layer, held, False, *mine), run(layer, held, True, *theirs)
    assert y.dtype == expected.dtype == torch.float16
    oracle.assert_close(y, expected, 0.02)
    y.sum().backward()
    assert [value.grad.dtype for value in mine] == [torch.bfloat16] * 4


@latents
@few_layers
def test_mismatched_dtypes_are_refused_as_by_the_float_layer(layer: Layer, held: bool) -> None:
    weight, source, bias = layer.operands(held, held, 1, dtype=torch.float32)
    whole = torch.zeros(layer.shape)
    for x, b in ((layer.input(3), bias), (layer.input(3, dtype=torch.bfloat16), bias)):
        for call in (lambda x=x, b=b: layer(x, weight, source, b, 1), lambda x=x, b=b: layer.float_layer(x, whole, b)):
            with pytest.raises(RuntimeError, match=r"dtype|type"):
                call()
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        layer.float_layer(layer.input(3, dtype=torch.float32), whole, bias.double())
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        layer(layer.input(3, dtype=torch.float32), weight, source, bias.double(), 1)


def test_half_does_not_overflow_before_it_is_scaled() -> None:
    """The sums over inputs without their scale may be beyond float16; what the layer gives is not."""
    layer = Layer("linear", (8, 4096), 4)
    x = torch.full((2, 4096), 30.0, dtype=torch.float16, requires_grad=True)
    for k in (1, 4):
        weight = torch.ones(layer.tile_size, dtype=torch.float16, requires_grad=True)
        source = torch.linspace(0.01, 0.03, k).half().requires_grad_()
        y = layer(x, weight, source, None, k)
        oracle.assert_close(y.float(), 30.0 * 4096 * source.float().repeat_interleave(8 // k).expand(2, 8), 0.01)
        y.sum().backward()
        assert source.grad is not None
        assert source.grad.isfinite().all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("k", [1, 4])
def test_alpha_gradient_is_summed_in_single_precision(dtype: torch.dtype, k: int) -> None:
    layer = Layer("linear", (64, 32), 4)
    weight, source, _ = layer.operands(True, True, k, dtype=torch.float32)
    x = torch.randn(4096, 32)
    grad = torch.randn(4096, 64) + 0.5
    (a,), (e,) = leaves(source), leaves(source.double())
    with torch.autocast("cpu", dtype=dtype):
        layer(x, weight, a, None, k).backward(grad.to(dtype))
    layer.chain(x.double(), weight.double(), e, None, k).backward(grad.double())
    oracle.assert_close(a.grad, (e.grad / weight_count(layer, k)).float(), 0.01)


# Inputs


@latents
@few_layers
def test_no_tokens(layer: Layer, held: bool) -> None:
    mine, _ = both(layer, held, batch=(0,))
    y = run(layer, held, False, *mine)
    assert y.shape[:2] == (0, layer.outputs)
    y.sum().backward()
    assert mine[0].grad.shape == mine[0].shape
    for value in mine[1:]:
        assert not value.grad.any()


@latents
@few_layers
def test_strided_and_expanded_inputs(layer: Layer, held: bool) -> None:
    weight, source, bias = layer.operands(held, held, 1)
    dense = layer.input(2)
    forms = {
        "transposed": dense.transpose(0, -1).contiguous().transpose(0, -1),
        "every second": torch.stack([dense, dense], -1)[..., 0],
        "expanded": dense[:1].expand_as(dense),
        "flipped": dense.flip(0),
    }
    for x in forms.values():
        expected = layer.chain(x.contiguous(), weight, source, bias, 1)
        mine, theirs = leaves(weight, source), leaves(weight, source)
        y = layer(x, *mine, bias, 1)
        oracle.assert_close(y, expected, 1e-12)
        grad = torch.randn(1, dtype=y.dtype).expand_as(y)  # as from a sum
        y.backward(grad)
        layer.chain(x.contiguous(), *theirs, bias, 1).backward(grad.contiguous())
        assert_equal_gradients(layer, [x, *mine, bias], [x, *theirs, bias], held, 1)


@latents
@pytest.mark.parametrize("name", ["conv2d flat", "conv2d groups", "conv2d two-axis", "conv_transpose2d flat"])
def test_channels_last_is_kept(name: str, held: bool) -> None:
    layer = LAYERS[name]
    for k in (1, 4):
        if "two-axis" in name and k == 4:
            continue
        mine, theirs = both(layer, held, k, dtype=torch.float32)
        x = mine[0].detach().to(memory_format=torch.channels_last).requires_grad_()
        y = run(layer, held, False, x, *mine[1:], k=k)
        expected = run(layer, held, True, *theirs, k=k)
        like = layer.float_layer(x, torch.randn(layer.shape), None)
        assert like.is_contiguous(memory_format=torch.channels_last)
        assert y.is_contiguous(memory_format=torch.channels_last)
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad)
        oracle.assert_close(y, expected, 1e-5)
        assert x.grad is not None
        assert x.grad.is_contiguous(memory_format=torch.channels_last)
        assert_equal_gradients(layer, [x, *mine[1:]], theirs, held, k, 1e-5)


@latents
@few_layers
def test_only_what_is_asked_for_gets_a_gradient(layer: Layer, held: bool) -> None:
    for wanted in range(1, 16):
        mine, theirs = both(layer, held)
        for i in range(4):
            for values in (mine, theirs):
                values[i].requires_grad_(bool(wanted >> i & 1))
        for chain, operands in ((False, mine), (True, theirs)):
            y = run(layer, held, chain, *operands)
            y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape))
        assert_equal_gradients(layer, mine, theirs, held, 1)


@few_layers
def test_nothing_is_recorded_without_need(layer: Layer) -> None:
    mine, _ = both(layer, True)
    with torch.no_grad():
        assert run(layer, True, False, *mine).grad_fn is None
    with torch.inference_mode():
        assert run(layer, True, False, *mine).is_inference()
    assert run(layer, True, False, *(value.detach() for value in mine)).grad_fn is None


@latents
@few_layers
@pytest.mark.parametrize("change", [lambda y: y.add_(1), lambda y: y.relu_(), lambda y: y.mul_(2)[..., :1].zero_()])
def test_the_result_may_be_written_in_place(layer: Layer, held: bool, change: Any) -> None:
    for k in layer.alphas():
        for with_bias in (True, False):
            mine, theirs = both(layer, held, k)
            for chain, operands in ((False, mine), (True, theirs)):
                y = run(layer, held, chain, *operands[:3], operands[3] if with_bias else None, k=k)
                change(y)
                (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
            assert_equal_gradients(layer, mine, theirs, held, k)


def test_the_result_shares_no_memory() -> None:
    """Not with an operand, and its elements not with each other."""
    for name in ("linear one row", "linear flat", "conv2d flat", "conv_transpose2d flat"):
        layer = LAYERS[name]
        mine, _ = both(layer, True)
        for bias in (mine[3], None):
            y = run(layer, True, False, *mine[:3], bias)
            assert 0 not in y.stride()
            assert y._base is None or not y._base.requires_grad
            with torch.no_grad():
                kept = [value.clone() for value in mine]
                y.zero_()
            assert all(torch.equal(value, old) for value, old in zip(mine, kept, strict=True))


# Differentiation


@latents
@few_layers
def test_gradient_penalty(layer: Layer, held: bool) -> None:
    """The gradient of the gradient of the input, by all operands."""
    for k in layer.alphas():
        mine, theirs = both(layer, held, k)
        for chain, operands in ((False, mine), (True, theirs)):
            y = run(layer, held, chain, *operands, k=k)
            (grad,) = torch.autograd.grad(y.square().sum(), operands[0], create_graph=True)
            (grad.square().sum() + y.sum()).backward()
        assert_equal_gradients(layer, mine, theirs, held, k)


@few_layers
def test_gradient_penalty_of_parameters(layer: Layer) -> None:
    mine, theirs = both(layer, False, 1)
    for chain, operands in ((False, mine), (True, theirs)):
        y = run(layer, False, chain, *operands)
        grads = torch.autograd.grad(y.square().sum(), operands, create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
    assert_equal_gradients(layer, mine, theirs, False, 1)


@few_layers
def test_second_gradient_where_alphas_come_from_the_weight(layer: Layer) -> None:
    """Weight and source are one tensor: each has its own part of the gradient."""
    weight, _, bias = layer.operands(False, False, 1)
    x = layer.input(3)
    found: list[Any] = []
    for chain in (False, True):
        a, w, b = leaves(x, weight, bias)
        y = run(layer, False, chain, a, w, w, b)
        grads = torch.autograd.grad(y.square().sum(), (a, w), create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        found.append((grads, a.grad, w.grad))
    oracle.assert_close(*found, 1e-10)


@few_layers
def test_operands_that_are_one_tensor(layer: Layer) -> None:
    """A bias that is computed of the input, and twice differentiated."""
    weight, source, _ = layer.operands(True, True, 1)
    x = layer.input(3)
    found: list[Any] = []
    for chain in (False, True):
        a, w, s = leaves(x, weight, source)
        b = a.mean() * torch.ones(layer.outputs, dtype=x.dtype)
        y = run(layer, True, chain, a, w, s, b)
        (grad,) = torch.autograd.grad(y.square().sum(), a, create_graph=True)
        grad.square().sum().backward()
        found.append((grad, a.grad, w.grad))
    oracle.assert_close(*found, 1e-10)


@few_layers
def test_gradcheck(layer: Layer) -> None:
    """By input, alphas and bias, and of a full-precision tile: what has no straight-through step."""
    weight, source, bias = layer.operands(False, False, 1)
    for binary in (True, False):
        x, s, b, w = leaves(layer.input(2), source, bias, weight)
        if binary:
            w = w.detach()
        function = lambda x, s, b, w, binary=binary: layer(x, w, s, b, 1, binary=binary)  # noqa: E731
        assert torch.autograd.gradcheck(function, (x, s, b, w), fast_mode=True)
        assert torch.autograd.gradgradcheck(function, (x, s, b, w), fast_mode=True)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # by the first torch.func.jvp
@latents
@few_layers
def test_torch_func(layer: Layer, held: bool) -> None:
    """``grad``, ``vjp``, ``jvp``, and gradients of each sample by ``vmap``."""
    mine, _ = both(layer, held)
    x, w, s, b = (value.detach() for value in mine)

    def loss(chain: bool, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return run(layer, held, chain, x, w, s, b).square().sum()

    def as_source(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*grads[:-1], grads[-1] * (weight_count(layer, 1) if held else 1))

    by_all: list[Any] = [torch.func.grad(functools.partial(loss, chain), (0, 1, 2))(x, w, s) for chain in (False, True)]
    oracle.assert_close(as_source(by_all[0]), by_all[1], 1e-10)
    each: list[Any] = [
        torch.vmap(torch.func.grad(functools.partial(loss, chain), (1, 2)), (0, None, None))(x, w, s)
        for chain in (False, True)
    ]
    oracle.assert_close(as_source(each[0]), each[1], 1e-10)
    direction = torch.randn_like(x)
    along: list[Any] = [
        torch.func.jvp(lambda x, chain=chain: run(layer, held, chain, x, w, s, b), (x,), (direction,))
        for chain in (False, True)
    ]
    oracle.assert_close(*along, 1e-10)
    hessians: list[Any] = [torch.func.hessian(functools.partial(loss, chain))(x[:1], w, s) for chain in (False, True)]
    oracle.assert_close(*hessians, 1e-10)


@pytest.mark.parametrize("use_reentrant", [False, True])
@latents
def test_checkpointing(held: bool, use_reentrant: bool) -> None:
    layer = LAYERS["conv2d groups"]
    mine, theirs = both(layer, held)
    function = functools.partial(run, layer, held, False)
    y = checkpoint.checkpoint(function, *mine, use_reentrant=use_reentrant)
    run(layer, held, False, *theirs).square().sum().backward()
    y.square().sum().backward()
    for a, e in zip(mine, theirs, strict=True):
        assert torch.equal(a.grad, e.grad)


def test_saved_tensors_can_be_moved_and_freed() -> None:
    layer = LAYERS["linear flat"]
    mine, theirs = both(layer, True)
    with torch.autograd.graph.save_on_cpu():
        y = run(layer, True, False, *mine)
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    run(layer, True, True, *theirs).sum().backward()
    for a, e in zip(mine[:2], theirs[:2], strict=True):
        oracle.assert_close(a.grad, 2 * e.grad, 1e-12)
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_hooks_see_the_gradients() -> None:
    layer = LAYERS["linear flat"]
    mine, _ = both(layer, True)
    seen: list[torch.Size] = []
    for value in mine:
        value.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    run(layer, True, False, *mine).sum().backward()
    assert sorted(seen) == sorted(value.shape for value in mine)


# It compares with fakes of real tensors in between, whose gradients it asks for.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@few_layers
@latents
def test_opcheck(layer: Layer, held: bool) -> None:
    weight, source, bias = layer.operands(held, held, 1, dtype=torch.float32)
    x, w, s, b = leaves(layer.input(2, dtype=torch.float32), weight, source, bias)
    operator = layer.call(1).operator
    sizes = (layer.inputs, layer.outputs, *([list(layer.shape[2:])] if layer.dims else []), layer.p, 1)
    torch.library.opcheck(operator.overload, (x, w, s, b, *sizes), layer.options())


# Refusals


def test_operands_that_do_not_fit() -> None:
    layer = LAYERS["linear flat"]
    weight, source, bias = layer.operands(True, True, 4)
    x = layer.input(3)
    with pytest.raises(RuntimeError, match=r"tbn::train_linear: expected 6 input features, got an input of shape"):
        layer(x[:, :5], weight, source, bias, 4)
    with pytest.raises(ValueError, match=r"tbn::train_linear: weight must have shape \(8, 6\), or the 12 elements"):
        layer(x, weight[:11], source, bias, 4)
    with pytest.raises(ValueError, match=r"tbn::train_linear: weight must have shape"):
        layer(x, torch.zeros(6, 8), source, bias, 4)  # the elements of the weight, in another shape
    with pytest.raises(ValueError, match=r"4 alphas from a source of shape \(3,\)"):
        layer(x, weight, source[:3], bias, 4)
    with pytest.raises(ValueError, match=r"3 alphas from a source"):
        layer(x, weight, source[:3], bias, 3)
    with pytest.raises(ValueError, match=r"tbn::train_linear: bias must have shape \(8,\), got \(3,\)"):
        layer(x, weight, source, bias[:3], 4)
    with pytest.raises(RuntimeError, match=r"an input of shape \(\) has too few dimensions"):
        layer(x[0, 0], weight, source, bias, 4)
    image = LAYERS["conv2d flat"]
    weight, source, bias = image.operands(True, True, 4)
    with pytest.raises(RuntimeError, match=r"has too many dimensions"):
        image(image.input(1, 2), weight, source, bias, 4)


# Memory


class Sizes(TorchDispatchMode):
    """The elements of the largest tensor that any operator makes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in oracle.flatten(result):
            self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_no_whole_weight_is_made(kind: str, k: int) -> None:
    """One training step on the tile, forward and backward, makes no tensor of the weight's size."""
    layer = Layer(kind, (64, 32) if kind == "linear" else (64, 32, 3, 3), 4)
    weight, source, bias = leaves(*layer.operands(True, True, k))
    x = layer.input(2).requires_grad_()
    with Sizes() as sizes:
        layer(x, weight, source, bias, k).square().sum().backward()
    assert sizes.largest < 64 * 32 if kind == "linear" else sizes.largest < 64 * 32 * 9
    assert weight.grad.shape == weight.shape


def test_what_is_saved_is_not_more_than_the_chain_saves() -> None:
    layer = Layer("linear", (256, 256), 4)
    weight, source, _ = leaves(*layer.operands(True, True, 1))
    x = layer.input(64)
    saved: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        saved[value.data_ptr()] = value.numel()
        return value

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        layer(x, weight, source, None, 1)
    assert sum(saved.values()) <= x.numel() + 2 * layer.tile_size + 64 * 64 + 8


def test_copies_of_modules() -> None:
    """The operators stand in the graphs of modules that are copied and averaged."""
    import tbn_compiler as tbn

    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))
    qat = tbn.transform(model, tbn.TilingConfig(p=4, min_size=0, latent="tile"))
    x = torch.randn(3, 12)
    assert torch.equal(copy.deepcopy(qat)(x), qat(x))
    assert F.mse_loss(copy.deepcopy(qat)(x), qat(x)) == 0
