"""The operations that passes know, each with every spelling it has in a graph, and the one binder of their arguments.

A graph calls ReLU as a module (``nn.ReLU``), a function (``F.relu``, ``torch.relu``), a method (``x.relu()``) or an
operator (``aten.relu.default``), in place or not, as its author wrote it and by who traced it. A pass asks
:func:`bind` what a node computes, and gets the operation's one name and all arguments by name::

    node: max_pool2d(x, 3, stride=2)        # or nn.MaxPool2d(3, 2), or aten.max_pool2d.default(x, [3, 3], [2, 2])
    call = bind(node, gm)
    call.name                               # "max_pool2d"
    call.arguments["stride"]                # 2, 2 or [2, 2]: values keep the form that they have in the graph

The names and their order are those of the function in ``torch.nn.functional`` where there is one. A call with an
argument that an operation does not list is none of its calls, so that no pass overlooks an option. The operators of
this package have one spelling and a schema: see :mod:`tbn_compiler.graph.calls`.
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from tbn_compiler.graph.attention import attention_layer
from tbn_compiler.graph.calls import named_arguments
from tbn_compiler.torch_private import OpOverload, functional_pad, operator_schema

_aten = torch.ops.aten


def _signature(text: str) -> inspect.Signature:
    """The signature that ``"input, p=0.5"`` stands for."""
    parameters = []
    for part in text.split(", "):
        name, _, default = part.partition("=")
        value = ast.literal_eval(default) if default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value))
    return inspect.Signature(parameters)


@dataclass(frozen=True, eq=False)
class Operation:
    """One operation with all its spellings.

    Attributes:
        name: its name, that of the function for most.
        signature: arguments of its functions and methods; attributes of its modules have the same names.
        modules: classes whose ``forward`` computes it.
        functions: functions of Python.
        methods: names of methods of a tensor, which is the first argument.
        overloads: operators of exported graphs. Their arguments are told by name, ``self`` being the first.
        renamed: names of arguments that differ in some spelling, with the name in ``signature``.
        ignored: arguments of some spelling that change no value.
        variadic: whether the second argument may come element by element: ``view(2, 3)`` for ``view((2, 3))``.
    """

    name: str
    signature: inspect.Signature
    modules: tuple[type[nn.Module], ...] = ()
    functions: tuple[Callable[..., Any], ...] = ()
    methods: tuple[str, ...] = ()
    overloads: tuple[OpOverload, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    variadic: bool = False

    @property
    def first(self) -> str:
        """Name of the first argument."""
        return next(iter(self.signature.parameters))

    def bind(self, arguments: Sequence[Any], options: Mapping[str, Any]) -> dict[str, Any] | None:
        """Arguments by name with the defaults filled in; ``None`` if there is one that the operation does not have."""
        if self.variadic and len(arguments) > 1 and not isinstance(arguments[1], tuple | list):
            arguments = (arguments[0], tuple(arguments[1:]))
        named = {self.renamed.get(name, name): value for name, value in options.items() if name not in self.ignored}
        try:
            bound = self.signature.bind(*arguments, **named)
        except TypeError:
            return None
        bound.apply_defaults()
        return bound.arguments


@dataclass(frozen=True, eq=False)
class BoundCall:
    """What a node computes.

    Attributes:
        node: the calling node.
        operation: what it calls.
        arguments: all arguments by name, nodes where the graph computes them. Parameters, buffers and options of a
            module are what its attributes are.
        module: the module that it calls, or ``None``. It may have hooks.
    """

    node: fx.Node
    operation: Operation
    arguments: dict[str, Any]
    module: nn.Module | None = None

    @property
    def name(self) -> str:
        """Name of the operation."""
        return self.operation.name

    @property
    def input(self) -> Any:
        """The first argument."""
        return self.arguments[self.operation.first]


def bind(node: Any, gm: nn.Module | None = None) -> BoundCall | None:
    """The operation that a node calls, with its arguments; ``None`` if it is no node, or none of these operations.

    Args:
        node: a node of a graph, or any other argument of one.
        gm: where the modules are that the graph calls; without it they are not looked at.
    """
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module":
        return None if gm is None else _bind_module(node, gm.get_submodule(str(node.target)))
    found = operation_of(node)
    if found is None:
        return None
    if isinstance(node.target, OpOverload):
        arguments = found.bind((), _overload_arguments(node, node.target, found))
    else:
        arguments = found.bind(node.args, node.kwargs)
    return None if arguments is None else BoundCall(node, found, arguments)


def _overload_arguments(node: fx.Node, target: OpOverload, found: Operation) -> dict[str, Any]:
    """The arguments of an operator's call, without those that the operation does not list and that have no effect."""
    usual = {argument.name: argument.default_value for argument in operator_schema(target).arguments}
    return {
        found.first if name == "self" else name: value
        for name, value in named_arguments(node).items()
        if name == "self" or found.renamed.get(name, name) in found.signature.parameters or value != usual[name]
    }


