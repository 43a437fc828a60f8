"""tbn_compiler: a compiler for Tiled Bit Networks (Gorbett, Shirazi, Ray, CIKM 2024).

>>> import torch, tbn_compiler as tbn
>>> net = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
>>> qat = tbn.transform(net, tbn.TilingConfig(p=4))  # train this with any loop
>>> packed = tbn.lower(qat)                          # inference on packed tiles
"""

from __future__ import annotations

from tbn_compiler.compiler import lower, transform
from tbn_compiler.config import LayerInfo, TilingConfig
from tbn_compiler.errors import (
    ConfigError,
    ExportError,
    LoweringError,
    SerializationError,
    TBNError,
    TransformError,
)

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "ExportError",
    "LayerInfo",
    "LoweringError",
    "SerializationError",
    "TBNError",
    "TilingConfig",
    "TransformError",
    "lower",
    "transform",
]
