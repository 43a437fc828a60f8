"""How each operation of :mod:`~tbn_compiler.backends.c.ir` is computed: which kernels, with which arguments.

One function an operation, registered with :func:`~tbn_compiler.backends.c.registry.implements`. A kernel is a template
of its own name. Layers on tiles have :mod:`~tbn_compiler.backends.c.tiled_kernels` and
:mod:`~tbn_compiler.backends.c.tiled_transpose`.
"""

from tbn_compiler.backends.c import tiled_kernels, tiled_transpose
from tbn_compiler.backends.c.kernels import attention, convs, elementwise, int8, layers, recurrent, reductions

__all__ = [
    "attention",
    "convs",
    "elementwise",
    "int8",
    "layers",
    "recurrent",
    "reductions",
    "tiled_kernels",
    "tiled_transpose",
]
