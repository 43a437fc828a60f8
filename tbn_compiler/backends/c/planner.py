"""Planning: from the graph to a :class:`~tbn_compiler.backends.c.plan.Plan`.

1. :mod:`~tbn_compiler.backends.c.fuse` rewrites the graph.
2. Every operation gets its kernels (:mod:`~tbn_compiler.backends.c.kernels`), which name what they need: values,
   constants, structures, working memory.
3. Every value and workspace gets memory: a parameter of the run function, the state in the caller's memory, or a buffer
   in one scratch block.
4. Everything gets a name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar, get_args

from tbn_compiler.backends.c import ir, kernels
from tbn_compiler.backends.c.element_instances import typed
from tbn_compiler.backends.c.emit import local_names, made_up_names, template_names
from tbn_compiler.backends.c.fuse import simplify
from tbn_compiler.backends.c.memory import (
    Buffer,
    embed_joined,
    end_of,
    lifetimes,
    live_bytes,
    place_buffers,
    resolve_parts,
    share_storage,
)
from tbn_compiler.backends.c.names import KEYWORDS, SymbolTable
from tbn_compiler.backends.c.number_formats import give_int8, number_formats, take_int8
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.plan import (
    At,
    Call,
    Implementation,
    Plan,
    PlannedBuffer,
    PlannedConstant,
    PlannedState,
    Port,
    Step,
    Struct,
    Workspace,
    constants,
    structs,
    workspaces,
)
from tbn_compiler.backends.c.registry import Context, implement
from tbn_compiler.backends.c.rounding import output_step
from tbn_compiler.backends.c.state import find_states, write_last

# Parameters and counters that the printer makes up; templates hold the other names.
_LOCAL_NAMES = ("input", "output", "memory", "integers", "bytes", "octets", "i", "j")

# Kernels that copy their first argument to the second one.
_COPIES = frozenset(typed("copy", dtype) for dtype in get_args(ir.DType))

assert kernels  # imported so that the implementations are registered


def build_plan(graph: ir.Graph, options: Options, initial_state: Mapping[str, Any] | None = None) -> Plan:
    """Plan the program for a graph.

    Args:
        graph: the model.
        options: what the user chose.
        initial_state: what the state holds before the first run, by the name of the input; the rest is zeros.
    """
    states = find_states(graph, options.state, initial_state)
    before, after = [state.before for state in states], [state.after for state in states]
    graph = take_int8(graph, before) if options.int8_inputs else graph
    graph = give_int8(graph, after) if options.int8_outputs else graph
    simplified, results = simplify(graph)
    simplified, results = write_last(simplified, results, graph.inputs, states)
    formats = number_formats(graph)
    parts = resolve_parts(simplified)
    operations = [operation for operation in simplified if not isinstance(operation, ir.Part)]
    context = Context(options)
    implementations = [_with_notes(operation, implement(operation, context)) for operation in operations]
    # Constants are named first, so that no buffer of the run function hides one.
    symbols = SymbolTable(template_names(), made_up_names())
    arrays = [c for implementation in implementations for c in constants(implementation)]
    arrays += [state.initial for state in states if state.initial is not None]
    stored = _name({array: array.name for array in arrays}, symbols)
    described = _name({s: s.name for implementation in implementations for s in structs(implementation)}, symbols)
    constant_names = (f"{options.name}_{symbol}" for symbol in symbols.taken)
    names = SymbolTable((*_LOCAL_NAMES, *local_names(), *KEYWORDS, *constant_names, *(["state"] if states else [])))
    given = {value.name: value for index, value in enumerate(graph.inputs) if index not in before}
    made = {f"out{index}": value for index, value in enumerate(results) if index not in after}
    inputs = _ports(list(given.values()), "input", list(given), names)
    outputs = _ports(list(made.values()), "output", list(made), names)
    members = _name({graph.inputs[index]: graph.inputs[index].name for index in before}, SymbolTable(KEYWORDS))
    old = tuple(Port(f"state->{name}", value) for value, name in members.items())
    new = tuple(Port(f"state->{name}", results[index]) for name, index in zip(members.values(), after, strict=True))
    memory = _Memory(operations, parts, implementations, (*inputs, *old), (*outputs, *new), names, new)
    buffers, offsets = memory.buffers, place_buffers(memory.buffers)
    live = live_bytes(buffers, len(operations))
    peak = max(range(len(operations)), key=live.__getitem__)
    pointers = memory.pointers | {constant: f"{options.name}_{symbol}" for constant, symbol in stored.items()}
    return Plan(
        options=options,
        inputs=tuple(
            replace(port, format=form) for port, form in zip(inputs, _without(formats[0], before), strict=True)
        ),
        outputs=tuple(
            Port(
                port.name,
                ir.Value(port.value.name, value.shape, port.value.dtype),
                form,
                output_step(operations, result) if port.value.dtype == "float32" else 0.0,
            )
            for port, value, form, result in zip(
                outputs,
                _without(graph.outputs, after),
                _without(formats[1], after),
                _without(results, after),
                strict=True,
            )
        ),
        states=tuple(
            PlannedState(name, value, state.before, state.after, _symbol(stored, state.initial))
            for state, (value, name) in zip(states, members.items(), strict=True)
        ),
        steps=tuple(
            Step(
                node=operation.name,
                layer=operation.layer,
                inputs=tuple(pointers[value] for value in operation.inputs),
                output=pointers[operation.output],
                shape=operation.output.shape,
                constant_bytes=sum(constant.array.nbytes for constant in constants(implementation)),
                data_bytes=sum(v.nbytes for v in {*operation.inputs, operation.output} if isinstance(v, ir.Value)),
                implementation=memory.without_copies(index, operation, implementation),
                workspace=tuple(pointers[index, space] for space in workspaces(implementation)),
            )
            for index, (operation, implementation) in enumerate(zip(operations, implementations, strict=True))
        ),
        constants=tuple(PlannedConstant(symbol, constant) for constant, symbol in stored.items()),
        structs=tuple((symbol, struct) for struct, symbol in described.items()),
        buffers=tuple(
            PlannedBuffer(buffer.name, buffer.nbytes, offset, buffer.first, buffer.last, buffer.dtype)
            for buffer, offset in zip(buffers, offsets, strict=True)
        ),
        pointers=pointers,
        scratch_bytes=end_of(buffers, offsets),
        weight_bytes=sum(constant.array.nbytes for constant in stored),
        live_bytes=tuple(live),
        peak_step=operations[peak].name if live[peak] else None,
    )


def _with_notes(operation: ir.Operation, implementation: Implementation) -> Implementation:
    """The implementation with a word on weights that are stored larger than their tiles."""
    stored = _stored(operation)
    notes = tuple(
        f"{value.name} is stored decoded, in {value.array.nbytes:,} bytes where its tile has {value.tile_bytes:,}: "
        "this operation has no kernel on tiles"
        for value in dict.fromkeys(stored)
        if value.tile_bytes is not None
    )
    return replace(implementation, notes=notes)


def _stored(operation: ir.Operation) -> Iterator[ir.Constant]:
    """The stored arrays of an operation, and of those inside it."""
    for value in (*operation.inputs, *vars(operation).values()):
        if isinstance(value, ir.Operation):
            yield from _stored(value)
        elif isinstance(value, ir.Constant):
            yield value


_Named = TypeVar("_Named", ir.Constant, ir.Value, Struct)
_Item = TypeVar("_Item")


def _symbol(stored: Mapping[ir.Constant, str], constant: ir.Constant | None) -> str | None:
    return None if constant is None else stored[constant]


def _without(items: Sequence[_Item], indices: Sequence[int]) -> list[_Item]:
    """The items with other indices."""
    return [item for index, item in enumerate(items) if index not in indices]


def _name(names: dict[_Named, str], symbols: SymbolTable) -> dict[_Named, str]:
    """Give each array or structure a symbol like its name."""
    return {item: symbols.unique(name) for item, name in names.items()}


def _ports(values: Sequence[ir.Value], only: str, names: Sequence[str], symbols: SymbolTable) -> tuple[Port, ...]:
    """Name the parameters: ``only`` if there is one, else ``names``."""
    if len(values) == 1:
        return (Port(only, values[0]),)
    ports: list[Port] = []
    for name, value in zip(names, values, strict=True):
        symbol = symbols.unique(name)
        while symbol.upper() in {port.name.upper() for port in ports}:  # macros are in capitals
            symbol = symbols.unique(name)
        ports.append(Port(symbol, value))
    return tuple(ports)


def _plus(pointer: str, offset: int) -> str:
    return f"{pointer} + {offset}" if offset else pointer


class _Memory:
    """Buffers for what is not a parameter, and the C name of all memory.

    Attributes:
        buffers: contents of the scratch block, not placed yet.
        pointers: C name of every value, and of every workspace by step.
    """

    def __init__(
        self,
        operations: Sequence[ir.Operation],
        parts: Mapping[ir.Value, tuple[ir.Operand, int]],
        implementations: Sequence[Implementation],
        inputs: Sequence[Port],
        outputs: Sequence[Port],
        names: SymbolTable,
        states: Sequence[Port] = (),
    ) -> None:
        self.buffers: list[Buffer] = []
        self.pointers: dict[ir.Operand | tuple[int, Workspace], str] = {port.value: port.name for port in inputs}
        self._names = names
        given, made = ([port.value for port in ports] for ports in (inputs, outputs))
        storages = share_storage(operations, parts, given, made)
        # What still holds the old state is not written early.
        self._embeddings = embed_joined(operations, storages, made, [port.value for port in states])
        inside = {embedding.inner: embedding for embedding in self._embeddings}
        spans = lifetimes(storages, self._embeddings)
        parameters = {port.value: port.name for port in outputs}
        # What lies inside another storage comes after it, as a join comes after what it joins.
        for index in sorted(range(len(storages)), key=lambda i: (i in inside, -inside[i].step if i in inside else i)):
            storage = storages[index]
            if index in inside:
                outer = storages[inside[index].outer].values[0]
                place = _plus(self.pointers[outer], inside[index].offset)
            else:
                place = next((parameters[value] for value in storage.values if value in parameters), "")
            if not place:
                operation, value = operations[storage.first], storage.values[0]
                suffix = "sums" if isinstance(operation, ir.SumNeighbours) else "out"
                place = self._buffer(f"{operation.layer}_{suffix}", value.storage_bytes, *spans[index], value.dtype)
            self.pointers |= dict.fromkeys(storage.values, place)
        self.pointers |= {value: _plus(self.pointers[whole], offset) for value, (whole, offset) in parts.items()}
        for index, (operation, implementation) in enumerate(zip(operations, implementations, strict=True)):
            for space in workspaces(implementation):
                name = f"{operation.layer}_{space.name}"
                self.pointers[index, space] = self._buffer(name, space.nbytes, index, index, space.dtype)

    def without_copies(self, step: int, operation: ir.Operation, implementation: Implementation) -> Implementation:
        """An implementation without copies of what lies there already."""
        calls = tuple(call for call in implementation.calls if not self._stays(call))
        return self._without_joined(step, operation, replace(implementation, calls=calls))

    def _stays(self, call: Call) -> bool:
        """Whether a call copies an array to itself."""
        if call.kernel not in _COPIES:
            return False
        arguments = (
            place.operand if isinstance(place, At) and place == At(place.operand) else place
            for place in call.arguments[:2]
        )
        places = [self.pointers[value] for value in arguments if isinstance(value, ir.Value)]
        return len(places) == 2 and places[0] == places[1]

    def _without_joined(self, step: int, operation: ir.Operation, implementation: Implementation) -> Implementation:
        """A join without the copies of what lies in its result already."""
        there = {embedding.offset for embedding in self._embeddings if embedding.step == step}
        if not there:
            return implementation
        skipped = {At(operation.output, offset) for offset in there}
        calls = tuple(call for call in implementation.calls if not skipped.intersection(call.arguments))
        choice = f"{len(there)} of {len(operation.inputs)} inputs lie in the result already"
        return replace(implementation, calls=calls, choice=choice)

    def _buffer(self, name: str, nbytes: int, first: int, last: int, dtype: str) -> str:
        symbol = self._names.unique(name)
        self.buffers.append(Buffer(symbol, nbytes, first, last, dtype))
        return symbol
