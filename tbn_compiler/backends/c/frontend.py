"""From a module to :class:`~tbn_compiler.backends.c.ir.Graph`, through ``torch.export``.

``torch.export`` gives one flat graph with known shapes; ``run_decompositions({})`` makes it functional (``relu_``
becomes ``relu``) and keeps ``linear`` and the ``tbn::`` operators whole. To support a further operator, add an
operation to :mod:`ir`, a converter to :data:`_CONVERTERS` here, and a kernel to :mod:`plan`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from tbn_compiler.backends.c import ir
from tbn_compiler.compiler import lower
from tbn_compiler.errors import ExportError
from tbn_compiler.layers import get_records
from tbn_compiler.tiling import TileLayout
from tbn_compiler.tracing import share_tensors_copy

_aten, _tbn = torch.ops.aten, torch.ops.tbn


def import_graph(module: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> ir.Graph:
    """Trace a module with ``torch.export`` and convert the result.

    Args:
        module: a lowered module, a trained one (it is lowered on the way), or any other module. It is not changed.
        example_inputs: one float32 tensor, or a tuple of them; every shape is taken as it is.

    Raises:
        ExportError: the module cannot be traced, or holds what this backend does not support.
        LoweringError: a trained module cannot be lowered.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not all(isinstance(value, Tensor) for value in inputs):
        kinds = ", ".join(type(value).__name__ for value in inputs)
        raise ExportError(f"example_inputs must be a tensor or a tuple of tensors, got ({kinds})")
    if get_records(module) is not None:
        module = lower(module)
    try:
        module = share_tensors_copy(module).eval()
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            program = torch.export.export(module, inputs).run_decompositions({})
    except Exception as error:
        shapes = ", ".join(str(list(value.shape)) for value in inputs)
        raise ExportError(f"torch.export cannot trace {type(module).__name__} on inputs {shapes}: {error}") from error
    return _Importer(program).graph()


