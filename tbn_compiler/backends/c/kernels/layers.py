"""Layers with float weights."""

from __future__ import annotations

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.geometry import window_struct
from tbn_compiler.backends.c.plan import At, Call, Implementation
from tbn_compiler.backends.c.registry import Context, implements


@implements(ir.Linear)
def _linear(operation: ir.Linear, context: Context) -> Implementation:
    out_features, in_features = operation.weight.shape
    (source,), vectors = operation.inputs, operation.output.size // out_features
    numbers = (in_features, out_features, int(operation.relu))
    pointers = (At(source, stride=in_features), At(operation.output, stride=out_features))
    call = Call("linear", (operation.weight, operation.bias, *numbers, *pointers), repeat=vectors)
    title = f"float linear {in_features} -> {out_features}{_suffix(operation.bias, operation.relu)}"
    return Implementation(title, (call,), cost=vectors * in_features * out_features)


@implements(ir.Conv)
def _conv(operation: ir.Conv, context: Context) -> Implementation:
    window, groups, weight = operation.window, operation.groups, operation.weight
    rows, inputs = weight.shape[:2]
    title = f"float conv {inputs * groups} -> {rows} channels, {_kernel(weight.shape)}"
    title += f"{_groups(groups)}{_suffix(operation.bias, operation.relu)}"
    numbers = (inputs * groups, rows, groups, int(operation.relu))
    samples = operation.output.size // (rows * window.output_size)
    pointers = _images(operation, inputs * groups * window.input_size, rows * window.output_size)
    call = Call("conv", (window_struct(window), *numbers, weight, operation.bias, *pointers), repeat=samples)
    cost = operation.output.size * inputs * window.kernel_size
    return Implementation(title, (call,), cost=cost)


@implements(ir.ConvTranspose)
def _conv_transpose(operation: ir.ConvTranspose, context: Context) -> Implementation:
    window, groups, weight = operation.window, operation.groups, operation.weight
    inputs, outputs = weight.shape[0], weight.shape[1] * groups
    title = f"float transpose conv {inputs} -> {outputs} channels, {_kernel(weight.shape)}"
    title += f"{_groups(groups)}{_suffix(operation.bias, False)}"
    samples = operation.output.size // (outputs * window.input_size)
    pointers = _images(operation, inputs * window.output_size, outputs * window.input_size)
    arguments = (window_struct(window), inputs, outputs, groups, weight, operation.bias, *pointers)
    cost = samples * inputs * window.output_size * weight.shape[1] * window.kernel_size
    return Implementation(title, (Call("conv_transpose", arguments, repeat=samples),), cost=cost)


@implements(ir.Gather)
def _gather(operation: ir.Gather, context: Context) -> Implementation:
    indices, table = operation.inputs
    count = operation.output.size // operation.columns
    call = Call("gather", (indices, table, operation.output, count, operation.rows, operation.columns))
    title = f"look up {operation.columns} numbers in {operation.rows} rows"
    return Implementation(title, (call,), cost=operation.output.size)


def _images(operation: ir.Operation, input_size: int, output_size: int) -> tuple[At, At]:
    """Pointers that advance from sample to sample."""
    (source,) = operation.inputs
    return At(source, stride=input_size), At(operation.output, stride=output_size)


def _kernel(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape[2:]))


def _groups(groups: int) -> str:
    return f", {groups} groups" if groups > 1 else ""


def _suffix(bias: ir.Constant | None, relu: bool) -> str:
    return f"{', bias' if bias else ''}{', ReLU' if relu else ''}"
