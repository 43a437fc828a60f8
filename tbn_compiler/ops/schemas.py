"""Schemas of the ``tbn::`` operators, and the fakes of those that make weights.

:mod:`tbn_compiler.ops.calls` reads the arguments of the inference operators from the schemas, and has their
fakes. A bad call fails in its fake, while tracing.

In the inference operators ``tile`` is a packed tile (``uint8 [ceil(q / 8)]``) or a full-precision tile
(floating point ``[q]``), ``alpha`` is one scale, one per copy or one per row, and the result has the dtype of
``input`` and is contiguous.

``input_alpha`` of shape ``[k]`` says that ``input`` holds ``z`` and stands for ``k`` scaled copies of it, one behind
the other along the features or channels: ``cat([a * z for a in input_alpha])``. The layer then sums the ``k``
column blocks of its weight, times the ``input_alpha``, instead of reading the copies.

``activation`` is the number format that the input is brought into first, with one scale per token (per vector of the
last axis in a linear layer, per sample in a convolution), or with ``input_scale``, one number for all; the scale
multiplies the result again:

- ``"float"``: as it is.
- ``"int8"``: symmetric, scale ``max|x| / 127``, integers ``round_half_even(x * (127 / max|x|))``; a token whose largest
  magnitude is below :data:`INT8_TINY` counts as zero. Products of an integer input with a packed tile are exact.
- ``"binary"``: ``sign(x)`` (0 gives -1, as Eq. 3), scale ``mean|x|``.

With ``input_scale`` (one element ``s``, at least :data:`INT8_TINY` and finite), int8 integers are
``round_half_even(x * (1 / s))``, at least -127 and at most 127, where infinities end too.

A token with a NaN in it gives NaN throughout, with either scale.

``epilogue`` is a function applied to the result, after alphas and bias.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from tbn_compiler.packing import packed_size
from tbn_compiler.tiling import TileLayout

LIBRARY = torch.library.Library("tbn", "DEF")

CONV_OPS = {1: "conv1d", 2: "conv2d", 3: "conv3d"}
CONV_TRANSPOSE_OPS = {d: f"conv_transpose{d}d" for d in CONV_OPS}

Activation = Literal["float", "int8", "binary"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
EPILOGUES = ("none", "relu", "gelu", "gelu_tanh", "silu")

INT8_TINY = 2.0**-100  # 127 divided by anything smaller would come near the end of float32's range

_CONV_SCHEMA = (
    "{name}(Tensor input, Tensor tile, Tensor alpha, Tensor? bias, int in_channels, int out_channels, "
    "int[{d}] kernel_size, int p, Tensor? input_alpha=None, Tensor? input_scale=None, *, int p_in=1, int shift=0, "
    "bool hadamard=False, int[{d}] stride=1, int[{d}] padding=0, int[{d}] dilation=1, int groups=1, "
    'str activation="float", str epilogue="none") -> Tensor'
)

_CONV_TRANSPOSE_SCHEMA = (
    "{name}(Tensor input, Tensor tile, Tensor alpha, Tensor? bias, int in_channels, int out_channels, "
    "int[{d}] kernel_size, int p, *, int shift=0, bool hadamard=False, int[{d}] stride=1, int[{d}] padding=0, "
    "int[{d}] output_padding=0, int groups=1, int[{d}] dilation=1) -> Tensor"
)

# Layers that train; the arguments behind the bias are those of the inference operators.
TRAINING_PREFIX = "train_"
_TRAINING_HEAD = f"{TRAINING_PREFIX}{{name}}(Tensor input, Tensor weight, Tensor source, Tensor? bias, "
_TRAIN_CONV_SCHEMA = (
    _TRAINING_HEAD + "int in_channels, int out_channels, int[{d}] kernel_size, int p, int num_alphas, *, int p_in=1, "
    "int shift=0, bool hadamard=False, int[{d}] stride=1, int[{d}] padding=0, int[{d}] dilation=1, int groups=1, "
    "bool binary=True) -> Tensor"
)
_TRAIN_CONV_TRANSPOSE_SCHEMA = (
    _TRAINING_HEAD + "int in_channels, int out_channels, int[{d}] kernel_size, int p, int num_alphas, *, "
    "int shift=0, bool hadamard=False, int[{d}] stride=1, int[{d}] padding=0, int[{d}] output_padding=0, int groups=1, "
    "int[{d}] dilation=1, bool binary=True) -> Tensor"
)

LIBRARY.define(
    "tile(Tensor weight, int p, *, int p_in=1, int shift=0, int batch=1, bool hadamard=False, "
    "bool binary=True) -> Tensor"
)
LIBRARY.define(
    f"{TRAINING_PREFIX}weight(Tensor weight, Tensor source, int[] shape, int p, int num_alphas, *, int p_in=1, "
    "int shift=0, int batch=1, bool hadamard=False, bool binary=True) -> Tensor"
)
LIBRARY.define("scale(Tensor bits, Tensor source, int num_alphas, *, int p_in=1) -> Tensor")
LIBRARY.define("unpack_bits(Tensor packed, int numel, *, ScalarType dtype) -> Tensor")
LIBRARY.define(
    "unpack(Tensor tile, Tensor alpha, int[] shape, int p, *, int p_in=1, int shift=0, int batch=1, "
    "bool hadamard=False) -> Tensor"
)
LIBRARY.define(
    "linear(Tensor input, Tensor tile, Tensor alpha, Tensor? bias, int in_features, int out_features, int p, "
    "Tensor? input_alpha=None, Tensor? input_scale=None, *, int p_in=1, int shift=0, bool hadamard=False, "
    'str activation="float", str epilogue="none") -> Tensor'
)
LIBRARY.define(
    _TRAINING_HEAD.format(name="linear")
    + "int in_features, int out_features, int p, int num_alphas, *, int p_in=1, int shift=0, bool hadamard=False, "
    "bool binary=True) -> Tensor"
)
for _d, _name in CONV_OPS.items():
    LIBRARY.define(_CONV_SCHEMA.format(name=_name, d=_d))
    LIBRARY.define(_CONV_TRANSPOSE_SCHEMA.format(name=CONV_TRANSPOSE_OPS[_d], d=_d))
    LIBRARY.define(_TRAIN_CONV_SCHEMA.format(name=_name, d=_d))
    LIBRARY.define(_TRAIN_CONV_TRANSPOSE_SCHEMA.format(name=CONV_TRANSPOSE_OPS[_d], d=_d))


# Layouts know sizes that take arithmetic to find: an operator that is called again finds its own again.
_layout = functools.lru_cache(maxsize=1024)(TileLayout)


def make_layout(
    shape: Sequence[int], p: int, p_in: int = 1, shift: int = 0, batch: int = 1, hadamard: bool = False
) -> TileLayout:
    """The layout of a weight. Weight shapes are static: dynamic shapes specialise on them, never on the batch."""
    return _layout(tuple(int(size) for size in shape), int(p), int(p_in), int(shift), int(batch), bool(hadamard))


def check_stored(op: str, tile: Tensor, alpha: Tensor, layout: TileLayout) -> None:
    """Check dtype and size of a stored tile, and the number of alphas. Neither is ever symbolic."""
    packed = tile.dtype == torch.uint8
    if not packed and not tile.is_floating_point():
        raise TypeError(f"tbn::{op}: tile must be uint8 (packed bits) or floating point, got {tile.dtype}")
    expected = packed_size(layout.tile_size) if packed else layout.tile_size
    if tuple(tile.shape) != (expected,):
        raise ValueError(
            f"tbn::{op}: tile of a weight {layout.shape} with p={layout.p} must have shape ({expected},) "
            f"as {tile.dtype}, got {tuple(tile.shape)}"
        )
    if alpha.dim() != 1 or not layout.allows_alphas(int(alpha.shape[0])):
        raise ValueError(
            f"tbn::{op}: alpha must have one element, or one per copy ({layout.p}), per output copy ({layout.p_out}) "
            f"or per row ({layout.rows}), got shape {tuple(alpha.shape)}"
        )


def _floating(op: str, name: str, tensor: Tensor) -> None:
    torch._check_type(
        tensor.is_floating_point(), lambda: f"tbn::{op}: {name} must be floating point, got {tensor.dtype}"
    )


def tile_layout(weight: Tensor, p: int, p_in: int, shift: int, batch: int, hadamard: bool) -> TileLayout:
    """Check the operands of ``tbn::tile`` and return the layout."""
    _floating("tile", "weight", weight)
    return make_layout(weight.shape, p, p_in, shift, batch, hadamard)


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


def check_unpack_bits(packed: Tensor, numel: int) -> None:
    """Check the operands of ``tbn::unpack_bits``."""
    torch._check_type(
        packed.dtype == torch.uint8, lambda: f"tbn::unpack_bits: packed must be uint8, got {packed.dtype}"
    )
    torch._check_value(
        tuple(packed.shape) == (packed_size(numel),),
        lambda: f"tbn::unpack_bits: {numel} elements take {packed_size(numel)} bytes, got shape {tuple(packed.shape)}",
    )


def unpack_layout(
    tile: Tensor, alpha: Tensor, shape: Sequence[int], p: int, p_in: int, shift: int, batch: int, hadamard: bool
) -> TileLayout:
    """Check the operands of ``tbn::unpack`` and return the layout of the weight."""
    layout = make_layout(shape, p, p_in, shift, batch, hadamard)
    _floating("unpack", "alpha", alpha)
    check_stored("unpack", tile, alpha, layout)
    return layout


@torch.library.register_fake("tbn::tile", lib=LIBRARY)
def _tile(
    weight: Tensor,
    p: int,
    *,
    p_in: int = 1,
    shift: int = 0,
    batch: int = 1,
    hadamard: bool = False,
    binary: bool = True,
) -> Tensor:
    tile_layout(weight, p, p_in, shift, batch, hadamard)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


@torch.library.register_fake("tbn::scale", lib=LIBRARY)
def _scale(bits: Tensor, source: Tensor, num_alphas: int, *, p_in: int = 1) -> Tensor:
    scale_layout(bits, source, num_alphas, p_in)
    return torch.empty_like(bits, memory_format=torch.contiguous_format)


@torch.library.register_fake("tbn::unpack_bits", lib=LIBRARY)
def _unpack_bits(packed: Tensor, numel: int, *, dtype: torch.dtype) -> Tensor:
    check_unpack_bits(packed, numel)
    return packed.new_empty(numel, dtype=dtype)


@torch.library.register_fake("tbn::unpack", lib=LIBRARY)
def _unpack(
    tile: Tensor,
    alpha: Tensor,
    shape: Sequence[int],
    p: int,
    *,
    p_in: int = 1,
    shift: int = 0,
    batch: int = 1,
    hadamard: bool = False,
) -> Tensor:
    unpack_layout(tile, alpha, shape, p, p_in, shift, batch, hadamard)
    return alpha.new_empty(tuple(shape))
