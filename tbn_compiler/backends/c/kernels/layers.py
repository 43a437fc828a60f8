"""Layers with float weights."""

from __future__ import annotations

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.registry import Context, implements
from tbn_compiler.backends.c.plan import At, Call, Implementation


@implements(ir.Linear)
def _linear(operation: ir.Linear, context: Context) -> Implementation:
    out_features, in_features = operation.weight.shape
    (source,), vectors = operation.inputs, operation.output.size // out_features
    numbers = (in_features, out_features, int(operation.relu))
    pointers = (At(source, stride=in_features), At(operation.output, stride=out_features))
    call = Call("linear", (operation.weight, operation.bias, *numbers, *pointers), repeat=vectors)
    title = f"float linear {in_features} -> {out_features}{suffix(operation.bias, operation.relu)}"
    return Implementation(title, (call,), cost=vectors * in_features * out_features)


def suffix(bias: ir.Constant | None, relu: bool) -> str:
    """What a layer's title says after its sizes."""
    return f"{', bias' if bias else ''}{', ReLU' if relu else ''}"
