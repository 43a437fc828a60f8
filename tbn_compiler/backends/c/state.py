"""State: inputs and outputs of a model that are one array in the caller's memory, from one run to the next.

The new value may be written over the old one only when nothing reads that any more. Where a value is made earlier, it
lies in scratch memory, and is copied at the end of the run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.memory import resolve_parts, share_storage
from tbn_compiler.errors import ExportError

StatePairs = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class State:
    """One array of the state.

    Attributes:
        before: index of the input that it is.
        after: index of the output that it becomes.
        initial: what it holds before the first run; ``None``: zeros.
    """

    before: int
    after: int
    initial: ir.Constant | None


def state_pairs(state: Any) -> StatePairs:
    """The option ``state`` as pairs of an input's name and an output's index.

    Raises:
        ExportError: it is something else, or two inputs become the same output.
    """
    if state is None:
        return ()
    if not isinstance(state, Mapping) or not all(
        isinstance(name, str) and isinstance(index, int) and not isinstance(index, bool)
        for name, index in state.items()
    ):
        raise ExportError(f"state={state!r} must be a dictionary from names of inputs to indices of outputs")
    indices = list(state.values())
    twice = next((index for index in indices if indices.count(index) > 1), None)
    if twice is not None:
        raise ExportError(f"state={state!r}: output {twice} cannot be the next value of two inputs")
    return tuple(state.items())


def find_states(graph: ir.Graph, pairs: StatePairs, initial: Mapping[str, Any] | None) -> list[State]:
    """The inputs and outputs that pairs name.

    Args:
        graph: the model.
        pairs: what :func:`state_pairs` gives.
        initial: tensors or arrays of initial values by the name of the input; ``None``: all begin with zeros.

    Raises:
        ExportError: there is no such input or output, they differ in shape or type, an initial value does not fit, or
            nothing but state would be left of the outputs.
    """
    names = [value.name for value in graph.inputs]
    initial = {} if initial is None else initial
    if not isinstance(initial, Mapping):
        raise ExportError(f"initial_state={initial!r} must be a dictionary from names of inputs to tensors")
    unknown = next((name for name in initial if name not in dict(pairs)), None)
    if unknown is not None:
        raise ExportError(f"initial_state has {unknown!r}, which state does not name")
    found = []
    for name, after in pairs:
        if name not in names:
            raise ExportError(f"state names the input {name!r}: the model's inputs are {', '.join(names)}")
        if not 0 <= after < len(graph.outputs):
            raise ExportError(f"state[{name!r}]={after}: the model has the outputs 0 to {len(graph.outputs) - 1}")
        old, new = graph.inputs[names.index(name)], graph.outputs[after]
        if (old.shape, old.dtype) != (new.shape, new.dtype):
            raise ExportError(
                f"state[{name!r}]={after}: the input is {old.dtype} {list(old.shape)} and the output {new.dtype} "
                f"{list(new.shape)}, so they cannot be one array"
            )
        found.append(State(names.index(name), after, _initial(old, initial.get(name))))
    if len(found) == len(graph.outputs):
        raise ExportError("state names all outputs: the run function would give nothing")
    return found


def _initial(value: ir.Value, given: Any) -> ir.Constant | None:
    """The stored array for an initial value; ``None`` for zeros."""
    if given is None:
        return None
    array = _array(value.name, given)
    if array.shape != value.shape:
        raise ExportError(
            f"initial_state[{value.name!r}] has the shape {list(array.shape)}, the input {list(value.shape)}"
        )
    with np.errstate(invalid="ignore", over="ignore"):
        stored = array.astype(value.dtype)
    if not np.array_equal(stored, array, equal_nan=True):
        raise ExportError(
            f"initial_state[{value.name!r}] is {array.dtype}, with elements that {value.dtype} has not: convert it to "
            f"{value.dtype}"
        )
    stored.flags.writeable = False
    return ir.Constant(f"initial {value.name}", stored) if any(stored.tobytes()) else None  # -0.0 is not zero


def _array(name: str, given: Any) -> np.ndarray:
    """An initial value as an array; of floats that NumPy has not, as float32, which holds them all."""
    try:
        tensor = torch.as_tensor(given).detach().cpu()
        narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
        array: np.ndarray = (tensor.float() if narrow else tensor).numpy()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ExportError(f"initial_state[{name!r}] is no tensor: {error}") from error
    if array.dtype.kind == "c":
        raise ExportError(f"initial_state[{name!r}] is {array.dtype}: state holds real numbers")
    return array


def write_last(
    operations: Sequence[ir.Operation], outputs: Sequence[ir.Value], inputs: Sequence[ir.Value], states: Sequence[State]
) -> tuple[list[ir.Operation], list[ir.Value]]:
    """Copy the new values at the end that are made while something still reads the old ones.

    Copies that there are already are put in an order in which they overwrite nothing that a later one reads, if there
    is one.

    Args:
        operations: what :func:`~tbn_compiler.backends.c.fuse.simplify` gives.
        outputs: the value of each output, which nothing else shares.
        inputs: the model's.
        states: which of them are state.

    Returns:
        The operations and the outputs, whose storages may now be those of the state.
    """
    result, values = list(operations), list(outputs)
    for index, state in enumerate(states):
        if not _is_safe(result, values, inputs, state):
            made = values[state.after]
            later = _copied_later(result, made)
            if all(_is_safe(later, values, inputs, other) for other in states[: index + 1]):
                result = later
                continue
            values[state.after] = ir.Value(f"{made.name}_next", made.shape, made.dtype)
            name = values[state.after].name
            result.append(ir.Copy(name, inputs[state.before].name, (made,), values[state.after]))
    return result, values


def _copied_later(operations: Sequence[ir.Operation], made: ir.Value) -> list[ir.Operation]:
    """The operations with the copy that makes a value at the end; as they are if it is none."""
    copies = [operation for operation in operations if operation.output == made and isinstance(operation, ir.Copy)]
    return [*(operation for operation in operations if operation not in copies), *copies]


def _is_safe(
    operations: Sequence[ir.Operation], outputs: Sequence[ir.Value], inputs: Sequence[ir.Value], state: State
) -> bool:
    """Whether nothing reads the old value once the memory of the new one is written, or what reads it may write there.

    The new value's memory may hold other values before it.
    """
    parts = resolve_parts(operations)
    steps = [operation for operation in operations if not isinstance(operation, ir.Part)]
    storages = share_storage(steps, parts, inputs, outputs)
    first = next(storage.first for storage in storages if outputs[state.after] in storage.values)
    old = inputs[state.before]
    reads = [
        [parts[x][0] if isinstance(x, ir.Value) and x in parts else x for x in operation.inputs].count(old)
        for operation in steps
    ]
    if any(reads[first + 1 :]):
        return False
    writer = steps[first]
    in_place = old in writer.overwritable or isinstance(writer, ir.Copy)  # which is left out
    same = (writer.output.size, writer.output.dtype) == (old.size, old.dtype)
    return not reads[first] or (in_place and same and reads[first] == writer.inputs.count(old))
