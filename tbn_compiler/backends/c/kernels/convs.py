"""Convolutions with float weights, and transpose convolutions."""

from __future__ import annotations

from collections.abc import Iterable

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.costs import round_up
from tbn_compiler.backends.c.float_instances import CONV_POSITIONS, conv_name
from tbn_compiler.backends.c.geometry import inside, whole_places, window_struct
from tbn_compiler.backends.c.kernels.layers import layer_suffix
from tbn_compiler.backends.c.plan import At, Call, Implementation, Struct
from tbn_compiler.backends.c.registry import Context, implements


@implements(ir.Conv)
def _conv(operation: ir.Conv, context: Context) -> Implementation:
    small = _one_weight_at_a_time(operation, context)
    if operation.weight.shape[0] // operation.groups >= 4:
        return context.fastest(small, _filters_at_once(operation, context, 4, down=False))
    return context.fastest(small, *(_filters_at_once(operation, context, 1, down) for down in (False, True)))


def _title(operation: ir.Conv) -> str:
    rows, inputs = operation.weight.shape[:2]
    title = f"float conv {inputs * operation.groups} -> {rows} channels, {_kernel(operation.weight.shape)}"
    return title + f"{_groups(operation.groups)}{layer_suffix(operation.bias, operation.relu)}"


def _one_weight_at_a_time(operation: ir.Conv, context: Context) -> Implementation:
    window, groups, weight = operation.window, operation.groups, operation.weight
    rows, inputs = weight.shape[:2]
    numbers = (inputs * groups, rows, groups, int(operation.relu))
    samples = operation.output.size // (rows * window.output_size)
    pointers = _images(operation, inputs * groups * window.input_size, rows * window.output_size)
    arguments = (window_struct(window), *numbers, weight, operation.bias, *pointers)
    lines = samples * rows * inputs * sum(inside(window, 0)) * window.output[1]
    work = {
        "conv": samples * rows * inputs * sum(inside(window, 0)) * sum(inside(window, 1)),
        "conv.line": lines,
        "conv.channel": operation.output.size * inputs,
        "conv.position": operation.output.size,
    }
    return context.implementation(_title(operation), (Call("conv", arguments, repeat=samples),), work)


