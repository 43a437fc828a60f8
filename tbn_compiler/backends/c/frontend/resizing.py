"""Images of another size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.reductions import pair
from tbn_compiler.backends.c.frontend.registry import Arguments, Converter, converts
from tbn_compiler.backends.c.frontend.shapes import moved

_aten = torch.ops.aten


def _nearest(mode: str) -> Converter:
    """The converter of a resize to the nearest pixel."""

    def convert(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
        head = importer.head(node, args["input"])
        (source,), output = head["inputs"], head["output"]
        before, after = source.shape[2:], output.shape[2:]
        scales = args["scale_factors"] or [None] * len(before)
        places = [_places(mode, *sizes) for sizes in zip(before, after, scales, strict=True)]
        even = [[i * n // m for i in range(m)] for n, m in zip(before, after, strict=True)]
        if places != even:
            return _by_table(importer, node, head, places)
        planes, sizes = math.prod(source.shape[:2]), (pair(before), pair(after))
        return ir.Resample(**head, function="resize_nearest", planes=planes, input_size=sizes[0], output_size=sizes[1])

    return convert


converts(_aten.upsample_nearest1d.vec, _aten.upsample_nearest2d.vec)(_nearest("nearest"))
converts(_aten._upsample_nearest_exact1d.vec, _aten._upsample_nearest_exact2d.vec)(_nearest("nearest-exact"))


def _places(mode: str, before: int, after: int, scale: float | None) -> list[int]:
    """Which pixels PyTorch takes along a side: it rounds with the scale that it was given."""
    indices = torch.arange(before, dtype=torch.float32)[None, None]
    options: dict[str, Any] = {"size": after} if scale is None else {"scale_factor": scale}
    places: list[int] = F.interpolate(indices, mode=mode, **options).flatten().int().tolist()
    return places


def _by_table(importer: Importer, node: fx.Node, head: dict[str, Any], places: list[list[int]]) -> ir.Operation:
    """Rows by a table of indices, then columns by another one."""
    (source,), output = head["inputs"], head["output"]
    shape = list(source.shape)
    for axis, rows in enumerate(places, start=2):
        outer, size, columns = (math.prod(part) for part in (shape[:axis], shape[axis : axis + 1], shape[axis + 1 :]))
        shape[axis] = len(rows)
        last = axis == len(shape) - 1
        result = output if last else importer.temporary(node, f"axis_{axis}", tuple(shape))
        index = importer.new_constant(f"{node.name} axis {axis}", np.array(rows, np.int32))
        operands = (index, source)
        gather = ir.Gather(result.name, head["layer"], operands, result, outer=outer, rows=size, columns=columns)
        if last:
            return gather
        source = importer.add_before(gather)
    raise AssertionError("an image has an axis")


@converts(_aten.upsample_linear1d.vec, _aten.upsample_bilinear2d.vec)
def _resize_linear(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    head = importer.head(node, args["input"])
    (source,), output = head["inputs"], head["output"]
    before, after, corners = source.shape[2:], output.shape[2:], args["align_corners"]
    if before == after:
        return moved(head["name"], head["layer"], source, output, ir.Access.whole(source.shape))
    scales = args["scale_factors"] or [None] * len(before)
    steps = [_step(corners, *sizes) for sizes in zip(before, after, scales, strict=True)]
    height, width = ([1.0] * (2 - len(steps)) + steps)[-2:]
    return ir.Resample(
        **head,
        function="resize_linear",
        planes=math.prod(source.shape[:2]),
        input_size=pair(before),
        output_size=pair(after),
        parameters=(height, width, 0.0 if corners else 0.5),
    )


def _step(corners: bool, before: int, after: int, scale: float | None) -> float:
    """How far apart in the input neighbouring pixels of the output lie."""
    if corners:
        return (before - 1) / (after - 1) if after > 1 else 0.0
    return 1 / scale if scale else before / after