def operation_of(node: fx.Node) -> Operation | None:
    """The operation that the function or method of a node belongs to, whatever its arguments."""
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    return _FUNCTIONS.get(node.target) if node.op == "call_function" else None


def node_name(node: fx.Node) -> str:
    """The name of the operation that a node calls, or else of its function or method."""
    found = operation_of(node)
    return found.name if found is not None else str(getattr(node.target, "__name__", node.target))


def module_operation(module: nn.Module) -> Operation | None:
    """The operation that a module computes. A subclass that overrides ``forward`` is not what it derives from."""
    for cls in type(module).__mro__:
        if cls in _MODULES:
            return _MODULES[cls] if type(module).forward is cls.forward else None
    return None


def _bind_module(node: fx.Node, module: nn.Module) -> BoundCall | None:
    found, values = module_operation(module), [*node.args, *node.kwargs.values()]
    if found is None or len(values) != 1:
        return None
    options = {
        name: getattr(module, name) if hasattr(module, name) else parameter.default
        for name, parameter in found.signature.parameters.items()
        if name != found.first
    }
    return BoundCall(node, found, {found.first: values[0]} | options, module)


def _convolutions() -> Iterator[Operation]:
    plain = _signature("input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1")
    transposed = _signature("input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1")
    for d in (1, 2, 3):
        for name, module, signature, overloads in (
            (f"conv{d}d", f"Conv{d}d", plain, ("default", "padding")),  # padding="same"
            (f"conv_transpose{d}d", f"ConvTranspose{d}d", transposed, ("default" if d == 1 else "input",)),
        ):
            yield Operation(
                name,
                signature,
                (getattr(nn, module),),
                (getattr(F, name),),
                overloads=tuple(getattr(getattr(_aten, name), overload) for overload in overloads),
            )


def _dropouts() -> Iterator[Operation]:
    """Dropout by ``torch.nn.functional`` and modules, and by ``torch``, which drops whole channels of any rank."""
    for name, default in [("dropout", True), ("alpha_dropout", False), ("feature_alpha_dropout", False)]:
        yield _dropout(name, default, (getattr(F, name),), _DROPOUT_MODULES[name])
    yield _dropout("feature_dropout", True, (), ())
    for d in (1, 2, 3):
        name = f"dropout{d}d"
        signature = _signature("input, p=0.5, training=True, inplace=False")
        yield Operation(name, signature, (getattr(nn, f"Dropout{d}d"),), (getattr(F, name),))


_DROPOUT_MODULES: dict[str, tuple[type[nn.Module], ...]] = {
    "dropout": (nn.Dropout,),
    "alpha_dropout": (nn.AlphaDropout,),
    "feature_alpha_dropout": (nn.FeatureAlphaDropout,),
}


def _dropout(name: str, default: bool, functions: tuple[Any, ...], modules: tuple[type[nn.Module], ...]) -> Operation:
    forms = (name, f"{name}_")
    return Operation(
        name,
        _signature(f"input, p=0.5, training={default}, inplace=False"),
        modules,
        (*functions, *(getattr(torch, form) for form in forms)),
        overloads=tuple(getattr(_aten, form).default for form in forms),
        renamed={"train": "training"},
    )


