from __future__ import annotations

import io
import itertools
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c, ir
from tbn_compiler.backends.c.memory import Buffer, end_of, live_bytes, place_buffers
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.plan import Plan
from tbn_compiler.backends.c.planner import build_plan
from tests.backends.c.programs import Network, check
from tests.backends.c.toolchain import needs_cc

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
    plan = build_plan(graph, Options("net", optimize="size"))
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


def test_several_placements_are_tried() -> None:
    """Largest first needs 76 bytes here; another order reaches the bound."""
    sizes = [(32, 7, 8), (32, 2, 3), (24, 6, 8), (20, 3, 6)]
    buffers = [Buffer(f"b{index}", *size) for index, size in enumerate(sizes)]
    assert end_of(buffers, place_buffers(buffers)) == max(live_bytes(buffers, 9)) == 56


@settings(max_examples=200)
@given(_buffers())
def test_no_placement_is_worse_than_largest_first(buffers: list[Buffer]) -> None:
    order = sorted(range(len(buffers)), key=lambda i: (-buffers[i].nbytes, buffers[i].first, i))
    placed: list[tuple[int, Buffer]] = []
    for index in order:
        buffer = buffers[index]
        busy = [(start, start + other.nbytes) for start, other in placed if other.overlaps(buffer)]
        starts = [0, *(end for _, end in busy)]
        fits = (s for s in sorted(starts) if all(s + buffer.nbytes <= start or s >= end for start, end in busy))
        placed.append((next(fits), buffer))
    largest_first = max(start + buffer.nbytes for start, buffer in placed)
    assert max(live_bytes(buffers, _STEPS)) <= end_of(buffers, place_buffers(buffers)) <= largest_first


class Joins(nn.Module):
    """A random mix of joins, parts, functions in place and values that are read again."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        draw = random.Random(self.seed)
        values = [x]
        for _ in range(8):
            a, b = draw.choice(values), draw.choice(values)
            kind = draw.choice(["cat", "cat", "relu", "exp", "fc", "part", "add"])
            if kind == "cat" and a.numel() + b.numel() <= 40:
                values.append(torch.cat([a, b], 1))
            elif kind == "part" and a.shape[1] > 2:
                values.append(a[:, 1:-1])
            elif kind == "fc" and a.shape[1] == 6:
                values.append(self.fc(a))
            elif kind == "add":
                values.append(a + a.flip(1))
            else:
                values.append(a.sigmoid() if kind == "exp" else (a - 0.1).relu())
        return tuple(values[-3:])


class ReadAfterJoin(nn.Module):
    """What is joined is read again after something was written over the result."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        joined = torch.cat([y, self.fc(x.exp())], 1).relu()
        return joined.sum(1, keepdim=True) + self.fc(y)


@needs_cc
def test_joined_values_are_written_in_place(tmp_path: Path) -> None:
    modules = [ReadAfterJoin(), *(Joins(seed) for seed in range(16))]
    networks = [Network(module, [(torch.randn(1, 6),)]) for module in modules]
    check(networks, tmp_path)
    steps = [step for network in networks if network.plan for step in network.plan.steps]
    assert any("lie in the result already" in step.choice for step in steps)
    assert all(n.plan and n.plan.scratch_bytes >= max(n.plan.live_bytes) for n in networks)


def test_the_plan_is_a_table_and_a_picture(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(72, 4))
    plan = export_c(net, torch.zeros(1, 2, 8, 8), tmp_path / "net.c", name="net")
    console = Console(width=200, file=io.StringIO())
    console.print(plan.table())
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"net: {plan.weight_bytes:,} bytes of constants, {plan.scratch_bytes:,} of scratch" in text
    assert "max pool 2 x 2" in text
    assert text.count("(peak)") == 1
    assert f"#define NET_TOTAL_BYTES {plan.total_bytes}\n" in (tmp_path / "net.h").read_text()
    plan.draw(tmp_path / "plan.png")
    plan.draw(tmp_path / "plan.svg")
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "conv" in plan.steps[0].kernel


@pytest.mark.parametrize(("p", "alpha", "paper"), [(4, "tile", 6800), (1, "layer", 16196)])
def test_max_memory_as_the_paper_counts_it(p: int, alpha: str, paper: int, tmp_path: Path) -> None:
    """Its Table 6: 6.80 KB for the TBN, 16.20 KB for the binary network."""
    net = nn.Sequential(nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False))
    overrides = {"2": {"p": 1, "alpha": "layer"}}
    module = tbn.transform(net, tbn.TilingConfig(p=p, alpha=alpha, min_size=0, overrides=overrides))  # type: ignore[arg-type]
    plan = export_c(module, torch.zeros(1, 784), tmp_path / "net.c", optimize="size")
    assert paper == 784 * 128 // p // 8 + 4 * p + 4 * 784 + 4 * 128
    # The first layer's copies are not written: 32 results instead of 128, and its alphas are in the second layer.
    assert plan.largest_layer_bytes == (6400 if p == 4 else 16196) <= paper
    assert plan.weight_bytes == {4: 3316, 1: 12712}[p]
