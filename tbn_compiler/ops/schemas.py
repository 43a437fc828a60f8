"""Schemas and fakes of the ``tbn::`` operators. A bad call fails here, while tracing.

In the inference operators ``tile`` is a packed tile (``uint8 [ceil(q / 8)]``) or a full-precision tile
(floating point ``[q]``), ``alpha`` is one scale, one per copy or one per row, and the result has the dtype of
``input`` and is contiguous.

``input_alpha`` of shape ``[k]`` says that ``input`` holds ``z`` and stands for ``k`` scaled copies of it, one behind
the other along the features or channels: ``cat([a * z for a in input_alpha])``. The layer then sums the ``k``
column blocks of its weight, times the ``input_alpha``, instead of reading the copies.

``activation`` is the number format that the input is brought into first, with one scale per token (per vector of the
last axis in a linear layer, per sample in a convolution); the scale multiplies the result again:

- ``"float"``: as it is.
- ``"int8"``: symmetric, scale ``max|x| / 127``, integers ``round_half_even(x * (127 / max|x|))``; a token whose largest
  magnitude is below :data:`INT8_TINY` counts as zero. Products of an integer input with a packed tile are exact.
- ``"binary"``: ``sign(x)`` (0 gives -1, as Eq. 3), scale ``mean|x|``.

``epilogue`` is a function applied to the result, after alphas and bias.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from tbn_compiler.packing import packed_size
from tbn_compiler.tiling import TileLayout

LIBRARY = torch.library.Library("tbn", "DEF")

CONV_OPS = {1: "conv1d", 2: "conv2d", 3: "conv3d"}
CONV_TRANSPOSE_OPS = {d: f"conv_transpose{d}d" for d in CONV_OPS}

ACTIVATIONS = ("float", "int8", "binary")
EPILOGUES = ("none", "relu", "gelu", "gelu_tanh", "silu")

INT8_TINY = 2.0**-100  # 127 divided by anything smaller would come near the end of float32's range

_CONV_SCHEMA = (
    "{name}(Tensor input, Tensor tile, Tensor alpha, Tensor? bias, int in_channels, int out_channels, "
    "int[{d}] kernel_size, int p, Tensor? input_alpha=None, *, int p_in=1, int shift=0, "
    "int[{d}] stride=1, int[{d}] padding=0, int[{d}] dilation=1, int groups=1, "
    'str activation="float", str epilogue="none") -> Tensor'
)

_CONV_TRANSPOSE_SCHEMA = (
    "{name}(Tensor input, Tensor tile, Tensor alpha, Tensor? bias, int in_channels, int out_channels, "
    "int[{d}] kernel_size, int p, *, int shift=0, int[{d}] stride=1, int[{d}] padding=0, int[{d}] output_padding=0, "
    "int groups=1, int[{d}] dilation=1) -> Tensor"
)

LIBRARY.define("tile(Tensor weight, int p, *, int p_in=1, int shift=0, bool binary=True) -> Tensor")
LIBRARY.define("scale(Tensor bits, Tensor source, int num_alphas, *, int p_in=1) -> Tensor")
LIBRARY.define("unpack(Tensor packed, int numel, *, ScalarType dtype) -> Tensor")
LIBRARY.define(
    "linear(Tensor input, Tensor tile, Tensor alpha, Tensor? bias, int in_features, int out_features, int p, "
    "Tensor? input_alpha=None, *, int p_in=1, int shift=0, "
    'str activation="float", str epilogue="none") -> Tensor'
)
for _d, _name in CONV_OPS.items():
    LIBRARY.define(_CONV_SCHEMA.format(name=_name, d=_d))
    LIBRARY.define(_CONV_TRANSPOSE_SCHEMA.format(name=CONV_TRANSPOSE_OPS[_d], d=_d))


# Layouts know sizes that take arithmetic to find: an operator that is called again finds its own again.
_layout = functools.lru_cache(maxsize=1024)(TileLayout)


def make_layout(shape: Sequence[int], p: int, p_in: int = 1, shift: int = 0) -> TileLayout:
    """The layout of a weight. Weight shapes are static: dynamic shapes specialise on them, never on the batch."""
    return _layout(tuple(int(size) for size in shape), int(p), int(p_in), int(shift))


def check_tile_operands(
    op: str,
    input: Tensor,
    tile: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    layout: TileLayout,
    outputs: int | None = None,
) -> None:
    """Check dtypes, sizes and devices of the operands of an inference op with ``outputs`` features or channels.

    ``outputs`` defaults to the rows of the layout.
    """
    outputs = layout.rows if outputs is None else outputs
    torch._check_type(input.is_floating_point(), lambda: f"tbn::{op}: input must be floating point, got {input.dtype}")
    packed = tile.dtype == torch.uint8
    torch._check_type(
        packed or tile.is_floating_point(),
        lambda: f"tbn::{op}: tile must be uint8 (packed bits) or floating point, got {tile.dtype}",
    )
    expected = packed_size(layout.tile_size) if packed else layout.tile_size
    torch._check_value(
        tuple(tile.shape) == (expected,),
        lambda: (
            f"tbn::{op}: tile of a weight {layout.shape} with p={layout.p} must have shape ({expected},) "
            f"as {tile.dtype}, got {tuple(tile.shape)}"
        ),
    )
    torch._check_value(
        alpha.dim() == 1 and layout.allows_alphas(int(alpha.shape[0])),
        lambda: (
            f"tbn::{op}: alpha must have one element, or one per copy ({layout.p}), per output copy ({layout.p_out}) "
            f"or per row ({layout.rows}), got shape {tuple(alpha.shape)}"
        ),
    )
    if bias is not None:
        torch._check_value(
            tuple(bias.shape) == (outputs,),
            lambda: f"tbn::{op}: bias must have shape ({outputs},), got {tuple(bias.shape)}",
        )
    for name, operand in (("tile", tile), ("alpha", alpha), ("bias", bias)):
        torch._check_value(
            operand is None or operand.device == input.device,
            lambda name=name, operand=operand: f"tbn::{op}: {name} is on {operand.device}, input on {input.device}",
        )


def check_formats(op: str, activation: str, epilogue: str) -> None:
    """Check the names of the input's number format and of the function behind the layer."""
    for name, value, choices in (("activation", activation, ACTIVATIONS), ("epilogue", epilogue, EPILOGUES)):
        torch._check_value(
            value in choices,
            lambda name=name, value=value, choices=choices: (
                f"tbn::{op}: {name}={value!r} is not one of {', '.join(map(repr, choices))}"
            ),
        )