def _filters_at_once(operation: ir.Conv, context: Context, filters: int, down: bool) -> Implementation:
    """Some filters at some neighbouring output positions at once: positions of a row, or ``down`` a column."""
    rows, inputs = operation.weight.shape[:2]
    window, groups, title = _flattened(operation.window), operation.groups, _title(operation)
    samples = operation.output.size // (rows * window.output_size)
    positions = CONV_POSITIONS[filters]
    spans = [whole_places(window, axis) for axis in (0, 1)]
    # Ranges that are too short for the kernel count as border.
    (first_row, end_row), (first_column, end_column) = (
        (first, end) if end - first >= positions else (0, 0) for first, end in spans
    )
    fields = (
        ("inputs", inputs),
        ("outputs", rows // groups),
        ("groups", groups),
        ("first_row", first_row),
        ("end_row", end_row),
        ("first_column", first_column),
        ("end_column", end_column),
        ("relu", int(operation.relu)),
    )
    layer = Struct("conv_layer", f"{operation.layer}_conv", title, fields)
    kernel = conv_name(filters, window.kernel[1], window.dilation[1], down)
    pointers = _images(operation, inputs * groups * window.input_size, rows * window.output_size)
    call = Call(kernel, (window_struct(window), layer, operation.weight, operation.bias, *pointers), repeat=samples)
    passes = samples * groups * round_up(rows // groups, filters) // filters
    work = _Work(window, inputs, filters)
    if down:
        work.down_columns((first_row, end_row), range(window.output[1]))
    elif filters == 1:
        work.along_rows((first_column, end_column))
        border = [column for column in range(window.output[1]) if not first_column <= column < end_column]
        work.down_columns((first_row, end_row), border, unrolled=False)
    else:
        work.along_rows((first_column, end_column))
        work.edges(range(window.output[0]), set(range(window.output[1])) - set(range(first_column, end_column)))
    return context.implementation(title, (call,), {unit: passes * count for unit, count in work.units.items()})


class _Work:
    """What is done for the filters of one pass.

    Attributes:
        units: number of units of each kind.
    """

    def __init__(self, window: ir.Window, inputs: int, filters: int) -> None:
        self.units: dict[str, float] = {}
        self._window, self._inputs, self._filters = window, inputs, filters
        self._rows, self._columns = inside(window, 0), inside(window, 1)
        self._kernel = f"conv_by_{filters}"
        self._unrolled = conv_name(filters, window.kernel[1], window.dilation[1]) != conv_name(filters, 0, 1)

    def _add(self, kernel: str, times: int, rows: int, columns: int) -> None:
        """So many positions, or groups of them, over ``rows`` rows and ``columns`` columns of the window."""
        channels = self._inputs if self._window.kernel[0] > 1 else 1
        lines = times * rows * self._inputs
        counts = {".position": times, ".channel": times * channels, ".line": lines, "": lines * columns}
        for unit, count in counts.items():
            self.units[kernel + unit] = self.units.get(kernel + unit, 0) + count

    def _blocks(self, span: tuple[int, int]) -> int:
        positions = CONV_POSITIONS[self._filters]
        return round_up(span[1] - span[0], positions) // positions

    def along_rows(self, span: tuple[int, int]) -> None:
        """The columns of the output in ``span``, where all of the window's columns are inside."""
        kernel = self._kernel if self._unrolled else f"{self._kernel}_any"
        for rows in self._rows:
            self._add(kernel, self._blocks(span), rows, self._window.kernel[1])
        self.units["conv.row"] = self.units.get("conv.row", 0) + len(self._rows)

    def down_columns(self, span: tuple[int, int], places: Iterable[int], unrolled: bool = True) -> None:
        """Columns of the output, in which all of the window's rows are inside in ``span``."""
        for place in places:
            columns = self._columns[place]
            whole = unrolled and self._unrolled and columns == self._window.kernel[1]
            kernel = self._kernel if whole else f"{self._kernel}_any"
            self._add(kernel, self._blocks(span), self._window.kernel[0], columns)
            self.edges(set(range(len(self._rows))) - set(range(*span)), (place,))
            self.units["conv.row"] = self.units.get("conv.row", 0) + 1

    def edges(self, rows: Iterable[int], columns: Iterable[int]) -> None:
        """Output positions one by one."""
        for column in columns:
            for row in rows:
                self._add(f"conv_edge_by_{self._filters}", 1, self._rows[row], self._columns[column])


def _flattened(window: ir.Window) -> ir.Window:
    """The window of a 1 x 1 convolution on an image of one long row, where it reads every pixel."""
    if window.input != window.output or window.kernel_size > 1 or window.stride != (1, 1) or window.padding != (0, 0):
        return window
    row = (1, window.input_size)
    return ir.Window(row, row, (1, 1))


@implements(ir.ConvTranspose)
def _conv_transpose(operation: ir.ConvTranspose, context: Context) -> Implementation:
    window, groups, weight = operation.window, operation.groups, operation.weight
    inputs, outputs = weight.shape[0], weight.shape[1] * groups
    title = f"float transpose conv {inputs} -> {outputs} channels, {_kernel(weight.shape)}"
    title += f"{_groups(groups)}{layer_suffix(operation.bias, False)}"
    samples = operation.output.size // (outputs * window.input_size)
    pointers = _images(operation, inputs * window.output_size, outputs * window.input_size)
    arguments = (window_struct(window), inputs, outputs, groups, weight, operation.bias, *pointers)
    weights = samples * inputs * weight.shape[1] * window.kernel_size
    work = {
        "conv_transpose": weights * window.output_size,
        "conv_transpose.weight": weights,
        "conv_transpose.result": operation.output.size,
    }
    return context.implementation(title, (Call("conv_transpose", arguments, repeat=samples),), work)


def _images(operation: ir.Operation, input_size: int, output_size: int) -> tuple[At, At]:
    """Pointers that advance from sample to sample."""
    (source,) = operation.inputs
    return At(source, stride=input_size), At(operation.output, stride=output_size)


def _kernel(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[2:]))


def _groups(groups: int) -> str:
    return f", {groups} groups" if groups > 1 else ""
