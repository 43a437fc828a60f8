"""What it makes of a float output that integers behind it may be a step off.

In C an integer is rounded from the exact number, in PyTorch from a float: where that is next to the middle of two
steps, they may differ by one, and so may what is rounded from it later, once for each time. What is rounded from an
input itself is the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from tbn_compiler.backends.c import ir

_Makers = Mapping[ir.Operand, ir.Operation]


def output_step(operations: Sequence[ir.Operation], output: ir.Value) -> float:
    """How much a float changes with the integers that it is computed from; 0 if none of them is rounded.

    Where a layer sums integers, that is a step of them for each time that something was rounded on the way; of integers
    that are the output itself, one step, as if they were compared. Functions and layers in float behind count as if
    they kept the size of a change.

    Args:
        operations: the program.
        output: one of its values.
    """
    makers: _Makers = {operation.output: operation for operation in operations}
    steps = [0.0]
    roundings = max(sum(getattr(operation, "output_scale", None) is not None for operation in operations), 1)
    pending, seen = [output], {output}
    while pending:
        operation = makers.get(pending.pop())
        if operation is None:
            continue
        sources = [source for source in operation.inputs if isinstance(source, ir.Value) and source not in seen]
        step = _step(operation)
        if step is None:
            seen.update(sources)
            pending += sources
        elif any(_is_rounded(source, makers) for source in sources):
            steps.append(step if isinstance(operation, ir.Dequantize) else step * roundings)
    return max(steps)


def _step(operation: ir.Operation) -> float | None:
    """What an integer more in the input adds to a result in float; ``None`` if the operation reads no integers."""
    match operation:
        case ir.Dequantize(scale=scale):
            return scale
        case ir.IntegerMean(scale=scale, output_scale=None):
            return scale / operation.axis.size
        case ir.Tiled(input_scale=float(scale), output_scale=None):
            copies = 1.0 if operation.input_alpha is None else float(np.abs(operation.input_alpha.array).sum())
            return scale * copies * float(np.abs(operation.alpha.array).max())
        case _:
            return None


def _is_rounded(value: ir.Value, makers: _Makers) -> bool:
    """Whether computed numbers were rounded on the way to an array of integers."""
    pending, seen = [value], {value}
    while pending:
        operation = makers.get(pending.pop())
        if operation is None:
            continue
        sources = [source for source in operation.inputs if isinstance(source, ir.Value)]
        if getattr(operation, "output_scale", None) is not None:
            return True
        if isinstance(operation, ir.Quantize):
            if any(_is_computed(source, makers) for source in sources):
                return True
            continue
        fresh = [source for source in sources if source not in seen]
        seen.update(fresh)
        pending += fresh
    return False


def _is_computed(value: ir.Value, makers: _Makers) -> bool:
    """Whether a float is more than an element of an input, moved."""
    operation = makers.get(value)
    while isinstance(operation, ir.Alias | ir.Strided | ir.Part):
        operation = makers.get(operation.inputs[0])
    return operation is not None