def _check_inputs(op: str, what: str, size: int, expected: int, input_alpha: Tensor | None) -> None:
    """Check the number of features or channels of the input, ``1 / k`` of the layer's for ``k`` replicas."""
    if input_alpha is not None:
        k = input_alpha.numel()
        torch._check_value(
            input_alpha.dim() == 1 and expected % k == 0,
            lambda: (
                f"tbn::{op}: input_alpha {tuple(input_alpha.shape)} must be a vector that divides {expected} {what}"
            ),
        )
        expected //= k
    torch._check_value(size == expected, lambda: f"tbn::{op}: expected {expected} {what}, got an input with {size}")


def linear_layout(
    input: Tensor, in_features: int, out_features: int, p: int, input_alpha: Tensor | None, p_in: int, shift: int
) -> TileLayout:
    """Check the input of ``tbn::linear``; layout of the weight ``[out_features, in_features]``."""
    torch._check_value(input.dim() >= 1, lambda: "tbn::linear: input must have at least one dimension")
    _check_inputs("linear", "input features", input.shape[-1], in_features, input_alpha)
    return make_layout((out_features, in_features), p, p_in, shift)


def _check_channels(
    op: str,
    input: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    input_alpha: Tensor | None,
    groups: int,
) -> None:
    """Check the dimensions and channels of a convolution's input."""
    d = len(kernel_size)
    torch._check_value(
        input.dim() in (d + 1, d + 2),
        lambda: f"tbn::{op}: input must have {d + 1} (unbatched) or {d + 2} dimensions, got {input.dim()}",
    )
    _check_inputs(op, "input channels", input.shape[-d - 1], in_channels, input_alpha)
    torch._check_value(
        groups >= 1 and in_channels % groups == 0 and out_channels % groups == 0,
        lambda: f"tbn::{op}: groups={groups} must divide {in_channels} input and {out_channels} output channels",
    )


