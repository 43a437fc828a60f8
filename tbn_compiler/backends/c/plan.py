"""The plan: a frozen description of the C program, in which everything is decided and nothing is text yet."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from tbn_compiler import html
from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.costs import Work
from tbn_compiler.backends.c.element_instances import C_TYPES
from tbn_compiler.backends.c.number_formats import NumberFormat
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.report import draw_plan, plan_data, plan_section, plan_table

# What may lie in the scratch block, and what its part of a union is called.
SCRATCH_MEMBERS = {"float": "floats", "int32_t": "integers", "int8_t": "bytes", "uint8_t": "octets"}


@dataclass(frozen=True)
class Workspace:
    """Memory that one step needs for itself; it holds nothing before and after.

    Attributes:
        name: what the buffer is called after.
        size: number of elements.
        dtype: their type, a key of :data:`C_TYPES`.
    """

    name: str
    size: int
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        """Number of bytes, rounded up to whole words."""
        return -(-self.size * np.dtype(self.dtype).itemsize // 4) * 4


@dataclass(frozen=True)
class Struct:
    """A ``static const`` structure that describes a layer to its kernel; equal ones are stored once.

    Attributes:
        type: the ``typedef`` behind the model's prefix, made by a template.
        name: what its symbol is made of.
        title: the comment above it.
        fields: name and value of each member, in the order of the ``typedef``.
    """

    type: str
    name: str
    title: str
    fields: tuple[tuple[str, Argument], ...]


@dataclass(frozen=True)
class At:
    """A pointer into an operand.

    It is ``operand + offset + i * stride + j * inner_stride`` in repetition ``i`` of a call and ``j`` of its inner one;
    with a period, ``j % inner_period`` stands for ``j``.
    """

    operand: ir.Operand | Workspace
    offset: int = 0
    stride: int = 0
    inner_stride: int = 0
    inner_period: int = 0


@dataclass(frozen=True)
class Index:
    """The number of the repetition, as an argument of a repeated call."""


# What a kernel is called with, or what a structure holds: a pointer (``None`` is NULL), an address or a number. A tuple
# is an array inside a structure.
Argument = ir.Operand | Workspace | At | Index | Struct | int | float | None | tuple[int, ...]


@dataclass(frozen=True)
class Call:
    """A call of a kernel.

    Attributes:
        kernel: the template ``<kernel>.c``, which defines the function ``<name>_<kernel>``.
        arguments: in the order of the function's parameters.
        repeat: how often it is called; pointers given as :class:`At` advance. Calls of one implementation that follow
            one another with the same number share the loop.
        inner: how often it is called in each repetition, in a loop of its own.
    """

    kernel: str
    arguments: tuple[Argument, ...]
    repeat: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Implementation:
    """How one operation is computed; :mod:`~tbn_compiler.backends.c.kernels` chooses it.

    Attributes:
        title: what the operation is, in a few words, for comments and tables.
        calls: what runs, in order.
        cost: estimated number of executed instructions on the target.
        choice: why these kernels, where there was a choice.
        notes: what a user may not expect of it.
        work: what the estimate was made from (:mod:`~tbn_compiler.backends.c.costs`); empty for tiles of whole rows.
    """

    title: str
    calls: tuple[Call, ...]
    cost: int
    choice: str = ""
    notes: tuple[str, ...] = ()
    work: Work = field(default_factory=dict)

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels in order of first use."""
        return tuple(dict.fromkeys(call.kernel for call in self.calls))


