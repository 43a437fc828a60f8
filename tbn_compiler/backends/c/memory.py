"""Memory: which values share a buffer, when each one is in use, and where in the scratch block it lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tbn_compiler.backends.c import ir


@dataclass(frozen=True)
class Buffer:
    """A block of memory that is needed from step ``first`` to step ``last``, both included."""

    name: str
    nbytes: int
    first: int
    last: int
    dtype: str = "float32"

    def overlaps(self, other: Buffer) -> bool:
        """Whether both are in use at some step, so that they must not share memory."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Storage:
    """Values that share memory, one after the other in time, and parts of them.

    Attributes:
        values: the values, in the order in which they are written.
        first, last: the steps between which one of them is in use.
    """

    values: tuple[ir.Value, ...]
    first: int
    last: int


def resolve_parts(operations: Sequence[ir.Operation]) -> dict[ir.Value, tuple[ir.Operand, int]]:
    """For each value that is a part of another one: what it lies in, which is no part itself, and where."""
    parts: dict[ir.Value, tuple[ir.Operand, int]] = {}
    for operation in operations:
        if isinstance(operation, ir.Part):
            (source,) = operation.inputs
            whole, offset = parts[source] if isinstance(source, ir.Value) and source in parts else (source, 0)
            parts[operation.output] = (whole, offset + operation.offset)
    return parts


def share_storage(
    operations: Sequence[ir.Operation],
    parts: Mapping[ir.Value, tuple[ir.Operand, int]],
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
) -> list[Storage]:
    """Let an operation that may write in place do so where nothing reads its input again.

    The model's inputs belong to the caller and are never written; an output is never written over.

    Args:
        operations: the steps.
        parts: what :func:`resolve_parts` gives.
        inputs, outputs: the model's.
    """

    def whole(operand: ir.Operand) -> ir.Operand:
        return parts[operand][0] if isinstance(operand, ir.Value) and operand in parts else operand

    last_read: dict[ir.Operand, int] = {}
    for step, operation in enumerate(operations):
        last_read |= dict.fromkeys(map(whole, operation.inputs), step)
    last_read |= dict.fromkeys(outputs, len(operations))
    shared: dict[ir.Value, list[ir.Value]] = {}
    owner: dict[ir.Operand, ir.Value] = {}
    made_at = {operation.output: step for step, operation in enumerate(operations)}
    for step, operation in enumerate(operations):
        value = operation.output
        wholes = [whole(operand) for operand in operation.inputs]
        free = [
            v
            for v in operation.overwritable
            if v in owner
            and last_read[v] == step
            and isinstance(v, ir.Value)
            and (v.size, v.dtype) == (value.size, value.dtype)
            # Nothing else that the operation reads may lie there, but the same value once more.
            and wholes.count(v) == operation.inputs.count(v)
        ]
        owner[value] = owner[free[0]] if free else value
        shared.setdefault(owner[value], []).append(value)
    return [
        Storage(tuple(values), made_at[first], max(last_read[value] for value in values))
        for first, values in shared.items()
    ]


def place_buffers(buffers: Sequence[Buffer]) -> list[int]:
    """Return an offset in bytes for each buffer.

    Greedy by size: the largest buffer first, each at the lowest offset that is free during its whole life. Optimal
    placement is NP-hard; :func:`live_bytes` gives the bound to compare with, which chains of shrinking layers
    reach. Sizes that are multiples of 4 give offsets that are too.
    """
    offsets: dict[int, int] = {}
    for index in sorted(range(len(buffers)), key=lambda i: (-buffers[i].nbytes, buffers[i].first, i)):
        buffer = buffers[index]
        busy = sorted((start, start + buffers[i].nbytes) for i, start in offsets.items() if buffer.overlaps(buffers[i]))
        offset = 0
        for start, end in busy:
            if offset + buffer.nbytes <= start:
                break
            offset = max(offset, end)
        offsets[index] = offset
    return [offsets[index] for index in range(len(buffers))]


def live_bytes(buffers: Sequence[Buffer], num_steps: int) -> list[int]:
    """Bytes of all buffers in use at each step: no placement can be smaller than the largest of these."""
    return [sum(b.nbytes for b in buffers if b.first <= step <= b.last) for step in range(num_steps)]
