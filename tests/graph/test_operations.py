"""Every spelling of an operation computes the same, takes its arguments by the table's names, and is there once."""

from __future__ import annotations

import operator
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tbn_compiler.graph import operations
from tbn_compiler.graph.attention import attention_layer
from tbn_compiler.graph.operations import OPERATIONS, Operation, bind, module_operation

_CHANNELS = 4


def _dims(name: str) -> int:
    """The digit before the "d" in a name; 0 if there is none."""
    return int((re.findall(r"(\d)d", name) or [0])[0])


def _example(operation: Operation) -> dict[str, Any]:
    """Arguments that make a difference where they can: no option has its default value."""
    generator = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    name, dims = operation.name, _dims(operation.name)
    image = tensor(2, _CHANNELS, *(9, 8, 7)[:dims])
    if name.startswith("conv"):
        transposed = name.startswith("conv_transpose")
        weight = tensor(_CHANNELS, 3, *(3,) * dims) if transposed else tensor(6, 2, *(3,) * dims)
        given = {"weight": weight, "bias": tensor(6), "groups": 2}
        sizes = {"stride": 2, "padding": 1, "dilation": 2} | ({"output_padding": 1} if transposed else {})
        return {"input": image} | given | {size: [value] * dims for size, value in sizes.items()}
    if name.startswith("dropout") and dims:
        return {"input": image, "p": 0.3, "training": False}
    if "adaptive" in name:
        return {"input": image, "output_size": [3] * dims}
    if "pool" in name:
        return {"input": image, "kernel_size": [3] * dims, "stride": [2] * dims, "padding": [1] * dims}
    matrix, square = tensor(3, 5), tensor(5, 4)
    return {
        "linear": {"input": matrix, "weight": tensor(2, 5), "bias": tensor(2)},
        "bilinear": {"input1": matrix, "input2": tensor(3, 4), "weight": tensor(2, 5, 4), "bias": tensor(2)},
        "mm": {"input": matrix, "mat2": square},
        "matmul": {"input": matrix, "other": square},
        "addmm": {"input": tensor(4), "mat1": matrix, "mat2": square, "beta": 2, "alpha": 3},
        "batch_norm": {
            "input": tensor(2, 4, 3),
            "running_mean": tensor(4),
            "running_var": tensor(4).abs(),
            "weight": tensor(4),
            "bias": tensor(4),
            "training": False,
            "momentum": 0.3,
            "eps": 0.1,
        },
        "layer_norm": {
            "input": tensor(2, 3, 4),
            "normalized_shape": [3, 4],
            "weight": tensor(3, 4),
            "bias": tensor(3, 4),
            "eps": 0.1,
        },
        "scaled_dot_product_attention": {
            "query": tensor(2, 4, 3),
            "key": tensor(2, 5, 3),
            "value": tensor(2, 5, 2),
            "attn_mask": tensor(4, 5),
            "scale": 0.3,
        },
        "leaky_relu": {"input": matrix, "negative_slope": 0.3},
        "gelu": {"input": matrix, "approximate": "tanh"},
        "hardtanh": {"input": matrix, "min_val": -0.5, "max_val": 0.3},
        "elu": {"input": matrix, "alpha": 0.7},
        "softplus": {"input": matrix, "beta": 2, "threshold": 1},
        "add": {"input": matrix, "other": tensor(3, 5), "alpha": 2},
        "mul": {"input": matrix, "other": tensor(3, 5)},
        "cat": {"tensors": [matrix, tensor(3, 2)], "dim": 1},
        "pad": {"input": matrix, "pad": [1, 2], "mode": "constant", "value": 3.0},
        "mean": {"input": tensor(2, 3, 4), "dim": [1], "keepdim": True},
        "flatten": {"input": tensor(2, 3, 4, 5), "start_dim": 1, "end_dim": 2},
        "reshape": {"input": matrix, "shape": (5, 3)},
        "getitem": {"input": matrix, "index": 1},
        "size": {"input": matrix, "dim": 1},
    }.get(name, {"input": matrix, "p": 0.3, "training": False} if "dropout" in name else {"input": matrix})


