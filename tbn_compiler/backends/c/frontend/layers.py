"""Linear layers and convolutions, with float weights and on tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.attention import plus, product
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.reductions import pair
from tbn_compiler.backends.c.frontend.registry import Arguments, converts
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.tiling import LayoutKind, TileLayout

_aten, _tbn = torch.ops.aten, torch.ops.tbn

_LAYOUTS: tuple[LayoutKind, ...] = ("flat", "two-axis", "staggered", "hadamard")


@converts(_aten.linear.default)
def _linear(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation | Sequence[ir.Operation]:
    if importer.is_computed(args["weight"]):
        return _computed_linear(importer, node, args)
    weight = importer.constant(node, args["weight"])
    bias = importer.optional_constant(node, args["bias"])
    if weight.array.ndim != 2:
        raise importer.unsupported(node, "the weight is not a matrix")
    layer = weight.name.removesuffix(".weight")
    return ir.Linear(**importer.head(node, args["input"], layer=layer), weight=weight, bias=bias)


def _computed_linear(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    """A product with a matrix that the model computes, transposed."""
    operation = product(importer, node, args["input"], args["weight"], transposed=True)
    return (operation,) if args["bias"] is None else plus(importer, node, operation, args["bias"])


@converts(_aten.embedding.default)
def _embedding(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    head = importer.typed_head(node, "int32", args["indices"])
    table = importer.operand(node, args["weight"], head["output"].dtype)
    head["inputs"] += (table,)
    rows, columns = table.shape
    return ir.Gather(**head, outer=1, rows=rows, columns=columns)


@converts(_aten.conv1d.default, _aten.conv1d.padding, _aten.conv2d.default, _aten.conv2d.padding)
def _conv(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    weight = importer.constant(node, args["weight"])
    bias = importer.optional_constant(node, args["bias"])
    head = importer.head(node, args["input"], layer=weight.name.removesuffix(".weight"))
    window = conv_window(args, head["inputs"][0].shape, head["output"].shape, weight.shape[2:])
    return ir.Conv(**head, weight=weight, bias=bias, window=window, groups=args["groups"])


@converts(_aten.conv_transpose1d.default, _aten.conv_transpose2d.input)
def _conv_transpose(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    weight = importer.constant(node, args["weight"])
    bias = importer.optional_constant(node, args["bias"])
    head = importer.head(node, args["input"], layer=weight.name.removesuffix(".weight"))
    window = conv_window(args, head["output"].shape, head["inputs"][0].shape, weight.shape[2:])
    return ir.ConvTranspose(**head, weight=weight, bias=bias, window=window, groups=args["groups"])


def conv_window(
    args: Arguments, image: tuple[int, ...], positions: tuple[int, ...], kernel: tuple[int, ...]
) -> ir.Window:
    """The window that slides over an ``image`` and stops at ``positions``; both are shapes that end in the sizes."""
    dims = len(kernel)
    dilation, padding = pair(args["dilation"], dims), args["padding"]
    if padding == "same":
        # An odd number of padding rows has the larger part at the end, where any distance is allowed.
        padding = [d * (k - 1) // 2 for d, k in zip(dilation[-dims:], kernel, strict=True)]
    elif padding == "valid":
        padding = [0]
    return ir.Window(
        input=pair(image[-dims:]),
        output=pair(positions[-dims:]),
        kernel=pair(kernel),
        stride=pair(args["stride"], dims),
        padding=pair(padding, dims, missing=0),
        dilation=dilation,
    )


@converts(_tbn.conv_transpose1d.default, _tbn.conv_transpose2d.default)
def _tiled_conv_transpose(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    tile, kernel, groups = importer.tile(node, args["tile"]), args["kernel_size"], args["groups"]
    head = importer.head(node, args["input"], layer=_layer_of(tile))
    return ir.TiledConvTranspose(
        **head,
        tile=tile,
        alpha=importer.constant(node, args["alpha"]),
        bias=importer.optional_constant(node, args["bias"]),
        input_alpha=None,
        layout=layout_of(importer, node),
        window=conv_window(args, head["output"].shape, head["inputs"][0].shape, tuple(kernel)),
        groups=groups,
    )


@converts(_tbn.linear.default)
def _tiled_linear(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    before, head, tail = tiled_head(importer, node, args)
    return *before, ir.TiledLinear(**head, **tile_of(importer, node, args), layout=layout_of(importer, node)), *tail


@converts(_tbn.conv1d.default, _tbn.conv2d.default)
def _tiled_conv(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    before, head, tail = tiled_head(importer, node, args)
    window = conv_window(args, head["inputs"][0].shape, head["output"].shape, tuple(args["kernel_size"]))
    layer = {**head, **tile_of(importer, node, args), "layout": layout_of(importer, node), "window": window}
    return *before, ir.TiledConv(**layer, groups=args["groups"]), *tail


def layout_of(importer: Importer, node: fx.Node) -> TileLayout:
    """The layout of a tiled layer's weight; the kernels follow it element by element."""
    call = tiled_call(node)
    assert call is not None
    if call.layout.kind not in _LAYOUTS:
        raise importer.unsupported(node, f"its tile has the layout {call.layout.kind!r}")
    return call.layout


