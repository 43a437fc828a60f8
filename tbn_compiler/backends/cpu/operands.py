"""What the kernels can read as it is, what is converted for them, and what they do not take."""

from __future__ import annotations

import torch
from torch import Tensor

from tbn_compiler.backends.cpu import library
from tbn_compiler.ops.calls import TensorCall

_float32 = torch.float32


def is_vector(operand: Tensor) -> bool:
    """Whether the kernels can read an alpha or bias as it is."""
    return operand.dtype is _float32 and operand.dim() == 1 and operand.is_contiguous() and operand.is_cpu


def is_scale(operand: Tensor) -> bool:
    """Whether the kernels can read an input scale as it is."""
    return operand.dtype is _float32 and operand.numel() == 1 and operand.is_cpu


def as_vector(operand: Tensor) -> Tensor:
    """An alpha, bias or input scale as the kernels read it."""
    return operand.to(_float32).contiguous()


def expand_replicas(input: Tensor, input_alpha: Tensor | None, dim: int) -> Tensor:
    """The input that ``k`` input alphas stand for: ``k`` scaled copies, one behind the other along ``dim``."""
    if input_alpha is None:
        return input
    return torch.cat([input * factor for factor in input_alpha.to(input.dtype)], dim)


def reason_against(call: TensorCall) -> str | None:
    """Why PyTorch computes a layer, or ``None`` if the kernels can."""
    if library.level() is None:
        return library.unused()
    if call.input.dtype == torch.float64:
        return "float64 input"
    if call.tile.dtype != torch.uint8:
        return "full-precision tile"
    if call.layout.row_size == 0:
        return "no inputs"
    if not call.product.scales_results:
        return "rows mix several alphas"
    if call.activation != "float" and (call.product.neighbours > 1 or call.input_alpha is not None):
        return f"{call.activation} activations are summed, or scaled, before they meet the tile"
    return None
