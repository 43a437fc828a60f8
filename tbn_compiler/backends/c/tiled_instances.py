"""Kernels that are printed from one template with different parameters, by the name of the C function.

Each is a small template of its own, as the files beside it are: it declares what it needs, sets the parameters and
includes the common text from ``templates/tiled``.
"""

from __future__ import annotations

# Number of rows whose signs choose a bucket, and the numbers of such groups that a pass may take.
BUCKET_LANES = {8: (1, 2, 3, 4), 4: (1, 2, 3, 4, 5, 6, 7, 8)}

# Widths of the windows that are gathered faster.
PATCH_COLUMNS = range(1, 8)


def instance(stem: str, fixed: bool) -> str:
    """Name of a kernel in floating-point or in block fixed-point arithmetic."""
    return f"tiled_{'fixed_' if fixed else ''}{stem}"


def bucket_name(bits: int, lanes: int, fixed: bool) -> str:
    """Name of the bucket kernel for ``lanes`` groups of ``bits`` rows."""
    return instance(f"bucket{bits}x{lanes}", fixed)


def patch_name(columns: int, dilation: int) -> str:
    """Name of the kernel that gathers windows of so many columns."""
    return f"tiled_patch{columns}" if columns in PATCH_COLUMNS and (dilation == 1 or columns == 1) else "tiled_patch"


def _template(kernel: str, source: str, fixed: bool, needs: tuple[str, ...] = (), **parameters: object) -> str:
    declared = [*needs, "tiled_fixed"] if fixed else list(needs)
    parameters = {"kernel": kernel, "number": "int32_t" if fixed else "float"} | parameters
    lines = [
        *([f"{{# needs: {', '.join(declared)} #}}"] if declared else []),
        "{# headers: stdint.h #}",
        *(f"{{% set {name} = {value!r} %}}" for name, value in parameters.items()),
        f'{{% include "tiled/{source}.c" %}}',
    ]
    return "\n".join(lines) + "\n"


def _instances() -> dict[str, str]:
    found = {}
    for columns in PATCH_COLUMNS:
        kernel = f"tiled_patch{columns}"
        found[kernel] = (
            f"{{# needs: tiled_patch #}}\n{{% set kernel, columns = '{kernel}', {columns} %}}\n"
            '{% include "tiled/patch.c" %}\n'
        )
    for fixed in (False, True):
        sums = instance("signed_sums", fixed)
        found[sums] = _template(sums, "signed_sums", False, number="int32_t" if fixed else "float")
        lookup = instance("lookup", fixed)
        found[lookup] = _template(lookup, "lookup", fixed)
        for stem, whole in (("table", True), ("table_any", False)):
            kernel = instance(stem, fixed)
            found[kernel] = _template(kernel, "table", fixed, whole=whole)
        for bits, all_lanes in BUCKET_LANES.items():
            for lanes in all_lanes:
                kernel = bucket_name(bits, lanes, fixed)
                found[kernel] = _template(
                    kernel, "bucket", fixed, needs=(sums,), signed_sums=sums, bits=bits, lanes=lanes
                )
    return found


INSTANCES = _instances()
