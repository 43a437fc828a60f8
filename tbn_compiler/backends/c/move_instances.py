"""Kernels that move integers or give them another type: the texts of those for floats, by the name of the function."""

from __future__ import annotations

from tbn_compiler.backends.c.instances import template
from tbn_compiler.backends.c.plan import C_TYPES

# What may be moved beside floats, and what is converted to what.
_MOVED = ("int8", "uint8", "int32")
CONVERTED = (
    *(("uint8", "float32"), ("int8", "float32"), ("int32", "float32")),
    *(("uint8", "int32"), ("int8", "int32")),
)
# Kernels that move elements: what they need, and the header that they include.
_MOVES = {
    "copy": ((), ("string.h",)),
    "copy_blocks": ((), ("string.h",)),
    "fill": ((), ()),
    "strided_copy": (("nest2",), ()),
}


def move_name(kernel: str, dtype: str) -> str:
    """Name of the kernel that moves elements of a type."""
    return kernel if dtype == "float32" else f"{kernel}_{dtype}"


def conversion_name(source: str, result: str) -> str:
    """Name of the kernel that gives numbers another type."""
    return f"{source}_to_{result}"


def _instances() -> dict[str, str]:
    found = {}
    for dtype in _MOVED:
        for stem, (needs, headers) in _MOVES.items():
            kernel = move_name(stem, dtype)
            parameters = {"kernel": kernel, "element": C_TYPES[dtype]}
            found[kernel] = template(f"loops/{stem}", parameters, needs, (*headers, "stdint.h"))
    for source, result in CONVERTED:
        kernel = conversion_name(source, result)
        parameters = {"kernel": kernel, "element": C_TYPES[source], "result": C_TYPES[result]}
        found[kernel] = template("loops/convert", parameters, headers=("stdint.h",))
    return found


INSTANCES = _instances()
