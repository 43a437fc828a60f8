"""The operators on plans: what they compute, their fakes, and what they refuse."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tbn_compiler import torch_private
from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import bound, library
from tbn_compiler.ops.calls import OPERATORS, TensorCall

pytestmark = pytest.mark.skipif(bound.unavailable() is not None, reason=str(bound.unavailable()))


def layer(kind: str, x: Tensor, rows: int, kernel: tuple[int, ...] = (), **options: Any) -> TensorCall:
    """A layer of four copies with random operands."""
    generator = torch.Generator().manual_seed(0)
    columns = x.shape[-1 - len(kernel)]
    size = rows * columns * int(torch.tensor(kernel or (1,)).prod()) // 4
    tile = torch.randint(0, 256, ((size + 7) // 8,), dtype=torch.uint8, generator=generator)
    alpha, bias = torch.rand(4, generator=generator), torch.randn(rows, generator=generator)
    geometry = (list(kernel),) if kernel else ()
    return OPERATORS[kind].bind((x, tile, alpha, bias, columns, rows, *geometry, 4), options).checked()


def run(call: TensorCall, plan: Tensor, x: Tensor) -> Tensor:
    return bound.operator(call)(x, plan, *bound.sizes(call))


def expected(call: TensorCall, x: Tensor) -> Tensor:
    result: Tensor = call.operator.overload(**{**call.arguments, "input": x})
    return result


CALLS = {
    "linear": layer("linear", torch.randn(3, 24), 32, epilogue="relu"),
    "many tokens": layer("linear", torch.randn(2, 9, 24), 32),
    "one token": layer("linear", torch.randn(24), 32),
    "no token": layer("linear", torch.randn(0, 24), 32),
    "conv1d": layer("conv1d", torch.randn(2, 16, 20), 128, (3,), stride=[2], padding=[1], dilation=[2]),
    "conv2d": layer("conv2d", torch.randn(2, 16, 9, 8), 128, (3, 2), stride=[1, 2], padding=[1, 0]),
    "one image": layer("conv2d", torch.randn(16, 9, 8), 128, (3, 3)),
}


def plan_of(call: Any) -> Tensor:
    return bound.as_tensor(bound.bind(call))


@pytest.mark.parametrize("activation", ["float", "int8", "binary"])
@pytest.mark.parametrize("level", cpu.info().available)
@pytest.mark.parametrize("name", CALLS)
def test_equal_the_operators(name: str, level: str, activation: str) -> None:
    with cpu.use_level(level):
        call = CALLS[name].replaced(activation=activation)
        x = call.input
        if bound.why_not(call, x.shape[x.dim() - call.dims :]) is not None:
            pytest.skip("PyTorch computes it at this level")
        plan = plan_of(call)
        result = run(call, plan, x)
        assert torch.equal(result, expected(call, x))
        assert result.is_contiguous()
        strided = torch.stack([x, x], -1)[..., 0]
        assert torch.equal(run(call, plan, strided), result)


@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_one_scale_belongs_to_the_plan(name: str) -> None:
    scale = torch.tensor([0.02])
    call = CALLS[name].replaced(activation="int8", input_scale=scale)
    if bound.why_not(call, call.input.shape[call.input.dim() - call.dims :]) is not None:
        pytest.skip("PyTorch computes it at this level")
    plan, right = plan_of(call), expected(call, call.input)
    scale.zero_()
    assert torch.equal(run(call, plan, call.input), right)


@pytest.mark.parametrize("activation", ["float", "int8"])
def test_images_keep_their_format(activation: str) -> None:
    call = CALLS["conv2d"].replaced(activation=activation)
    if bound.why_not(call, (9, 8)) is not None:
        pytest.skip("PyTorch computes it at this level")
    plan = plan_of(call)
    for batch in (1, 2):
        for shape in ((batch, 16, 9, 8), (batch, 16, 3, 2), (batch, 16, 9, 2)):
            x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
            result, right = run(call, plan, x), expected(call, x)
            assert torch.equal(result, right)
            assert result.stride() == right.stride()


@pytest.mark.parametrize("name", CALLS)
def test_fakes(name: str) -> None:
    call = CALLS[name]
    if bound.why_not(call, call.input.shape[call.input.dim() - call.dims :]) is not None:
        pytest.skip("PyTorch computes it at this level")
    plan, inputs = plan_of(call), [call.input]
    if call.dims == 2 and call.input.dim() == 4:
        inputs.append(call.input.contiguous(memory_format=torch.channels_last))
    for x in inputs:
        with torch_private.FakeTensorMode() as mode:
            fake = run(call, mode.from_tensor(plan), mode.from_tensor(x))
        real = run(call, plan, x)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)


def test_a_plan_keeps_its_operands() -> None:
    call = layer("linear", torch.randn(3, 24), 32)
    right, plan, operator, rest = expected(call, call.input), plan_of(call), bound.operator(call), bound.sizes(call)
    x = call.input
    del call
    gc.collect()
    torch.full((1 << 16,), 7.0)  # memory that was freed would be written
    assert torch.equal(operator(x, plan, *rest), right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, plan: (x[:, :5], plan), "the input does not fit the layer"),
        (lambda x, plan: (x.double(), plan), "the input must be float32"),
        (lambda x, plan: (x[0, 0], plan), "with at least one dimension"),
        (lambda x, plan: (x, plan.clone()), "not one that this process made"),
        (lambda x, plan: (x, plan[:-1]), "not one that this process made"),
        (lambda x, plan: (x, torch.zeros(4, dtype=torch.uint8)), "not one that this process made"),
    ],
)
def test_what_does_not_fit_is_refused(change: Any, message: str) -> None:
    call = CALLS["linear"]
    x, plan = change(call.input, plan_of(call))
    with pytest.raises(RuntimeError, match=message):
        run(call, plan, x)


def test_kernels_of_one_operator_refuse_plans_of_the_other() -> None:
    call = CALLS["one image"].replaced(activation="int8")
    if bound.why_not(call, (9, 8)) is not None:
        pytest.skip("PyTorch computes it at this level")
    with pytest.raises(RuntimeError, match="linear: the input does not fit"):
        torch.ops.tbn_cpu.linear.default(torch.randn(3, 16), plan_of(call), 128)
    with pytest.raises(RuntimeError, match="conv: the input does not fit"):
        torch.ops.tbn_cpu.conv.default(torch.randn(1, 24, 5), plan_of(CALLS["linear"]), 32, 1, *[1] * 8)
    with pytest.raises(RuntimeError, match="the kernel does not fit"):
        run(call, plan_of(call), torch.randn(16, 2, 2))


def test_layers_that_stay() -> None:
    assert bound.why_not(CALLS["linear"].replaced(input=torch.empty(0, dtype=torch.float64)), ()) == "float64 input"
    assert bound.why_not(CALLS["conv2d"], (9, 1)) == "the kernel does not fit the input"
    assert bound.why_not(CALLS["conv2d"], (9, 20000)) == "rows wider than 16384"
    assert bound.why_not(CALLS["conv2d"], (None, None)) in (None, *_REASONS)
    with cpu.use_level("none"):
        assert bound.why_not(CALLS["linear"], ()) == "the native kernels are turned off"


_REASONS = ("fewer than 64 different filters in a group",
            "PyTorch convolves with the different filters faster than this level")  # fmt: skip


def test_without_the_functions_of_libtorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "exported_functions", lambda names: dict.fromkeys(names))
    reason = bound._registered.__wrapped__()
    assert reason == f"torch {torch.__version__} does not export aoti_torch_library_init_impl"


def test_structure_has_the_fields_of_the_header() -> None:
    sizes = {"BoundLayer": 10 * 8 + 8, "Form": 16}
    assert {name: library.ctypes.sizeof(getattr(library, name)) for name in sizes} == sizes
    names = list(torch_private.exported_functions(bound._FUNCTIONS.values()))
    assert names == list(bound._FUNCTIONS.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x.permute(0, 2, 3, 1)[:, ::2, 1:],
        lambda x: x[:, :, None, 0].expand(-1, -1, 7, -1).transpose(1, 3),
        lambda x: x[1, 2, 3],
        lambda x: x[:0],
        lambda x: x.unflatten(3, (1, -1)).transpose(0, 4),
        lambda x: x,
    ],
)
def test_a_dense_copy(make: Callable[[Tensor], Tensor]) -> None:
    values = torch.randn(2, 3, 4, 6)
    x = make(values)
    copy = torch.ops.tbn_cpu.dense(x)
    assert torch.equal(copy, x)
    assert copy.is_contiguous()
    assert x.numel() == 0 or copy.data_ptr() != x.data_ptr()
    meta = torch.ops.tbn_cpu.dense(make(values.to("meta")))
    assert (meta.shape, meta.stride()) == (copy.shape, copy.stride())
    with pytest.raises(RuntimeError, match="must be float32"):
        torch.ops.tbn_cpu.dense(x.double())