_AVERAGE = "ceil_mode=False, count_include_pad=True"


def _poolings() -> Iterator[Operation]:
    window = "input, kernel_size, stride=None, padding=0"
    for d in (1, 2, 3):
        divisor = "" if d == 1 else ", divisor_override=None"
        for name, module, options in (
            (f"max_pool{d}d", f"MaxPool{d}d", f"{window}, dilation=1, ceil_mode=False, return_indices=False"),
            (f"avg_pool{d}d", f"AvgPool{d}d", f"{window}, {_AVERAGE}{divisor}"),
            (f"adaptive_avg_pool{d}d", f"AdaptiveAvgPool{d}d", "input, output_size"),
        ):
            functions = dict.fromkeys(getattr(owner, name) for owner in (F, torch) if hasattr(owner, name))
            modules, overloads = (getattr(nn, module),), (getattr(_aten, name).default,)
            yield Operation(name, _signature(options), modules, tuple(functions), overloads=overloads)
        name, modules = f"adaptive_max_pool{d}d", (getattr(nn, f"AdaptiveMaxPool{d}d"),)
        signature = _signature("input, output_size, return_indices=False")
        yield Operation(name, signature, modules, (getattr(F, name),))
        # The other spellings return the indices, too.
        functions = dict.fromkeys(getattr(owner, name) for owner in (torch,) if hasattr(owner, name))
        signature, overloads = _signature("input, output_size"), (getattr(_aten, name).default,)
        yield Operation(f"{name}_with_indices", signature, (), tuple(functions), overloads=overloads)


def _activation(name: str, module: type[nn.Module], options: str = "", *further: Any) -> Operation:
    """A function of each element; ``further`` are spellings beside that of ``torch.nn.functional`` and the operator."""
    packet = getattr(_aten, name)
    in_place = getattr(_aten, f"{name}_", None)
    return Operation(
        name,
        _signature("input" + (f", {options}" if options else "")),
        (module,),
        (getattr(F, name), *(value for value in further if not isinstance(value, str))),
        tuple(value for value in further if isinstance(value, str)),
        (packet.default, *([] if in_place is None else [in_place.default])),
    )


_IN_PLACE = "inplace=False"

# What gives a view of its first argument, in any spelling; the other arguments are constants.
VIEWS = frozenset(
    {
        *("t", "T", "mT", "transpose", "swapaxes", "permute", "movedim", "view", "reshape", "flatten", "unflatten"),
        *("squeeze", "unsqueeze", "narrow", "select", "chunk", "split", "getitem", "contiguous", "numpy_T"),
    }
)

