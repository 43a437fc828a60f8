"""What the GPU benchmark measures: linear layers, convolutions, memory, other packages' layers.

A case gives what was measured and nothing that follows from it: ratios and goals are made when tables are.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from benchmarks import gpu_peers, memory
from benchmarks.gpu_results import Case, Row

SHAPES = [(4096, 4096), (14336, 4096), (28672, 8192), (1024, 4096)]  # out x in
BATCHES = (1, 256, 4096, 16)
TILINGS = (4, 8)
CONVS = [(512, 7), (64, 56), (256, 14), (128, 28)]  # channels, image size of the 3x3 layers of a ResNet
IMAGES = (256, 32, 1)
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}

# Norm of the error over the norm of the result: bf16 operands and one rounding of the result.
TOLERANCE = 1e-2


class Times(Protocol):
    """What measures: microseconds of a call, see :class:`benchmarks.gpu_timing.Timer`."""

    def graph(self, run: Callable[[], object]) -> float:
        """Inside a CUDA graph."""

    def eager(self, run: Callable[[], object]) -> float:
        """Launched by Python, the GPU waiting."""

    def wall(self, run: Callable[[], object]) -> float:
        """Of one of many calls, one behind the other."""


def all_times(times: Times, run: Callable[[], object]) -> Row:
    """The three times of a call."""
    return {"graph_us": times.graph(run), "eager_us": times.eager(run), "wall_us": times.wall(run)}


def random_tile(numel: int, device: torch.device) -> Tensor:
    """A random packed tile of ``numel`` bits, a multiple of 8."""
    return torch.randint(0, 256, (numel // 8,), dtype=torch.uint8, device=device)


def unpacked(tile: Tensor, numel: int, dtype: torch.dtype) -> Tensor:
    """Its +1 and -1."""
    result: Tensor = torch.ops.tbn.unpack_bits(tile, numel, dtype=dtype)
    return result


def error(got: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of ``expected``; NaN if either has one."""
    return float((got.float() - expected).norm() / expected.norm())


def dense_row(m: int, n: int, batch: int, times: Times, device: torch.device) -> Row:
    """CuBLAS in bf16."""
    x = torch.randn(batch, n, dtype=torch.bfloat16, device=device)
    weight = torch.randn(m, n, dtype=torch.bfloat16, device=device)
    return {"kind": "dense", "out": m, "in": n, "batch": batch, **all_times(times, lambda: F.linear(x, weight))}


def linear_row(m: int, n: int, batch: int, p: int, times: Times, device: torch.device, *, copies: bool = True) -> Row:
    """One tiled layer; without ``copies`` what it costs when they are passed on and only different rows are written.

    The layer of the different rows is itself one, with ``p`` 1 on the same tile. Beside it stands the library's product
    with those rows as floats.
    """
    rows = m // p
    x = torch.randn(batch, n, dtype=torch.bfloat16, device=device)
    tile, alpha = random_tile(rows * n, device), torch.rand(p if copies else 1, device=device) + 0.5
    sizes = (n, m, p) if copies else (n, rows, 1)

    def run() -> Tensor:
        result: Tensor = torch.ops.tbn.linear(x, tile, alpha, None, *sizes)
        return result

    unique = x.float() @ unpacked(tile, rows * n, torch.float32).view(rows, n).t()
    expected = (unique.unsqueeze(1) * alpha.view(1, -1, 1)).flatten(1)
    row: Row = {"kind": "tiled" if copies else "passed on", "out": m, "in": n, "batch": batch, "p": p}
    row["error"] = error(run(), expected)
    del unique, expected
    row |= all_times(times, run)
    if not copies:
        weight = unpacked(tile, rows * n, torch.bfloat16).view(rows, n)
        row["library_us"] = times.graph(lambda: F.linear(x, weight))
    return row


