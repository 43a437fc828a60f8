"""Triton kernels behind the ``tbn::`` operators on a GPU.

The kernels are registered without importing triton; that happens at the first call on a GPU. Where triton is missing,
or for a call that no kernel covers, the operator's PyTorch reference computes the result, and the reason is logged
once at level INFO (logger ``tbn_compiler.backends.triton``). :func:`info` tells what is in use.

============  ==========================================================================================
``plan``      how kernels read a tiled weight, from its layout
``kernels``   the kernels
``linear``    ``tbn::linear``: what calls have in common, and the operands of each
``launches``  grids, arguments and workspaces of its kernels
``prepared``  what calls of an operator with equal forms keep
``replay``    launches that are kept, and repeated with other addresses
``counts``    counts of programs that have arrived, for sums of several
``conv``      ``tbn::conv1d/2d/3d``
``hadamard``  launches for copies with Hadamard signs
``quantize``  inputs as integers
``search``    the configurations that a shape may be run with
``tuning``    choosing among them by measurement, and the file that keeps the choice
============  ==========================================================================================
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbn_compiler.backends.triton.plan import plan_weight
from tbn_compiler.backends.triton.search import Gpu, linear_candidates
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import OPERATORS, register_kernel, with_signature
from tbn_compiler.ops.schemas import CONV_OPS, make_layout
from tbn_compiler.tiling import TiledProduct

_LOGGER = logging.getLogger(__name__)


@functools.cache
def unavailable() -> str | None:
    """Why the Triton kernels cannot be used at all, or ``None``."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'tbn-compiler[gpu]')"
    return None


_declined: dict[str, int] = {}


def decline(reason: str) -> None:
    """Count a call that is left to the reference, and log the first one with this reason."""
    if reason not in _declined:
        _LOGGER.info("left to the PyTorch reference: %s", reason)
    _declined[reason] = _declined.get(reason, 0) + 1


@dataclass(frozen=True)
class Info:
    """What computes the ``tbn::`` operators on a GPU.

    Attributes:
        kernels: "triton" or "reference".
        reason: why not Triton; empty if it is.
        torch: version.
        triton: version, or ``None``.
        device: name of the current GPU, or ``None``.
        tuning_file: where measured configurations are kept for it, or ``None``.
        declined: calls that the reference computed although the kernels were registered, by reason.
    """

    kernels: str
    reason: str
    torch: str
    triton: str | None
    device: str | None
    tuning_file: str | None
    declined: dict[str, int]


def info() -> Info:
    """What computes the ``tbn::`` operators on a GPU, and why."""
    reason = unavailable()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    version = path = None
    if reason is None:
        import triton

        from tbn_compiler.backends.triton.tuning import tuning_file

        version = triton.__version__
        path = None if device is None else str(tuning_file(device))
    kernels = "triton" if reason is None else "reference"
    return Info(kernels, reason or "", torch.__version__, version, device, path, dict(_declined))


def linear_workspace(
    in_features: int,
    out_features: int,
    p: int,
    num_alphas: int,
    tokens: int,
    dtype: torch.dtype,
    *,
    packed: bool = True,
    gpu: Gpu | None = None,
) -> int:
    """Bytes that ``tbn::linear`` allocates beside its result with the configuration that it uses unmeasured.

    Args:
        in_features: columns of the layer's weight.
        out_features: rows of the layer's weight, in the paper's layout.
        p: copies of the tile.
        num_alphas: scales of the layer.
        tokens: rows of the input.
        dtype: dtype of the input.
        packed: 1-bit tile, otherwise full precision.
        gpu: the GPU; an H200 if not given.

    Returns:
        Size of the partial sums of a product whose columns several programs share, or of weights that are expanded
        before and the products with them.
    """
    product = TiledProduct(make_layout((out_features, in_features), p), num_alphas)
    plan = plan_weight(product, packed=packed, word_aligned=True)
    config = linear_candidates(plan, tokens, dtype, gpu or Gpu())[0]
    if config.kernel in ("unpack", "gemm", "library"):
        products = tokens * plan.rows * 4 if config.kernel == "library" else 0
        return plan.rows * plan.columns * dtype.itemsize + products
    if config.split_k == 1:
        return 0
    blocks = -(-tokens // config.block_tokens) * -(-plan.rows // config.block_rows)
    return config.split_k * blocks * config.block_tokens * config.block_rows * 4


def kernel(name: str) -> Callable[..., Tensor]:
    """The kernel of an operator, in the module that launches it; triton is imported at the first call."""
    operator = OPERATORS[name]
    module = f"{__name__}.{'conv' if operator.dims else 'linear'}"

    def compute(*args: Any, **kwargs: Any) -> Tensor:
        reason = unavailable()
        if reason is not None:
            decline(reason)
            call = operator.bind(args, kwargs).checked()
            return reference.compute(call).contiguous(memory_format=call.output_format())
        result: Tensor = getattr(importlib.import_module(module), name)(*args, **kwargs)
        return result

    return with_signature(operator, compute)


def register() -> None:
    """Register the kernels for CUDA devices (ROCm's too)."""
    for name in ("linear", *CONV_OPS.values()):
        register_kernel(OPERATORS[name], kernel(name), "CUDA")
