"""Reading and writing arrays in place instead of copying them: strided copies become part of what is around them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from tbn_compiler.backends.c import ir

_READS_STRIDED = (ir.Elementwise, ir.MatMul, ir.Attention)


def absorb_copies(operations: Sequence[ir.Operation], outputs: Sequence[ir.Operand]) -> list[ir.Operation]:
    """Let operations that read, or write, with strides do so on the array that a strided copy is made from, or to.

    Copies that nothing reads any more are left for the caller to remove.
    """
    return _write_strided(_read_strided(operations), outputs)


def _read_strided(operations: Sequence[ir.Operation]) -> list[ir.Operation]:
    copies: dict[ir.Operand, ir.Strided] = {}
    result: list[ir.Operation] = []
    for operation in operations:
        if isinstance(operation, ir.Strided):
            (source,) = operation.inputs
            if source in copies:
                access = compose(operation.access, copies[source].access)
                if access is not None:
                    operation = replace(operation, inputs=copies[source].inputs, access=access)
            copies[operation.output] = operation
        elif isinstance(operation, ir.Part) and operation.inputs[0] in copies:
            # Part of a copy: a copy too, to whoever reads with strides.
            copy, shape = copies[operation.inputs[0]], operation.output.shape
            access = compose(ir.Access(shape, ir.row_major(shape), operation.offset), copy.access)
            if access is not None:
                head = (operation.name, operation.layer, copy.inputs, operation.output)
                copies[operation.output] = ir.Strided(*head, access=access)
        elif isinstance(operation, _READS_STRIDED):
            inputs, accesses = list(operation.inputs), list(operation.accesses)
            for index, source in enumerate(inputs):
                access = compose(accesses[index], copies[source].access) if source in copies else None
                if access is not None:
                    inputs[index], accesses[index] = copies[source].inputs[0], access
            operation = replace(operation, inputs=tuple(inputs), accesses=tuple(accesses))  # type: ignore[arg-type]
        result.append(operation)
    return result


def compose(outer: ir.Access, inner: ir.Access) -> ir.Access | None:
    """What ``outer`` reads of a copy made by ``inner``, as an access to the copy's source; ``None`` if it is none.

    Each dimension of ``outer`` has to move along one dimension of ``inner``. Several may move along the same, as the
    heads of an attention and their features do, if together they do not leave it.
    """
    steps = ir.row_major(inner.sizes)
    # Where in the copy the first element stands, and how far back and forth the others go, by dimension.
    first, rest = [], outer.offset
    for size, step in zip(inner.sizes, steps, strict=True):
        index, rest = divmod(rest, step) if size > 1 else (0, rest)
        first.append(index)
    lowest, highest = list(first), list(first)
    strides = []
    for size, stride in zip(outer.sizes, outer.strides, strict=True):
        if size == 1 or stride == 0:
            strides.append(0)
            continue
        # The dimension with the largest step that divides the stride.
        along = next((d for d, n in enumerate(inner.sizes) if n > 1 and stride % steps[d] == 0), None)
        if along is None:
            return None
        times = stride // steps[along]
        lowest[along] += min(times, 0) * (size - 1)
        highest[along] += max(times, 0) * (size - 1)
        strides.append(times * inner.strides[along])
    if any(low < 0 or high >= size for low, high, size in zip(lowest, highest, inner.sizes, strict=True)):
        return None
    offset = inner.offset + sum(index * stride for index, stride in zip(first, inner.strides, strict=True))
    return ir.Access(outer.sizes, tuple(strides), offset)


def _write_strided(operations: Sequence[ir.Operation], outputs: Sequence[ir.Operand]) -> list[ir.Operation]:
    """A product whose result is only read by a copy in another order is written in that order."""
    reads = Counter(value for operation in operations for value in operation.inputs)
    result: list[ir.Operation] = []
    made_by: dict[ir.Operand, int] = {}
    for operation in operations:
        if isinstance(operation, ir.Strided):
            (source,) = operation.inputs
            index = made_by.get(source)
            if index is not None and reads[source] == 1 and source not in outputs:
                producer = result[index]
                assert isinstance(producer, ir.MatMul | ir.Attention)
                access = _inverse(producer.result, operation.access)
                if access is not None:
                    result[index] = replace(producer, output=operation.output, result=access)
                    continue
        if isinstance(operation, ir.MatMul | ir.Attention):
            made_by[operation.output] = len(result)
        result.append(operation)
    return result


def _inverse(written: ir.Access, read: ir.Access) -> ir.Access | None:
    """Where the elements of ``written`` stand in a copy of all of them in the order ``read``; ``None`` if not all."""
    if math.prod(written.sizes) != math.prod(read.sizes) or read.offset or not written.in_order:
        return None
    places = ir.row_major(read.sizes)
    strides = []
    for size, stride in zip(written.sizes, written.strides, strict=True):
        same = (d for d, n in enumerate(read.sizes) if n == size and read.strides[d] == stride)
        along = next(same, None)
        if size > 1 and along is None:
            return None
        strides.append(0 if along is None or size == 1 else places[along])
    return ir.Access(written.sizes, tuple(strides))