@dataclass(frozen=True)
class Step:
    """One operation of the program.

    Attributes:
        node: the node of the exported graph whose value it computes.
        layer: qualified name of the layer.
        inputs, output: C names of the memory: parameters of the run function, buffers, or constants.
        shape: shape of the result.
        implementation: the kernel calls, the reason for them, and their cost.
        constant_bytes: bytes of the constants that it reads.
        data_bytes: bytes of the values that it reads and writes.
        workspace: buffers that only this step uses.
    """

    node: str
    layer: str
    inputs: tuple[str, ...]
    output: str
    shape: tuple[int, ...]
    implementation: Implementation
    constant_bytes: int
    data_bytes: int
    workspace: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Layer and operation in a few words."""
        title = self.implementation.title
        return title if self.layer == self.node else f"{self.layer}: {title}"

    @property
    def kernel(self) -> str:
        """The kernel, or the kernels, that run."""
        return ", ".join(self.implementation.kernels)

    @property
    def choice(self) -> str:
        """Why this kernel, and what a user may not expect of it."""
        return "; ".join(filter(None, (self.implementation.choice, *self.notes)))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user may not expect of it: a weight that is stored decoded."""
        return self.implementation.notes

    @property
    def cost(self) -> int:
        """Estimated number of executed instructions."""
        return self.implementation.cost


@dataclass(frozen=True)
class PlannedConstant:
    """A ``static const`` array.

    Attributes:
        symbol: C name without the model's prefix.
        constant: contents and ``state_dict`` key.
    """

    symbol: str
    constant: ir.Constant


@dataclass(frozen=True)
class PlannedBuffer:
    """A buffer in the scratch block; ``first`` and ``last`` are the steps between which it is in use."""

    name: str
    nbytes: int
    offset: int
    first: int
    last: int
    dtype: str = "float32"


@dataclass(frozen=True)
class Port:
    """An input or output of the run function.

    Attributes:
        name: C name of the parameter.
        value: shape and element type.
        format: what its integers stand for, where that is known.
        step: how much one step of the integers that a float output is computed from changes it.
    """

    name: str
    value: ir.Value
    format: NumberFormat | None = None
    step: float = 0.0


@dataclass(frozen=True)
class PlannedState:
    """A member of the state structure.

    Attributes:
        name: C name of the member.
        value: shape and element type.
        before, output: indices of the model's input that it is, and of the output that it becomes.
        initial: symbol of the constant that it holds before the first run; ``None``: zeros.
    """

    name: str
    value: ir.Value
    before: int
    output: int
    initial: str | None = None


