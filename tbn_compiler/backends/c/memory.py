"""Placement of buffers in one scratch block, from the steps at which each one is in use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Buffer:
    """A block of memory that is needed from step ``first`` to step ``last``, both included."""

    name: str
    nbytes: int
    first: int
    last: int

    def overlaps(self, other: Buffer) -> bool:
        """Whether both are in use at some step, so that they must not share memory."""
        return self.first <= other.last and other.first <= self.last


def place_buffers(buffers: Sequence[Buffer]) -> list[int]:
    """Return an offset in bytes for each buffer.

    Greedy by size: the largest buffer first, each at the lowest offset that is free during its whole life. Optimal
    placement is NP-hard; :func:`live_bytes` gives the bound to compare with, which chains of shrinking layers
    reach. Sizes that are multiples of 4 give offsets that are too.
    """
    offsets: dict[int, int] = {}
    for index in sorted(range(len(buffers)), key=lambda i: (-buffers[i].nbytes, buffers[i].first, i)):
        buffer = buffers[index]
        busy = sorted((start, start + buffers[i].nbytes) for i, start in offsets.items() if buffer.overlaps(buffers[i]))
        offset = 0
        for start, end in busy:
            if offset + buffer.nbytes <= start:
                break
            offset = max(offset, end)
        offsets[index] = offset
    return [offsets[index] for index in range(len(buffers))]


def live_bytes(buffers: Sequence[Buffer], num_steps: int) -> list[int]:
    """Bytes of all buffers in use at each step: no placement can be smaller than the largest of these."""
    return [sum(b.nbytes for b in buffers if b.first <= step <= b.last) for step in range(num_steps)]
