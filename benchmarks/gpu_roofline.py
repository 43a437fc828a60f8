"""What a GPU allows for a linear layer or a convolution: times from counted instructions, bytes and operations.

The model of a tiled layer is that of kernels as they could be, not as they are: the constants are instructions counted
in machine code for sm_90 (a weight's bits summed inside a thread for one row of input; inputs as two 8-bit integers for
large layers; bits expanded as the right operand of ``wgmma`` for many rows, or once into memory for the library). Rates
and the time of an empty kernel are the card's own, see :class:`Ceilings`. No time of a tiled kernel goes in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

CLOCK = 1750.0  # MHz: cycles a microsecond of a Hopper multiprocessor under load
NOMINAL_FLOP = 790e6  # a microsecond: the rate for which the efficiencies below were found
FEW_ROWS = 16  # beyond these the model multiplies on tensor cores in blocks of 128 tokens


@dataclass(frozen=True)
class Ceilings:
    """What a card reaches.

    Attributes:
        bytes_per_us: copying, bytes read and bytes written together.
        flop_per_us: a large product of bf16 matrices.
        empty_us: a kernel that does nothing, between the events that time a call.
        processors: multiprocessors.
    """

    bytes_per_us: float
    flop_per_us: float
    empty_us: float
    processors: int = 132


@dataclass(frozen=True)
class Estimate:
    """A modelled time.

    Attributes:
        way: how it is computed.
        parts: microseconds, by what they go to.
        us: their sum.
    """

    way: str
    parts: Mapping[str, float]
    us: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "us", sum(self.parts.values()))

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {us:.1f}" for name, us in self.parts.items() if us >= 0.05)
        return f"{self.way}: {self.us:.1f} us ({parts})"


def dense_linear(m: int, n: int, batch: int, card: Ceilings) -> Estimate:
    """CuBLAS in bf16: the longer of moving everything once and multiplying in blocks of 128 x 256."""
    blocks = math.ceil(m / 128) * math.ceil(batch / 256)
    filled = max(blocks / (math.ceil(blocks / card.processors) * card.processors), 0.75)
    product = 2.0 * m * n * batch / card.flop_per_us / (filled if batch >= 256 else 1)
    moved = 2.0 * (m * n + batch * (m + n)) / card.bytes_per_us
    return Estimate("dense", {"launch": card.empty_us, "product or memory": max(product, moved)})


def tiled_linear(m: int, n: int, batch: int, p: int, card: Ceilings, *, copies: bool = True) -> Estimate:
    """The fastest way that is modelled for an aligned layer of ``m / p`` different rows.

    Args:
        m: rows of the weight.
        n: columns.
        batch: rows of the input.
        p: copies of the tile.
        card: its ceilings.
        copies: whether all ``m`` columns of the result are written, or only the different ones.
    """
    rows = m // p
    written = m if copies else rows
    if batch == 1:
        ways = [_sum(rows, n, card), _integers(rows, n, card)]
    elif batch < 256:
        ways = list(_expanded_left(rows, n, batch, written, card))
    else:
        ways = [*_expanded_right(rows, n, batch, written, card), _unpacked(rows, n, batch, written, card)]
    return min(ways, key=lambda way: way.us)


def _write(columns: int, batch: int, card: Ceilings) -> float:
    return 2.0 * columns * batch / card.bytes_per_us


def _sum(rows: int, columns: int, card: Ceilings) -> Estimate:
    """One row of input: each thread sums 32 weights; (rows a block, instructions for 4096 columns)."""
    compute = math.inf
    for block, instructions in ((8, 1143), (16, 1913), (4, 633)):
        share = math.ceil(math.ceil(rows / block) / card.processors)
        compute = min(compute, columns / 4096 * share * instructions / CLOCK + 0.6)
    memory = rows * columns / 8 / card.bytes_per_us
    return Estimate("sums of bits", {"launch": card.empty_us + 1, "instructions or memory": max(compute, memory)})


def _integers(rows: int, columns: int, card: Ceilings) -> Estimate:
    """One row of input as two 8-bit integers, four products an instruction; the integers are a kernel of their own."""
    share = math.ceil(math.ceil(rows / 8) / card.processors)
    compute = columns / 4096 * share * 384 / CLOCK + 0.6
    memory = rows * columns / 8 / card.bytes_per_us
    parts = {"launches": 2 * card.empty_us + 1, "instructions or memory": max(compute, memory)}
    return Estimate("sums of 8-bit integers", parts)


def _expanded_left(rows: int, columns: int, batch: int, written: int, card: Ceilings) -> Iterator[Estimate]:
    """Some rows of input: bits expanded as the left operand, 500 cycles a step of 128 x 128 weights."""
    for block, factor in ((128, 1.0), (64, 0.66)):
        if batch < block:
            block, factor = max(16, batch), 0.8
        blocks, split = math.ceil(rows / 128) * math.ceil(batch / block), 1
        while split < 8 and blocks * split * 2 <= card.processors and math.ceil(columns / 128) // (split * 2) >= 4:
            split *= 2
        waves = math.ceil(blocks * split / card.processors)
        parts = {
            "launch": card.empty_us + 1,
            "steps": waves * math.ceil(columns / 128 / split) * 500 * factor / CLOCK,
            "partial sums": split * batch * rows * 4 / card.bytes_per_us + 3.0 if split > 1 else 0.0,
            "output": _write(written, batch, card) * (1.0 if waves < 2 else 0.5),
        }
        yield Estimate("bits as left operand", parts)


def _expanded_right(rows: int, columns: int, batch: int, written: int, card: Ceilings) -> Iterator[Estimate]:
    """Many rows of input: bits expanded as the right operand of ``wgmma`` at 0.78 of its rate."""
    efficiency = 0.78 * card.flop_per_us / NOMINAL_FLOP
    for block in (128, 256):
        blocks = math.ceil(rows / 128) * math.ceil(batch / block)
        for split in (1, 2, 4, 8):
            if columns / 64 / split < 4:
                continue
            waves = math.ceil(blocks * split / card.processors)
            parts = {
                "launch": card.empty_us + 1 + (1.5 if split > 1 else 0),
                "product": waves * columns / 64 / split * block / 128 * 512 / efficiency / CLOCK,
                "output": _write(written, batch, card) * (1.0 if waves < 2 else 0.4),
            }
            yield Estimate("bits as right operand", parts)


def _unpacked(rows: int, columns: int, batch: int, written: int, card: Ceilings) -> Estimate:
    """Many rows of input: bits expanded once into memory, the library's product, one kernel that writes the copies."""
    product = dense_linear(rows, columns, batch, card).us - card.empty_us
    copies = (2.0 * rows * batch + 2.0 * written * batch) / card.bytes_per_us
    parts = {
        "launches": 7.0,  # three kernels of a stream at 2 us each, the first one begins 1 us late
        "expanding": 2.0 * rows * columns / card.bytes_per_us,
        "product": product,
        "output": copies,
    }
    return Estimate("unpacked once", parts)


def convolution(channels: int, size: int, images: int, p: int, card: Ceilings, *, copies: bool = True) -> Estimate:
    """A 3 x 3 convolution with as many outputs as inputs: the longer of moving and multiplying; dense at ``p`` 1.

    Nothing is counted here: it is what remains where neither is ever idle, so more than any kernel reaches.
    """
    positions = images * size * size
    product = 2.0 * 9 * channels**2 * positions / p / card.flop_per_us
    written = channels if copies else channels // p
    weight = 9 * channels**2 / p * (2.0 if p == 1 else 0.125)
    moved = (2.0 * positions * (channels + written) + weight) / card.bytes_per_us
    return Estimate("convolution", {"launch": card.empty_us, "product or memory": max(product, moved)})
