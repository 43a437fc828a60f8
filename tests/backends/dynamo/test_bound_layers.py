"""Layers bound to their operands: what compiled graphs call without Python, and what stays."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import bound
from tbn_compiler.backends.dynamo import compile_graph
from tests import oracle

CONFIG = tbn.TilingConfig(p=4, alpha="tile", min_size=0)

pytestmark = pytest.mark.skipif(bound.unavailable() is not None, reason=str(bound.unavailable()))


def mlp(function: type[nn.Module] = nn.ReLU) -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), function(), nn.Linear(32, 32, bias=False), nn.Linear(32, 8))


def convnet() -> nn.Module:
    """Enough filters for the kernels of every activation."""
    return nn.Sequential(
        nn.Conv2d(16, 128, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(128, 128, (3, 1), stride=(2, 1)),
        nn.Flatten(1),
    )


def packed(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return tbn.lower(tbn.transform(model.eval(), CONFIG.replace(**options)))


def compiled(module: nn.Module, activation: str = "float", **options: Any) -> Any:
    return torch.compile(module, backend=compile_graph, options={"activation": activation}, **options)


def calls(gm: fx.GraphModule) -> list[str]:
    """Names of the layers' operators in a graph."""
    return [
        f"{node.target.namespace}::{node.target._opname}"
        for node in gm.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace in ("tbn", "tbn_cpu")
    ]


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("options", [{}, {"p": (2, 2), "alpha": "output"}, {"replicate": "hadamard"}], ids=str)
@pytest.mark.parametrize("function", [nn.ReLU, nn.GELU, nn.SiLU])
def test_linear(
    function: type[nn.Module], options: dict[str, Any], activation: str, eager_graphs: list[fx.GraphModule]
) -> None:
    module = packed(mlp(function), **options)
    example = torch.randn(5, 24)
    expected = tbn.optimize(module, example, activation=activation)  # type: ignore[arg-type]
    fast = compiled(module, activation)
    with torch.no_grad():
        oracle.assert_close(fast(example), expected(example), rtol=1e-5)
    (gm,) = eager_graphs
    summed = activation != "float" and isinstance(options.get("p"), tuple)  # PyTorch sums neighbours in other formats
    if summed:
        assert calls(gm) == ["tbn::linear"] * 3
    else:  # neighbours are one network
        assert calls(gm)
        assert set(calls(gm)) <= {"tbn_cpu::linear", "tbn_cpu::network"}


@pytest.mark.parametrize("activation", ["float", "int8"])
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_convolutions(form: torch.memory_format, activation: str, graphs: list[fx.GraphModule]) -> None:
    module, x = packed(convnet()), torch.randn(2, 16, 9, 8).contiguous(memory_format=form)
    expected = tbn.optimize(module, x, activation=activation)  # type: ignore[arg-type]
    fast = compiled(module, activation)
    with torch.no_grad():
        oracle.assert_close(fast(x), expected(x), rtol=1e-5)
    (gm,) = graphs
    level = cpu.info().level or ""
    if level.startswith("avx512"):
        assert calls(gm) == ["tbn_cpu::conv"] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, eager_graphs: list[fx.GraphModule]) -> None:
    module = packed(mlp()).to(dtype)
    x = torch.randn(3, 24, dtype=dtype)
    fast = compiled(module)
    with torch.no_grad():
        result, expected = fast(x), module(x)
    assert result.dtype == dtype
    oracle.assert_close(result, expected, rtol=1e-5 if dtype == torch.float64 else 0.02)
    assert ("tbn::linear" in calls(eager_graphs[0])) == (dtype == torch.float64)


def test_batches_that_vary(eager_graphs: list[fx.GraphModule]) -> None:
    """Few and many tokens have kernels of their own; one graph serves both."""
    module = packed(mlp())
    fast = compiled(module, dynamic=True)
    with torch.no_grad():
        for shape in ((3, 24), (40, 24), (11, 24), (12, 24), (0, 24)):
            x = torch.randn(shape)
            oracle.assert_close(fast(x), module(x), rtol=1e-5)
        turned = torch.randn(24, 40).t()
        oracle.assert_close(fast(turned), module(turned), rtol=1e-5)
    assert all("tbn::linear" not in calls(gm) for gm in eager_graphs)


def test_weights_that_change(eager_graphs: list[fx.GraphModule]) -> None:
    """Tile, alphas and bias, in place and by new tensors."""
    module, x = packed(mlp()), torch.randn(4, 24)
    fast = compiled(module)
    with torch.no_grad():
        fast(x)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            tensor.copy_(255 - tensor if tensor.dtype == torch.uint8 else tensor * 1.5)
            oracle.assert_close(fast(x), module(x), rtol=1e-5)
            owner, _, last = name.rpartition(".")
            changed = 255 - tensor if tensor.dtype == torch.uint8 else tensor * 1.5
            part = module.get_submodule(owner)
            setattr(part, last, nn.Parameter(changed) if isinstance(getattr(part, last), nn.Parameter) else changed)
            oracle.assert_close(fast(x), module(x), rtol=1e-5)
    assert len(eager_graphs) == 1


