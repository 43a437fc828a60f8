"""Calls of the inference operators: one list of arguments each, layouts, checks, sizes."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import tbn_compiler  # noqa: F401  (registers the operators)
from tbn_compiler.backends.cpu import conv as cpu_conv
from tbn_compiler.backends.cpu import linear as cpu_linear
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import OPERATORS, Operator, TensorCall, check_signature, make_kernel, register_kernel
from tbn_compiler.packing import packed_size
from tbn_compiler.tiling import TileLayout

LAYERS: dict[str, type[Any]] = {
    "linear": nn.Linear,
    "conv1d": nn.Conv1d,
    "conv2d": nn.Conv2d,
    "conv3d": nn.Conv3d,
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}


def arguments(name: str, inputs: int = 8, outputs: int = 12, kernel: int = 2, p: int = 4, **options: Any) -> Any:
    """``(args, kwargs)`` of a call; a size in ``options`` holds for every dimension."""
    operator = OPERATORS[name]
    numel = inputs * outputs * kernel**operator.dims // options.get("groups", 1)
    sizes = (inputs, outputs, *([[kernel] * operator.dims] if operator.dims else []))
    x = torch.randn(3, inputs // options.pop("replicas", 1), *(6, 5, 7)[: operator.dims])
    tile = torch.randint(0, 256, (packed_size(numel // p),), dtype=torch.uint8)
    kwargs = {k: [v] * operator.dims if k in operator.sizes else v for k, v in options.items()}
    return (x, tile, torch.ones(1), None, *sizes, p), kwargs


def bind(name: str, **options: Any) -> TensorCall:
    args, kwargs = arguments(name, **options)
    return OPERATORS[name].bind(args, kwargs)


def test_every_operator_is_described() -> None:
    names = {name.removeprefix("tbn::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("tbn::")}
    with_tile = {
        name for name in names if "tile" in [a.name for a in getattr(torch.ops.tbn, name).default._schema.arguments][1:]
    }
    assert with_tile == set(OPERATORS) == set(LAYERS)


@pytest.mark.parametrize("name", OPERATORS)
def test_descriptions(name: str) -> None:
    operator = OPERATORS[name]
    assert operator.dims == (0 if name == "linear" else int(name[-2]))
    assert operator.transposed == ("transpose" in name)
    assert operator.positional[:4] == ("input", "tile", "alpha", "bias")
    # A layout that the operator cannot be told would be taken for another one.
    described = {field.name for field in fields(TileLayout)} - {"shape", "p", "batch"}
    assert set(operator.layout_options) == described - ({"p_in"} if operator.transposed else set())
    call = bind(name)
    assert (call.kind, call.dims, call.transposed) == (name, operator.dims, operator.transposed)
    assert (call.inputs, call.outputs, call.groups, call.channel_axis) == (8, 12, 1, -1 - operator.dims)
    assert call.takes_epilogue == call.takes_activation == call.takes_input_alpha == (not operator.transposed)
    assert (call.activation, call.epilogue, call.input_alpha) == ("float", "none", None)


# One list of arguments


@pytest.mark.parametrize("name", OPERATORS)
def test_kernels_take_the_arguments_of_the_schema(name: str) -> None:
    operator = OPERATORS[name]
    check_signature(operator, reference.KERNELS[name])
    written_out = {"linear": cpu_linear.linear, "conv1d": cpu_conv.make_conv(1), "conv2d": cpu_conv.make_conv(2)}
    if name in written_out:
        check_signature(operator, written_out[name])
    assert list(inspect.signature(reference.KERNELS[name]).parameters) == list(operator.names)


def linear_like(
    input: Any,
    tile: Any,
    alpha: Any,
    bias: Any,
    in_features: int,
    out_features: int,
    p: int,
    input_alpha: Any = None,
    *,
    p_in: int = 1,
    shift: int = 1,
    activation: str = "float",
    epilogue: str = "none",
) -> Tensor:
    raise NotImplementedError


def swapped(input: Any, tile: Any, alpha: Any, bias: Any, out_features: int, in_features: int, p: int) -> Tensor:
    raise NotImplementedError


@pytest.mark.parametrize("kernel", [linear_like, swapped, lambda *args, **kwargs: None])
def test_a_kernel_with_other_arguments_is_not_registered(kernel: Any) -> None:
    with pytest.raises(TypeError, match=r"a kernel of tbn::linear takes \(.*, its schema has \(input, tile, "):
        register_kernel(OPERATORS["linear"], kernel, "XPU")
    assert not torch._C._dispatch_has_kernel_for_dispatch_key("tbn::linear", "XPU")


def test_arguments_by_position_and_by_name_are_the_same_call() -> None:
    args, _ = arguments("linear")
    operator = OPERATORS["linear"]
    named = dict(zip(operator.positional[3:], args[3:], strict=False))
    by_position = operator.bind(args, {"epilogue": "relu"})
    by_name = operator.bind(args[:3], named | {"epilogue": "relu"})
    assert by_position.arguments.keys() == by_name.arguments.keys() == set(operator.names)
    assert all(by_position.arguments[name] is by_name.arguments[name] for name in operator.names)


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((1, 2), {}, "missing a required argument: 'alpha'"),
        ((1, 2, 3, 4, 5, 6, 7), {"colour": 1}, "unexpected keyword argument 'colour'"),
        ((1, 2, 3, 4, 5, 6, 7, None, None, 1), {}, "too many positional arguments"),
    ],
)
def test_wrong_arguments(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        OPERATORS["linear"].bind(args, kwargs)


# Layouts and sizes


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("name", OPERATORS)
def test_layouts_have_the_shape_of_pytorchs_weight(name: str, groups: int) -> None:
    if name == "linear":
        assert bind(name).layout.shape == tuple(nn.Linear(8, 12).weight.shape)
        return
    call = bind(name, groups=groups, shift=3)
    assert call.layout.shape == tuple(LAYERS[name](8, 12, 2, groups=groups).weight.shape)
    assert (call.layout.p, call.layout.p_in, call.layout.shift) == (4, 1, 3)
    assert call.product.groups == groups


def test_two_axis_layouts() -> None:
    assert bind("linear", p_in=2).layout.p_in == bind("conv2d", p_in=2).layout.p_in == 2


GEOMETRIES: list[dict[str, int]] = [
    {},
    {"stride": 2, "padding": 1},
    {"padding": 2, "dilation": 2},
    {"stride": 3, "padding": 1, "groups": 4},
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_fakes_result_has_the_shape_of_the_real_one(name: str, geometry: dict[str, int]) -> None:
    options = geometry if OPERATORS[name].dims else {}
    if OPERATORS[name].transposed and "stride" in options:
        options = options | {"output_padding": 1}
    args, kwargs = arguments(name, **options)
    for x in (args[0], args[0][0], args[0][:0]):
        real = OPERATORS[name].overload(x, *args[1:], **kwargs)
        assert tuple(real.shape) == OPERATORS[name].bind((x, *args[1:]), kwargs).output_shape()
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in (x, *args[1:])]
            fake = OPERATORS[name].overload(*fakes, **kwargs)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_function_and_geometry_are_those_of_the_layer(name: str, geometry: dict[str, int]) -> None:
    """PyTorch's function on the decoded weight gives what the operator gives."""
    args, kwargs = arguments(name, **(geometry if OPERATORS[name].dims else {}))
    call = OPERATORS[name].bind(args, kwargs)
    weight = reference.dense_weight(call.tile, call.alpha, call.layout, torch.float32)
    expected = call.function(call.input, weight, None, *call.geometry)
    torch.testing.assert_close(call.operator.overload(*args, **kwargs), expected)


