"""tbn_compiler: a compiler for Tiled Bit Networks (Gorbett, Shirazi, Ray, CIKM 2024).

>>> import torch, tbn_compiler as tbn
>>> net = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
>>> qat = tbn.transform(net, tbn.TilingConfig(p=4))  # train this with any loop
>>> packed = tbn.lower(qat)                          # inference on packed tiles
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tbn_compiler import backends
from tbn_compiler.compiler import lower, optimize, transform
from tbn_compiler.config import LayerInfo, TilingConfig
from tbn_compiler.errors import (
    ConfigError,
    ExportError,
    LoweringError,
    SerializationError,
    TBNError,
    TransformError,
)
from tbn_compiler.serialize import load, save
from tbn_compiler.summary import Summary, summary
from tbn_compiler.training import init_from_float, set_tiling_strength, tiling_strength

if TYPE_CHECKING:
    from torch import nn

    from tbn_compiler.backends.c import Plan

__version__ = "0.1.0"

backends.register()


def export_c(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    **options: Any,
) -> Plan:
    """Write a model as one standalone C99 file and a header; see :func:`tbn_compiler.backends.c.export_c`."""
    from tbn_compiler.backends.c import export_c as export  # backends load when used

    return export(module, example_inputs, path, **options)


__all__ = [
    "ConfigError",
    "ExportError",
    "LayerInfo",
    "LoweringError",
    "SerializationError",
    "Summary",
    "TBNError",
    "TilingConfig",
    "TransformError",
    "export_c",
    "init_from_float",
    "load",
    "lower",
    "optimize",
    "save",
    "set_tiling_strength",
    "summary",
    "tiling_strength",
    "transform",
]
