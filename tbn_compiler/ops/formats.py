"""Number formats of activations, and the functions behind a layer, in PyTorch.

:mod:`tbn_compiler.ops.schemas` defines them; other backends must equal what this module computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tbn_compiler.ops.schemas import INT8_TINY

_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def apply_epilogue(x: Tensor, epilogue: str) -> Tensor:
    """The function behind a layer."""
    return _FUNCTIONS[epilogue](x)


def quantize_int8(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Symmetric int8 with one scale for all elements along ``dims``.

    Args:
        x: floating point, any shape.
        dims: dimensions that share a scale.

    Returns:
        Integers from -127 to 127 in the dtype of ``x``, and the scale, with ``dims`` of size 1. Their product
        approximates ``x``.
    """
    largest = x.abs().amax(dims, keepdim=True)
    # A maximum of NaN is not below the limit, and spreads.
    largest = torch.where(largest < INT8_TINY, 0.0, largest)
    # A number divided by a tensor is its reciprocal times the number: two roundings, where the definition has one.
    factor = torch.where(largest == 0, 0.0, torch.full_like(largest, 127) / largest)
    return torch.round(x * factor), largest / 127


def binarize(x: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """``sign(x)``, with -1 for 0, in the dtype of ``x``, and ``mean|x|`` along ``dims``, which have size 1."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype), x.abs().mean(dims, keepdim=True)


def with_fixed_scale(x: Tensor, activation: str, scale: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The values of ``x`` in a format with a given scale, and that scale, or NaN where a token holds one.

    Args:
        x: floating point, any shape.
        activation: ``"int8"`` or ``"binary"``.
        scale: one element, at least :data:`INT8_TINY` and finite; all becomes NaN with another one.
        dims: dimensions of a token, which have size 1 in the second result.
    """
    scale = scale.reshape(()).to(x.dtype)
    scale = torch.where((scale >= INT8_TINY) & scale.isfinite(), scale, torch.nan)
    if activation == "int8":
        values = torch.round(x * scale.reciprocal()).clamp(-127, 127)
    else:
        values = torch.where(x > 0, 1.0, -1.0).to(x.dtype)
    return values, torch.where(x.isnan().any(dims, keepdim=True), torch.nan, scale)


def in_format(
    layer: Callable[[Tensor, Tensor | None], Tensor],
    input: Tensor,
    bias: Tensor | None,
    activation: str,
    token_dims: tuple[int, ...],
    terms: int,
    input_scale: Tensor | None = None,
) -> Tensor:
    """Run a layer on its input in a number format.

    Args:
        layer: computes ``(input, bias) -> output``; its output is linear in its input where the bias is ``None``.
        input: floating point.
        bias: added after the scale, one element for each feature or channel of the output.
        activation: the format.
        token_dims: dimensions of the input that share a scale, the last ones; as many as the output has of features
            or channels and spatial sizes.
        terms: products that an output sums; with it, integers that float32 would round are summed in float64.
        input_scale: one scale for all tokens; ``None``: each has its own.

    Returns:
        The output, in the dtype of ``input``.
    """
    if activation == "float" or input.numel() == 0:
        return layer(input, bias)
    # The scale comes from float32 at least: half precision has too few digits for 127 / max|x|.
    wide = input if input.dtype == torch.float64 else input.float()
    if input_scale is None:
        values, scale = (quantize_int8 if activation == "int8" else binarize)(wide, token_dims)
    else:
        values, scale = with_fixed_scale(wide, activation, input_scale, token_dims)
    out = layer(values if 127 * terms < 2**24 else values.double(), None) * scale
    if bias is not None:
        out = out + bias.to(out.dtype).view(-1, *[1] * (len(token_dims) - 1))
    return out.to(input.dtype)
