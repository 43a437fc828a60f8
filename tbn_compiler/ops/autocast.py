"""Autocast: the inference operators run in the autocast dtype, as PyTorch's linear and convolution do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops.calls import OPERATORS, Operator
from tbn_compiler.ops.schemas import LIBRARY
from tbn_compiler.torch_private import autocast_keys, untraced, without_dispatch


def _register(operator: Operator, device: str) -> None:
    op = operator.overload
    keys = autocast_keys(device)

    def kernel(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Tile, alpha and bias keep their dtypes: the operator converts them to that of its input.
        if input.is_floating_point() and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        with without_dispatch(keys):
            result: Tensor = op(input, *args, **kwargs)
        return result

    LIBRARY.impl(operator.name, untraced(kernel), f"Autocast{device.upper()}")


def register() -> None:
    """Register the autocast rule for CPU and CUDA."""
    for operator in OPERATORS.values():
        for device in ("cpu", "cuda"):
            _register(operator, device)
