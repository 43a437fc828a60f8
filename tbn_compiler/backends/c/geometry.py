"""The geometry of windows as the kernels read it."""

from __future__ import annotations

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.plan import Struct


def window_struct(window: ir.Window) -> Struct:
    """``window``: the geometry of a convolution or a pooling; layers with the same one share it."""
    fields = tuple(
        (f"{name}_{axis}", pair[i])
        for name, pair in (
            ("input", window.input),
            ("output", window.output),
            ("kernel", window.kernel),
            ("stride", window.stride),
            ("padding", window.padding),
            ("dilation", window.dilation),
        )
        for i, axis in enumerate(("height", "width"))
    )
    size = f"{window.kernel[0]} x {window.kernel[1]} on {window.input[0]} x {window.input[1]}"
    return Struct("window", f"window_{window.kernel[0]}x{window.kernel[1]}", f"window of {size}", fields)


def whole_places(window: ir.Window, axis: int) -> tuple[int, int]:
    """The output rows (axis 0) or columns (axis 1) where all of the window is inside: the first, and behind the last.

    Both are the same where there are none.
    """
    whole = [place for place, count in enumerate(inside(window, axis)) if count == window.kernel[axis]]
    return (whole[0], whole[-1] + 1) if whole else (0, 0)


def inside(window: ir.Window, axis: int) -> list[int]:
    """How many rows (axis 0) or columns (axis 1) of the window are inside the image, at each output row or column."""
    size, stride, padding = window.input[axis], window.stride[axis], window.padding[axis]
    offsets = [i * window.dilation[axis] - padding for i in range(window.kernel[axis])]
    return [sum(0 <= place * stride + offset < size for offset in offsets) for place in range(window.output[axis])]