# Checks


@pytest.mark.parametrize("tracing", [False, True], ids=["eager", "fake"])
@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("conv_transpose2d", {"groups": 3}, "tbn::conv_transpose2d: groups=3 must divide 8 input and 12 out"),
        ("conv_transpose1d", {"kernel_size": [2, 2]}, r"kernel_size must have 1 elements, got \[2, 2\]"),
        ("conv2d", {"stride": [1]}, r"stride must have 2 elements, got \[1\]"),
        ("conv_transpose2d", {"bias": torch.zeros(8)}, r"bias must have shape \(12,\), got \(8,\)"),
        ("linear", {"input_alpha": torch.ones(3)}, r"input_alpha \(3,\) must be a vector that divides 8 input "),
        ("linear", {"input_alpha": torch.ones(2)}, "expected 4 input features, got an input with 8"),
        ("conv2d", {"activation": "int4"}, "activation='int4' is not one of 'float', 'int8', 'binary'"),
        ("linear", {"epilogue": "tanh"}, "epilogue='tanh' is not one of 'none', 'relu'"),
    ],
)
def test_bad_calls(name: str, changes: dict[str, Any], message: str, tracing: bool) -> None:
    args, _ = arguments(name)
    given = dict(zip(OPERATORS[name].positional, args, strict=False)) | changes
    mode = FakeTensorMode(allow_non_fake_inputs=True) if tracing else torch.no_grad()
    with mode, pytest.raises((ValueError, RuntimeError), match=message):
        OPERATORS[name].overload(**given)


def test_replicas_on_another_device_are_refused() -> None:
    args, _ = arguments("linear", replicas=2)
    call = OPERATORS["linear"].bind((*args, torch.ones(2, device="meta")), {})
    with pytest.raises(ValueError, match="tbn::linear: input_alpha is on meta, input on cpu"):
        call.checked()


def test_groups_read_different_copies() -> None:
    args, kwargs = arguments("conv2d", groups=2, replicas=2)
    with pytest.raises(ValueError, match="input_alpha needs groups=1, got groups=2"):
        torch.ops.tbn.conv2d(*args, torch.ones(2), **kwargs)


def test_calls_without_tensors_keep_their_sizes() -> None:
    call = bind("conv2d", groups=2, padding=1)
    kept = call.without_tensors()
    assert not any(isinstance(value, Tensor) for value in kept.arguments.values())
    assert (kept.layout, kept.outputs, kept.geometry) == (call.layout, call.outputs, call.geometry)


def test_a_kernel_is_made_from_a_function_of_a_call() -> None:
    def double(call: TensorCall) -> Tensor:
        """Twice the input."""
        return 2 * call.input

    kernel = make_kernel(OPERATORS["linear"], double)
    args, _ = arguments("linear")
    assert torch.equal(kernel(*args, epilogue="relu"), 2 * args[0])
    assert (kernel.__name__, kernel.__doc__) == ("linear", "Twice the input.")
    with pytest.raises(RuntimeError, match="expected 8 input features"):
        kernel(torch.zeros(7), *args[1:])


def test_an_operator_reads_any_schema_of_its_kind() -> None:
    for first, second in itertools.pairwise(OPERATORS.values()):
        assert first.overload is not second.overload
        assert Operator.of(first.overload).names == first.names
