"""Counts of programs that have arrived, by which the last one of a block knows that all sums are there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

# Zero between launches: one tensor for each stream, since the launches of a
# stream follow one another, and a part of a reserve for each launch in a graph, which may run beside them.
_RESERVE = 2**18
_MEASURED = 2**14
_lock = threading.Lock()
_counts: dict[tuple[int, int], Tensor] = {}
_outgrown: list[Tensor | None] = []
_reserves: dict[int, Tensor] = {}
_reserved: dict[int, int] = {}
_measuring = threading.local()


def _lasting_zeros(index: int, count: int) -> Tensor:
    """Zeros that outlive every graph: made by another thread, whose memory no capture takes for its pool."""

    def make() -> Tensor:
        zeros = torch.zeros(count, dtype=torch.int32, device=torch.device("cuda", index))
        torch.cuda.current_stream(index).synchronize()  # they are used on any stream
        return zeros

    with ThreadPoolExecutor(1) as other:
        return other.submit(make).result()


def arrival_counts(device: torch.device, blocks: int) -> Tensor:
    """``blocks`` zeros (``int32``) that no other launch uses at the same time, and that the launch leaves as zeros."""
    if device.type != "cuda":
        return torch.zeros(blocks, dtype=torch.int32, device=device)
    blocks = -(-blocks // 4) * 4  # parts begin at 16 bytes: no other kernel has to be compiled during a capture
    own: Tensor | None = getattr(_measuring, "counts", None)
    if own is not None and blocks <= own.numel():
        return own[:blocks]
    index = torch.cuda.current_device() if device.index is None else device.index
    capturing = torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device).cuda_stream
    with _lock:
        if capturing:
            used = _reserved.get(index, _RESERVE)  # nothing can be allocated for good during a capture
            if used + blocks <= _RESERVE:
                _reserved[index] = used + blocks
                return _reserves[index][used : used + blocks]
        else:
            if index not in _reserves:
                _reserves[index], _reserved[index] = _lasting_zeros(index, _RESERVE), 0
            counts = _counts.get((index, stream))
            if counts is None or counts.numel() < blocks:
                _outgrown.append(counts)  # a kernel may still count there
                counts = _counts[index, stream] = _lasting_zeros(index, max(blocks, 1024))
            return counts
    return torch.zeros(blocks, dtype=torch.int32, device=device)  # by each replay of the graph


@contextlib.contextmanager
def measured(device: torch.device) -> Iterator[None]:
    """Launches of this thread inside the block follow one another: they share counts of their own."""
    if device.type != "cuda":
        yield
        return
    _measuring.counts = torch.zeros(_MEASURED, dtype=torch.int32, device=device)
    torch.cuda.current_stream(device).synchronize()
    try:
        yield
    finally:
        _measuring.counts = None
