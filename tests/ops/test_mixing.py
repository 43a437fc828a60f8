"""Layers whose copies have Hadamard signs, against dense layers on the oracle's weight."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import tbn_compiler  # noqa: F401  (registers the operators)
from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import conv
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import OPERATORS, TRAINING_OPERATORS
from tbn_compiler.ops.training import shares_products
from tbn_compiler.tiling import TileLayout
from tests import oracle

tbn = torch.ops.tbn
KINDS = list(OPERATORS)


@dataclass(frozen=True)
class Layer:
    """A layer; ``shape`` is that of the weight, ``geometry`` what its operator takes beside."""

    kind: str
    shape: tuple[int, ...]
    p: int = 4
    groups: int = 1
    geometry: dict[str, Any] = field(default_factory=dict)

    @property
    def transposed(self) -> bool:
        return "transpose" in self.kind

    @property
    def dims(self) -> int:
        return len(self.shape) - 2

    @property
    def tile_size(self) -> int:
        return int(np.prod(self.shape)) // self.p

    @property
    def channels(self) -> tuple[int, int]:
        """Input and output channels."""
        sizes = (self.shape[1] * self.groups, self.shape[0])
        return sizes[::-1] if self.transposed else sizes

    @property
    def sizes(self) -> tuple[Any, ...]:
        return (*self.channels, *([self.shape[2:]] if self.dims else []), self.p)

    @property
    def options(self) -> dict[str, Any]:
        return {"hadamard": True, **self.geometry, **({"groups": self.groups} if self.dims else {})}

    def float_layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        options = {**self.geometry, **({"groups": self.groups} if self.dims else {})}
        result: Tensor = getattr(F, self.kind)(x, weight, bias, **options)
        return result

    def input(self, *batch: int, dtype: torch.dtype = torch.float64, replicas: int = 1) -> Tensor:
        return oracle.exact(*batch, self.channels[0] // replicas, *(5, 6, 4)[: self.dims], dtype=dtype)

    def stored(self, k: int, packed: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
        """``(stored tile, alpha, dense weight)``."""
        t = oracle.array(oracle.exact(self.tile_size))
        t = np.where(t > 0, 1.0, -1.0) if packed else t
        alpha = np.random.default_rng(k).integers(1, 9, k) / 8
        tile = torch.from_numpy(oracle.pack(t)) if packed else torch.from_numpy(t).to(dtype)
        weight = torch.from_numpy(oracle.hadamard_fill(self.shape, t, alpha)).to(dtype)
        return tile, torch.from_numpy(alpha).to(dtype), weight

    def alphas(self) -> list[int]:
        return sorted({1, self.p, self.shape[0]})


def layer(kind: str, p: int = 4, groups: int = 1) -> Layer:
    d = 0 if kind == "linear" else int(kind[-2])
    geometry: dict[str, Any] = {}
    if d:
        geometry = {"stride": [2, 1, 2][:d], "padding": [1, 0, 1][:d], "dilation": [1, 2, 1][:d]}
    if "transpose" in kind:
        geometry["output_padding"] = [1, 0, 0][:d]
    return Layer(kind, (2 * p * groups, 3 * p, *(3, 2, 2)[:d]), p, groups, geometry)


# Inference


@pytest.mark.parametrize("packed", [True, False], ids=["bits", "floats"])
@pytest.mark.parametrize("p", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
def test_inference(kind: str, p: int, packed: bool) -> None:
    case = layer(kind, p)
    for k in case.alphas():
        tile, alpha, weight = case.stored(k, packed)
        for bias in (None, oracle.exact(case.channels[1], dtype=torch.float64)):
            for batch in [(2,), (), *([(2, 3), (0,)] if kind == "linear" else [])]:
                x = case.input(*batch)
                got = getattr(tbn, kind)(x, tile, alpha, bias, *case.sizes, **case.options)
                # Every product and sum is exact in float64.
                assert torch.equal(got, case.float_layer(x, weight, bias))
                assert got.is_contiguous()


@pytest.mark.parametrize("kind", KINDS[1:])
def test_groups_of_a_convolution_take_the_whole_weight(kind: str) -> None:
    case = layer(kind, groups=2)
    for k in case.alphas():
        tile, alpha, weight = case.stored(k)
        x = case.input(2)
        got = getattr(tbn, kind)(x, tile, alpha, None, *case.sizes, **case.options)
        assert torch.equal(got, case.float_layer(x, weight, None))


@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
@pytest.mark.parametrize("replicas", [2, 3, 4, 6])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d"])
def test_replicas_of_the_input(kind: str, replicas: int, activation: str) -> None:
    """12 inputs in 4 groups: 3 replicas hold whole ones, others do not."""
    case = layer(kind)
    if activation == "float":
        input_alpha = torch.arange(1, replicas + 1, dtype=torch.float64) / 4
        tile, alpha, weight = case.stored(case.p)
        x = case.input(2, replicas=replicas)
        got = getattr(tbn, kind)(x, tile, alpha, None, *case.sizes, input_alpha, **case.options)
        copies = torch.cat([factor * x for factor in input_alpha], 1)
        assert torch.equal(got, case.float_layer(copies, weight, None))


@pytest.mark.parametrize("epilogue", ["none", "relu"])
@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("kind", ["linear", "conv1d", "conv2d", "conv3d"])
def test_number_formats(kind: str, activation: str, epilogue: str) -> None:
    """As the layer without tiles in the same format: a plain one-copy tile holds the same weight."""
    case = layer(kind)
    tile, alpha, _ = case.stored(1)
    x, bias = case.input(3, dtype=torch.float32) * 0.37, torch.randn(case.channels[1])
    options = {"activation": activation, "epilogue": epilogue}
    got = getattr(tbn, kind)(x, tile, alpha.float(), bias, *case.sizes, **case.options, **options)
    layout = TileLayout(case.shape, case.p, hadamard=True)
    whole = layout.replicate(reference.decode(tile, layout, torch.float32)).reshape(-1)
    plain = torch.from_numpy(oracle.pack(oracle.array(whole)))
    sizes, as_plain = (*case.sizes[:-1], 1), {**case.options, **options, "hadamard": False}
    expected = getattr(tbn, kind)(x, plain, alpha.float(), bias, *sizes, **as_plain)
    oracle.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    case = layer(kind)
    tile, alpha, weight = case.stored(case.p, dtype=dtype)
    x = case.input(2, dtype=dtype)
    got = getattr(tbn, kind)(x, tile, alpha, None, *case.sizes, **case.options)
    assert got.dtype == dtype
    expected = case.float_layer(x.double(), weight.double(), None)
    oracle.assert_close(got.double(), expected, rtol=4 * torch.finfo(dtype).eps)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 4), st.integers(1, 4), st.booleans(), st.integers(0, 9))
def test_linear_property(p: int, rows: int, inputs: int, packed: bool, tokens: int) -> None:
    case = Layer("linear", (p * rows, p * inputs), p)
    tile, alpha, weight = case.stored(p, packed)
    x, bias = case.input(tokens), oracle.exact(p * rows, dtype=torch.float64)
    assert torch.equal(tbn.linear(x, tile, alpha, bias, *case.sizes, hadamard=True), F.linear(x, weight, bias))


def test_values_that_are_not_finite_reach_the_rows_that_read_them() -> None:
    case = Layer("linear", (8, 8), 4)
    tile, alpha, weight = case.stored(1, dtype=torch.float32)
    for values in ([torch.inf], [torch.nan], [torch.inf, torch.inf], [torch.inf, -torch.inf]):
        for places in itertools.combinations(range(8), len(values)):
            x = torch.ones(8)
            x[list(places)] = torch.tensor(values)
            got = tbn.linear(x, tile, alpha, None, *case.sizes, hadamard=True)
            torch.testing.assert_close(got, F.linear(x, weight), equal_nan=True)


NATIVE = [
    Layer("linear", (8, 8), 4),
    Layer("linear", (24, 44), 4),
    Layer("linear", (256, 96), 8),
    Layer("conv1d", (512, 32, 3), 4, geometry={"padding": [1], "stride": [2]}),
    Layer("conv2d", (512, 40, 3, 2), 8, geometry={"padding": [1, 0], "dilation": [1, 2]}),
    Layer("conv2d", (512, 40, 1, 1), 4),
    Layer("conv2d", (256, 16, 3, 3), 2, groups=2),
]


@pytest.mark.parametrize("case", NATIVE, ids=str)
def test_native_kernels(case: Layer) -> None:
    """float32 of few digits, so that every sum is exact; a level that has no kernel for it gives the same."""
    for k in case.alphas():
        tile, alpha, weight = case.stored(k, dtype=torch.float32)
        bias = oracle.exact(case.channels[1])
        for batch in (1, 5, *((0, 13, 40) if case.kind == "linear" else ())):
            x = case.input(batch, dtype=torch.float32)
            expected = case.float_layer(x, weight, None)
            op = getattr(tbn, case.kind)
            assert torch.equal(op(x, tile, alpha, None, *case.sizes, **case.options), expected)
            expected = case.float_layer(x, weight, bias)
            assert torch.equal(op(x, tile, alpha, bias, *case.sizes, **case.options), expected)
            got = op(x, tile, alpha, bias, *case.sizes, **case.options, epilogue="relu")
            assert torch.equal(got, expected.relu())
        if case.groups == 1:
            x, input_alpha = case.input(3, dtype=torch.float32, replicas=2), torch.tensor([0.5, 0.25])
            copies = torch.cat([x * 0.5, x * 0.25], 1)
            got = op(x, tile, alpha, None, *case.sizes, input_alpha, **case.options)
            oracle.assert_close(got, case.float_layer(copies, weight, None))


@pytest.mark.parametrize("activation", ["int8", "binary"])
@pytest.mark.parametrize("case", NATIVE, ids=str)
def test_native_kernels_of_integers(case: Layer, activation: str) -> None:
    """Sums of integers are exact, with one scale for all column groups.

    That scale is the reference's for int8, and a mean summed in another order for binary activations.
    """
    for k in case.alphas():
        tile, alpha, _ = case.stored(k, dtype=torch.float32)
        bias, op = oracle.exact(case.channels[1]), getattr(tbn, case.kind)
        for batch in (1, 5, *((0, 13, 40) if case.kind == "linear" else ())):
            x, options = torch.randn_like(case.input(batch, dtype=torch.float32)), {**case.options}
            options |= {"activation": activation, "epilogue": "relu"}
            got = op(x, tile, alpha, bias, *case.sizes, **options)
            with cpu.use_level("none"):
                expected = op(x, tile, alpha, bias, *case.sizes, **options)
            assert torch.equal(got, expected) or activation == "binary"
            if batch:
                oracle.assert_close(got, expected)


@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
def test_what_the_native_kernels_take(activation: str) -> None:
    case = Layer("linear", (64, 64), 4)
    tile, alpha, _ = case.stored(1, dtype=torch.float32)
    before = dict(cpu.info().declined)
    tbn.linear(case.input(2, dtype=torch.float32), tile, alpha, None, *case.sizes, hadamard=True, activation=activation)
    declined = [key for key, count in cpu.info().declined.items() if count != before.get(key)]
    assert len(declined) == (cpu.info().level is None)


@pytest.mark.parametrize("level", cpu.info().available)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_sums_that_overflow_on_the_way(kind: str, level: str) -> None:
    """Results of column groups, or mixed sums of them, leave float32 where the whole sum does not."""
    if kind == "conv2d" and level not in conv.MIN_FILTERS:
        pytest.skip("PyTorch computes it")
    case = Layer(kind, (512, 32) if kind == "linear" else (512, 32, 1, 1), 4)
    tile, alpha, weight = case.stored(4, dtype=torch.float32)
    for batch in (1, 20):
        x = case.input(batch, dtype=torch.float32)
        x = torch.where(torch.rand_like(x) < 0.5, 0, x.sign() * 2.0**126)
        with cpu.use_level(level):
            got = getattr(tbn, kind)(x, tile, alpha, None, *case.sizes, **case.options)
        expected = case.float_layer(x.double(), weight.double(), None).float()
        assert not expected.isnan().any()
        assert torch.equal(got, expected)


def test_native_kernels_notice_a_tile_that_changes() -> None:
    case = Layer("linear", (64, 64), 4)
    tile, alpha, weight = case.stored(1, dtype=torch.float32)
    x = case.input(2, dtype=torch.float32)
    first = tbn.linear(x, tile, alpha, None, *case.sizes, hadamard=True)
    assert torch.equal(first, F.linear(x, weight))
    tile.bitwise_not_()
    assert torch.equal(tbn.linear(x, tile, alpha, None, *case.sizes, hadamard=True), -first)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_is_not_taken_for_one_without_signs(kind: str) -> None:
    """What is kept for a tile in one layout must not serve the other."""
    case = layer(kind, 4)
    tile, alpha, weight = case.stored(4, dtype=torch.float32)
    plain = np.unpackbits(tile.numpy(), count=case.tile_size, bitorder="little") * 2.0 - 1
    flat = torch.from_numpy(oracle.fill(case.shape, plain, oracle.array(alpha))).float()
    x = case.input(2, dtype=torch.float32)
    for hadamard in (True, False, True):
        got = getattr(tbn, kind)(x, tile, alpha, None, *case.sizes, **{**case.options, "hadamard": hadamard})
        oracle.assert_close(got, case.float_layer(x, weight if hadamard else flat, None))


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_multiplications(kind: str) -> None:
    """PyTorch's own count: a p-th of the dense layer's, and the mixing, which is counted as a product with H."""
    from torch.utils.flop_counter import FlopCounterMode

    case = Layer(kind, (64, 64, *(3,) * (0 if kind == "linear" else int(kind[-2]))), 8)
    tile, alpha, weight = case.stored(8, dtype=torch.float32)
    x = case.input(2, dtype=torch.float32)
    with FlopCounterMode(display=False) as dense:
        out = case.float_layer(x, weight, None)
    with FlopCounterMode(display=False) as mixed:
        reference.KERNELS[kind](x, tile, alpha, None, *case.sizes, **case.options)
    mixed_elements = x.numel() if case.transposed else out.numel()
    assert mixed.get_total_flops() == dense.get_total_flops() // 8 + 2 * 8 * mixed_elements


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind: str, packed: bool) -> None:
    case = layer(kind)
    tile, alpha, _ = case.stored(4, packed, dtype=torch.float32)
    x = case.input(2, dtype=torch.float32).requires_grad_()
    bias = torch.randn(case.channels[1]).requires_grad_()
    args = (x, tile, alpha.requires_grad_(), bias, *case.sizes)
    torch.library.opcheck(getattr(tbn, kind).default, args, case.options)


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv_transpose2d"])
def test_gradients_of_inference_operators(kind: str) -> None:
    case = layer(kind)
    for k in case.alphas():
        tile, alpha, _ = case.stored(k)
        bits = np.unpackbits(tile.numpy(), count=case.tile_size, bitorder="little") * 2.0 - 1
        signs = torch.from_numpy(oracle.hadamard_fill(case.shape, bits, np.ones(1)))
        places = torch.from_numpy(oracle.alpha_places(case.shape, case.p, k))
        x = case.input(2).requires_grad_()
        alpha.requires_grad_()
        out = getattr(tbn, kind)(x, tile, alpha, None, *case.sizes, **case.options)
        upstream = torch.randn_like(out)
        expected = torch.autograd.grad(case.float_layer(x, alpha[places] * signs, None), (x, alpha), upstream)
        oracle.assert_close(torch.autograd.grad(out, (x, alpha), upstream), expected, rtol=1e-12)


def test_bad_layouts_fail_while_tracing() -> None:
    with FakeTensorMode():
        for call in (
            lambda: tbn.tile(torch.ones(6, 4), 4, hadamard=True),
            lambda: tbn.unpack(torch.zeros(3, dtype=torch.uint8), torch.ones(1), [8, 6], 2, p_in=2, hadamard=True),
        ):
            with pytest.raises(Exception, match=r"Hadamard"):
                call()


# Training


@pytest.mark.parametrize("binary", [True, False])
def test_tile_and_its_gradient(binary: bool) -> None:
    shape, p = (8, 12, 2), 4
    w = oracle.exact(*shape, dtype=torch.float64).requires_grad_()
    s, signs = oracle.hadamard_sums(oracle.array(w), p), torch.from_numpy(oracle.hadamard_signs(shape, p))
    t = np.where(s > 0, 1.0, -1.0) if binary else s
    bits = tbn.tile(w, p, hadamard=True, binary=binary)
    assert torch.equal(bits, torch.from_numpy(oracle.hadamard_fill(shape, t, np.ones(1))))
    upstream = torch.randn(shape, dtype=torch.float64)
    bits.backward(upstream)
    expected = upstream  # straight through
    if not binary:
        sums = (signs * upstream).reshape(p, -1).sum(0)
        expected = (sums.repeat(p).reshape(shape)) * signs
    torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=0)
    grad = torch.func.grad(lambda w: (tbn.tile(w, p, hadamard=True, binary=binary) * upstream).sum())(w.detach())
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=0)


def test_opcheck_of_operators_on_weights() -> None:
    w = torch.randn(8, 12).requires_grad_()
    for binary in (True, False):
        torch.library.opcheck(tbn.tile.default, (w, 4), {"hadamard": True, "binary": binary})
    tile, alpha, weight = Layer("linear", (8, 12)).stored(4)
    args = (tile, alpha.requires_grad_(), [8, 12], 4)
    torch.library.opcheck(tbn.unpack.default, args, {"hadamard": True})
    assert torch.equal(tbn.unpack(*args, hadamard=True), weight)


def chain(case: Layer, x: Tensor, weight: Tensor, source: Tensor, bias: Tensor, k: int, binary: bool) -> Tensor:
    """The layer on the oracle's whole weight, by differentiable functions."""
    places = torch.from_numpy(oracle.tile_places(case.shape, case.p))
    of_alpha = torch.from_numpy(oracle.alpha_places(case.shape, case.p, k))
    signs = torch.from_numpy(oracle.hadamard_signs(case.shape, case.p)).to(weight.dtype)
    held, s = weight.numel() == case.tile_size, weight.reshape(-1)
    if not held:
        s = s.new_zeros(case.tile_size).index_add(0, places.reshape(-1), (weight * signs).reshape(-1))
    t = torch.where(s > 0, 1.0, -1.0).to(s.dtype)
    if not binary:
        bits = s[places] * signs
    elif held:
        bits = (s + (t - s).detach())[places] * signs
    else:
        bits = weight + (t[places] * signs - weight).detach()
    magnitude = source.abs().reshape(-1)
    if source.numel() == k:
        count = weight.new_tensor(np.prod(case.shape) // k)
        alpha = magnitude.detach() + (magnitude - magnitude.detach()) / count
    else:
        alpha = magnitude.new_zeros(k).index_add(0, of_alpha.reshape(-1), magnitude) * k / magnitude.numel()
    return case.float_layer(x, alpha[of_alpha] * bits, bias)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("held", [False, True], ids=["weight", "tile"])
@pytest.mark.parametrize("kind", KINDS)
def test_training_layers(kind: str, held: bool, binary: bool) -> None:
    case = layer(kind)
    for k in sorted({1, case.p}):
        x = torch.randn_like(case.input(2))
        weight = torch.randn(case.tile_size if held else case.shape, dtype=torch.float64)
        source = torch.rand(k if held else case.shape, dtype=torch.float64) + 0.25
        operands = [x, weight, source, torch.randn(case.channels[1], dtype=torch.float64)]
        for value in operands:
            value.requires_grad_()
        op = getattr(tbn, f"train_{kind}")
        for value in (x, x[0]):
            given_operands = (value, *operands[1:])
            out = op(*given_operands, *case.sizes, k, **case.options, binary=binary)
            expected = chain(case, *given_operands, k, binary)
            oracle.assert_close(out, expected, rtol=1e-12)
            upstream = torch.randn_like(out)
            grads = [torch.autograd.grad(y, operands, upstream, retain_graph=True) for y in (out, expected)]
            oracle.assert_close(grads[0], grads[1], rtol=1e-11)
        # Gradients are differentiable, too.
        second = [
            torch.autograd.grad(
                [g.square().sum() for g in torch.autograd.grad(y, operands, upstream, create_graph=True)[:3]],
                operands[:3],
            )
            for y in (out, expected)
        ]
        oracle.assert_close(second[0], second[1], rtol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_alphas_from_the_weight_itself(kind: str) -> None:
    case = layer(kind)
    x, bias = torch.randn_like(case.input(2)).requires_grad_(), torch.randn(case.channels[1], dtype=torch.float64)
    weight = torch.randn(case.shape, dtype=torch.float64, requires_grad=True)
    out = getattr(tbn, f"train_{kind}")(x, weight, weight, bias, *case.sizes, 4, **case.options)
    expected = chain(case, x, weight, weight, bias, 4, True)
    upstream = torch.randn_like(out)
    first = [torch.autograd.grad(y, (x, weight), upstream, create_graph=True) for y in (out, expected)]
    oracle.assert_close(first[0], first[1], rtol=1e-11)
    second = [torch.autograd.grad([g.square().sum() for g in grads], (x, weight)) for grads in first]
    oracle.assert_close(second[0], second[1], rtol=1e-10)


@pytest.mark.parametrize("held", [False, True], ids=["weight", "tile"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_result_may_be_written_in_place(kind: str, held: bool) -> None:
    case = layer(kind)
    weight = torch.randn(case.tile_size if held else case.shape, dtype=torch.float64, requires_grad=True)
    source = torch.rand(case.p if held else case.shape, dtype=torch.float64) + 0.5
    for batch in ((2,), (1,), ()):
        x = case.input(*batch)
        out = getattr(tbn, f"train_{kind}")(x, weight, source, None, *case.sizes, case.p, **case.options)
        expected = out.relu()
        assert torch.equal(out.relu_(), expected)
        out.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_only_layers_that_mix_share_products(kind: str) -> None:
    operator = TRAINING_OPERATORS[kind]
    for groups, expected in ((1, True), (2, False)):
        case = layer(kind, groups=groups if kind != "linear" else 1)
        arguments = dict(zip(operator.positional[4:], (*case.sizes, 4), strict=True))
        call = operator.bind((None, None, None, None), arguments | case.options)
        assert shares_products(call) == (expected or kind == "linear")


# It compares with fakes of real tensors in between, whose gradients it asks for.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv_transpose2d"])
@pytest.mark.parametrize("held", [False, True], ids=["weight", "tile"])
def test_opcheck_of_training_layers(kind: str, held: bool) -> None:
    case = layer(kind)
    operands = [case.input(2, dtype=torch.float32), torch.randn(case.tile_size if held else case.shape)]
    operands += [torch.rand(4 if held else case.shape) + 0.1, torch.randn(case.channels[1])]
    args = (*(value.requires_grad_() for value in operands), *case.sizes, 4)
    torch.library.opcheck(getattr(tbn, f"train_{kind}").default, args, case.options)


@pytest.mark.parametrize("held", [False, True], ids=["weight", "tile"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv_transpose2d"])
def test_autocast(kind: str, held: bool) -> None:
    case = layer(kind)
    x, weight = (
        torch.randn_like(case.input(5, dtype=torch.float32)),
        torch.randn(case.tile_size if held else case.shape),
    )
    source, bias = torch.rand(1 if held else case.shape) + 0.5, torch.randn(case.channels[1])
    operands = [value.requires_grad_() for value in (x, weight, source, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        out = getattr(tbn, f"train_{kind}")(*operands, *case.sizes, 1, **case.options)
    assert out.dtype == torch.bfloat16
    upstream = torch.randn_like(out).float()
    grads = torch.autograd.grad(out.float(), operands, upstream)
    assert [grad.dtype for grad in grads] == [torch.float32] * 4
    expected = chain(case, *operands, 1, True)
    wanted = torch.autograd.grad(expected, operands, upstream)
    oracle.assert_close(out.float(), expected, rtol=0.03)
    oracle.assert_close(grads, wanted, rtol=0.03)


@pytest.mark.parametrize("held", [False, True], ids=["weight", "tile"])
def test_half_does_not_overflow_before_it_is_scaled(held: bool) -> None:
    case = Layer("linear", (8, 4096), 4)
    x = torch.full((2, 4096), 30.0, dtype=torch.float16)
    weight = torch.ones(case.tile_size if held else case.shape, dtype=torch.float16)
    weight = weight if held else weight * torch.from_numpy(oracle.hadamard_signs(case.shape, 4))
    source = torch.full((4,) if held else case.shape, 0.02, dtype=torch.float16)
    operands = [value.requires_grad_() for value in (x, weight.half(), source)]
    out = tbn.train_linear(*operands, None, *case.sizes, 4, hadamard=True)
    expected = 30.0 * 4096 * 0.02 * torch.tensor([1.0, 1, 0, 0, 0, 0, 0, 0]).expand(2, 8)
    torch.testing.assert_close(out.float(), expected, rtol=0.01, atol=2)
    for grad in torch.autograd.grad(out.sum(), operands):
        assert grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_alphas_of_zero(kind: str) -> None:
    case = layer(kind)
    operands = [case.input(2), torch.randn(case.tile_size).double(), torch.zeros(4).double()]
    out = getattr(tbn, f"train_{kind}")(*(v.requires_grad_() for v in operands), None, *case.sizes, 4, **case.options)
    assert not out.any()
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), operands))


@pytest.mark.parametrize("held", [False, True], ids=["weight", "tile"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv_transpose2d"])
def test_torch_func(kind: str, held: bool) -> None:
    """``torch.func`` differentiates the whole weight."""
    case = layer(kind)
    x, weight = torch.randn_like(case.input(2)), torch.randn(case.tile_size if held else case.shape).double()
    source = torch.rand(4 if held else case.shape, dtype=torch.float64) + 0.5

    def loss(x: Tensor, weight: Tensor, source: Tensor) -> Tensor:
        return getattr(tbn, f"train_{kind}")(x, weight, source, None, *case.sizes, 4, **case.options).square().sum()

    functional = torch.func.grad(loss, (0, 1, 2))(x, weight, source)
    operands = [value.requires_grad_() for value in (x, weight, source)]
    oracle.assert_close(torch.autograd.grad(loss(*operands), operands), functional, rtol=1e-11)
    each = torch.vmap(torch.func.grad(loss, 1), (0, None, None))(*(value.detach() for value in operands))
    oracle.assert_close(each.sum(0), functional[1], rtol=1e-11)


@pytest.mark.parametrize("held", [False, True], ids=["weight", "tile"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_compiled_training(kind: str, held: bool) -> None:
    case = layer(kind)
    x, weight = case.input(2, dtype=torch.float32), torch.randn(case.tile_size if held else case.shape)
    operands = [x, weight, torch.rand(4 if held else case.shape) + 0.5, torch.randn(case.channels[1])]
    for value in operands:
        value.requires_grad_()
    op = getattr(tbn, f"train_{kind}")

    def step(*operands: Tensor) -> Tensor:
        return op(*operands, *case.sizes, 4, **case.options)

    eager, compiled = step(*operands), torch.compile(step, backend="aot_eager", fullgraph=True)(*operands)
    oracle.assert_close(compiled, eager)
    upstream = torch.randn_like(eager)
    oracle.assert_close(*(torch.autograd.grad(y, operands, upstream) for y in (compiled, eager)), rtol=1e-5)
