"""Native CPU kernels under the ``tbn::`` operators; see ``docs/cpu.md``.

A plain C library computes the different rows of a tile by table lookups, in the best vector instructions that the
machine has. It is opened at the first call. Where it is missing, and for the few calls that it does not take, PyTorch
computes, and :func:`info` gives the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tbn_compiler.backends.cpu import conv, declined, library, linear, prepare
from tbn_compiler.backends.cpu.bind_layers import bind
from tbn_compiler.backends.cpu.library import LEVELS, set_level, use_level
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import OPERATORS, TensorCall, make_kernel, register_kernel

__all__ = ["LEVELS", "Info", "bind", "info", "register", "set_level", "use_level"]


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


def _left_to_pytorch(call: TensorCall) -> Tensor:
    """A call that no kernel takes; it is counted as declined."""
    declined.decline(call.kind, "transpose convolution" if call.transposed else "three dimensions")
    return reference.compute(call).contiguous(memory_format=call.output_format())


def register() -> None:
    """Put the kernels under the operators on the CPU. Nothing is loaded before the first call."""
    native = {kernel.__name__: kernel for kernel in (linear.linear, conv.make_conv(1), conv.make_conv(2))}
    for name, operator in OPERATORS.items():
        register_kernel(operator, native.get(name) or make_kernel(operator, _left_to_pytorch), "CPU")
