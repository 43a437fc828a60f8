"""Linear layers and convolutions, with float weights and on tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.registry import Arguments, converts
from tbn_compiler.tiling import TileLayout

_aten, _tbn = torch.ops.aten, torch.ops.tbn


@converts(_aten.linear.default)
def _linear(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    weight = importer.constant(node, args["weight"])
    bias = importer.optional_constant(node, args["bias"])
    if weight.array.ndim != 2:
        raise importer.unsupported(node, "the weight is not a matrix")
    layer = weight.name.removesuffix(".weight")
    return ir.Linear(**importer.head(node, args["input"], layer=layer), weight=weight, bias=bias)


@converts(_tbn.linear.default)
def _tiled_linear(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    shape = (args["out_features"], args["in_features"])
    return ir.TiledLinear(
        **_tiled_head(importer, node, args),
        **_tile(importer, node, args),
        layout=TileLayout(shape, args["p"], args["p_in"], args["shift"]),
    )


@converts(_tbn.conv1d.default, _tbn.conv2d.default)
def _tiled_conv(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    head = _tiled_head(importer, node, args)
    (source,) = head["inputs"]
    kernel, groups = args["kernel_size"], args["groups"]
    shape = (args["out_channels"], args["in_channels"] // groups, *kernel)
    dims = len(kernel)
    window = ir.Window(
        input=pair(source.shape[-dims:]),
        output=pair(head["output"].shape[-dims:]),
        kernel=pair(kernel),
        stride=pair(args["stride"], dims),
        padding=pair(args["padding"], dims, missing=0),
        dilation=pair(args["dilation"], dims),
    )
    layout = TileLayout(shape, args["p"], args["p_in"], args["shift"])
    return ir.TiledConv(**head, **_tile(importer, node, args), layout=layout, window=window, groups=groups)


def _tiled_head(importer: Importer, node: fx.Node, args: Arguments) -> dict[str, Any]:
    tile = importer.constant(node, args["tile"])
    if args["activation"] != "float":
        raise importer.unsupported(node, f"activation={args['activation']!r}: inputs stay in float in C")
    if args["epilogue"] != "none":
        raise importer.unsupported(node, f"epilogue={args['epilogue']!r}")
    layer = tile.name.removesuffix("_tile").removesuffix(".weight")
    return importer.head(node, args["input"], layer=layer)


def _tile(importer: Importer, node: fx.Node, args: Arguments) -> dict[str, Any]:
    names = ("tile", "alpha")
    optional = ("bias", "input_alpha")
    return {name: importer.constant(node, args[name]) for name in names} | {
        name: importer.optional_constant(node, args[name]) for name in optional
    }


def pair(sizes: Sequence[int], dims: int | None = None, missing: int = 1) -> tuple[int, int]:
    """Sizes as (height, width): a single one is that of all ``dims``, and 1-D has the height ``missing``."""
    sizes = list(sizes)
    if dims is not None and len(sizes) == 1:
        sizes *= dims
    height, width = sizes if len(sizes) == 2 else (missing, sizes[0])
    return height, width