OPERATIONS: tuple[Operation, ...] = (
    # Layers
    Operation(
        "linear", _signature("input, weight, bias=None"), (nn.Linear,), (F.linear,), overloads=(_aten.linear.default,)
    ),
    *_convolutions(),
    Operation("attention", inspect.signature(attention_layer), functions=(attention_layer,)),
    Operation(
        "scaled_dot_product_attention",
        _signature(
            "query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False",
        ),
        functions=(F.scaled_dot_product_attention,),
        overloads=(_aten.scaled_dot_product_attention.default,),
    ),
    Operation("bilinear", _signature("input1, input2, weight, bias=None"), functions=(F.bilinear,)),
    # Products
    Operation("mm", _signature("input, mat2"), (), (torch.mm,), ("mm",), (_aten.mm.default,)),
    Operation(
        "matmul",
        _signature("input, other"),
        functions=(torch.matmul, operator.matmul),
        methods=("matmul",),
        overloads=(_aten.matmul.default,),
    ),
    Operation(
        "addmm",
        _signature("input, mat1, mat2, beta=1, alpha=1"),
        functions=(torch.addmm,),
        methods=("addmm",),
        overloads=(_aten.addmm.default,),
    ),
    # What does nothing in evaluation mode
    Operation("identity", _signature("input"), (nn.Identity,)),
    Operation("detach", _signature("input"), (), (torch.detach,), ("detach",), (_aten.detach.default,)),
    *_dropouts(),
    # Norms
    Operation(
        "batch_norm",
        _signature("input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5"),
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        (F.batch_norm,),
        overloads=(_aten.batch_norm.default,),
        ignored=frozenset({"cudnn_enabled"}),
    ),
    Operation(
        "layer_norm",
        _signature("input, normalized_shape, weight=None, bias=None, eps=1e-5"),
        (nn.LayerNorm,),
        (F.layer_norm, torch.layer_norm),
        overloads=(_aten.layer_norm.default,),
        ignored=frozenset({"cudnn_enable"}),
    ),
    # Functions of each element
    _activation("relu", nn.ReLU, _IN_PLACE, torch.relu, torch.relu_, "relu", "relu_"),
    _activation("leaky_relu", nn.LeakyReLU, f"negative_slope=0.01, {_IN_PLACE}"),
    _activation("gelu", nn.GELU, "approximate='none'"),
    _activation("silu", nn.SiLU, _IN_PLACE),
    _activation("sigmoid", nn.Sigmoid, "", torch.sigmoid, "sigmoid"),
    _activation("tanh", nn.Tanh, "", torch.tanh, "tanh"),
    _activation("relu6", nn.ReLU6, _IN_PLACE),
    _activation("hardtanh", nn.Hardtanh, f"min_val=-1.0, max_val=1.0, {_IN_PLACE}"),
    _activation("elu", nn.ELU, f"alpha=1.0, {_IN_PLACE}"),
    _activation("softplus", nn.Softplus, "beta=1, threshold=20"),
    _activation("hardswish", nn.Hardswish, _IN_PLACE),
    _activation("hardsigmoid", nn.Hardsigmoid, _IN_PLACE),
    Operation(
        "add",
        _signature("input, other, alpha=1"),
        functions=(torch.add, operator.add, operator.iadd),
        methods=("add", "add_"),
        overloads=(_aten.add.Tensor, _aten.add_.Tensor),
    ),
    Operation(
        "mul",
        _signature("input, other"),
        functions=(torch.mul, operator.mul, operator.imul),
        methods=("mul", "mul_"),
        overloads=(_aten.mul.Tensor, _aten.mul_.Tensor),
    ),
    Operation("cat", _signature("tensors, dim=0"), functions=(torch.cat,), overloads=(_aten.cat.default,)),
    # Pooling, padding, means
    *_poolings(),
    Operation(
        "pad",
        _signature("input, pad, mode='constant', value=None"),
        functions=(F.pad, functional_pad),
        overloads=(_aten.pad.default,),
    ),
    Operation(
        "mean",
        _signature("input, dim=None, keepdim=False, dtype=None"),
        functions=(torch.mean,),
        methods=("mean",),
        overloads=(_aten.mean.dim,),
    ),
    # Shapes
    Operation(
        "flatten",
        _signature("input, start_dim=0, end_dim=-1"),
        (nn.Flatten,),
        (torch.flatten,),
        ("flatten",),
        (_aten.flatten.using_ints,),
    ),
    Operation(
        "reshape",
        _signature("input, shape"),
        functions=(torch.reshape,),
        methods=("view", "reshape"),
        overloads=(_aten.view.default, _aten.reshape.default),
        renamed={"size": "shape"},
        variadic=True,
    ),
    Operation(
        "contiguous",
        _signature("input, memory_format=None"),
        methods=("contiguous",),
        overloads=(_aten.contiguous.default,),
    ),
    Operation("clone", _signature("input, memory_format=None"), (), (torch.clone,), ("clone",), (_aten.clone.default,)),
    Operation("getitem", _signature("input, index"), functions=(operator.getitem,)),
    Operation("size", _signature("input, dim=None"), methods=("size",), overloads=(_aten.sym_size.int,)),
)

_MODULES = {module: operation for operation in OPERATIONS for module in operation.modules}
_METHODS = {method: operation for operation in OPERATIONS for method in operation.methods}
_FUNCTIONS: dict[Any, Operation] = {
    spelling: operation for operation in OPERATIONS for spelling in (*operation.functions, *operation.overloads)
}
