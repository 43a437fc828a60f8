"""Converts an exported program node by node.

``torch.export`` gives one flat graph with known shapes; ``run_decompositions`` makes it functional (``relu_`` becomes
``relu``), takes apart what has no converter and keeps layers and the ``tbn::`` operators whole. What depends on stored
tensors only is computed here and stored as its result.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.registry import (
    CONVERTERS,
    RESULT_CONVERTERS,
    SKIPPED,
    supported_operators,
)
from tbn_compiler.compiler import deploy, lower
from tbn_compiler.errors import ExportError
from tbn_compiler.graph.calls import named_arguments
from tbn_compiler.graph.copying import share_tensors_copy
from tbn_compiler.graph.records import get_records
from tbn_compiler.graph.shapes import distinct_tensors
from tbn_compiler.ops.schemas import INT8_TINY

_aten, _tbn = torch.ops.aten, torch.ops.tbn
# What a type of PyTorch is in C.
_DTYPES: dict[torch.dtype, ir.DType] = {
    torch.float32: "float32",
    torch.bool: "bool",
    torch.uint8: "uint8",
    torch.int8: "int8",
    **dict.fromkeys((torch.int64, torch.int32, torch.int16), "int32"),
}


def import_graph(module: nn.Module, example_inputs: Tensor | Sequence[Tensor]) -> ir.Graph:
    """Trace a module with ``torch.export`` and convert the result.

    Args:
        module: a lowered module, a trained one (it is lowered on the way), or any other module. It is not changed.
        example_inputs: one tensor, or a tuple of them; every shape is taken as it is.

    Raises:
        ExportError: the module cannot be traced, or holds what this backend does not support.
        LoweringError: a trained module cannot be lowered.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not all(isinstance(value, Tensor) for value in inputs):
        kinds = ", ".join(type(value).__name__ for value in inputs)
        raise ExportError(f"example_inputs must be a tensor or a tuple of tensors, got ({kinds})")
    shapes = ", ".join(str(list(value.shape)) for value in inputs)
    failure = f"torch.export cannot trace {type(module).__name__} on inputs {shapes}"
    if get_records(module) is not None:
        module, _ = deploy(lower(module), inputs, free_sizes=False)
    try:
        module = share_tensors_copy(module).eval()
        with torch.no_grad(), _whole_attention(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.export warns about its own internals
            program = torch.export.export(module, distinct_tensors(inputs)).run_decompositions({})
            if not _supported_targets() >= _targets(program):
                program = program.run_decompositions(_decompositions())
    except Exception as error:
        raise ExportError(f"{failure}: {error}") from error
    return Importer(program).graph()


def _supported_targets() -> set[Any]:
    return {operator.getitem, *CONVERTERS, *RESULT_CONVERTERS, *SKIPPED}


def _targets(program: ExportedProgram) -> set[Any]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def _decompositions() -> dict[Any, Any]:
    """PyTorch's own decompositions of the operators that have no converter; the others stay whole."""
    table = torch.export.default_decompositions()
    # A convolution that is not supported is named as it was written.
    return {
        op: table[op]
        for op in table
        if op not in CONVERTERS and op not in RESULT_CONVERTERS and not op.name().startswith("aten::conv")
    }


@contextmanager
def _whole_attention() -> Iterator[None]:
    """Keep PyTorch's attention modules from exporting as one operator of their own."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Importer:
    """Converts one exported program, node by node."""

    def __init__(self, program: ExportedProgram) -> None:
        self._program = program
        self._values: dict[fx.Node, ir.Value] = {}
        self._tensors: dict[fx.Node, tuple[str, Any]] = {}  # stored, or computed from stored ones, by name
        self._tile_bytes: dict[fx.Node, int] = {}  # of the tiles behind those that are decoded
        # By tensor, so that tied weights are stored once, and by what its elements are stored as.
        self._constants: dict[tuple[int, torch.dtype], ir.Constant] = {}
        self._numbers: dict[tuple[str, str], ir.Constant] = {}
        self._converted: dict[tuple[ir.Operand, str], ir.Value] = {}
        self._added: set[ir.Value] = set()
        self._before: list[ir.Operation] = []  # what the node that is being converted needs first

    def graph(self) -> ir.Graph:
        """Convert the whole program."""
        for spec in self._program.graph_signature.output_specs:
            if spec.kind != OutputKind.USER_OUTPUT:
                raise ExportError(
                    f"the model changes {spec.target!r} while it runs: state has to be an input whose new value is "
                    "returned, see export_c(state=...)"
                )
        graph = self._program.graph
        inputs = self._inputs(graph)
        operations: list[ir.Operation] = []
        for node in graph.nodes:
            if node.op != "call_function" or node.target in SKIPPED or self._fold(node):
                continue
            converted = self._convert(node)
            operations += [*self._before, *converted]
            self._before.clear()
            if converted:
                self._values[node] = converted[-1].output
        return ir.Graph(inputs, self._outputs(graph), tuple(operations))

    def _convert(self, node: fx.Node) -> Sequence[ir.Operation]:
        """The operations of a node; none if it returns a tuple, whose elements are converted where they are taken."""
        if node.target is operator.getitem:
            source, index = node.args
            assert isinstance(source, fx.Node)
            assert isinstance(index, int)
            result = RESULT_CONVERTERS[source.target](self, node, named_arguments(source), index)
        elif node.target in RESULT_CONVERTERS:
            return ()
        elif node.target in CONVERTERS:
            result = CONVERTERS[node.target](self, node, named_arguments(node))
        else:
            raise self.unsupported(node)
        return (result,) if isinstance(result, ir.Operation) else tuple(result)

    def _fold(self, node: fx.Node) -> bool:
        """Compute a node that reads stored tensors only; whether it is one."""
        stored = all(value in self._tensors for value in node.all_input_nodes)
        if node.target in _NOT_FOLDED or not (stored or node.target in _READS_SHAPE_ONLY):
            return False

        def tensor(value: fx.Node) -> Any:
            return self._tensors[value][1] if value in self._tensors else _zeros_like(value)

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), tensor)
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        tiles = node.all_input_nodes[:1] if node.target is _tbn.unpack.default else []
        sizes = [self._tensors[tile][1].nbytes for tile in tiles]
        sizes += [self._tile_bytes[value] for value in node.all_input_nodes if value in self._tile_bytes]
        if sizes:
            self._tile_bytes[node] = sum(sizes)
        names = [self._tensors[value][0] for value in node.all_input_nodes if value in self._tensors]
        name = names[0].removesuffix("_tile") if tiles else names[0] if len(names) == 1 else node.name
        self._tensors[node] = (name, result)
        return True

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
                self._values[nodes[name]] = self.value_of(nodes[name])
                inputs.append(self._values[nodes[name]])
            elif spec.target in program.constants:
                self._tensors[nodes[name]] = (spec.target, program.constants[spec.target])
            else:
                self._tensors[nodes[name]] = (str(spec.target), program.state_dict[str(spec.target)])
        if not inputs:
            raise ExportError("the model has no inputs: there is nothing to compute")
        return tuple(inputs)

    def _outputs(self, graph: fx.Graph) -> tuple[ir.Value, ...]:
        """The values of the outputs."""
        (outputs,) = graph.output_node().args
        assert isinstance(outputs, tuple)
        values = []
        for output in outputs:
            if not isinstance(output, fx.Node) or output not in self._values:
                raise ExportError(f"the output {output} does not depend on the input")
            values.append(self._values[output])
        return tuple(values)

    def value_of(self, node: fx.Node) -> ir.Value:
        """The value that a node makes: ``float32``, ``bool``, bytes as they are, or ``int32`` for other integers."""
        val = node.meta.get("val")
        if not isinstance(val, Tensor):
            raise self.unsupported(node, "it gives no single tensor")
        if val.dtype not in _DTYPES:
            raise self.unsupported(node, f"it gives {val.dtype}; export in float32 (module.float())")
        if not all(isinstance(size, int) for size in val.shape):
            raise self.unsupported(node, "its shape is dynamic")
        if 0 in val.shape:
            raise self.unsupported(node, "it gives an empty tensor")
        return ir.Value(node.name, tuple(val.shape), _DTYPES[val.dtype])

    def head(self, node: fx.Node, *inputs: Any, layer: str | None = None) -> dict[str, Any]:
        """The fields that all operations share, of one that takes and gives floats.

        Args:
            node: the node.
            inputs: the arguments that are tensors.
            layer: name of the layer, where the node's place in the modules does not give it.
        """
        head = self.typed_head(node, "float32", *inputs)
        if head["output"].dtype != "float32":
            raise self.unsupported(node, f"it gives {node.meta['val'].dtype}: in C it takes and gives floats alone")
        return head if layer is None else head | {"layer": layer}

    def typed_head(self, node: fx.Node, dtype: ir.DType | None, *inputs: Any) -> dict[str, Any]:
        """As :meth:`head`, of an operation on elements of this type; ``None`` is that of the result."""
        output = self.value_of(node)
        operands = tuple(self.operand(node, value, dtype or output.dtype) for value in inputs)
        return {"name": node.name, "layer": layer_of(node), "inputs": operands, "output": output}

    def operand(self, node: fx.Node, value: Any, dtype: ir.DType | None = None) -> ir.Operand:
        """What an operation reads: a computed value, a stored tensor, or a number, brought to a type."""
        if isinstance(value, bool | int | float):
            return self._number(value, dtype or "float32")
        if isinstance(value, ir.Value | ir.Constant):
            found: ir.Operand = value
        elif isinstance(value, fx.Node) and value in self._values:
            found = self._values[value]
        else:
            return self.constant(node, value, infinite=True, dtype=getattr(torch, dtype or self.dtype(node, value)))
        return self._to_type(node, found, dtype) if dtype not in (None, found.dtype) else found

    def _to_type(self, node: fx.Node, value: ir.Operand, dtype: ir.DType) -> ir.Value:
        """A value as elements of another type."""
        if dtype in ir.BYTES:
            raise self.unsupported(node, f"it turns {value.dtype} into {dtype}, which in C only inputs hold")
        if (value, dtype) not in self._converted:
            output = ir.Value(f"{value.name} as {dtype}", value.shape, dtype)
            head = (output.name, layer_of(node))
            if value.dtype not in ir.BYTES:
                self.add_before(ir.Unary(*head, (value,), output, function=f"to_{dtype}"))
            elif dtype == "bool":
                integers = self._to_type(node, value, "int32")
                self.add_before(ir.Unary(*head, (integers,), output, function="to_bool"))
            else:
                self.add_before(ir.Convert(*head, (value,), output))
            self._converted[value, dtype] = output
        return self._converted[value, dtype]

    def _number(self, number: float, dtype: ir.DType) -> ir.Constant:
        """A number as an array without dimensions."""
        key = repr(number), dtype
        if key not in self._numbers:
            name = f"number {number}"
            self._numbers[key] = self.new_constant(
                name, _as_type(name, torch.tensor(number), getattr(torch, dtype)).numpy()
            )
        return self._numbers[key]

    def add_before(self, operation: ir.Operation) -> ir.Value:
        """Let an operation run before those that the node becomes; returns its output."""
        self._before.append(operation)
        return operation.output

    def add_once(self, operation: ir.Operation) -> None:
        """As :meth:`add_before`, but for an operation that another node needed already."""
        if operation.output not in self._added:
            self._added.add(operation.output)
            self.add_before(operation)

    def dtype(self, node: fx.Node, value: Any) -> ir.DType:
        """The type in C of a tensor."""
        tensor = value.meta.get("val") if isinstance(value, fx.Node) else None
        if value in self._tensors:
            tensor = self._tensors[value][1]
        if not isinstance(tensor, Tensor) or tensor.dtype not in _DTYPES:
            raise self.unsupported(node, f"operand {value} is no tensor of floats, integers or booleans")
        return _DTYPES[tensor.dtype]

    def is_stored(self, value: Any) -> bool:
        """Whether an argument is a stored tensor, or computed from such at export."""
        return isinstance(value, fx.Node) and value in self._tensors

    def stored(self, value: fx.Node) -> Tensor:
        """A stored tensor."""
        tensor: Tensor = self._tensors[value][1]
        return tensor.detach().cpu()

    def is_computed(self, value: Any) -> bool:
        """Whether an argument is computed while the model runs."""
        return isinstance(value, fx.Node) and value in self._values

    def scalar(self, value: Any) -> float | None:
        """A number, or the number in a stored tensor with one element and no dimensions; ``None`` for anything else."""
        if self.is_stored(value) and self._tensors[value][1].dim() == 0:
            number: float = self._tensors[value][1].item()
            return number
        return value if isinstance(value, int | float) else None

    def positive(self, node: fx.Node, scale: float) -> float:
        """A scale of int8 numbers, in float32."""
        if not INT8_TINY <= scale < math.inf:
            raise self.unsupported(node, f"its scale is {scale:g}; calibrate it")
        return float(np.float32(scale))

    def temporary(self, node: fx.Node, name: str, shape: tuple[int, ...], dtype: ir.DType = "float32") -> ir.Value:
        """A value between the operations that a node becomes."""
        return ir.Value(f"{node.name}_{name}", tuple(shape), dtype)

    def constant(
        self, node: fx.Node, value: Any, *, infinite: bool = False, dtype: torch.dtype = torch.float32
    ) -> ir.Constant:
        """A stored tensor with elements of ``dtype``; ``infinite`` allows infinity (a mask), and a number to be NaN."""
        if not isinstance(value, fx.Node) or value not in self._tensors:
            raise self.unsupported(node, f"operand {value} is computed while the model runs, not a stored tensor")
        name, tensor = self._tensors[value]
        key = id(tensor), dtype
        if key not in self._constants:
            array = _as_type(name, tensor.detach().cpu(), dtype)
            alone = infinite and not array.dim()
            if not (array.isfinite() | (array.isinf() & infinite) | alone).all():
                raise ExportError(f"{name} {list(tensor.shape)} holds values that are not finite")
            constant = self.new_constant(name, array.numpy())
            packed = dtype == torch.uint8
            self._constants[key] = replace(constant, tile_bytes=self._tile_bytes.get(value), packed=packed)
        return self._constants[key]

    def tile(self, node: fx.Node, value: Any) -> ir.Constant:
        """A stored tile: packed bits, or numbers in full precision."""
        packed = value in self._tensors and self._tensors[value][1].dtype == torch.uint8
        return self.constant(node, value, dtype=torch.uint8 if packed else torch.float32)

    def additive_mask(self, node: fx.Node, value: Any) -> Any:
        """A mask to add to scores, from one that is true where a score counts; others as they are."""
        if self.dtype(node, value) != "bool":
            return value
        if self.is_stored(value):
            name, tensor = self._tensors[value]
            return self.new_constant(name, torch.zeros(tensor.shape).masked_fill(~tensor.cpu(), -math.inf).numpy())
        output = self.temporary(node, "mask", self.operand(node, value).shape)
        return self.add_before(self.select(node, value, 0.0, -math.inf, output))

    def select(self, node: fx.Node, shown: Any, a: Any, b: Any, output: ir.Value) -> ir.Select:
        """Elements of ``a`` where ``shown`` is true, of ``b`` where it is not."""
        operands = (self.operand(node, shown, "bool"), *(self.operand(node, x, output.dtype) for x in (a, b)))
        accesses = tuple(ir.Access.broadcast(operand.shape, output.shape) for operand in operands)
        return ir.Select(output.name, layer_of(node), operands, output, accesses)

    def new_constant(self, name: str, array: Any) -> ir.Constant:
        """A constant that is not a tensor of the program."""
        stored = np.array(array, order="C")
        stored.flags.writeable = False
        return ir.Constant(name, stored)

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
        if node.target in _NOT_FOLDED:
            reason = "the module holds a trained part that is not lowered: call tbn_compiler.lower on that part first"
        return ExportError(
            f"{message}: {reason or 'the C backend does not support this operator'}. "
            f"Supported operators: {', '.join(supported_operators())}"
        )


# Training operators: to store their result would silently lose the tile.
_NOT_FOLDED = (_tbn.tile.default, _tbn.scale.default)
# What these give does not depend on the elements of their input.
_READS_SHAPE_ONLY = (
    *(_aten.ones_like.default, _aten.zeros_like.default, _aten.full_like.default),
    *(_aten.new_ones.default, _aten.new_zeros.default, _aten.new_full.default),
)


def _zeros_like(node: fx.Node) -> Tensor:
    """A real tensor with the shape and dtype of a traced one."""
    val = node.meta["val"]
    return torch.zeros(tuple(val.shape), dtype=val.dtype)


def _as_type(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Elements of another type; what is ``int64`` in PyTorch has to be ``int32``."""
    if dtype == torch.int32 and tensor.dtype == torch.int64 and (tensor.to(dtype) != tensor).any():
        raise ExportError(f"{name} {list(tensor.shape)} holds integers beyond int32, which int64 is in C")
    return tensor.to(dtype)


def layer_of(node: fx.Node) -> str:
    """The innermost module that a node was traced in, or the node itself."""
    return _module_of(node) or node.name


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
