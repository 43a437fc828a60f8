"""Recurrent layers: a loop over steps, with two products and a kernel for the gates in each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.costs import Work
from tbn_compiler.backends.c.plan import Argument, At, Call, Implementation, Index, Workspace
from tbn_compiler.backends.c.recurrence import GATES, Product, Recurrence
from tbn_compiler.backends.c.registry import Context, implement, implements
from tbn_compiler.backends.c.tiled_rows import memory_limit

_TITLES = {"gru": "GRU", "lstm": "LSTM", "rnn_tanh": "RNN with tanh", "rnn_relu": "RNN with ReLU"}


@implements(Recurrence)
def _recurrence(operation: Recurrence, context: Context) -> Implementation:
    """The state is copied, then every step reads and writes the copy; without later steps' outputs it is the result."""
    steps, batch, hidden, size = operation.steps, operation.batch, operation.hidden, operation.state
    (x, *states), output = operation.inputs, operation.output
    state: At | Workspace = Workspace("state", batch * size) if operation.all_steps else At(output)
    cell: At | Workspace = Workspace("cell", batch * hidden)
    if operation.keeps_cell:
        cell = At(output, output.size - batch * hidden)
    memories = [(state, batch * size), *([(cell, batch * hidden)] if operation.cell == "lstm" else [])]
    before = [
        Call("copy", (states[index], memory, count)) if states else Call("fill", (0.0, memory, count))
        for index, (memory, count) in enumerate(memories)
    ]
    gates = Workspace("input_gates", GATES[operation.cell] * batch * hidden)
    recurrent_gates = Workspace("state_gates", gates.size)
    features = x.size // steps
    first, by = _direction(operation, features)
    step = _calls(operation.of_input, context, At(x, first, by), gates, steps)
    input_gates: At | Workspace = gates
    of_all, made = _all_at_once(operation, context)
    if of_all is not None:
        first, by = _direction(operation, gates.size)
        before, step, input_gates = [*before, *of_all.calls], [], At(made, first, by)
    step += _calls(operation.of_state, context, state, recurrent_gates, steps)
    result = state
    if operation.all_steps:
        result = At(output, *_direction(operation, batch * size))
    wide = Workspace("result", batch * hidden)
    own = (wide, wide) if operation.projection is not None else (state, result)
    inner = (input_gates, recurrent_gates, *([cell] if operation.cell == "lstm" else []), *own, batch, hidden)
    step.append(Call(f"{operation.cell}_step", inner, repeat=steps))
    if operation.projection is not None:
        step += _calls(operation.projection, context, wide, state, steps)
        if operation.all_steps:
            step.append(Call("copy", (state, result, batch * size), repeat=steps))
    tiled = any(isinstance(layer, ir.TiledLinear) for layer in _products(operation))
    title = f"{'tiled ' if tiled else ''}{_TITLES[operation.cell]} {features // batch} -> {size}"
    title += f" by {hidden}" if operation.projection is not None else ""
    title += f", {steps} steps" if steps > 1 else ""
    title += ", backwards" if operation.reverse else ""
    products = [implement(layer, context) for layer in _products(operation)]
    rest = products if of_all is None else [of_all, *products[1:]]
    own_work = {"copy": batch * size + (batch * hidden if operation.cell == "lstm" else 0), **_work(operation)}
    done = context.implementation(title, (*before, *step), own_work)
    cost = done.cost + sum(part.cost * (1 if part is of_all else steps) for part in rest)
    choice = "; ".join(dict.fromkeys(part.choice for part in rest if part.choice))
    return replace(done, cost=cost, choice=choice, work={})


def _products(operation: Recurrence) -> Sequence[Product]:
    found = (operation.of_input, operation.of_state, operation.projection)
    return [layer for layer in found if layer is not None]


def _work(operation: Recurrence) -> Work:
    """What the gates take, in units of the functions of elements."""
    count = operation.steps * operation.batch * operation.hidden
    units = {
        "gru": {"sigmoid": 2, "tanh": 1, "multiply": 2, "add": 5},
        "lstm": {"sigmoid": 3, "tanh": 2, "multiply": 3, "add": 5},
        "rnn_tanh": {"tanh": 1, "add": 1},
        "rnn_relu": {"relu": 1, "add": 1},
    }
    return {unit: number * count for unit, number in units[operation.cell].items()}


def _direction(operation: Recurrence, size: int) -> tuple[int, int]:
    """Where the first step's elements lie in an array of all steps, and how far the next one's are."""
    return ((operation.steps - 1) * size, -size) if operation.reverse else (0, size)


# The gates of all steps at once take so much less than step by step, or they are made step by step.
_WORTHWHILE = 0.9


def _all_at_once(operation: Recurrence, context: Context) -> tuple[Implementation | None, Workspace]:
    """The product with the inputs of all steps before the first step, where that saves instructions and takes little.

    Kernels in float multiply several vectors at once; those for tiles do not.
    """
    layer, steps = operation.of_input, operation.steps
    made = Workspace("input_gates", steps * layer.output.size)
    if context.options.optimize == "size" or steps == 1 or made.nbytes > memory_limit(context.options):
        return None, made
    source, gates = layer.inputs[0], layer.output
    assert isinstance(source, ir.Value)
    x = replace(source, shape=(steps, *source.shape))
    y = replace(gates, shape=(steps, *gates.shape))
    found = implement(replace(layer, inputs=(x,), output=y), context)
    if found.cost > _WORTHWHILE * steps * implement(layer, context).cost:
        return None, made
    places: dict[ir.Operand, At] = {x: At(operation.inputs[0]), y: At(made)}
    return replace(found, calls=tuple(_placed(call, places, call.repeat) for call in found.calls)), made


def _calls(layer: Product, context: Context, source: At | Workspace, target: At | Workspace, steps: int) -> list[Call]:
    """The calls of a layer inside the loop over steps, one behind the other for the samples."""
    found = implement(layer, context).calls
    places: dict[ir.Operand, At] = {
        value: place if isinstance(place, At) else At(place)
        for value, place in zip((layer.inputs[0], layer.output), (source, target), strict=True)
    }
    return [
        _placed(call, places, steps, sample)
        for several, calls in _by_repeat(found)
        for sample in range(several)
        for call in calls
    ]


def _by_repeat(calls: Sequence[Call]) -> Iterator[tuple[int, list[Call]]]:
    """Calls that follow one another with the same number of repetitions, as the printer lets them share a loop."""
    group: list[Call] = []
    for call in calls:
        if group and group[-1].repeat != call.repeat:
            yield group[-1].repeat, group
            group = []
        group.append(call)
    yield group[-1].repeat, group


def _placed(call: Call, places: Mapping[ir.Operand, At], repeat: int, sample: int | None = None) -> Call:
    """A call on other memory: in the loop that it has, or, for one sample, in another one over steps."""

    def place(argument: Argument) -> Argument:
        if isinstance(argument, Index):
            return argument if sample is None else sample
        if not isinstance(argument, At | ir.Value | Workspace):
            return argument
        at = argument if isinstance(argument, At) else At(argument)
        offset, stride = (at.offset, at.stride) if sample is None else (at.offset + sample * at.stride, 0)
        base = places.get(at.operand, At(at.operand)) if isinstance(at.operand, ir.Value) else At(at.operand)
        return replace(at, operand=base.operand, offset=base.offset + offset, stride=base.stride + stride)

    return replace(call, arguments=tuple(map(place, call.arguments)), repeat=repeat)
