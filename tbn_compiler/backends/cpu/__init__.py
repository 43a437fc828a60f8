"""Native CPU kernels under the ``tbn::`` operators; see ``docs/cpu.md``.

A plain C library computes the different rows of a tile by table lookups, in the best vector instructions that the
machine has. It is opened at the first call. Where it is missing, and for the few calls that it does not take, PyTorch
computes, and :func:`info` gives the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tbn_compiler.backends.cpu import conv, declined, library, linear, prepare
from tbn_compiler.backends.cpu.library import LEVELS, set_level, use_level
from tbn_compiler.ops import LIBRARY, reference
from tbn_compiler.ops.schemas import CONV_TRANSPOSE_OPS

__all__ = ["LEVELS", "Info", "info", "register", "set_level", "use_level"]


@dataclass(frozen=True)
class Info:
    """What computes the ``tbn::`` operators on the CPU.

    Attributes:
        level: the vector level in use, or ``None``: PyTorch computes.
        reason: why, where the level is ``None``.
        available: the levels that this machine runs, best first.
        library: path of the native library, or ``None``.
        prepared_tiles: tiles that are kept in the kernels' order.
        prepared_bytes: bytes that they take.
        declined: calls that PyTorch computed although the kernels were registered, by operator and reason.
    """

    level: str | None
    reason: str
    available: tuple[str, ...]
    library: str | None
    prepared_tiles: int
    prepared_bytes: int
    declined: dict[str, int]


def info() -> Info:
    """What computes the ``tbn::`` operators on the CPU, and why.

    Raises:
        ConfigError: the environment variable ``TBN_CPU_LEVEL`` names no level that this machine runs.
    """
    level, path = library.level(), library.library_path()
    return Info(
        level=level,
        reason="" if level else library.unused(),
        available=library.available_levels(),
        library=str(path) if path else None,
        prepared_tiles=prepare.memory()[0],
        prepared_bytes=prepare.memory()[1],
        declined=declined.counts(),
    )


def _left_to_pytorch(kernel: Callable[..., Tensor], reason: str) -> Callable[..., Tensor]:
    """A PyTorch kernel whose calls are counted as declined."""

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        declined.decline(kernel.__name__, reason)
        return kernel(*args, **kwargs)

    counted.__name__ = kernel.__name__
    return counted


def register() -> None:
    """Put the kernels under the operators on the CPU. Nothing is loaded before the first call."""
    kernels = [linear.linear, conv.make_conv(1), conv.make_conv(2)]
    kernels.append(_left_to_pytorch(reference.KERNELS["conv3d"], "three dimensions"))
    for op in CONV_TRANSPOSE_OPS.values():
        kernels.append(_left_to_pytorch(reference.KERNELS[op], "transpose convolution"))
    for kernel in kernels:
        LIBRARY.impl(kernel.__name__, kernel, "CPU")
