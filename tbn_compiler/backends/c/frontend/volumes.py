"""Operators on volumes ``[N, C, D, H, W]``, as those on images: of slices, or of what lies in a window's depth.

A convolution with a kernel of depth ``d`` reads, for each slice of its result, ``d`` slices of every channel. Taken for
channels, they make a sample of an image with ``C d`` channels, and the weight ``[m, C, d, h, w]`` is, as it is stored,
that of a convolution of such images: ``[m, C d, h, w]``. Tiles whose copies follow one another stay what they are, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.layers import conv_window, layout_of, tile_of, tiled_head
from tbn_compiler.backends.c.frontend.registry import Arguments, Converter, converts, converts_results
from tbn_compiler.backends.c.frontend.shapes import moved
from tbn_compiler.tiling import TileLayout

_aten, _tbn = torch.ops.aten, torch.ops.tbn


def _head_and_weight(importer: Importer, node: fx.Node, args: Arguments) -> tuple[dict[str, Any], ir.Constant]:
    weight = importer.constant(node, args["weight"])
    return importer.head(node, args["input"], layer=weight.name.removesuffix(".weight")), weight


@converts(_aten.conv3d.default, _aten.conv3d.padding)
def _conv(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    return _float_conv(importer, node, args, *_head_and_weight(importer, node, args))


def _float_conv(
    importer: Importer, node: fx.Node, args: Arguments, head: dict[str, Any], weight: ir.Constant
) -> Sequence[ir.Operation]:
    volumes = _Windows(importer, node, args, head, weight.shape[2:])
    rows, inputs, depth, *kernel = weight.shape
    flat = replace(weight, array=weight.array.reshape(rows, inputs * depth, *kernel))
    bias, window = importer.optional_constant(node, args["bias"]), volumes.window
    layer = ir.Conv(**volumes.image_head(), weight=flat, bias=bias, window=window, groups=args["groups"])
    return *volumes.before, layer, volumes.back(layer.output)


@converts(_tbn.conv3d.default)
def _tiled_conv(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    before, head, tail = tiled_head(importer, node, args)
    layout = layout_of(importer, node)
    final = tail[-1].output if tail else head["output"]
    if layout.kind not in ("flat", "staggered"):
        weight = _decoded(tile_of(importer, node, args), layout)
        return *before, *_as_floats(importer, node, head), *_float_conv(importer, node, args, head, weight), *tail
    volumes = _Windows(importer, node, args, head | {"output": final}, tuple(args["kernel_size"]))
    rows, inputs, depth, *kernel = layout.shape
    flat = replace(layout, shape=(rows, inputs * depth, *kernel))
    given = {name: head[name] for name in ("input_scale",) if name in head}
    stored = tile_of(importer, node, args)
    layer: ir.Operation = ir.TiledConv(
        **volumes.image_head(), **stored, **given, layout=flat, window=volumes.window, groups=args["groups"]
    )
    layers = [layer]
    for function in tail:  # while the slices are apart, so that the layer can apply a ReLU itself
        applied = importer.temporary(node, "applied", layer.output.shape)
        layers.append(replace(function, name=applied.name, inputs=(layer.output,), output=applied))
    return *before, *volumes.before, *layers, volumes.back(layers[-1].output)


def _decoded(stored: dict[str, Any], layout: TileLayout) -> ir.Constant:
    """The weight of a tile whose copies are interleaved along the channels."""
    tile, alpha = (torch.from_numpy(stored[name].array.copy()) for name in ("tile", "alpha"))
    options = {"p_in": layout.p_in, "shift": layout.shift, "hadamard": layout.hadamard}
    weight = _tbn.unpack(tile, alpha, layout.shape, layout.p, **options)
    if stored["input_alpha"] is not None:  # the channels stand for copies
        scales = torch.from_numpy(stored["input_alpha"].array.copy())
        copies = weight.unflatten(1, (len(scales), -1))
        weight = (copies * scales.reshape(-1, *(1,) * (copies.dim() - 2))).sum(1)
    name = stored["tile"].name.removesuffix("_tile")
    return ir.Constant(name, weight.numpy(), tile_bytes=stored["tile"].array.nbytes)


def _as_floats(importer: Importer, node: fx.Node, head: dict[str, Any]) -> Sequence[ir.Operation]:
    """What gives a layer without a kernel on int8 the same numbers as floats."""
    scale = head.pop("input_scale", None)
    if scale is None:
        return ()
    (integers,) = head["inputs"]
    floats = importer.temporary(node, "floats", integers.shape)
    head["inputs"] = (floats,)
    return (ir.Dequantize(floats.name, head["layer"], (integers,), floats, scale),)


def _image_head(head: dict[str, Any], source: ir.Value, output: ir.Value) -> dict[str, Any]:
    return {"name": output.name, "layer": head["layer"], "inputs": (source,), "output": output}


class _Windows:
    """The slices of volumes under the windows of a convolution, as images whose channels they are.

    Attributes:
        before: what brings them there.
        window: what slides over the images.
    """

    def __init__(
        self, importer: Importer, node: fx.Node, args: Arguments, head: dict[str, Any], kernel: tuple[int, ...]
    ) -> None:
        self.before: list[ir.Operation] = []
        self._importer, self._node, self._head = importer, node, head
        (source,) = head["inputs"]
        assert isinstance(source, ir.Value)
        samples, channels, depth, *image = _five(source.shape)
        _, filters, self._depth, height, width = _five(head["output"].shape)
        stride, dilation, padding = (_three(args[name]) for name in ("stride", "dilation", "padding"))
        start = dilation[0] * (kernel[0] - 1) // 2 if args["padding"] == "same" else padding[0]
        reach = (self._depth - 1) * stride[0] + (kernel[0] - 1) * dilation[0] + 1
        if start or reach > depth:
            source = self._padded(
                source, (samples, channels, depth, math.prod(image)), start, max(reach, start + depth)
            )
            depth = source.shape[2]
        size = math.prod(image)
        access = ir.Access(
            (samples, self._depth, channels, kernel[0], size),
            (channels * depth * size, stride[0] * size, depth * size, dilation[0] * size, 1),
        )
        shape = (samples * self._depth, channels * kernel[0], *image)
        self._source = importer.temporary(node, "slices", shape, source.dtype)
        self.before.append(moved(self._source.name, head["layer"], source, self._source, access))
        self._output = importer.temporary(node, "images", (samples * self._depth, filters, height, width))
        self.window = conv_window(_of_images(args), shape, self._output.shape, kernel[1:])

    def _padded(self, source: ir.Value, shape: tuple[int, ...], start: int, depth: int) -> ir.Value:
        """Volumes with slices of zeros around them."""
        samples, channels, _, size = shape
        padded = self._importer.temporary(self._node, "padded", (samples, channels, depth, size), source.dtype)
        strides = ir.row_major(padded.shape)
        result = ir.Access(shape, strides, start * size)
        self.before.append(ir.Pad(padded.name, self._head["layer"], (source,), padded, value=0.0, result=result))
        return padded

    def image_head(self) -> dict[str, Any]:
        """The fields that all operations share, of the convolution of images."""
        return _image_head(self._head, self._source, self._output)

    def back(self, images: ir.Value) -> ir.Operation:
        """The slices of the result at their places in volumes."""
        rows, filters, *image = images.shape
        samples, size = rows // self._depth, math.prod(image)
        access = ir.Access(
            (samples, filters, self._depth, size), (self._depth * filters * size, size, filters * size, 1)
        )
        return moved(self._node.name, self._head["layer"], images, self._head["output"], access)


@converts(_aten.conv_transpose3d.input)
def _conv_transpose(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    return _float_conv_transpose(importer, node, args, *_head_and_weight(importer, node, args))


def _float_conv_transpose(
    importer: Importer, node: fx.Node, args: Arguments, head: dict[str, Any], weight: ir.Constant
) -> Sequence[ir.Operation]:
    volumes = _Spread(importer, node, args, head, weight.shape)
    inputs, outputs, depth, *kernel = weight.shape
    flat = replace(weight, array=weight.array.reshape(inputs, outputs * depth, *kernel))
    image = volumes.image_head()
    layer = ir.ConvTranspose(**image, weight=flat, bias=None, window=volumes.window, groups=args["groups"])
    return *volumes.before, layer, *volumes.sums(importer.optional_constant(node, args["bias"]))


@converts(_tbn.conv_transpose3d.default)
def _tiled_conv_transpose(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    layout, stored = layout_of(importer, node), tile_of(importer, node, args | {"input_alpha": None})
    head = importer.head(node, args["input"], layer=stored["tile"].name.removesuffix("_tile").removesuffix(".weight"))
    if layout.kind not in ("flat", "staggered"):
        return _float_conv_transpose(importer, node, args, head, _decoded(stored, layout))
    volumes = _Spread(importer, node, args, head, layout.shape)
    inputs, outputs, depth, *kernel = layout.shape
    flat = replace(layout, shape=(inputs, outputs * depth, *kernel))
    bias = stored.pop("bias")
    image = volumes.image_head()
    layer = ir.TiledConvTranspose(
        **image, **stored, bias=None, layout=flat, window=volumes.window, groups=args["groups"]
    )
    return *volumes.before, layer, *volumes.sums(bias)


class _Spread:
    """The slices of volumes as images, for a transpose convolution that gives each of them ``d`` slices a channel.

    Attributes:
        before: what brings them there.
        window: what slides over the images of the result.
    """

    def __init__(
        self, importer: Importer, node: fx.Node, args: Arguments, head: dict[str, Any], weight: tuple[int, ...]
    ) -> None:
        self._importer, self._node, self._head = importer, node, head
        (source,) = head["inputs"]
        samples, channels, depth, *image = _five(source.shape)
        _, self._filters, _, *result = self._result = _five(head["output"].shape)
        self._kernel, self._depth = weight[2], depth
        steps = (args["stride"], args["dilation"], args["padding"])
        self._stride, self._dilation, self._padding = (_three(sizes)[0] for sizes in steps)
        size = math.prod(image)
        access = ir.Access((samples, depth, channels, size), (channels * depth * size, size, depth * size, 1))
        shape = (samples * depth, channels, *image)
        self._source = importer.temporary(node, "slices", shape)
        self.before = [moved(self._source.name, head["layer"], source, self._source, access)]
        self._output = importer.temporary(node, "images", (samples * depth, self._filters * self._kernel, *result))
        self.window = conv_window(_of_images(args), self._output.shape, shape, weight[3:])

    def image_head(self) -> dict[str, Any]:
        """As of :class:`_Windows`."""
        return _image_head(self._head, self._source, self._output)

    def sums(self, bias: ir.Constant | None) -> Sequence[ir.Operation]:
        """The sum of what the slices of the kernel give, each at its depth, and of the bias."""
        layer, operations = self._head["layer"], []
        samples, filters, depth, *image = self._result
        shape = (samples, filters, depth, math.prod(image))
        total: ir.Value | None = None
        for k in range(self._kernel):
            spread = self._spread(k, shape)
            if spread is None:
                continue
            part, result = spread
            operations += [part, result]
            if total is None:
                total = result.output
                continue
            both = (total, result.output)
            total = self._importer.temporary(self._node, f"sum_{k}", shape)
            whole = ir.Access.whole(shape)
            operations.append(ir.Binary(total.name, layer, both, total, (whole, whole), "add"))
        assert total is not None
        if bias is None:
            return *operations, ir.Alias(self._node.name, layer, (total,), self._head["output"])
        accesses = (ir.Access.whole(shape), ir.Access(shape, (0, 1, 0, 0)))
        last = ir.Binary(self._node.name, layer, (total, bias), self._head["output"], accesses, "add")
        return *operations, last

    def _spread(self, k: int, shape: tuple[int, ...]) -> tuple[ir.Operation, ir.Operation] | None:
        """What slice ``k`` of the kernel gives, and that at its depth with zeros elsewhere; ``None`` if all is cut."""
        samples, filters, depth, size = shape
        start = k * self._dilation - self._padding
        inside = [d for d in range(self._depth) if 0 <= d * self._stride + start < depth]
        if not inside:
            return None
        sizes = (samples, filters, len(inside), size)
        row = filters * self._kernel * size  # the slices that an input's gives
        access = ir.Access(sizes, (self._depth * row, self._kernel * size, row, 1), inside[0] * row + k * size)
        part = self._importer.temporary(self._node, f"part_{k}", sizes)
        placed = self._importer.temporary(self._node, f"placed_{k}", shape)
        steps = (filters * depth * size, depth * size, self._stride * size, 1)
        result = ir.Access(sizes, steps, (inside[0] * self._stride + start) * size)
        layer = self._head["layer"]
        pad = ir.Pad(placed.name, layer, (part,), placed, value=0.0, result=result)
        return moved(part.name, layer, self._output, part, access), pad


def _five(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of volumes with a batch, which may be missing."""
    return (1,) * (5 - len(shape)) + tuple(shape)


