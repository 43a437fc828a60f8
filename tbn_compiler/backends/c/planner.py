"""Planning: from the graph to a :class:`~tbn_compiler.backends.c.plan.Plan`.

1. Views disappear: a value that only renames another one is replaced by it. So does what nothing reads.
2. Neighbouring inputs that share a weight (two-axis tiles) are summed by a step of their own.
3. A ReLU right behind a linear layer becomes part of it.
4. Every value gets memory: the model's input or output, or a buffer in one scratch block. An elementwise operation
   writes over its input where nothing reads that again.
5. Every operation gets a kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.memory import Buffer, live_bytes, place_buffers
from tbn_compiler.backends.c.names import SymbolTable
from tbn_compiler.backends.c.plan import (
    KERNELS,
    ElementwiseStep,
    LinearStep,
    Plan,
    PlannedBuffer,
    PlannedConstant,
    SoftmaxStep,
    Step,
    SumNeighboursStep,
    TiledLayer,
    TiledLinearStep,
)
from tbn_compiler.tiling import TileLayout

# What the templates name beside the kernels: behind the model's prefix, and inside the run function.
_FILE_NAMES = ("run", "scratch", "activate", "tiled_linear", "tiled_linear_store", "bits_product", "float_product")
_LOCAL_NAMES = ("input", "output", "scratch", "memory", "i")


@dataclass(frozen=True)
class _Task:
    """An operation, with what was fused into it."""

    operation: ir.Operation
    relu: bool = False


def build_plan(graph: ir.Graph, name: str, scratch: str) -> Plan:
    """Plan the program for a graph with one input and one output.

    Args:
        graph: the model.
        name: prefix of every symbol, a valid C identifier.
        scratch: ``"static"`` or ``"caller"``.
    """
    (model_input,), (model_output,) = graph.inputs, graph.outputs
    operations, last = _resolve_aliases(graph)
    if last == model_input:
        last = ir.Value(f"{model_input.name}_copy", model_input.shape)
        operations.append(ir.Copy(last.name, last.name, (model_input,), last))
    tasks = _fuse_relus(_sum_neighbours(operations), last)
    symbols = SymbolTable((*KERNELS, *_FILE_NAMES))
    selector = _KernelSelector(symbols)
    # Constants are named first, so that no buffer of the run function hides one.
    for task in tasks:
        selector.name_constants(task.operation)
    local_names = SymbolTable((*_LOCAL_NAMES, *(f"{name}_{symbol}" for symbol in symbols.taken)))
    places, buffers = _assign_memory(tasks, model_input, last, local_names)
    offsets = place_buffers(buffers)
    live = live_bytes(buffers, len(tasks))
    peak = max(range(len(tasks)), key=live.__getitem__)
    return Plan(
        name=name,
        scratch=scratch,
        input=model_input,
        output=model_output,
        steps=tuple(selector.step(task, places) for task in tasks),
        constants=selector.constants,
        buffers=tuple(
            PlannedBuffer(buffer.name, buffer.nbytes, offset, buffer.first, buffer.last)
            for buffer, offset in zip(buffers, offsets, strict=True)
        ),
        scratch_bytes=max((offset + b.nbytes for b, offset in zip(buffers, offsets, strict=True)), default=0),
        weight_bytes=sum(planned.constant.array.nbytes for planned in selector.constants),
        live_bytes=tuple(live),
        peak_step=tasks[peak].operation.name if live[peak] else None,
    )


def _resolve_aliases(graph: ir.Graph) -> tuple[list[ir.Operation], ir.Value]:
    """The operations that the output needs, reading original values only, and the value of the output."""
    original: dict[ir.Value, ir.Value] = {value: value for value in graph.inputs}
    operations: list[ir.Operation] = []
    for operation in graph.operations:
        inputs = tuple(original[value] for value in operation.inputs)
        if isinstance(operation, ir.Alias):
            original[operation.output] = inputs[0]
        else:
            original[operation.output] = operation.output
            operations.append(replace(operation, inputs=inputs))
    output = original[graph.outputs[0]]
    needed = {output}
    for operation in reversed(operations):
        if operation.output in needed:
            needed.update(operation.inputs)
    return [operation for operation in operations if operation.output in needed], output


def _sum_neighbours(operations: Sequence[ir.Operation]) -> list[ir.Operation]:
    """Sum inputs that share a weight before they are multiplied.

    A two-axis layer becomes ``SumNeighbours`` and a flat layer on ``n / p_in`` inputs. It stays as it is where
    neighbours are scaled differently: by alphas along the input, or by input alphas whose replicas end between them.
    Layers that read the same value share the sums.
    """
    result: list[ir.Operation] = []
    sums: dict[tuple[ir.Value, int], ir.Value] = {}
    for operation in operations:
        if isinstance(operation, ir.TiledLinear) and _shares_weights(operation):
            layout, (source,) = operation.layout, operation.inputs
            key = (source, layout.p_in)
            if key not in sums:
                inputs = layout.row_size // operation.replicas // layout.p_in
                sums[key] = ir.Value(f"{operation.name}_sums", (*operation.output.shape[:-1], inputs))
                result.append(
                    ir.SumNeighbours(sums[key].name, operation.layer, (source,), sums[key], count=layout.p_in)
                )
            flat = TileLayout((layout.rows, layout.row_size // layout.p_in), layout.p_out)
            operation = replace(operation, inputs=(sums[key],), layout=flat)
        result.append(operation)
    return result


def _shares_weights(operation: ir.TiledLinear) -> bool:
    """Whether neighbouring inputs have the same weight and the same scale."""
    layout = operation.layout
    one_alpha = layout.alphas_in(operation.alpha.array.size) == 1
    return layout.p_in > 1 and one_alpha and layout.row_size // operation.replicas % layout.p_in == 0


def _fuse_relus(operations: Sequence[ir.Operation], output: ir.Value) -> list[_Task]:
    """Let a linear layer apply the ReLU that is the only reader of its result."""
    reads = Counter(value for operation in operations for value in operation.inputs)
    tasks: list[_Task] = []
    made_by: dict[ir.Value, int] = {}
    for operation in operations:
        if isinstance(operation, ir.Relu):
            (value,) = operation.inputs
            index = made_by.get(value)
            if index is not None and reads[value] == 1 and value != output:
                tasks[index] = _Task(replace(tasks[index].operation, output=operation.output), relu=True)
                continue
        if isinstance(operation, ir.Linear | ir.TiledLinear):
            made_by[operation.output] = len(tasks)
        tasks.append(_Task(operation))
    return tasks


def _assign_memory(
    tasks: Sequence[_Task], model_input: ir.Value, output: ir.Value, names: SymbolTable
) -> tuple[dict[ir.Value, str], list[Buffer]]:
    """Choose the memory of every value.

    Returns:
        The place of each value (``"input"``, ``"output"`` or a buffer's name), and the buffers.
    """
    last_read = {value: step for step, task in enumerate(tasks) for value in task.operation.inputs}
    # Values that share memory, by the first of them. The input is the caller's and is never written.
    shared: dict[ir.Value, list[ir.Value]] = {}
    owner: dict[ir.Value, ir.Value] = {}
    for step, task in enumerate(tasks):
        operation = task.operation
        value = operation.output
        dying = [v for v in operation.inputs if last_read[v] == step and v != model_input and v.size == value.size]
        owner[value] = owner[dying[0]] if operation.in_place and dying else value
        shared.setdefault(owner[value], []).append(value)

    made_at = {task.operation.output: step for step, task in enumerate(tasks)}
    places = {model_input: "input"}
    buffers = []
    for first, values in shared.items():
        place = "output"
        if output not in values:
            step = made_at[first]
            operation = tasks[step].operation
            suffix = "sums" if isinstance(operation, ir.SumNeighbours) else "out"
            place = names.unique(f"{operation.layer}_{suffix}")
            buffers.append(Buffer(place, first.nbytes, step, max(last_read[value] for value in values)))
        places |= dict.fromkeys(values, place)
    return places, buffers


class _KernelSelector:
    """Turns operations into steps, and collects the constants that they read."""

    def __init__(self, symbols: SymbolTable) -> None:
        self._symbols = symbols
        self._names: dict[ir.Constant, str] = {}
        self._layers: dict[TiledLayer, TiledLayer] = {}  # by contents without symbol

    @property
    def constants(self) -> tuple[PlannedConstant, ...]:
        """All constants in order of first use."""
        return tuple(PlannedConstant(symbol, constant) for constant, symbol in self._names.items())

    def name_constants(self, operation: ir.Operation) -> None:
        """Give a symbol to each array that an operation reads."""
        found: tuple[ir.Constant | None, ...] = ()
        if isinstance(operation, ir.Linear):
            found = (operation.weight, operation.bias)
        elif isinstance(operation, ir.TiledLinear):
            found = (operation.tile, operation.alpha, operation.bias, operation.input_alpha)
        for constant in found:
            if constant is not None and constant not in self._names:
                self._names[constant] = self._symbols.unique(constant.name)

    def _name(self, constant: ir.Constant | None) -> str | None:
        return None if constant is None else self._names[constant]

    def step(self, task: _Task, places: dict[ir.Value, str]) -> Step:
        """Choose the kernel of a task."""
        operation = task.operation
        head: dict[str, Any] = {
            "node": operation.name,
            "layer": operation.layer,
            "inputs": tuple(places[value] for value in operation.inputs),
            "output": places[operation.output],
            "shape": operation.output.shape,
        }
        size = operation.output.size
        match operation:
            case ir.TiledLinear():
                layer = self._tiled_layer(operation, task.relu)
                vectors = size // layer.out_features
                return TiledLinearStep(_tiled_kernel(operation), **head, vectors=vectors, parameters=layer)
            case ir.Linear():
                out_features, in_features = operation.weight.array.shape
                return LinearStep(
                    "linear",
                    **head,
                    vectors=size // out_features,
                    in_features=in_features,
                    out_features=out_features,
                    weight=self._names[operation.weight],
                    bias=self._name(operation.bias),
                    relu=task.relu,
                )
            case ir.Softmax():
                columns = operation.output.shape[-1]
                return SoftmaxStep("softmax", **head, rows=size // columns, columns=columns)
            case ir.SumNeighbours():
                return SumNeighboursStep("sum_neighbours", **head, size=size, count=operation.count)
            case ir.AddScalar():
                return ElementwiseStep("add_scalar", **head, size=size, scalar=operation.scalar)
            case ir.Add():
                return ElementwiseStep("add", **head, size=size)
            case ir.Relu():
                return ElementwiseStep("relu", **head, size=size)
            case ir.Copy():
                return ElementwiseStep("copy", **head, size=size)
        raise AssertionError(f"no kernel for {type(operation).__name__}")

    def _tiled_layer(self, operation: ir.TiledLinear, relu: bool) -> TiledLayer:
        """The description of a tiled layer; equal ones, as of a layer that runs twice, are shared."""
        layout, num_alphas = operation.layout, operation.alpha.array.size
        layer = TiledLayer(
            symbol="",
            name=operation.layer,
            in_features=layout.row_size,
            out_features=layout.rows,
            p=layout.p,
            p_in=layout.p_in,
            shift=_shift(layout),
            unique_rows=layout.distinct_rows(num_alphas),
            tile_size=layout.tile_size,
            num_alphas=num_alphas,
            rows_per_alpha=_rows_per_alpha(operation),
            replicas=operation.replicas,
            tile=self._names[operation.tile],
            alpha=self._names[operation.alpha],
            bias=self._name(operation.bias),
            input_alpha=self._name(operation.input_alpha),
            relu=relu,
        )
        if layer not in self._layers:
            self._layers[layer] = replace(layer, symbol=self._symbols.unique(f"{operation.layer}_layer"))
        return self._layers[layer]


def _shift(layout: TileLayout) -> int:
    """Elements by which each further copy is rolled; a single copy is not."""
    return layout.shift % layout.tile_size if layout.p > 1 else 0


def _rows_per_alpha(operation: ir.TiledLinear) -> int:
    """Rows that one alpha scales; 0 where alphas change inside a row.

    That is the case where a copy with an alpha of its own ends inside a row, and where neighbouring inputs have
    different alphas.
    """
    layout, num_alphas = operation.layout, operation.alpha.array.size
    if layout.alphas_in(num_alphas) > 1 or layout.rows % num_alphas:
        return 0
    return layout.rows // num_alphas


def _tiled_kernel(operation: ir.TiledLinear) -> str:
    """The kernel for a tiled layer.

    Eight inputs are taken at a time where every row begins and the tile ends on a whole byte, copies follow one
    another unrolled, and one scale holds for a whole row. Everything else goes run by run.
    """
    layout = operation.layout
    if not operation.tile.packed:
        return "tiled_linear_float"
    whole_bytes = layout.row_size % 8 == 0 and layout.tile_size % 8 == 0
    plain = layout.p_in == 1 and _shift(layout) == 0 and operation.input_alpha is None
    return "tiled_linear_bytes" if whole_bytes and plain and _rows_per_alpha(operation) else "tiled_linear_bits"
