"""Whole models on a GPU: eagerly, in a CUDA graph captured by hand, and by ``torch.compile(backend="tbn")``.

Every result is compared with the packed model run eagerly; with CUDA graphs also after the weights have changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks.gpu_cases import Times, error
from benchmarks.gpu_results import Case, Row
from benchmarks.models import PointNet, ViT, resnet18
from tbn_compiler.backends.dynamo import compile_graph

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ViT": (ViT, (3, 256, 256)),
    "ResNet18": (resnet18, (3, 224, 224)),
    "PointNet": (PointNet, (3, 1024)),
}
BATCHES = (1, 64)
P = 4

# Norm of the difference of two ways to compute in bf16, which round at other places: some ten layers of 2^-9 each, and
# networks with random weights pass differences on.
TOLERANCE = 5e-2

Ways = dict[str, Callable[[str, int, Times, torch.device], Row]]


def models(name: str, batch: int, device: torch.device) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model in bf16, dense and packed, and an input."""
    make, size = MODELS[name]
    torch.manual_seed(0)
    dense = make().eval()
    packed = tbn.lower(tbn.transform(make().eval(), tbn.TilingConfig(p=P, min_size=64_000))).eval()
    x = torch.randn(batch, *size, dtype=torch.bfloat16, device=device)
    return dense.to(device, torch.bfloat16), packed.to(device, torch.bfloat16), x


def captured(run: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A CUDA graph of a call and where it leaves its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result


def change(module: nn.Module) -> None:
    """Other weights in the same storages."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.mul_(1.25)


def eager_row(name: str, batch: int, times: Times, device: torch.device) -> Row:
    """Launched by Python, and in a graph captured by hand."""
    dense, packed, x = models(name, batch, device)
    row: Row = {"dense_us": times.wall(lambda: dense(x)), "us": times.wall(lambda: packed(x))}
    graph, _ = captured(lambda: dense(x))
    row["dense_graph_us"] = times.wall(graph.replay)
    graph, result = captured(lambda: packed(x))
    graph.replay()
    row["error"] = error(result, packed(x).float())
    row["graph_us"] = times.wall(graph.replay)
    change(packed)
    graph.replay()
    row["changed_error"] = error(result, packed(x).float())
    return row


def compiled_row(name: str, batch: int, times: Times, device: torch.device, mode: str | None = None) -> Row:
    """``torch.compile(backend="tbn")``."""
    _, packed, x = models(name, batch, device)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # The function and not its name, which only an installed package is found by.
    run: Callable[[Tensor], Tensor] = torch.compile(packed, backend=compile_graph, mode=mode)
    expected = packed(x).float()
    got = [run(x).clone() for _ in range(4)][-1]  # warms up, captures, replays
    row: Row = {"error": error(got, expected), "us": times.wall(lambda: run(x))}
    counters: dict[str, Any] = torch._dynamo.utils.counters["inductor"]
    row["graphs_skipped"] = counters.get("cudagraph_skips", 0)
    change(packed)
    expected = packed(x).float()
    row["changed_error"] = error([run(x).clone() for _ in range(3)][-1], expected)
    return row


def replayed_row(name: str, batch: int, times: Times, device: torch.device) -> Row:
    """The same with CUDA graphs."""
    return compiled_row(name, batch, times, device, mode="reduce-overhead")


def dense_row(name: str, batch: int, times: Times, device: torch.device) -> Row:
    """The dense model by ``torch.compile`` with CUDA graphs: what a user would compare with."""
    dense, _, x = models(name, batch, device)
    torch._dynamo.reset()
    run: Callable[[Tensor], Tensor] = torch.compile(dense, mode="reduce-overhead")
    expected = dense(x).float()
    got = [run(x).clone() for _ in range(4)][-1]
    return {"error": error(got, expected), "us": times.wall(lambda: run(x))}


WAYS: Ways = {
    "eager": eager_row,
    "compiled, CUDA graphs": replayed_row,
    "compiled": compiled_row,
    "dense, compiled, CUDA graphs": dense_row,
}


def graph_cases(times: Times, device: torch.device, batches: tuple[int, ...] = BATCHES) -> Iterator[Case]:
    """Every model in every way: graphs first, since those decide."""

    def without_gradients(way: str, name: str, batch: int) -> Row:
        with torch.no_grad():
            row = WAYS[way](name, batch, times, device)
        torch._dynamo.reset()
        return {"model": name, "batch": batch, "way": way, **row}

    for way in WAYS:
        for batch in batches:
            for name in MODELS:
                yield Case(f"graphs {name} batch {batch} {way}", partial(without_gradients, way, name, batch))
