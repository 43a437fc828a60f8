"""Times of GPU work with a cold second-level cache, launched one by one and from a CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

GRAPH_CALLS = 10
REPEATS = 15
FLUSH_BYTES = 256 * 2**20  # several times the 50 MB cache of an H200


class Timer:
    """Measures calls on the current GPU, in microseconds."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        self._flush_time: float | None = None

    def eager(self, run: Callable[[], object]) -> float:
        """Median time between events around one call that Python launches, the cache flushed before each."""
        run()
        times = []
        for _ in range(REPEATS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times)

    def graph(self, run: Callable[[], object]) -> float:
        """Time of one call inside a CUDA graph, the cache flushed before each.

        The graph holds flushes and calls in turn; the time of a graph of flushes alone is taken off.
        """
        if self._flush_time is None:
            self._flush_time = self._replay(lambda: None)
        return (self._replay(run) - self._flush_time) / GRAPH_CALLS

    def _replay(self, run: Callable[[], object]) -> float:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()  # compiles, tunes and initialises before the capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                self._flush.zero_()
                run()
        times = []
        for _ in range(REPEATS + 2):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return statistics.median(times[2:])