def tiled_head(
    importer: Importer, node: fx.Node, args: Arguments
) -> tuple[Sequence[ir.Operation], dict[str, Any], Sequence[ir.Operation]]:
    """What quantises the input, the fields that all operations share, and the fused function, if there are such."""
    head = importer.head(node, args["input"], layer=_layer_of(importer.tile(node, args["tile"])))
    first: Sequence[ir.Operation] = ()
    if args["activation"] != "float":
        scale = _input_scale(importer, node, args)
        (source,) = head["inputs"]
        integers = ir.Value(f"{node.name}_input", source.shape, "int8")
        first = (ir.Quantize(integers.name, head["layer"], (source,), integers, scale),)
        head |= {"inputs": (integers,), "input_scale": scale}
    if args["epilogue"] == "none":
        return first, head, ()
    before = importer.temporary(node, "before", head["output"].shape)
    function = ir.Unary(head["name"], head["layer"], (before,), head["output"], function=args["epilogue"])
    return first, head | {"name": before.name, "output": before}, (function,)


def _input_scale(importer: Importer, node: fx.Node, args: Arguments) -> float:
    """What the integer 1 stands for in a layer's input."""
    if args["activation"] != "int8":
        raise importer.unsupported(node, f"activation={args['activation']!r}: inputs are floats or int8 in C")
    if args["input_scale"] is None:
        reason = "each token has a scale of its own, and in C a layer has one: tbn_compiler.optimize(..., "
        reason += "calibration=batches), with calibration batches in which its inputs are not all 0"
        raise importer.unsupported(node, reason)
    return importer.positive(node, importer.constant(node, args["input_scale"], infinite=True).array.item())


@converts(_tbn.quantize_input.default)
def _quantize_input(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    return _rounded(importer, node, args["input"], _input_scale(importer, node, args | {"input_scale": args["scale"]}))


@converts(_aten.fake_quantize_per_tensor_affine.default)
def _fake_quantize(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    limits = (args["zero_point"], args["quant_min"], args["quant_max"])
    if limits != (0, -ir.INT8_LIMIT, ir.INT8_LIMIT):
        raise importer.unsupported(
            node, f"zero point and limits are {limits}, not {(0, -ir.INT8_LIMIT, ir.INT8_LIMIT)}"
        )
    return _rounded(importer, node, args["self"], importer.positive(node, args["scale"]))


def _rounded(importer: Importer, node: fx.Node, value: Any, scale: float) -> Sequence[ir.Operation]:
    """Numbers that int8 holds: they may stay integers."""
    head = importer.head(node, value)
    integers = ir.Value(f"{node.name}_int8", head["output"].shape, "int8")
    first = ir.Quantize(integers.name, head["layer"], head["inputs"], integers, scale)
    return first, ir.Dequantize(**(head | {"inputs": (integers,)}), scale=scale)


def _layer_of(tile: ir.Constant) -> str:
    return tile.name.removesuffix("_tile").removesuffix(".weight")


def tile_of(importer: Importer, node: fx.Node, args: Arguments) -> dict[str, Any]:
    """The stored tensors of a tiled layer."""
    stored = {"tile": importer.tile(node, args["tile"]), "alpha": importer.constant(node, args["alpha"])}
    return stored | {name: importer.optional_constant(node, args[name]) for name in ("bias", "input_alpha")}