@dataclass(frozen=True)
class Plan:
    """What the C file will be: steps, constants and memory.

    Attributes:
        options: what the user chose.
        inputs, outputs: parameters of the run function.
        states: members of the structure that the caller keeps from run to run.
        steps: operations in order.
        constants: arrays in the order in which they are stored.
        structs: descriptions of layers, with their symbols without prefix.
        buffers: contents of the scratch block, in order of first use.
        pointers: C expression for every value, workspace and constant that a call may name.
        scratch_bytes: size of the scratch block.
        weight_bytes: bytes of all constants: packed tiles, alphas, biases, float weights and tables.
        live_bytes: scratch bytes in use at each step; the block cannot be smaller than the largest of these.
        peak_step: node of the first step with the most scratch in use; ``None`` without scratch.
    """

    options: Options
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    steps: tuple[Step, ...]
    constants: tuple[PlannedConstant, ...]
    structs: tuple[tuple[str, Struct], ...]
    buffers: tuple[PlannedBuffer, ...]
    pointers: Mapping[ir.Operand | tuple[int, Workspace], str]
    scratch_bytes: int
    weight_bytes: int
    live_bytes: tuple[int, ...]
    peak_step: str | None
    states: tuple[PlannedState, ...] = ()

    @property
    def name(self) -> str:
        """Prefix of every symbol."""
        return self.options.name

    @property
    def scratch(self) -> str:
        """Who owns the scratch block."""
        return self.options.scratch

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels in use, in order of first use."""
        return tuple(dict.fromkeys(kernel for step in self.steps for kernel in step.implementation.kernels))

    @property
    def unused_inputs(self) -> tuple[str, ...]:
        """Names of the parameters that no step names: inputs, and the state where it stays what it is."""
        operands = (operand for step in self.steps for operand in _arguments(step.implementation))
        pointers = (self.pointers[operand] for operand in operands if isinstance(operand, ir.Value))
        read = {pointer.partition(" ")[0] for pointer in pointers}  # without an offset
        state = ["state"] if self.states and not any(pointer.startswith("state->") for pointer in read) else []
        return (*state, *(port.name for port in self.inputs if port.name not in read))

    @property
    def uses_stdint(self) -> bool:
        """Whether an input or output holds something else than floats."""
        values = [port.value for port in (*self.inputs, *self.outputs)] + [state.value for state in self.states]
        return any(value.dtype != "float32" for value in values)

    @property
    def state_bytes(self) -> int:
        """Size of the state structure, in which every member begins at a multiple of its elements' size."""
        size, largest = 0, 1
        for state in self.states:
            width = np.dtype(state.value.dtype).itemsize
            size, largest = -(-size // width) * width + state.value.nbytes, max(largest, width)
        return -(-size // largest) * largest

    @property
    def scratch_types(self) -> tuple[str, ...]:
        """C types of what lies in the scratch block."""
        return tuple(sorted({C_TYPES[buffer.dtype] for buffer in self.buffers}))

    @property
    def memory_names(self) -> dict[str, str]:
        """C expression of the begin of the scratch block, by the type of the elements."""
        if self.scratch == "caller":
            return SCRATCH_MEMBERS | {"float": "memory"}
        block = f"{self.name}_scratch"
        if len(self.scratch_types) == 1:
            return {self.scratch_types[0]: block}
        return {kind: f"{block}.{member}" for kind, member in SCRATCH_MEMBERS.items()}

    @property
    def cost(self) -> int:
        """Estimated number of executed instructions of a run on the target."""
        return sum(step.cost for step in self.steps)

    @property
    def total_bytes(self) -> int:
        """Constants and scratch memory."""
        return self.weight_bytes + self.scratch_bytes

    @property
    def largest_layer_bytes(self) -> int:
        """The paper's "max memory": weights, alphas, input and output of the layer that needs most of them.

        An upper bound for a model whose weights are loaded layer by layer; here they stay in flash.
        """
        return max(step.constant_bytes + step.data_bytes for step in self.steps)

    def table(self) -> Table:
        """A row for each step: operation, kernel, cost, constants and scratch memory. ``print`` it with ``rich``."""
        return plan_table(self)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data (ready for JSON): options, sizes in bytes, a dictionary for each step and buffer."""
        return plan_data(self)

    def section(self) -> html.Section:
        """The plan as a part of a page: sizes, memory over time, kernels and costs."""
        return plan_section(self)

    def to_html(self) -> str:
        """The plan as an HTML fragment that needs nothing else, neither style nor script."""
        return html.fragment(self.section())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.to_html()

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture of the scratch memory over the steps; the suffix gives the format. Needs matplotlib."""
        draw_plan(self, path)


def workspaces(implementation: Implementation) -> tuple[Workspace, ...]:
    """The workspaces that an implementation names, each once."""
    return tuple(dict.fromkeys(a for a in _arguments(implementation) if isinstance(a, Workspace)))


def constants(implementation: Implementation) -> tuple[ir.Constant, ...]:
    """The stored arrays that an implementation names, in its structures too, each once."""
    return tuple(dict.fromkeys(a for a in _arguments(implementation) if isinstance(a, ir.Constant)))


def structs(implementation: Implementation) -> tuple[Struct, ...]:
    """The structures that an implementation names, each once."""
    return tuple(dict.fromkeys(a for a in _arguments(implementation) if isinstance(a, Struct)))


def _arguments(implementation: Implementation) -> Iterator[Argument]:
    for call in implementation.calls:
        yield from _flat(call.arguments)


def _flat(arguments: tuple[Argument, ...]) -> Iterator[Argument]:
    for argument in arguments:
        if isinstance(argument, At):
            yield argument.operand
            continue
        if isinstance(argument, Struct):
            yield from _flat(tuple(value for _, value in argument.fields))
        yield argument
