"""Which elements of arrays an operation reads: by strides, along an axis, under a window."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Access:
    """Which elements of an array an operation reads, as an array of another shape: ``offset + sum(index * strides)``.

    Strides are in elements; 0 repeats an element, a negative one goes backwards.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Access:
        """All elements in order."""
        return cls(shape, row_major(shape))

    @classmethod
    def broadcast(cls, shape: tuple[int, ...], sizes: tuple[int, ...]) -> Access:
        """An array seen with more sizes: dimensions are added in front, and those of size 1 are repeated."""
        aligned = (1,) * (len(sizes) - len(shape)) + shape
        strides = row_major(aligned)
        return cls(sizes, tuple(0 if n == 1 else s for n, s in zip(aligned, strides, strict=True)))

    @property
    def in_order(self) -> bool:
        """Whether these are neighbouring elements in order."""
        used = [(n, s) for n, s in zip(self.sizes, self.strides, strict=True) if n > 1]
        return tuple(s for _, s in used) == row_major(tuple(n for n, _ in used))


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of an array of this shape."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return tuple(reversed(strides))


@dataclass(frozen=True)
class Axis:
    """An axis in the middle of an array: ``[outer, size, inner]``."""

    outer: int
    size: int
    inner: int

    @classmethod
    def of(cls, shape: tuple[int, ...], dim: int) -> Axis:
        """A dimension of an array."""
        return cls(math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]))


@dataclass(frozen=True)
class Window:
    """How a window of a 2-D convolution or pooling slides over an image; 1-D has height 1. Pairs are (height, width).

    Attributes:
        input, output: sizes of the images.
        kernel: size of the window.
        stride, padding, dilation: as in PyTorch; the padding is that before the first row and column. The window may
            reach any distance beyond the last ones: what lies outside counts as padding.
    """

    input: tuple[int, int]
    output: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def input_size(self) -> int:
        """Elements of one channel of the input."""
        return math.prod(self.input)

    @property
    def output_size(self) -> int:
        """Elements of one channel of the output."""
        return math.prod(self.output)

    @property
    def kernel_size(self) -> int:
        """Elements of the window."""
        return math.prod(self.kernel)