@contextlib.contextmanager
def cudnn_searches() -> Iterator[None]:
    """CuDNN measures its own algorithms: the same setting for dense and tiled convolutions."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def conv_dense_row(channels: int, size: int, images: int, times: Times, device: torch.device) -> Row:
    """CuDNN in bf16, input and filters in either memory format."""
    x = torch.randn(images, channels, size, size, dtype=torch.bfloat16, device=device)
    weight = torch.randn(channels, channels, 3, 3, dtype=torch.bfloat16, device=device)
    row: Row = {"kind": "dense", "channels": channels, "size": size, "images": images}
    with cudnn_searches():
        for name, memory_format in FORMATS.items():
            y, w = x.to(memory_format=memory_format), weight.to(memory_format=memory_format)
            row[name] = times.graph(lambda y=y, w=w: F.conv2d(y, w, padding=1))  # type: ignore[misc]
    return row


def conv_row(
    channels: int, size: int, images: int, p: int, times: Times, device: torch.device, *, copies: bool = True
) -> Row:
    """One 3 x 3 convolution in either memory format; without ``copies`` only its different channels."""
    filters = channels // p
    numel = filters * channels * 9
    tile, alpha = random_tile(numel, device), torch.rand(p if copies else 1, device=device) + 0.5
    x = torch.randn(images, channels, size, size, dtype=torch.bfloat16, device=device)
    unique = unpacked(tile, numel, torch.float32).view(filters, channels, 3, 3)
    # +1 and -1 are exact whatever the library multiplies in.
    expected = F.conv2d(x[:4].float(), unique, padding=1)
    expected = (expected.unsqueeze(1) * alpha.view(1, -1, 1, 1, 1)).flatten(1, 2)
    sizes = (channels, channels, (3, 3), p) if copies else (channels, filters, (3, 3), 1)
    row: Row = {"kind": "tiled" if copies else "passed on", "channels": channels, "size": size}
    row |= {"images": images, "p": p}
    errors = []
    with cudnn_searches():
        for name, memory_format in FORMATS.items():
            y, w = x.to(memory_format=memory_format), unique.to(torch.bfloat16, memory_format=memory_format)

            def run(y: Tensor = y) -> Tensor:
                result: Tensor = torch.ops.tbn.conv2d(y, tile, alpha, None, *sizes, padding=(1, 1))
                return result

            errors.append(error(run()[:4], expected))
            row[name] = times.graph(run)
            if not copies:
                row[f"library {name}"] = times.graph(lambda y=y, w=w: F.conv2d(y, w, padding=1))  # type: ignore[misc]
    row["error"] = max(errors, key=lambda e: (e != e, e))
    return row


def memory_row(model: str, column: str) -> Row:
    """Peak of the allocator for one inference on the GPU, everything that the model holds included.

    cuBLAS takes a workspace from the same allocator at its first product and keeps it. What is freed by clearing it
    is what it took.
    """
    module: nn.Module = memory.MODELS[model][0]().eval()
    config = memory.CONFIGS[column]
    if config is not None:
        module = tbn.lower(tbn.transform(module, config)).eval()
    inputs = torch.randn(memory.MODELS[model][1])
    clear_workspaces()
    before = torch.cuda.memory_allocated()
    module = module.cuda()
    parameters = torch.cuda.memory_allocated() - before
    x = inputs.cuda()
    with torch.no_grad():
        module(x)  # tunes, and lets the libraries take their workspaces
        torch.cuda.synchronize()
        kept = torch.cuda.memory_allocated() - before - parameters - x.nbytes
        torch.cuda.reset_peak_memory_stats()
        module(x)
        torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    held = torch.cuda.memory_allocated()
    clear_workspaces()
    workspace = held - torch.cuda.memory_allocated()
    row: Row = {"model": model, "column": column, "parameters": parameters, "peak": peak - workspace}
    row |= {"library_workspace": workspace, "kernels_keep": kept - workspace}
    return row | {"counted_peak": memory.account_model(model, column).peak}


def clear_workspaces() -> None:
    """Let the libraries give back their workspaces, and the allocator its empty blocks."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def peer_row(name: str, m: int, n: int, batch: int, times: Times, device: torch.device) -> Row:
    """Another package's layer."""
    weight = torch.randn(m, n, dtype=torch.bfloat16, device=device)
    x = torch.randn(batch, n, dtype=torch.bfloat16, device=device)
    layer = gpu_peers.make(name, weight)
    return {"peer": name, "out": m, "in": n, "batch": batch, "graph_us": times.graph(lambda: layer(x))}


def linear_cases(
    times: Times, device: torch.device, shapes: list[tuple[int, int]], batches: tuple[int, ...]
) -> Iterator[Case]:
    """Dense and tiled layers; for the first tiling also what remains when copies are passed on."""
    named = [(m, n, batch, f"linear {m}x{n} batch {batch}") for batch in batches for m, n in shapes]
    for m, n, batch, what in named:
        yield Case(f"{what} dense", partial(dense_row, m, n, batch, times, device))
        for p in TILINGS:
            yield Case(f"{what} p {p}", partial(linear_row, m, n, batch, p, times, device))
    p = TILINGS[0]
    for m, n, batch, what in named:
        yield Case(f"{what} p {p} passed on", partial(linear_row, m, n, batch, p, times, device, copies=False))


def conv_cases(
    times: Times, device: torch.device, convs: list[tuple[int, int]], images: tuple[int, ...]
) -> Iterator[Case]:
    """Dense and tiled convolutions: all layers with the first tiling, then the other ones, then copies passed on."""
    named = [((c, s, i), f"conv {c} channels {s}x{s} images {i}") for i in images for c, s in convs]
    first = TILINGS[0]
    for p in TILINGS:
        for sizes, what in named:
            if p == first:
                yield Case(f"{what} dense", partial(conv_dense_row, *sizes, times, device))
            yield Case(f"{what} p {p}", partial(conv_row, *sizes, p, times, device))
    for sizes, what in named:
        yield Case(f"{what} p {first} passed on", partial(conv_row, *sizes, first, times, device, copies=False))


def memory_cases() -> Iterator[Case]:
    """Every model in every column of the paper's table."""
    for model in memory.MODELS:
        for column in memory.CONFIGS:
            yield Case(f"memory {model} {column}", partial(memory_row, model, column))


def peer_cases(
    times: Times, device: torch.device, shapes: list[tuple[int, int]], batches: tuple[int, ...]
) -> Iterator[Case]:
    """Layers of the packages that are installed; for the others, that they are not."""
    for name, (package, _) in gpu_peers.PEERS.items():
        if not gpu_peers.importable(package):
            yield Case(f"peers {name}", partial(dict, peer=name, absent="not installed"))
            continue
        for batch in batches:
            for m, n in shapes:
                yield Case(f"peers {name} {m}x{n} batch {batch}", partial(peer_row, name, m, n, batch, times, device))
