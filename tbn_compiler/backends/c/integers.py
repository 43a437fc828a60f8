"""Keep activations that are quantised as int8 in memory, and compute with integers as far as kernels do.

What is imported says where values are brought to int8 (``Quantize``) and taken as floats again (``Dequantize``)::

    conv -> Quantize(s) -> conv'          conv' reads int8; conv writes int8 itself if nothing else reads its result
    add(Dequantize(a), Dequantize(b)) -> Quantize(s)        a sum of integers with two scales; so is a product
    max_pool(Dequantize(a))               Dequantize(max_pool(a)): what moves elements moves int8
    Quantize(s) . max_pool                max_pool . Quantize(s), where that is next to a producer
    Quantize(f(Dequantize(a)))            a table of 256 results
    Quantize(f(Convert(bytes)))           the same: what a model makes of the pixels of a camera

All of these give the same integers as the operations one by one, but for sums, products, means and layers, whose scales
are numbers in fixed point: those round once, where the float form rounds each product and sum.

Each rule looks at one operation and returns what stands in its place.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tbn_compiler.backends.c import ir, tables
from tbn_compiler.backends.c.geometry import inside
from tbn_compiler.backends.c.tiled_int8 import why_float

_LIMITS = (-ir.INT8_LIMIT, ir.INT8_LIMIT)


@dataclass(frozen=True)
class _Change:
    """Operations that disappear, and what stands in the place of the last one of them.

    Attributes:
        removed: they, the one that a rule was asked about last.
        added: in order.
        renamed: values that others stand for.
    """

    removed: tuple[ir.Operation, ...]
    added: tuple[ir.Operation, ...] = ()
    renamed: tuple[tuple[ir.Operand, ir.Operand], ...] = ()


class _View:
    """Who makes and who reads a value."""

    def __init__(self, operations: Sequence[ir.Operation], outputs: Iterable[ir.Operand]) -> None:
        self.outputs = set(outputs)
        self.names = {value.name for operation in operations for value in (*operation.inputs, operation.output)}
        self.maker: dict[ir.Operand, ir.Operation] = {operation.output: operation for operation in operations}
        self.readers: dict[ir.Operand, list[ir.Operation]] = defaultdict(list)
        for operation in operations:
            for value in dict.fromkeys(operation.inputs):
                self.readers[value].append(operation)

    def integer_value(self, value: ir.Value) -> ir.Value:
        """A value like another one, of int8, with a name that no value has."""
        name = f"{value.name}_int8"
        while name in self.names:
            name += "_"
        self.names.add(name)
        return ir.Value(name, value.shape, "int8")

    def only_reader(self, value: ir.Operand) -> bool:
        """Whether one operation reads a value, and no output is it."""
        return len(self.readers[value]) == 1 and value not in self.outputs

    def integers(self, value: ir.Operand) -> ir.Dequantize | None:
        """The operation that takes a value from int8, if one does."""
        found = self.maker.get(value)
        return found if isinstance(found, ir.Dequantize) else None


_Rule = Callable[[ir.Operation, _View], _Change | None]


def keep_integers(
    operations: Sequence[ir.Operation], outputs: Sequence[ir.Operand]
) -> tuple[list[ir.Operation], list[ir.Operand]]:
    """Apply the rules until none changes anything.

    Returns:
        The operations, with such that nothing reads any more, and the value of each output.
    """
    current, results = _as_kernels_can(operations), list(outputs)
    if not any(isinstance(operation, ir.Quantize | ir.Dequantize) for operation in current):
        return current, results
    changed = True
    while changed:
        changed = False
        for rule in _RULES:
            view, index = _View(current, results), 0
            while index < len(current):
                change = rule(current[index], view)
                if change is not None:
                    current, results = _apply(current, results, change)
                    view, changed = _View(current, results), True
                    index = max(index - len(change.removed), -1)
                index += 1
        current = _read(current, results)
    return current, results


def _apply(
    operations: list[ir.Operation], outputs: list[ir.Operand], change: _Change
) -> tuple[list[ir.Operation], list[ir.Operand]]:
    names = dict(change.renamed)
    result: list[ir.Operation] = []
    for operation in operations:
        if operation is change.removed[-1]:
            result += change.added
        if any(operation is other for other in change.removed):
            continue
        if names and not names.keys().isdisjoint(operation.inputs):
            operation = replace(operation, inputs=tuple(names.get(value, value) for value in operation.inputs))
        result.append(operation)
    return result, [names.get(value, value) for value in outputs]


def _read(operations: Sequence[ir.Operation], outputs: Iterable[ir.Operand]) -> list[ir.Operation]:
    """The operations that outputs depend on."""
    needed = set(outputs)
    for operation in reversed(operations):
        if operation.output in needed:
            needed.update(operation.inputs)
    return [operation for operation in operations if operation.output in needed]


def _as_kernels_can(operations: Sequence[ir.Operation]) -> list[ir.Operation]:
    """Layers on integers that have no integer kernel take the same numbers as floats."""
    result: list[ir.Operation] = []
    for operation in operations:
        if isinstance(operation, ir.Tiled) and operation.input_scale is not None and why_float(operation) is not None:
            (source,) = operation.inputs
            floats = ir.Value(f"{operation.name}_floats", source.shape)
            result.append(ir.Dequantize(floats.name, operation.layer, (source,), floats, operation.input_scale))
            operation = replace(operation, inputs=(floats,), input_scale=None)
        result.append(operation)
    return result


def _quantize_once(operation: ir.Operation, view: _View) -> _Change | None:
    """A value is brought to the same format once."""
    if not isinstance(operation, ir.Quantize):
        return None
    for other in view.readers[operation.inputs[0]]:
        if other is operation:
            return None
        if isinstance(other, ir.Quantize) and (other.scale, other.limits) == (operation.scale, operation.limits):
            return _Change((operation,), renamed=((operation.output, other.output),))
    return None


def _stay_integers(operation: ir.Operation, view: _View) -> _Change | None:
    """``Quantize(Dequantize(a))`` with the same scale is ``a``."""
    if isinstance(operation, ir.Quantize) and operation.limits == _LIMITS:
        source = view.integers(operation.inputs[0])
        if source is not None and source.scale == operation.scale:
            return _Change((operation,), renamed=((operation.output, source.inputs[0]),))
    return None


def _fold_limits(operation: ir.Operation, view: _View) -> _Change | None:
    """``Quantize(clamp(x))`` is ``Quantize(x)`` within limits: rounding keeps the order of numbers."""
    if not isinstance(operation, ir.Quantize):
        return None
    before = view.maker.get(operation.inputs[0])
    if not isinstance(before, ir.Unary) or not view.only_reader(before.output):
        return None
    bounds = _bounds(before)
    if bounds is None:
        return None
    low, high = (_rounded(bound, operation.scale) for bound in bounds)
    limits = (max(operation.limits[0], low), min(operation.limits[1], high))
    if limits[0] > limits[1]:
        return None
    return _Change((before, operation), (replace(operation, inputs=before.inputs, limits=limits),))


def _bounds(operation: ir.Unary) -> tuple[float, float] | None:
    match operation.function, operation.parameters:
        case "relu", ():
            return 0.0, np.inf
        case "clamp", (low, high):
            return low, high
        case "maximum_scalar", (low,):
            return low, np.inf
        case "minimum_scalar", (high,):
            return -np.inf, high
    return None


def _rounded(x: float, scale: float) -> int:
    """What ``Quantize`` makes of a number."""
    value = np.float32(x) * (np.float32(1) / np.float32(scale))
    return int(np.clip(np.rint(value), *_LIMITS))


def _write_integers(operation: ir.Operation, view: _View) -> _Change | None:
    """A layer on integers whose result is only quantised writes integers."""
    if not isinstance(operation, ir.Quantize):
        return None
    before = view.maker.get(operation.inputs[0])
    if not isinstance(before, ir.TiledLinear | ir.TiledConv) or before.input_scale is None:
        return None
    if before.output_scale is not None or not view.only_reader(before.output):
        return None
    limits = (max(operation.limits[0], 0), operation.limits[1]) if before.relu else operation.limits
    written = {"output": operation.output, "output_scale": operation.scale, "limits": limits, "relu": False}
    return _Change((before, operation), (replace(before, **written),))  # type: ignore[arg-type]


def _move_integers(operation: ir.Operation, view: _View) -> _Change | None:
    """What only moves elements, or takes the largest, moves int8."""
    if not _moves(operation):
        return None
    sources = [view.integers(value) for value in operation.inputs]
    scales = {source.scale for source in sources if source is not None}
    if None in sources or len(scales) != 1:
        return None
    moved = view.integer_value(operation.output)
    inputs = tuple(source.inputs[0] for source in sources if source is not None)
    mover = replace(operation, name=moved.name, inputs=inputs, output=moved)
    back = ir.Dequantize(operation.name, operation.layer, (moved,), operation.output, scales.pop())
    return _Change((operation,), (mover, back))


def _moves(operation: ir.Operation) -> bool:
    if operation.output.dtype != "float32":
        return False
    match operation:
        case ir.Strided() | ir.Part() | ir.Concat():
            return True
        case ir.Pad():
            return operation.value == 0
        case ir.Pool():
            # A window in the padding alone has no largest element: that is minus infinity, which int8 does not hold.
            alone = 0 in (*inside(operation.window, 0), *inside(operation.window, 1))
            return operation.function == "max_pool" and not alone
    return False


def _quantize_early(operation: ir.Operation, view: _View) -> _Change | None:
    """``Quantize`` of what was moved, or of the largest, is that of the quantised."""
    if not isinstance(operation, ir.Quantize):
        return None
    before = view.maker.get(operation.inputs[0])
    if before is None or not _moves(before) or not view.only_reader(before.output):
        return None
    sources = list(dict.fromkeys(before.inputs))
    if not all(isinstance(value, ir.Value) and value in view.maker and view.only_reader(value) for value in sources):
        return None
    if isinstance(before, ir.Pad) and not operation.limits[0] <= 0 <= operation.limits[1]:
        return None  # the limits hold for the padding too
    quantised = {value: view.integer_value(value) for value in sources if isinstance(value, ir.Value)}
    early = tuple(
        replace(operation, name=integers.name, inputs=(value,), output=integers)
        for value, integers in quantised.items()
    )
    mover = replace(before, inputs=tuple(quantised[value] for value in before.inputs), output=operation.output)  # type: ignore[index]
    return _Change((before, operation), (*early, mover))


def _sum_integers(operation: ir.Operation, view: _View) -> _Change | None:
    """A sum of integers that is only quantised."""
    if not isinstance(operation, ir.Quantize):
        return None
    before = view.maker.get(operation.inputs[0])
    if not isinstance(before, ir.Binary) or before.function != "add" or not view.only_reader(before.output):
        return None
    size = before.output.size
    sources = [view.integers(value) for value in before.inputs]
    in_order = all(access.in_order and not access.offset for access in before.accesses)
    if not in_order or any(source is None or source.output.size != size for source in sources):
        return None
    a, b = (source for source in sources if source is not None)
    inputs = (a.inputs[0], b.inputs[0])
    total = ir.RescaledSum(
        before.name, before.layer, inputs, operation.output, (a.scale, b.scale), operation.scale, operation.limits
    )
    return _Change((before, operation), (total,))


def _multiply_integers(operation: ir.Operation, view: _View) -> _Change | None:
    """A product of integers that is only quantised: of equal sizes, or of each image with a number of its own."""
    if not isinstance(operation, ir.Quantize):
        return None
    before = view.maker.get(operation.inputs[0])
    if not isinstance(before, ir.Binary) or before.function != "multiply" or not view.only_reader(before.output):
        return None
    sources = [view.integers(value) for value in before.inputs]
    pairs = sorted(zip(sources, before.accesses, strict=True), key=lambda pair: -pair[0].output.size if pair[0] else 0)
    (large, whole), (small, repeated) = pairs
    if large is None or small is None or large.output.size != before.output.size:
        return None
    # The last dimensions are those in which a number stays the same.
    last = len(repeated.sizes)
    while last and (repeated.sizes[last - 1] == 1 or repeated.strides[last - 1] == 0):
        last -= 1
    kept, inner = ir.Access(repeated.sizes[:last], repeated.strides[:last]), math.prod(repeated.sizes[last:])
    in_order = whole.in_order and kept.in_order and not whole.offset and not repeated.offset
    if not in_order or small.output.size * inner != before.output.size:
        return None
    head = (before.name, before.layer, (large.inputs[0], small.inputs[0]), operation.output)
    product = ir.IntegerProduct(*head, inner, large.scale * small.scale, operation.scale, operation.limits)
    return _Change((before, operation), (product,))


def _average_integers(operation: ir.Operation, view: _View) -> _Change | None:
    """The mean of integers, and what quantises it."""
    if isinstance(operation, ir.Quantize):
        before = view.maker.get(operation.inputs[0])
        if not isinstance(before, ir.IntegerMean) or not view.only_reader(before.output):
            return None
        if before.output_scale is not None:
            return None
        mean = replace(before, output=operation.output, output_scale=operation.scale, limits=operation.limits)
        return _Change((before, operation), (mean,))
    axis = _averaged(operation)
    source = view.integers(operation.inputs[0]) if axis is not None else None
    if axis is None or source is None or ir.INT8_LIMIT * axis.size >= 2**31:
        return None
    mean = ir.IntegerMean(operation.name, operation.layer, source.inputs, operation.output, axis, source.scale)
    return _Change((operation,), (mean,))


def _averaged(operation: ir.Operation) -> ir.Axis | None:
    """What an operation takes the mean of, if it is an axis, or whole images."""
    match operation:
        case ir.Reduce(function="mean"):
            return operation.axis
        case ir.Pool(function="avg_pool", divisor=0) if operation.window.padding == (0, 0):
            window = operation.window
            if window.kernel == window.input and window.output == (1, 1):
                return ir.Axis(operation.planes, window.input_size, 1)
        case ir.Resample(function="adaptive_avg_pool", output_size=(1, 1)):
            height, width = operation.input_size
            return ir.Axis(operation.planes, height * width, 1)
    return None


def _look_up(operation: ir.Operation, view: _View) -> _Change | None:
    """A function of integers that gives integers has 256 results; so has a change of the scale."""
    if not isinstance(operation, ir.Quantize):
        return None
    chain: list[ir.Operation] = []
    functions: list[tables.Function] = []
    value = operation.inputs[0]
    while (source := view.maker.get(value)) is not None and (numbers := tables.numbers_of(source)) is None:
        computed = [operand for operand in source.inputs if isinstance(operand, ir.Value)]
        function = tables.function_of(source, computed[0]) if len(computed) == 1 else None
        if function is None or not view.only_reader(value):
            return None
        chain.insert(0, source)
        functions.insert(0, function)
        (value,) = computed
    fits, axis = tables.common_axis(functions)
    if source is None or numbers is None or not fits:
        return None
    results = tables.quantized(numbers, functions, operation.scale, operation.limits)
    table = ir.Constant(f"{operation.name}_table", results)
    sizes, dim = ((operation.output.size,), None) if axis is None else ((axis.outer, axis.size, axis.inner), 1)
    title = _title(source, chain, operation)
    head = (operation.name, operation.layer, source.inputs, operation.output)
    return _Change((*chain, operation), (ir.Lookup(*head, table, title, ir.Access.whole(sizes), dim),))


def _title(source: ir.Operation, chain: Sequence[ir.Operation], result: ir.Quantize) -> str:
    """What a table computes."""
    if isinstance(source, ir.Convert):
        return f"bytes to steps of {result.scale:.3g}"
    names = [getattr(step, "function", "scale and shift").removesuffix("_scalar") for step in chain]
    assert isinstance(source, ir.Dequantize)
    return ", ".join(names) or f"steps of {source.scale:.3g} to {result.scale:.3g}"


def _look_up_moved(operation: ir.Operation, view: _View) -> _Change | None:
    """A table reads elements where they are, rather than from a copy in another order; or writes them in that order."""
    before = view.maker.get(operation.inputs[0]) if isinstance(operation, ir.Lookup | ir.Strided) else None
    if before is None or not view.only_reader(before.output):
        return None
    match before, operation:
        case ir.Strided(), ir.Lookup(whole=True):
            lookup, moved, seen = operation, before.access, ir.Access.whole(before.access.sizes)
        case ir.Lookup(whole=True), ir.Strided():
            lookup, moved, seen = before, operation.access, operation.access
        case _:
            return None
    dim = None
    if lookup.dim is not None:
        dim = tables.dimension_of(ir.Axis.of(lookup.access.sizes, lookup.dim), seen)
        if dim is None:
            return None
    head = (operation.name, operation.layer, before.inputs, operation.output)
    return _Change((before, operation), (ir.Lookup(*head, lookup.table, lookup.title, moved, dim),))


_RULES: tuple[_Rule, ...] = (
    _quantize_once,
    _fold_limits,
    _move_integers,
    _stay_integers,
    _average_integers,
    _sum_integers,
    _multiply_integers,
    _look_up,
    _look_up_moved,
    _quantize_early,
    _write_integers,
)