class _Importer:
    """Converts one exported program, node by node."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._values: dict[fx.Node, ir.Value] = {}
        self._tensors: dict[fx.Node, tuple[str, Tensor]] = {}
        self._constants: dict[int, ir.Constant] = {}  # by tensor, so that tied weights are stored once

    def graph(self) -> ir.Graph:
        """Convert the whole program."""
        graph = self._program.graph
        inputs = self._inputs(graph)
        output = self._output(graph)
        operations = []
        for node in graph.nodes:
            if node.op == "call_function" and node.target not in _SKIPPED:
                converter = _CONVERTERS.get(node.target)
                if converter is None:
                    raise self.unsupported(node)
                operation = converter(self, node, _arguments(node))
                self._values[node] = operation.output
                operations.append(operation)
        if output not in self._values:
            raise ExportError(f"the output {output} does not depend on the input")
        return ir.Graph(inputs, (self._values[output],), tuple(operations))

    def _inputs(self, graph: fx.Graph) -> tuple[ir.Value, ...]:
        """Sort the placeholders into inputs and stored tensors."""
        program = self._program
        nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
        inputs: list[ir.Value] = []
        for spec in program.graph_signature.input_specs:
            name = getattr(spec.arg, "name", "")
            if spec.kind == InputKind.USER_INPUT:
                if name not in nodes or not isinstance(nodes[name].meta.get("val"), Tensor):
                    raise ExportError(f"input {name or spec.arg} is not a tensor")
                self._values[nodes[name]] = self._value_of(nodes[name])
                inputs.append(self._values[nodes[name]])
            elif spec.target in program.constants:
                self._tensors[nodes[name]] = (spec.target, program.constants[spec.target])
            else:
                self._tensors[nodes[name]] = (str(spec.target), program.state_dict[str(spec.target)])
        if len(inputs) != 1:
            raise ExportError(f"the C backend supports one input, the model has {len(inputs)}: {_listed(inputs)}")
        return tuple(inputs)

    def _output(self, graph: fx.Graph) -> fx.Node:
        """The node of the only output."""
        for spec in self._program.graph_signature.output_specs:
            if spec.kind != OutputKind.USER_OUTPUT:
                raise ExportError(f"the model changes {spec.target!r} while it runs: the C backend keeps no state")
        (outputs,) = graph.output_node().args
        assert isinstance(outputs, tuple)
        if len(outputs) != 1 or not isinstance(outputs[0], fx.Node):
            raise ExportError(
                f"the C backend supports one output tensor, the model has {len(outputs)} outputs: "
                f"{', '.join(map(str, outputs))}"
            )
        return outputs[0]

    def _value_of(self, node: fx.Node) -> ir.Value:
        """The float32 value that a node makes."""
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            raise self.unsupported(node, "it gives no single tensor")
        if val.dtype != torch.float32:
            raise self.unsupported(node, f"it gives {val.dtype}; export in float32 (module.float())")
        if not all(isinstance(size, int) for size in val.shape):
            raise self.unsupported(node, "its shape is dynamic")
        if 0 in val.shape:
            raise self.unsupported(node, "it gives an empty tensor")
        return ir.Value(node.name, tuple(val.shape))

    def head(self, node: fx.Node, *inputs: Any, layer: str | None = None) -> dict[str, Any]:
        """The fields that all operations share."""
        values = []
        for value in inputs:
            if not isinstance(value, fx.Node) or value not in self._values:
                raise self.unsupported(node, f"operand {value} is not computed from the input")
            values.append(self._values[value])
        return {
            "name": node.name,
            "layer": layer or _module_of(node) or node.name,
            "inputs": tuple(values),
            "output": self._value_of(node),
        }

    def constant(self, node: fx.Node, value: Any) -> ir.Constant:
        """A stored tensor as float32, or as it is if it holds packed bits."""
        if not isinstance(value, fx.Node) or value not in self._tensors:
            raise self.unsupported(node, f"operand {value} is computed while the model runs, not a stored tensor")
        name, tensor = self._tensors[value]
        if id(tensor) not in self._constants:
            array = tensor.detach().cpu()
            array = array if array.dtype == torch.uint8 else array.float()
            if not torch.isfinite(array).all():
                raise ExportError(f"{name} {list(tensor.shape)} holds values that are not finite")
            stored = np.array(array.numpy(), order="C")
            stored.flags.writeable = False
            self._constants[id(tensor)] = ir.Constant(name, stored)
        return self._constants[id(tensor)]

    def optional_constant(self, node: fx.Node, value: Any) -> ir.Constant | None:
        """Like :meth:`constant`, for an argument that may be missing."""
        return None if value is None else self.constant(node, value)

    def unsupported(self, node: fx.Node, reason: str | None = None) -> ExportError:
        """The error for a node that cannot be exported."""
        inputs = ", ".join(_shape_of(value) for value in node.all_input_nodes)
        module = _module_of(node)
        where = f" of layer {module!r}" if module else ""
        message = (
            f"cannot export node {node.name!r} ({node.target}){where}, inputs {inputs} -> output {_shape_of(node)}"
        )
        if node.target in (_tbn.tile.default, _tbn.scale.default):
            reason = "the module holds a trained part that is not lowered: call tbn_compiler.lower on that part first"
        return ExportError(
            f"{message}: {reason or 'the C backend does not support this operator'}. "
            f"Supported operators: {', '.join(supported_operators())}"
        )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator call by name, defaults included."""
    assert isinstance(node.target, torch._ops.OpOverload), node.target
    schema = node.target._schema.arguments
    given = dict(zip((argument.name for argument in schema), node.args, strict=False))
    return {a.name: a.default_value for a in schema} | given | node.kwargs