_SPELLED = [operation for operation in OPERATIONS if operation.functions and operation.name != "attention"]


# Arguments of the example that a spelling does not have, or takes another value for.
_WITHOUT: dict[Any, tuple[str, ...]] = {operator.add: ("alpha",), operator.iadd: ("alpha",)}
_INSTEAD: dict[Any, dict[str, Any]] = {
    getattr(torch.ops.aten, f"conv{dims}d").padding: {"padding": "valid"} for dims in (1, 2, 3)
}


def _spellings(operation: Operation) -> list[Any]:
    return [*operation.functions, *operation.methods, *operation.overloads]


def _run(spelling: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    value, *others = (argument.clone() if isinstance(argument, Tensor) else argument for argument in args)
    function = getattr(value, spelling) if isinstance(spelling, str) else None  # some write into their input
    return spelling(value, *others, **options) if function is None else function(*others, **options)


def _calls(
    operation: Operation, spelling: Any, arguments: dict[str, Any]
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The ways to give arguments that a spelling accepts: by name, in our words or its own, and by place."""
    names = [name for name in operation.signature.parameters if name in arguments]
    first, *values = (arguments[name] for name in names)
    options = {name: arguments[name] for name in names[1:]}
    by_place = [*operation.signature.parameters][: len(names)] == names
    back = {name: other for other, name in operation.renamed.items()}
    own = {back.get(name, name): value for name, value in options.items()}
    ignored = dict.fromkeys(operation.ignored, False)
    found = []
    for args, given in (((first,), options), ((first,), own), ((first,), own | ignored), ((first, *values), {})):
        if not (given or by_place):
            continue
        try:
            _run(spelling, args, given)
        except (TypeError, RuntimeError):
            continue
        found.append((args, given))
    return found


def _node(spelling: Any, args: tuple[Any, ...], options: dict[str, Any]) -> fx.Node:
    kind = "call_method" if isinstance(spelling, str) else "call_function"
    return fx.Graph().create_node(kind, spelling, args, options)


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(_same, left, right))
    return bool(left == right)


@pytest.mark.parametrize("operation", _SPELLED, ids=lambda operation: operation.name)
def test_spellings_compute_the_same_and_are_bound_alike(operation: Operation) -> None:
    arguments = _example(operation)
    for spelling in _spellings(operation):
        given = {name: value for name, value in arguments.items() if name not in _WITHOUT.get(spelling, ())}
        given |= _INSTEAD.get(spelling, {})
        reference, (args, options) = operation.functions[0], _calls(operation, operation.functions[0], given)[0]
        expected = _run(reference, args, options)
        calls = _calls(operation, spelling, given)
        assert calls, f"{spelling} takes none of {list(given)}"
        for args, options in calls:
            assert _same(_run(spelling, args, options), expected), (spelling, options)
            call = bind(_node(spelling, args, options))
            assert call is not None, (spelling, options)
            assert call.operation is operation
            assert call.arguments.keys() == operation.signature.parameters.keys()
            assert all(_same(call.arguments[name], value) for name, value in given.items()), (spelling, call.arguments)


def test_attention_is_bound_by_its_own_signature() -> None:
    names = list(next(entry for entry in OPERATIONS if entry.name == "attention").signature.parameters)
    graph = fx.Graph()
    values = [graph.placeholder(name) for name in names]
    positional = names.index("num_heads")
    node = graph.call_function(
        attention_layer, tuple(values[:positional]), dict(zip(names[positional:], values[positional:], strict=True))
    )
    call = bind(node)
    assert call is not None
    assert call.arguments == dict(zip(names, values, strict=True))


_MODULES: dict[type[nn.Module], dict[str, Any]] = {
    nn.Linear: {"in_features": 5, "out_features": 2},
    **{
        cls: {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1, "groups": 2}
        for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    },
    **{cls: {"num_features": 4, "eps": 0.1} for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)},
    **{cls: {"p": 0.3} for cls in (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)},
    **{cls: {"p": 0.3} for cls in (nn.AlphaDropout, nn.FeatureAlphaDropout)},
    **{
        cls: {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True}
        for cls in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
    },
    **{cls: {"output_size": 3} for cls in (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)},
    **{cls: {"output_size": 3} for cls in (nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d)},
    nn.LayerNorm: {"normalized_shape": 5, "eps": 0.1},
    nn.LeakyReLU: {"negative_slope": 0.3},
    nn.GELU: {"approximate": "tanh"},
    nn.Hardtanh: {"min_val": -0.5, "max_val": 0.3},
    nn.ELU: {"alpha": 0.7},
    nn.Softplus: {"beta": 2, "threshold": 1},
    nn.Flatten: {"start_dim": 0},
}
_CLASSES = [
    pytest.param(operation, cls, id=cls.__name__)
    for operation in OPERATIONS
    for cls in operation.modules
    if cls is not nn.SyncBatchNorm  # needs a GPU
]


@pytest.mark.parametrize(("operation", "cls"), _CLASSES)
def test_modules_are_bound_to_what_they_compute(operation: Operation, cls: type[nn.Module]) -> None:
    module = cls(**_MODULES.get(cls, {})).eval()
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    dims = _dims(cls.__name__)
    value = torch.randn(2, 4, *(9, 8, 7)[:dims]) if dims else torch.randn(3, 5)
    gm = nn.ModuleDict({"part": module})
    node = fx.Graph().create_node("call_module", "part", (value,))
    call = bind(node, gm)
    assert call is not None
    assert (call.operation, call.module, call.name) == (operation, module, operation.name)
    assert bind(node) is None
    if operation.functions:
        assert _same(operation.functions[0](**call.arguments), module(value))
    else:
        assert operation.name == "identity"


def test_a_subclass_with_a_forward_of_its_own_is_another_operation() -> None:
    class Same(nn.ReLU):
        pass

    class Other(nn.ReLU):
        def forward(self, input: Tensor) -> Tensor:
            return input

    same, relu6 = module_operation(Same()), module_operation(nn.ReLU6())
    assert same is not None
    assert same.name == "relu"
    assert relu6 is not None
    assert relu6.name == "relu6"  # not Hardtanh, which it derives from
    assert module_operation(Other()) is None
    assert module_operation(nn.Sequential()) is None


@pytest.mark.parametrize(
    ("target", "args", "options"),
    [
        (torch.add, (1, 2), {"out": 3}),
        (torch.relu, (), {}),
        (torch.relu, (1, 2, 3), {}),
        (torch.ops.aten.elu.default, (1, 1, 2, 1), {}),  # scale=2, which F.elu does not have
        ("unknown", (1,), {}),
        (torch.svd, (1,), {}),
    ],
)
def test_calls_with_other_arguments_are_none(target: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    assert bind(_node(target, args, options)) is None
    assert bind(3) is None


@pytest.mark.parametrize("args", [(0, 2, -1), (0, (2, -1)), (0, [2, -1])])
def test_sizes_come_one_by_one_or_together(args: tuple[Any, ...]) -> None:
    for method in ("view", "reshape"):
        call = bind(_node(method, args, {}))
        assert call is not None
        assert list(call.arguments["shape"]) == [2, -1]


def test_graph_code_and_passes_name_operators_in_the_table_only() -> None:
    package = Path(operations.__file__).parents[1]
    files = [*package.glob("graph/*.py"), *package.glob("passes/*.py"), *package.glob("backends/dynamo/*.py")]
    naming = [file.name for file in files if re.search(r"\baten\.\w|_aten\.", file.read_text())]
    assert naming == ["operations.py"]


def test_every_spelling_stands_in_the_table_once() -> None:
    counts = Counter(spelling for operation in OPERATIONS for spelling in (*operation.modules, *_spellings(operation)))
    assert [spelling for spelling, count in counts.items() if count > 1] == []
    assert max(Counter(operation.name for operation in OPERATIONS).values()) == 1
