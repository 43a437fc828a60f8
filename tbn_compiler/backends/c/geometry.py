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
