"""From a module to :class:`~tbn_compiler.backends.c.ir.Graph`, through ``torch.export``.

One module for each family of operators. To support a further operator: an operation in
:mod:`~tbn_compiler.backends.c.ir`, a function here that converts to it, and a function with a template in
:mod:`~tbn_compiler.backends.c.kernels`. A function of elements is a line of
:mod:`~tbn_compiler.backends.c.element_instances`.
"""

from tbn_compiler.backends.c.frontend import (
    attention,
    conditions,
    elementwise,
    indexing,
    layers,
    recurrent,
    reductions,
    resizing,
    shapes,
    volumes,
)
from tbn_compiler.backends.c.frontend.importer import import_graph
from tbn_compiler.backends.c.frontend.registry import supported_operators

__all__ = [
    "attention",
    "conditions",
    "elementwise",
    "import_graph",
    "indexing",
    "layers",
    "recurrent",
    "reductions",
    "resizing",
    "shapes",
    "supported_operators",
    "volumes",
]
