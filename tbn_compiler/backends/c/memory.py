"""Memory: which values share a buffer, when each one is in use, and where in the scratch block it lies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        inputs: the model's.
        outputs: the model's.
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


@dataclass(frozen=True)
class Embedding:
    """A storage that lies inside another one, so that joining them copies nothing.

    Attributes:
        inner, outer: indices of the storages.
        offset: elements from the begin of ``outer``.
        step: the step that joins them.
    """

    inner: int
    outer: int
    offset: int
    step: int


def embed_joined(
    operations: Sequence[ir.Operation],
    storages: Sequence[Storage],
    outputs: Sequence[ir.Value],
    in_use: Sequence[ir.Value] = (),
) -> list[Embedding]:
    """Let values that are only joined be written where the join puts them, as far as scratch memory does not grow.

    That needs parts of the result without gaps. Embedding makes the result's memory live from the first part on, which
    it must not where that memory is ``in_use`` before.
    """
    home = {value: index for index, storage in enumerate(storages) for value in storage.values}
    fixed = {home[value] for value in outputs}
    occupied = {home[value] for value in in_use}
    chosen: list[Embedding] = []
    bytes_before = _scratch_bytes(storages, chosen, fixed)
    for step, operation in enumerate(operations):
        if not isinstance(operation, ir.Concat) or operation.outer != 1:
            continue
        if home[operation.output] in occupied:
            continue
        candidates, offset, taken = [], 0, fixed | {embedding.inner for embedding in chosen}
        outer = home[operation.output]
        for value, block in zip(operation.inputs, operation.blocks, strict=True):
            index = home.get(value) if isinstance(value, ir.Value) else None
            # Read elsewhere after the join, it would be lost when something is written over the result.
            kept = index is not None and (storages[index].last <= step or len(storages[outer].values) == 1)
            if index is not None and kept and index not in taken and storages[index].values[-1] == value:
                candidates.append(Embedding(index, outer, offset, step))
                taken = taken | {index}
            offset += block
        for candidate in candidates:
            total = _scratch_bytes(storages, [*chosen, candidate], fixed)
            if total <= bytes_before:
                chosen.append(candidate)
                bytes_before = total
    return chosen


def lifetimes(storages: Sequence[Storage], embeddings: Sequence[Embedding]) -> list[tuple[int, int]]:
    """First and last step of each storage, with what lies inside it."""
    spans = [(storage.first, storage.last) for storage in storages]
    for embedding in embeddings:  # a join comes after the joins of its parts
        (first, last), (inner_first, inner_last) = spans[embedding.outer], spans[embedding.inner]
        spans[embedding.outer] = (min(first, inner_first), max(last, inner_last))
    return spans


def _scratch_bytes(storages: Sequence[Storage], embeddings: Sequence[Embedding], parameters: set[int]) -> int:
    """Scratch memory of storages, without those that are parameters of the run function."""
    inside = parameters | {embedding.inner for embedding in embeddings}
    spans = lifetimes(storages, embeddings)
    buffers = [
        Buffer("", storage.values[0].storage_bytes, *spans[index])
        for index, storage in enumerate(storages)
        if index not in inside
    ]
    return end_of(buffers, place_buffers(buffers))


def place_buffers(buffers: Sequence[Buffer]) -> list[int]:
    """Return an offset in bytes for each buffer.

    Optimal placement is NP-hard. Buffers are placed one after the other, each at the lowest offset that is free during
    its whole life, in several orders; exchanges of two neighbours in the best order follow. It ends as soon as the
    result is as small as the bytes in use at some step (:func:`live_bytes`), which nothing can undercut. Sizes that are
    multiples of 4 give offsets that are too.
    """
    if not buffers:
        return []
    bound = max(live_bytes(buffers, 1 + max(buffer.last for buffer in buffers)))
    indices = range(len(buffers))
    keys: list[Callable[[int], tuple[int, ...]]] = [
        lambda i: (-buffers[i].nbytes, buffers[i].first, i),
        lambda i: (-buffers[i].nbytes * (buffers[i].last - buffers[i].first + 1), i),
        lambda i: (buffers[i].first - buffers[i].last, -buffers[i].nbytes, i),
        lambda i: (buffers[i].first, -buffers[i].nbytes, i),
        lambda i: (-buffers[i].last, -buffers[i].nbytes, i),
    ]
    best_order: list[int] = []
    best: list[int] = []
    for key in keys:
        order = sorted(indices, key=key)
        offsets = _place_in_order(buffers, order)
        if not best or end_of(buffers, offsets) < end_of(buffers, best):
            best, best_order = offsets, order
        if end_of(buffers, best) == bound:
            return best
    for first in range(min(len(buffers) - 1, _MAX_EXCHANGES)):
        order = list(best_order)
        order[first], order[first + 1] = order[first + 1], order[first]
        offsets = _place_in_order(buffers, order)
        if end_of(buffers, offsets) < end_of(buffers, best):
            best, best_order = offsets, order
    return best


_MAX_EXCHANGES = 100


def _place_in_order(buffers: Sequence[Buffer], order: Sequence[int]) -> list[int]:
    offsets: dict[int, int] = {}
    for index in order:
        buffer = buffers[index]
        busy = sorted((start, start + buffers[i].nbytes) for i, start in offsets.items() if buffer.overlaps(buffers[i]))
        offset = 0
        for start, end in busy:
            if offset + buffer.nbytes <= start:
                break
            offset = max(offset, end)
        offsets[index] = offset
    return [offsets[index] for index in range(len(buffers))]


def end_of(buffers: Sequence[Buffer], offsets: Sequence[int]) -> int:
    """Size of the block that holds buffers at these offsets."""
    return max((offset + b.nbytes for b, offset in zip(buffers, offsets, strict=True)), default=0)


def live_bytes(buffers: Sequence[Buffer], num_steps: int) -> list[int]:
    """Bytes of all buffers in use at each step: no placement can be smaller than the largest of these."""
    return [sum(b.nbytes for b in buffers if b.first <= step <= b.last) for step in range(num_steps)]