def test_equal_layers_have_their_own_plans(eager_graphs: list[fx.GraphModule]) -> None:
    """They share compiled code; plans go with their layers, and not before."""
    layers = [packed(mlp()) for _ in range(3)]
    x = torch.randn(4, 24)
    with torch.no_grad():
        for index, layer in enumerate(layers):
            for part in layer:
                if hasattr(part, "bias") and part.bias is not None:
                    part.bias.add_(index)
            layer.compile(backend=compile_graph)
        expected = [layer.forward(x) for layer in layers]
        for _ in range(2):
            gc.collect()
            for layer, right in zip(layers, expected, strict=True):
                oracle.assert_close(layer(x), right, rtol=1e-5)


def test_another_level(eager_graphs: list[fx.GraphModule]) -> None:
    """It counts for graphs that are compiled already; without native kernels the operators of Python stay."""
    module, x = packed(mlp()), torch.randn(4, 24)
    fast = compiled(module, "int8")
    with torch.no_grad():
        expected = fast(x)
        for level in (*cpu.info().available, "none"):
            with cpu.use_level(level):
                oracle.assert_close(fast(x), expected, rtol=1e-5)
        assert torch.equal(fast(x), expected)
    assert [set(calls(gm)) for gm in eager_graphs[1:]] == [{"tbn::linear"}]


def test_calls_from_several_threads() -> None:
    module, inputs = packed(mlp()), [torch.randn(size, 24) for size in (1, 5, 30)]
    with torch.no_grad():
        fast = compiled(module, dynamic=True)
        expected = [fast(x) for x in inputs]
    results: list[bool] = []

    def work(x: Tensor, right: Tensor) -> None:
        with torch.no_grad():
            results.extend(torch.equal(fast(x), right) for _ in range(50))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 150


class Mapped(nn.Module):
    """A layer inside ``torch.vmap``, and one outside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(torch.vmap(self.first)(x))
        return result


def test_layers_that_torch_func_transforms_stay(eager_graphs: list[fx.GraphModule]) -> None:
    module, x = packed(Mapped()), torch.randn(4, 24)
    fast = compiled(module)
    with torch.no_grad():
        oracle.assert_close(fast(x), module(x), rtol=1e-5)
    assert calls(eager_graphs[0]) == ["tbn::linear", "tbn_cpu::linear"]
    assert "called through Python: torch.func transforms it" in str(tbn.explain(fast))


def test_what_is_bound_is_said(eager_graphs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = packed(mlp()), torch.randn(4, 24)
    with torch.no_grad():
        fast = compiled(module)
        fast(x)
        assert str(tbn.explain(fast)).count("bound to its operands") == 3
        monkeypatch.setattr(bound, "unavailable", lambda: "torch 1.0 does not export it")
        torch._dynamo.reset()
        again = compiled(module)
        oracle.assert_close(again(x), fast(x), rtol=1e-5)
    graph = tbn.explain(again).graphs[-1]
    reason = "it is called through Python: torch 1.0 does not export it"
    assert len(graph.reasons[reason]) == 3
    assert str(graph).count(reason) == 1


class SelfAttention(nn.Module):
    """Four heads of eight, by PyTorch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(-2, -3) for part in self.project(x).chunk(3, -1))
        result: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2))
        return result


@pytest.mark.skipif(not cpu.library.has_attention(cpu.library.level()), reason="no level here computes attention")
def test_attention_between_layers(eager_graphs: list[fx.GraphModule]) -> None:
    module, x = packed(SelfAttention()), torch.randn(2, 10, 32)
    with torch.no_grad():
        oracle.assert_close(compiled(module)(x), module(x), rtol=1e-5)
        assert calls(eager_graphs[0]) == ["tbn_cpu::linear", "tbn_cpu::attention", "tbn_cpu::linear"]
        with torch.autocast("cpu", torch.bfloat16):  # it is PyTorch's there, in bfloat16
            found = compiled(module)(x)
            assert found.dtype == module(x).dtype
        assert "tbn_cpu::attention" not in calls(eager_graphs[1])
        with cpu.library.use_level("portable"):
            oracle.assert_close(compiled(module)(x), module(x), rtol=1e-5)
        assert "tbn_cpu::attention" not in calls(eager_graphs[2])


@pytest.mark.skipif(not cpu.library.has_attention(cpu.library.level()), reason="no level here computes attention")
def test_attention_compiled_by_inductor(graphs: list[fx.GraphModule]) -> None:
    """Sizes that vary, and strides that the next operation relies on."""
    module = packed(SelfAttention())
    fast = compiled(module, dynamic=True)
    with torch.no_grad():
        for size in (2, 3, 5):
            x = torch.randn(size, 7 + size, 32)
            oracle.assert_close(fast(x), module(x), rtol=1e-5)
    assert "tbn_cpu::attention" in calls(graphs[0])
