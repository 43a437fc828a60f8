"""Autocast: the inference operators run in the autocast dtype, as PyTorch's linear and convolution do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops.schemas import CONV_OPS, CONV_TRANSPOSE_OPS, LIBRARY


def _register(name: str, device: str) -> None:
    op = getattr(torch.ops.tbn, name).default
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))

    def kernel(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        # Tile, alpha and bias keep their dtypes: the operator converts them to that of its input.
        if input.is_floating_point() and input.dtype != torch.float64:
            input = input.to(torch.get_autocast_dtype(device))
        with torch._C._ExcludeDispatchKeyGuard(keys):
            result: Tensor = op(input, *args, **kwargs)
        return result

    LIBRARY.impl(name, kernel, f"Autocast{device.upper()}")


def register() -> None:
    """Register the autocast rule for CPU and CUDA."""
    for name in ("linear", *CONV_OPS.values(), *CONV_TRANSPOSE_OPS.values()):
        for device in ("cpu", "cuda"):
            _register(name, device)
