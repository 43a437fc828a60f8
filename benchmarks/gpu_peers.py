"""Other packages' low-bit linear layers, where they are installed: weight-only formats on a bf16 input."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

GROUP_SIZE = 128


def _torchao_int4(weight: Tensor) -> Callable[[Tensor], Tensor]:
    from torchao.quantization import Int4WeightOnlyConfig, quantize_  # type: ignore[import-not-found]

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device=weight.device)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    model = nn.Sequential(layer)
    quantize_(model, Int4WeightOnlyConfig(group_size=GROUP_SIZE, int4_packing_format="tile_packed_to_4d"))
    return model


def _gemlite(bits: int) -> Callable[[Tensor], Callable[[Tensor], Tensor]]:
    def make(weight: Tensor) -> Callable[[Tensor], Tensor]:
        from gemlite.core import DType, GemLiteLinear  # type: ignore[import-not-found]

        out_features, in_features = weight.shape
        layer = GemLiteLinear(
            bits,
            group_size=GROUP_SIZE,
            in_features=in_features,
            out_features=out_features,
            input_dtype=DType.BF16,
            output_dtype=DType.BF16,
        )
        groups = weight.numel() // GROUP_SIZE
        values = torch.randint(0, 2**bits, weight.shape, dtype=torch.uint8, device=weight.device)
        scales = torch.full((groups, 1), 0.01, dtype=weight.dtype, device=weight.device)
        layer.pack(values, scales, torch.full_like(scales, (2**bits - 1) / 2), None)
        made: Callable[[Tensor], Tensor] = layer
        return made

    return make


# Name -> (package, maker of a layer from a dense weight).
PEERS: dict[str, tuple[str, Callable[[Tensor], Callable[[Tensor], Tensor]]]] = {
    "torchao int4": ("torchao", _torchao_int4),
    "gemlite 4-bit": ("gemlite", _gemlite(4)),
    "gemlite 1-bit": ("gemlite", _gemlite(1)),
}


def make(name: str, weight: Tensor) -> Callable[[Tensor], Tensor]:
    """A peer's layer with the shape of ``weight``; its package must be installed, and may raise what it likes."""
    return PEERS[name][1](weight)


def importable(package: str) -> bool:
    """Whether a package is installed."""
    return importlib.util.find_spec(package) is not None
