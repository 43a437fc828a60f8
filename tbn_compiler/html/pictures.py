"""Pictures as data: where everything lies, in the coordinates of an SVG. Templates draw it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

_COLORS = 6  # that the style has for buffers

# Pixels of a picture in its natural size.
_LETTER, LINE = 6.8, 14.0  # width of a letter of 11 pixels, and a line of them
_LEFT, _RIGHT, _TOP, _BOTTOM = 16.0, 14.0, 12.0, 40.0
_TICK_GAP = 8.0


def text_width(text: str) -> float:
    """Pixels that a text of 11 pixels takes at most, nearly."""
    return _LETTER * len(text)


def round_ticks(end: float, count: int = 5) -> list[float]:
    """Round numbers from 0 to ``end``, nearly ``count`` steps: 1, 2 or 5 times a power of ten apart."""
    if end <= 0:
        return [0.0]
    rough = end / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    return [index * step for index in range(math.floor(end / step * (1 + 1e-9)) + 1)]


@dataclass(frozen=True)
class Bar:
    """One bar of a row: a share of the longest one, and inside it a share that is filled.

    Attributes:
        what: what it counts.
        length: percent of the panel.
        filled: percent of the panel.
        text: the numbers.
    """

    what: str
    length: float
    filled: float
    text: str


@dataclass(frozen=True)
class Bars:
    """Bars for each of several things, in the order given.

    Attributes:
        caption: what it shows.
        rows: name and bars.
    """

    caption: str
    rows: tuple[tuple[str, tuple[Bar, ...]], ...]

    kind = "bars"


@dataclass(frozen=True)
class Box:
    """A buffer: in use from step ``first`` to ``last``, at ``offset`` bytes."""

    name: str
    nbytes: int
    offset: int
    first: int
    last: int


@dataclass(frozen=True)
class Rectangle:
    """A box in pixels, with the lines of text that fit into it, centred at ``middle``."""

    x: float
    y: float
    width: float
    height: float
    color: int
    title: str
    lines: tuple[tuple[float, str], ...]
    middle: float


@dataclass(frozen=True)
class Tick:
    """A mark on an axis, in pixels, with its label."""

    at: float
    label: str


@dataclass(frozen=True)
class MemoryMap:
    """Buffers in a block of memory: time to the right, offsets upwards.

    Attributes:
        caption: what it shows.
        boxes: the buffers.
        live: bytes in use at each step.
        size: bytes of the block.
    """

    caption: str
    boxes: tuple[Box, ...]
    live: tuple[int, ...]
    size: int

    kind = "memory_map"

    @cached_property
    def _step(self) -> float:
        """Pixels of a step: room for its number, more if there are few steps."""
        return max(text_width(str(len(self.live))) + _TICK_GAP, min(150.0, 640.0 / max(len(self.live), 1)))

    @cached_property
    def left(self) -> float:
        """Where the plot begins: behind the longest label of the other axis."""
        return _LEFT + 14.0 + text_width(f"{self.size:,}") + _TICK_GAP

    @property
    def top(self) -> float:
        """Where the plot begins from above."""
        return _TOP

    @cached_property
    def right(self) -> float:
        """Where the plot ends."""
        return self.left + self._step * len(self.live)

    @cached_property
    def bottom(self) -> float:
        """Where the plot ends below."""
        return _TOP + 260.0

    @property
    def width(self) -> float:
        """Of the whole picture."""
        return max(self.right + _RIGHT, 320.0)

    @property
    def height(self) -> float:
        """Of the whole picture."""
        return self.bottom + _BOTTOM

    def _y(self, offset: float) -> float:
        return self.bottom - (self.bottom - self.top) * offset / max(self.size, 1)

    @property
    def offsets(self) -> list[Tick]:
        """Marks of the axis of bytes."""
        return [Tick(self._y(value), f"{value:,.0f}") for value in round_ticks(self.size)]

    @property
    def steps(self) -> list[Tick]:
        """Marks of the axis of steps, at their middles."""
        return [Tick(self.left + self._step * (index + 0.5), str(index)) for index in range(len(self.live))]

    @property
    def rectangles(self) -> list[Rectangle]:
        """The buffers, with their names where they fit."""
        found = []
        for number, box in enumerate(self.boxes):
            x, width = self.left + self._step * box.first, self._step * (box.last - box.first + 1)
            y, height = self._y(box.offset + box.nbytes), self._y(box.offset) - self._y(box.offset + box.nbytes)
            texts = (box.name, f"{box.nbytes:,} B")
            lines = [text for text in texts if max(text_width(box.name), text_width(text)) <= width - 6]
            lines = lines[: max(0, int((height - 4) // LINE))]
            # In its first step, where no line of another step's height crosses, if that is wide enough.
            fits_a_step = all(text_width(text) <= self._step - 6 for text in lines)
            middle = x + (self._step if fits_a_step else width) / 2
            start = y + height / 2 - LINE * (len(lines) - 1) / 2 + 4
            placed = tuple((start + LINE * index, text) for index, text in enumerate(lines))
            title = f"{box.name}: {box.nbytes:,} bytes at {box.offset:,}, steps {box.first} to {box.last}"
            found.append(Rectangle(x, y, width, height, number % _COLORS, title, placed, middle))
        return found

    @property
    def live_corners(self) -> list[tuple[float, float]]:
        """The corners of the line of bytes in use."""
        corners: list[tuple[float, float]] = []
        for index, value in enumerate(self.live):
            x, y = self.left + self._step * index, self._y(value)
            corners += [(x, y), (x + self._step, y)]
        return corners

    @property
    def live_line(self) -> str:
        """The line of bytes in use, for ``<polyline>``."""
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in self.live_corners)


@dataclass(frozen=True)
class Point:
    """A measured network: its size and what it reached."""

    name: str
    x: float
    y: float


@dataclass(frozen=True)
class Scatter:
    """Numbered points, the size to the right and the quality upwards.

    Attributes:
        caption: what it shows.
        x_title, y_title: what the axes are, units included.
        points: what is shown, numbered from 1; the names stand in a list beside it.
    """

    caption: str
    x_title: str
    y_title: str
    points: tuple[Point, ...]

    kind = "scatter"
    left, top, right, bottom = 70.0, 16.0, 620.0, 280.0
    width, height = 640.0, 326.0
    radius = 9.0

    @cached_property
    def _y_range(self) -> tuple[float, float]:
        low, high = _range(point.y for point in self.points)
        margin = (high - low) * 0.12 or max(abs(high) * 0.1, 1.0)
        return low - margin, high + margin

    @property
    def x_ticks(self) -> list[Tick]:
        """Marks of the axis of sizes, which begins at 0."""
        return [Tick(self._x(value), f"{value:,.0f}") for value in round_ticks(self._x_end)]

    @property
    def y_ticks(self) -> list[Tick]:
        """Marks of the axis of quality."""
        low, high = self._y_range
        step = round_ticks(high - low)[1]
        first, last = math.ceil(low / step), math.floor(high / step)
        return [Tick(self._y(index * step), f"{index * step:.6g}") for index in range(first, last + 1)]

    @cached_property
    def _x_end(self) -> float:
        return max((point.x for point in self.points), default=0.0) * 1.06 or 1.0

    def _x(self, value: float) -> float:
        return self.left + (self.right - self.left) * value / self._x_end

    def _y(self, value: float) -> float:
        low, high = self._y_range
        return self.bottom - (self.bottom - self.top) * (value - low) / (high - low)

    @property
    def places(self) -> list[tuple[float, float, float, float, Point]]:
        """For each point where it is, and where its number stands: beside it, clear of the other numbers."""
        spots = [(self._x(point.x), self._y(point.y)) for point in self.points]
        labels: list[tuple[float, float]] = []
        for x, y in spots:
            labels.append(_free_place(x, y, self.radius, [*labels, *spots], self))
        return [(*spot, *label, point) for spot, label, point in zip(spots, labels, self.points, strict=True)]


def _free_place(
    x: float, y: float, radius: float, taken: Sequence[tuple[float, float]], frame: Scatter
) -> tuple[float, float]:
    """The nearest centre around a point, on growing circles, where a number overlaps nothing and leaves no frame."""
    for ring in range(1, 12):
        distance = radius + 6.0 * ring
        for turn in range(12):
            angle = math.pi / 2 - turn * math.pi / 6  # from above, clockwise
            place = x + distance * math.cos(angle), y - distance * math.sin(angle)
            inside = (
                frame.left + radius < place[0] < frame.right - radius
                and frame.top + radius < place[1] < frame.bottom - radius
            )
            if inside and all(math.dist(place, other) >= 1.7 * radius for other in taken):
                return place
    return x, y


def _range(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return (min(found), max(found)) if found else (0.0, 1.0)