def _module_of(node: fx.Node) -> str:
    """Qualified name of the innermost module that a node was traced in."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths else ""


def _shape_of(node: fx.Node) -> str:
    val = node.meta.get("val")
    if isinstance(val, tuple | list):
        return "(" + ", ".join(str(list(getattr(item, "shape", []))) for item in val) + ")"
    return str(list(val.shape)) if isinstance(val, Tensor) else "none"


def _listed(values: Sequence[ir.Value]) -> str:
    return ", ".join(f"{value.name} {list(value.shape)}" for value in values) or "none"


_Arguments = dict[str, Any]
_Converter = Callable[[_Importer, fx.Node, _Arguments], ir.Operation]


def _alias(importer: _Importer, node: fx.Node, args: _Arguments) -> ir.Operation:
    return ir.Alias(**importer.head(node, next(iter(args.values()))))


def _relu(importer: _Importer, node: fx.Node, args: _Arguments) -> ir.Operation:
    return ir.Relu(**importer.head(node, args["self"]))


def _add(importer: _Importer, node: fx.Node, args: _Arguments) -> ir.Operation:
    if args["alpha"] != 1:
        raise importer.unsupported(node, f"alpha={args['alpha']} is not 1")
    if isinstance(args["other"], int | float):
        scalar = float(np.float32(args["other"]))
        if not math.isfinite(scalar):
            raise importer.unsupported(node, f"the number {args['other']} is not finite in float32")
        return ir.AddScalar(**importer.head(node, args["self"]), scalar=scalar)
    head = importer.head(node, args["self"], args["other"])
    if any(value.shape != head["output"].shape for value in head["inputs"]):
        raise importer.unsupported(node, "both operands must have the shape of the result")
    return ir.Add(**head)


def _softmax(importer: _Importer, node: fx.Node, args: _Arguments) -> ir.Operation:
    operation = ir.Softmax(**importer.head(node, args["self"]))
    rank = len(operation.output.shape)
    if rank == 0 or args["dim"] not in (-1, rank - 1):
        raise importer.unsupported(node, f"dim={args['dim']} is not the last dimension")
    return operation


def _linear(importer: _Importer, node: fx.Node, args: _Arguments) -> ir.Operation:
    weight = importer.constant(node, args["weight"])
    bias = importer.optional_constant(node, args["bias"])
    if weight.array.ndim != 2:
        raise importer.unsupported(node, "the weight is not a matrix")
    layer = weight.name.removesuffix(".weight")
    return ir.Linear(**importer.head(node, args["input"], layer=layer), weight=weight, bias=bias)


def _tiled_linear(importer: _Importer, node: fx.Node, args: _Arguments) -> ir.Operation:
    tile = importer.constant(node, args["tile"])
    layer = tile.name.removesuffix("_tile").removesuffix(".weight")
    head = importer.head(node, args["input"], layer=layer)
    layout = TileLayout((args["out_features"], args["in_features"]), args["p"], args["p_in"], args["shift"])
    return ir.TiledLinear(
        **head,
        tile=tile,
        alpha=importer.constant(node, args["alpha"]),
        bias=importer.optional_constant(node, args["bias"]),
        input_alpha=importer.optional_constant(node, args["input_alpha"]),
        layout=layout,
    )


# Checks of torch.export on tensors whose shapes and types are fixed here anyway.
_SKIPPED = {_aten._assert_tensor_metadata.default}

_CONVERTERS: dict[Any, _Converter] = {
    _tbn.linear.default: _tiled_linear,
    _aten.linear.default: _linear,
    _aten.relu.default: _relu,
    _aten.add.Tensor: _add,
    _aten.softmax.int: _softmax,
    _aten._softmax.default: _softmax,
    # The same elements under another shape. Dropout in evaluation arrives as a clone.
    **dict.fromkeys(
        (
            _aten._to_copy.default,
            _aten._unsafe_view.default,
            _aten.alias.default,
            _aten.clone.default,
            _aten.contiguous.default,
            _aten.detach.default,
            _aten.flatten.using_ints,
            _aten.reshape.default,
            _aten.squeeze.default,
            _aten.squeeze.dim,
            _aten.squeeze.dims,
            _aten.unflatten.int,
            _aten.unsqueeze.default,
            _aten.view.default,
        ),
        _alias,
    ),
}


def supported_operators() -> list[str]:
    """Names of the operators that the C backend accepts."""
    return sorted(str(target) for target in _CONVERTERS)