def conv_transpose_layout(
    input: Tensor, in_channels: int, out_channels: int, kernel_size: Sequence[int], p: int, shift: int, groups: int
) -> TileLayout:
    """Check the input of a transpose convolution; layout of ``[in_channels, out_channels / groups, *kernel_size]``."""
    op = CONV_TRANSPOSE_OPS[len(kernel_size)]
    _check_channels(op, input, in_channels, out_channels, kernel_size, None, groups)
    return make_layout((in_channels, out_channels // groups, *kernel_size), p, 1, shift)


def conv_layout(
    input: Tensor,
    in_channels: int,
    out_channels: int,
    kernel_size: Sequence[int],
    p: int,
    input_alpha: Tensor | None,
    p_in: int,
    shift: int,
    groups: int,
) -> TileLayout:
    """Check the input of a convolution; layout of the weight ``[out_channels, in_channels / groups, *kernel_size]``."""
    op = CONV_OPS[len(kernel_size)]
    _check_channels(op, input, in_channels, out_channels, kernel_size, input_alpha, groups)
    torch._check_value(
        input_alpha is None or groups == 1,
        lambda: f"tbn::{op}: input_alpha needs groups=1, got groups={groups}: the groups read different copies",
    )
    return make_layout((out_channels, in_channels // groups, *kernel_size), p, p_in, shift)


def _floating(op: str, name: str, tensor: Tensor) -> None:
    torch._check_type(
        tensor.is_floating_point(), lambda: f"tbn::{op}: {name} must be floating point, got {tensor.dtype}"
    )


def tile_layout(weight: Tensor, p: int, p_in: int, shift: int) -> TileLayout:
    """Check the operands of ``tbn::tile`` and return the layout."""
    _floating("tile", "weight", weight)
    return make_layout(weight.shape, p, p_in, shift)


def scale_layout(bits: Tensor, source: Tensor, num_alphas: int, p_in: int) -> TileLayout:
    """Check the operands of ``tbn::scale`` and return a layout with one copy for each alpha."""
    _floating("scale", "source", source)
    torch._check_value(
        bits.shape == source.shape,
        lambda: f"tbn::scale: bits {tuple(bits.shape)} and source {tuple(source.shape)} must have the same shape",
    )
    torch._check_value(
        num_alphas >= 1 and bits.numel() % num_alphas == 0,
        lambda: f"tbn::scale: num_alphas={num_alphas} does not divide the {bits.numel()} elements of the weight",
    )
    return make_layout(bits.shape, num_alphas, p_in)


def check_unpack(packed: Tensor, numel: int) -> None:
    """Check the operands of ``tbn::unpack``."""
    torch._check_type(packed.dtype == torch.uint8, lambda: f"tbn::unpack: packed must be uint8, got {packed.dtype}")
    torch._check_value(
        tuple(packed.shape) == (packed_size(numel),),
        lambda: f"tbn::unpack: {numel} elements take {packed_size(numel)} bytes, got shape {tuple(packed.shape)}",
    )


@torch.library.register_fake("tbn::tile", lib=LIBRARY)
def _tile(weight: Tensor, p: int, *, p_in: int = 1, shift: int = 0, binary: bool = True) -> Tensor:
    tile_layout(weight, p, p_in, shift)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.register_fake("tbn::scale", lib=LIBRARY)
def _scale(bits: Tensor, source: Tensor, num_alphas: int, *, p_in: int = 1) -> Tensor:
    scale_layout(bits, source, num_alphas, p_in)
    return torch.empty_like(bits, memory_format=torch.contiguous_format)


@torch.library.register_fake("tbn::unpack", lib=LIBRARY)
def _unpack(packed: Tensor, numel: int, *, dtype: torch.dtype) -> Tensor:
    check_unpack(packed, numel)
    return packed.new_empty(numel, dtype=dtype)


@torch.library.register_fake("tbn::linear", lib=LIBRARY)
def _linear(
    input: Tensor,
    tile: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    p: int,
    input_alpha: Tensor | None = None,
    *,
    p_in: int = 1,
    shift: int = 0,
    activation: str = "float",
    epilogue: str = "none",
) -> Tensor:
    layout = linear_layout(input, in_features, out_features, p, input_alpha, p_in, shift)
    check_formats("linear", activation, epilogue)
    check_tile_operands("linear", input, tile, alpha, bias, layout)
    return input.new_empty((*input.shape[:-1], out_features))


def _register_conv_fake(op: str, d: int) -> None:
    @torch.library.register_fake(f"tbn::{op}", lib=LIBRARY)
    def _conv(
        input: Tensor,
        tile: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        p: int,
        input_alpha: Tensor | None = None,
        *,
        p_in: int = 1,
        shift: int = 0,
        stride: Sequence[int] = (1,) * d,
        padding: Sequence[int] = (0,) * d,
        dilation: Sequence[int] = (1,) * d,
        groups: int = 1,
        activation: str = "float",
        epilogue: str = "none",
    ) -> Tensor:
        layout = conv_layout(input, in_channels, out_channels, kernel_size, p, input_alpha, p_in, shift, groups)
        check_formats(op, activation, epilogue)
        check_tile_operands(op, input, tile, alpha, bias, layout)
        spatial = [
            (size + 2 * pad - dil * (k - 1) - 1) // step + 1
            for size, k, step, pad, dil in zip(input.shape[-d:], kernel_size, stride, padding, dilation, strict=True)
        ]
        torch._check_value(
            all(size >= 1 for size in spatial),
            lambda: f"tbn::{op}: kernel {list(kernel_size)} does not fit the input {list(input.shape)}",
        )
        return input.new_empty((*input.shape[: -d - 1], out_channels, *spatial))


def _register_conv_transpose_fake(op: str, d: int) -> None:
    @torch.library.register_fake(f"tbn::{op}", lib=LIBRARY)
    def _conv_transpose(
        input: Tensor,
        tile: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        p: int,
        *,
        shift: int = 0,
        stride: Sequence[int] = (1,) * d,
        padding: Sequence[int] = (0,) * d,
        output_padding: Sequence[int] = (0,) * d,
        groups: int = 1,
        dilation: Sequence[int] = (1,) * d,
    ) -> Tensor:
        layout = conv_transpose_layout(input, in_channels, out_channels, kernel_size, p, shift, groups)
        check_tile_operands(op, input, tile, alpha, bias, layout, out_channels)
        spatial = [
            (size - 1) * step - 2 * pad + dil * (k - 1) + extra + 1
            for size, k, step, pad, extra, dil in zip(
                input.shape[-d:], kernel_size, stride, padding, output_padding, dilation, strict=True
            )
        ]
        return input.new_empty((*input.shape[: -d - 1], out_channels, *spatial))


for _d, _name in CONV_OPS.items():
    _register_conv_fake(_name, _d)
    _register_conv_transpose_fake(CONV_TRANSPOSE_OPS[_d], _d)
