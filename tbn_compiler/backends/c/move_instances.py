"""Kernels that move integers, look them up or give them another type, by the name of the C function."""

from __future__ import annotations

from tbn_compiler.backends.c.instances import template
from tbn_compiler.backends.c.plan import C_TYPES

# What may be moved beside floats, and what is converted to what.
_MOVED = ("int8", "uint8", "int32")
CONVERTED = (
    *(("uint8", "float32"), ("int8", "float32"), ("int32", "float32")),
    *(("uint8", "int32"), ("int8", "int32")),
)
# Kernels that move elements: what they need, the header that they include, and their parameters.
_MOVES: dict[str, tuple[tuple[str, ...], tuple[str, ...], dict[str, object]]] = {
    "copy": ((), ("string.h",), {}),
    "copy_blocks": ((), ("string.h",), {}),
    "fill": ((), (), {}),
    "strided_copy": (("nest2",), (), {"index": None}),
}
# What is looked up, and what is added to it for its place in the table.
_LOOKED_UP = {"int8": " + 128", "uint8": ""}


def move_name(kernel: str, dtype: str) -> str:
    """Name of the kernel that moves elements of a type."""
    return kernel if dtype == "float32" else f"{kernel}_{dtype}"


def conversion_name(source: str, result: str) -> str:
    """Name of the kernel that gives numbers another type."""
    return f"{source}_to_{result}"


def lookup_name(dtype: str, strided: bool) -> str:
    """Name of the kernel that looks up bytes of a type, side by side or wherever loops find them."""
    return f"{dtype}_lookup{'_strided' if strided else ''}"


def _instances() -> dict[str, str]:
    found = {}
    for dtype in _MOVED:
        for stem, (needs, headers, more) in _MOVES.items():
            kernel = move_name(stem, dtype)
            parameters = {"kernel": kernel, "element": C_TYPES[dtype], **more}
            found[kernel] = template(f"loops/{stem}", parameters, needs, (*headers, "stdint.h"))
    for source, result in CONVERTED:
        kernel = conversion_name(source, result)
        parameters = {"kernel": kernel, "element": C_TYPES[source], "result": C_TYPES[result]}
        found[kernel] = template("loops/convert", parameters, headers=("stdint.h",))
    for dtype, index in _LOOKED_UP.items():
        for strided, source, needs in ((False, "lookup", ()), (True, "strided_copy", ("nest2",))):
            kernel = lookup_name(dtype, strided)
            parameters = {"kernel": kernel, "element": C_TYPES[dtype], "index": index}
            found[kernel] = template(f"loops/{source}", parameters, needs, ("stdint.h",))
    return found


INSTANCES = _instances()
