from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.memory import Buffer, live_bytes, place_buffers
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.plan import Plan
from tbn_compiler.backends.c.planner import build_plan

_STEPS = 8


@st.composite
def _buffers(draw: st.DrawFn) -> list[Buffer]:
    buffers = []
    for index in range(draw(st.integers(1, 7))):
        first = draw(st.integers(0, _STEPS - 1))
        last = draw(st.integers(first, _STEPS - 1))
        buffers.append(Buffer(f"b{index}", 4 * draw(st.integers(1, 9)), first, last))
    return buffers


@given(_buffers())
def test_buffers_in_use_together_never_share_a_byte(buffers: list[Buffer]) -> None:
    offsets = place_buffers(buffers)
    for step in range(_STEPS):
        used = [
            set(range(offset, offset + buffer.nbytes))
            for buffer, offset in zip(buffers, offsets, strict=True)
            if buffer.first <= step <= buffer.last
        ]
        assert all(a.isdisjoint(b) for a, b in itertools.combinations(used, 2))
        assert live_bytes(buffers, _STEPS)[step] == sum(map(len, used))
    assert all(offset % 4 == 0 for offset in offsets)


@given(st.lists(st.integers(1, 50), min_size=2, max_size=8))
def test_shrinking_layers_need_no_more_than_the_largest_pair(sizes: list[int]) -> None:
    """Each layer's output lives while the next layer reads it: the lower bound is reached."""
    buffers = [Buffer(f"b{i}", 4 * size, i, i + 1) for i, size in enumerate(sorted(sizes, reverse=True))]
    total = max(offset + b.nbytes for b, offset in zip(buffers, place_buffers(buffers), strict=True))
    assert total == max(live_bytes(buffers, len(sizes) + 1))


@st.composite
def _graphs(draw: st.DrawFn) -> ir.Graph:
    """Random operations, each on any earlier values: skip connections, dead ends, views, repeated operands."""
    values = [ir.Value("x", (draw(st.integers(1, 4)),))]
    operations: list[ir.Operation] = []
    for index in range(draw(st.integers(1, 10))):
        name, source = f"v{index}", draw(st.sampled_from(values))
        kind = draw(st.sampled_from(["relu", "add", "add_scalar", "alias", "linear"]))
        head = (name, name, (source,), ir.Value(name, source.shape))
        if kind == "relu":
            operations.append(ir.Unary(*head, function="relu"))
        elif kind == "add":
            other = draw(st.sampled_from([value for value in values if value.size == source.size]))
            access = ir.Access.whole(source.shape)
            head = (name, name, (source, other), ir.Value(name, source.shape))
            operations.append(ir.Binary(*head, function="add", accesses=(access, access)))
        elif kind == "add_scalar":
            operations.append(ir.Unary(*head, function="add_scalar", parameters=(float(index + 1),)))
        elif kind == "alias":
            operations.append(ir.Alias(name, name, (source,), ir.Value(name, (1, *source.shape))))
        else:
            rows = draw(st.integers(1, 4))
            shape = (*source.shape[:-1], rows)
            weight = np.arange(rows * source.shape[-1], dtype=np.float32).reshape(rows, -1) % 5 - 2
            constant = ir.Constant(f"{name}.weight", weight)
            operations.append(ir.Linear(name, name, (source,), ir.Value(name, shape), weight=constant, bias=None))
        values.append(operations[-1].output)
    return ir.Graph((values[0],), (draw(st.sampled_from(values)),), tuple(operations))


def _evaluate(graph: ir.Graph, x: np.ndarray) -> np.ndarray:
    """The graph's output, every value in memory of its own."""
    arrays = {graph.inputs[0]: x}
    for operation in graph.operations:
        sources = [arrays[value] for value in operation.inputs]
        match operation:
            case ir.Unary(function="relu"):
                result = np.maximum(sources[0], 0)
            case ir.Unary():
                result = sources[0] + operation.parameters[0]
            case ir.Binary():
                result = sources[0] + sources[1]
            case ir.Linear():
                result = sources[0] @ operation.weight.array.T
            case _:
                result = sources[0]
        arrays[operation.output] = result.reshape(operation.output.shape)
    return arrays[graph.outputs[0]].reshape(-1)


def _interpret(plan: Plan, x: np.ndarray) -> np.ndarray:
    """Run the plan's steps in the memory that it assigns; what is not written yet is NaN."""
    block = np.full(plan.scratch_bytes // 4, np.nan, np.float32)
    memory = {b.name: block[b.offset // 4 : (b.offset + b.nbytes) // 4] for b in plan.buffers}
    memory |= {"input": x.copy(), "output": np.full(plan.outputs[0].value.size, np.nan, np.float32)}
    for step in plan.steps:
        sources = [memory[name] for name in step.inputs]
        (call,) = step.implementation.calls
        if call.kernel == "linear":
            weight, *_ = call.arguments
            assert memory[step.output] is not sources[0], "a linear layer cannot run in place"
            result = (sources[0].reshape(call.repeat, -1) @ weight.array.T).reshape(-1)
            result = np.maximum(result, 0) if call.arguments[4] else result
        else:
            result = {
                "copy": lambda s: s[0],
                "relu": lambda s: np.maximum(s[0], 0),
                "add": lambda s: s[0] + s[1],
                "add_scalar": lambda s, call=call: s[0] + call.arguments[1],
            }[call.kernel](sources)
        memory[step.output][:] = result
    assert np.array_equal(memory["input"], x), "the input belongs to the caller"
    return memory["output"]


@settings(max_examples=300)
@given(_graphs())
def test_no_value_is_overwritten_before_its_last_reader(graph: ir.Graph) -> None:
    x = np.arange(graph.inputs[0].size, dtype=np.float32) - 1
    plan = build_plan(graph, Options("net"))
    np.testing.assert_array_equal(_interpret(plan, x), _evaluate(graph, x))
    assert plan.scratch_bytes >= max(plan.live_bytes)


def test_the_plan_names_the_step_with_the_most_scratch() -> None:
    def linear(name: str, source: ir.Value, rows: int) -> ir.Linear:
        weight = ir.Constant(f"{name}.weight", np.ones((rows, source.size), np.float32))
        return ir.Linear(name, name, (source,), ir.Value(name, (1, rows)), weight=weight, bias=None)

    x = ir.Value("x", (1, 2))
    a = linear("a", x, 100)
    b = linear("b", a.output, 50)
    c = linear("c", b.output, 3)
    plan = build_plan(ir.Graph((x,), (c.output,), (a, b, c)), Options("net"))
    assert (plan.scratch_bytes, plan.live_bytes, plan.peak_step) == (600, (400, 600, 200), "b")
    assert plan.weight_bytes == 4 * (200 + 5000 + 150)