def _three(sizes: Any) -> list[int]:
    """Numbers of depth, height and width; a single one is that of all three, and a padding by name has none."""
    numbers = [0] if isinstance(sizes, str) else [sizes] if isinstance(sizes, int) else list(sizes)
    return numbers * 3 if len(numbers) == 1 else numbers


def _of_images(args: Arguments) -> Arguments:
    """The arguments of a convolution of images."""
    found = {name: _three(args[name])[1:] for name in ("stride", "dilation", "padding")}
    return found | {"padding": args["padding"]} if isinstance(args["padding"], str) else found


def _pool(function: str) -> Converter:
    """The converter of a pooling: of slices, then of what lies behind one another, which gives the same numbers."""

    def convert(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
        head = importer.head(node, args["self"])
        (source,), output = head["inputs"], head["output"]
        *outer, depth, height, width = source.shape
        *_, slices, rows, columns = output.shape
        kernel = _three(args["kernel_size"])
        steps = _three(args["stride"] or kernel)
        padding, dilation = _three(args["padding"]), _three(args.get("dilation", 1))
        between = importer.temporary(node, "slices", (*outer, depth, rows, columns))
        windows = (
            ir.Window((height, width), (rows, columns), *map(_two, (kernel, steps, padding, dilation))),
            ir.Window(
                (depth, rows * columns),
                (slices, rows * columns),
                (kernel[0], 1),
                (steps[0], 1),
                (padding[0], 0),
                (dilation[0], 1),
            ),
        )
        include, divisor = args.get("count_include_pad", True), args.get("divisor_override") or 0
        first, second = (
            ir.Pool(name, head["layer"], (x,), y, function, math.prod(planes), window, include, over)
            for name, x, y, planes, window, over in (
                (between.name, source, between, (*outer, depth), windows[0], int(divisor > 0)),
                (head["name"], between, output, outer, windows[1], divisor),
            )
        )
        return first, second

    return convert


def _two(sizes: Sequence[int]) -> tuple[int, int]:
    """Height and width of depth, height and width."""
    return sizes[1], sizes[2]


converts(_aten.max_pool3d.default)(_pool("max_pool"))
converts(_aten.avg_pool3d.default)(_pool("avg_pool"))


@converts_results(_aten.max_pool3d_with_indices.default)
def _max_pool_with_indices(importer: Importer, node: fx.Node, args: Arguments, index: int) -> Sequence[ir.Operation]:
    if index:
        raise importer.unsupported(node, "the indices of a pooling are not supported")
    found = _pool("max_pool")(importer, node, args)
    assert not isinstance(found, ir.Operation)
    return found


def _adaptive(function: str, importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    """As for :func:`_pool`."""
    head = importer.head(node, args["self"])
    (source,), output = head["inputs"], head["output"]
    *outer, depth, height, width = source.shape
    *_, slices, rows, columns = output.shape
    between = importer.temporary(node, "slices", (*outer, depth, rows, columns))
    first, second = (
        ir.Resample(name, head["layer"], (x,), y, function, math.prod(planes), before, after)
        for name, x, y, planes, before, after in (
            (between.name, source, between, (*outer, depth), (height, width), (rows, columns)),
            (head["name"], between, output, outer, (depth, rows * columns), (slices, rows * columns)),
        )
    )
    return first, second


@converts(_aten.adaptive_avg_pool3d.default, _aten._adaptive_avg_pool3d.default)
def _adaptive_avg_pool(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
    return _adaptive("adaptive_avg_pool", importer, node, args)


@converts_results(_aten.adaptive_max_pool3d.default)
def _adaptive_max_pool(importer: Importer, node: fx.Node, args: Arguments, index: int) -> Sequence[ir.Operation]:
    if index:
        raise importer.unsupported(node, "the indices of a pooling are not supported")
    return _adaptive("adaptive_max_pool", importer, node, args)
