"""Times of GPU work with a cold second-level cache, from a CUDA graph and by Python, and the card's ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.gpu_roofline import Ceilings

GRAPH_CALLS = 12
REPLAYS = 5  # the first one is not counted
EAGER_CALLS = 12
WALL_SECONDS = 0.01  # of back-to-back calls, three times
FLUSH_INTS = 64 * 2**20  # 256 MiB, several times the 50 MB cache of an H100
MATRIX = 8192
COPY_BYTES = 2**31


def _event(*, external: bool = False) -> torch.cuda.Event:
    """An event with a time; an external one is recorded by every replay of the graph that holds it."""
    made: torch.cuda.Event = torch.cuda.Event(enable_timing=True, external=external)
    return made


class Timer:
    """Measures calls on the current GPU, in microseconds.

    The cache is filled with other lines by reading a large buffer: written lines would still have to go out to memory
    while the timed call runs.
    """

    def __init__(self) -> None:
        self._junk = torch.randint(0, 2**31 - 1, (FLUSH_INTS,), dtype=torch.int32, device="cuda")
        self._sum = torch.zeros((), dtype=torch.int64, device="cuda")
        self._one = torch.zeros(1, device="cuda")
        self._side = torch.cuda.Stream()  # always the same: cuBLAS takes a workspace for each

    def _flush(self) -> None:
        torch.sum(self._junk, 0, dtype=torch.int64, out=self._sum)

    def graph(self, run: Callable[[], object]) -> float:
        """Time of one call inside a CUDA graph: median of the times between events recorded around each call.

        Nothing is taken off. What an empty kernel takes between the same events is :attr:`Ceilings.empty_us`.
        """
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            for _ in range(2):
                run()  # compiles, tunes and initialises before the capture
        torch.cuda.current_stream().wait_stream(self._side)
        begin, end = ([_event(external=True) for _ in range(GRAPH_CALLS)] for _ in range(2))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for first, last in zip(begin, end, strict=True):
                self._flush()
                first.record()
                run()
                last.record()
        times = []
        for replay in range(REPLAYS):
            graph.replay()
            torch.cuda.synchronize()
            if replay:
                times += [first.elapsed_time(last) * 1e3 for first, last in zip(begin, end, strict=True)]
        return float(statistics.median(times))

    def eager(self, run: Callable[[], object]) -> float:
        """Time between events around one call that Python launches: the GPU waits for it, its cache flushed before."""
        run()
        times = []
        for _ in range(EAGER_CALLS):
            begin, end = _event(), _event()
            self._flush()
            torch.cuda.synchronize()  # or the launch would hide behind the flush
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) * 1e3)
        return float(statistics.median(times))

    def wall(self, run: Callable[[], object]) -> float:
        """Wall-clock time of one of many calls, one behind the other: what Python or the GPU takes, the longer."""

        def calls(number: int) -> float:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(number):
                run()
            torch.cuda.synchronize()
            return (time.perf_counter() - start) / number

        calls(2)
        number = max(3, min(200, int(WALL_SECONDS / calls(3))))
        return statistics.median(calls(number) for _ in range(3)) * 1e6

    def ceilings(self) -> Ceilings:
        """What this card reaches: a large copy, a large product of bf16, and a kernel that does nothing."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return Ceilings(
            bytes_per_us=2 * COPY_BYTES / self._copy(),
            flop_per_us=2 * MATRIX**3 / self._product(),
            empty_us=self.graph(lambda: self._one.add_(1)),
            processors=properties.multi_processor_count,
        )

    def _copy(self) -> float:
        source = torch.ones(COPY_BYTES // 4, dtype=torch.int32, device="cuda")
        target = torch.empty_like(source)
        return self._often(lambda: target.copy_(source))

    def _product(self) -> float:
        x, weight = (torch.randn(MATRIX, MATRIX, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        return self._often(lambda: x @ weight)

    def _often(self, run: Callable[[], object]) -> float:
        """Time of one of many calls that follow each other, as the clock of a warm card allows."""
        run()
        begin, end = _event(), _event()
        times = []
        for _ in range(3):
            begin.record()
            for _ in range(20):
                run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 20 * 1e3)
        return float(statistics.median(times))
