"""Operations that treat each element alike."""

from __future__ import annotations

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.registry import Context, implements
from tbn_compiler.backends.c.plan import Call, Implementation


@implements(ir.Copy)
def _copy(operation: ir.Copy, context: Context) -> Implementation:
    return _elementwise("copy", operation, ())


@implements(ir.Relu)
def _relu(operation: ir.Relu, context: Context) -> Implementation:
    return _elementwise("relu", operation, ())


@implements(ir.Add)
def _add(operation: ir.Add, context: Context) -> Implementation:
    return _elementwise("add", operation, ())


@implements(ir.AddScalar)
def _add_scalar(operation: ir.AddScalar, context: Context) -> Implementation:
    return _elementwise("add_scalar", operation, (operation.scalar,))


def _elementwise(kernel: str, operation: ir.Operation, numbers: tuple[float, ...]) -> Implementation:
    size = operation.output.size
    call = Call(kernel, (*operation.inputs, *numbers, operation.output, size))
    return Implementation(" ".join([kernel, *map(str, numbers)]), (call,), cost=size)
