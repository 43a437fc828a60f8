"""Backends: leaves that turn a lowered graph into running code. None of them imports another."""

from __future__ import annotations


def register() -> None:
    """Register the kernels of the backends that sit under the ``tbn::`` operators; each loads at its first call."""
    from tbn_compiler.backends import cpu, triton

    cpu.register()
    triton.register()
