"""Kernels that are printed from one template with different parameters, by the name of the C function.

Each is a small template of its own, as the files beside it are: it declares what it needs, sets the parameters and
includes the common text from ``templates/tiled``.
"""

from __future__ import annotations

import itertools
from typing import Literal, get_args

from tbn_compiler.backends.c.instances import template

# Number of rows whose signs choose a bucket, and the numbers of such groups that a pass may take.
BUCKET_LANES = {8: (1, 2, 3, 4), 4: (1, 2, 3, 4, 5, 6, 7, 8)}

# Widths of the windows that are gathered faster.
PATCH_COLUMNS = range(1, 8)

# Distances of two positions at which windows are gathered faster.
PAIR_STRIDES = (1, 2)

# Filters that slide over images without loops, the widths of others that are faster, and strides of both.
WHOLE_FILTERS = ((3, 3),)
FILTER_COLUMNS = range(1, 8)
FILTER_STRIDES = (1, 2)

# Column groups that one lookup kernel sums apart, and those whose products are mixed without loops.
LOOKUP_GROUPS = (2, 4, 8)
MIX_GROUPS = (2, 4, 8, 16)
# Up to so many groups the code without loops is not larger.
_SMALL_MIX = 4
# Kernels that mix in loops take memory for a number of each group.
MIXES_WITH_MEMORY = ("tiled_mix", "tiled_block_mix")

Arithmetic = Literal["float", "fixed", "block", "int8", "pair"]
"""What a kernel computes in.

Floats; block fixed point, with floats in and out; the integers of a given block, with floats in and sums out; int8 in
and sums out; or two vectors of int8 at a time, as ``x0 + 65536 * x1``, with sums in the same form.
"""


Finish = Literal["float", "int8", "relu"]
"""What sums of int8 become: floats, int8, or int8 from 0 to 127."""


def instance(stem: str, arithmetic: Arithmetic, strided: bool = False) -> str:
    """Name of a kernel in an arithmetic, for inputs side by side or a stride apart."""
    return f"tiled_{'' if arithmetic == 'float' else f'{arithmetic}_'}{stem}{'_strided' if strided else ''}"


def patch_name(columns: int, dilation: int, grouped: bool = False) -> str:
    """Name of the kernel that gathers windows of so many columns, in the order of column groups or of channels."""
    fast = columns in PATCH_COLUMNS and (dilation == 1 or columns == 1)
    return f"tiled_patch{columns if fast else ''}{'_groups' if grouped else ''}"


def filter_name(rows: int = 0, columns: int = 0, stride: int = 1, channels: bool = False) -> str:
    """Name of the kernel for filters of one size, of any height and so many columns (``rows`` is 0), or of any size."""
    if columns == 0:
        return "tiled_filter"
    size = f"{rows}x{columns}{'_channels' if channels else ''}" if rows else f"_columns{columns}"
    return f"tiled_filter{size}{f'_by{stride}' if stride > 1 else ''}"


def lookup_stem(groups: int) -> str:
    """What the lookup kernel for so many column groups is called in every arithmetic."""
    return f"lookup_groups{groups}" if groups > 1 else "lookup"


def _template(
    source: str, parameters: dict[str, object], needs: tuple[str, ...] = (), headers: tuple[str, ...] = ()
) -> str:
    return template(f"tiled/{source}", parameters, needs, headers)


def _patches() -> dict[str, str]:
    found = {}
    for grouped in (False, True):
        general = patch_name(0, 1, grouped)
        found[general] = _template("patch_any", {"kernel": general, "grouped": grouped}, ("window",))
        for columns in PATCH_COLUMNS:
            kernel = patch_name(columns, 1, grouped)
            parameters = {"kernel": kernel, "general": general, "columns": columns, "grouped": grouped}
            found[kernel] = _template("patch_columns", parameters, (general,))
    return found


def _filters() -> dict[str, str]:
    needs, found = ("window", "tiled_filter_layer"), {}
    for stride in FILTER_STRIDES:
        for columns in FILTER_COLUMNS:
            kernel = filter_name(0, columns, stride)
            found[kernel] = _template("filter_columns", {"kernel": kernel, "columns": columns, "stride": stride}, needs)
        for (rows, columns), channels in itertools.product(WHOLE_FILTERS, (False, True)):
            kernel = filter_name(rows, columns, stride, channels)
            size: dict[str, object] = {"rows": rows, "columns": columns, "stride": stride, "channels": channels}
            found[kernel] = _template("filter_whole", {"kernel": kernel, **size}, needs)
    return found


def _rows(arithmetic: Arithmetic, strided: bool) -> dict[str, str]:
    found = {}
    sums = instance("signed_sums", "float" if arithmetic == "float" else "fixed")

    def add(stem: str, source: str, needs: tuple[str, ...] = (), **parameters: object) -> None:
        kernel = instance(stem, arithmetic, strided)
        needs = (*needs, "tiled_fixed") if arithmetic in ("fixed", "block") else needs
        parameters = {"kernel": kernel, "arithmetic": arithmetic, "strided": strided} | parameters
        found[kernel] = _template(source, parameters, needs, ("stdint.h",))

    for groups in (1, *LOOKUP_GROUPS) if arithmetic in ("float", "block") else (1,):
        add(lookup_stem(groups), "lookup", groups=groups)
    for stem, whole in (("table", True), ("table_any", False)):
        add(stem, "table", whole=whole)
    for bits, all_lanes in BUCKET_LANES.items():
        for lanes in all_lanes:
            add(f"bucket{bits}x{lanes}", "bucket", (sums,), signed_sums=sums, bits=bits, lanes=lanes)
    return found


def pair_patch_name(columns: int, dilation: int, stride: int) -> str:
    """Name of the kernel that gathers windows of so many columns at two positions, this far apart."""
    fast = columns in PATCH_COLUMNS and (dilation == 1 or columns == 1) and stride in PAIR_STRIDES
    return f"tiled_pair_patch{columns}_stride{stride}" if fast else "tiled_pair_patch"


def _pair_patches() -> dict[str, str]:
    needs, headers = ("window",), ("stdint.h",)
    found = {"tiled_pair_patch": _template("pair_patch_any", {"kernel": "tiled_pair_patch"}, needs, headers)}
    for columns in PATCH_COLUMNS:
        for stride in PAIR_STRIDES:
            kernel = pair_patch_name(columns, 1, stride)
            parameters = {"kernel": kernel, "columns": columns, "stride": stride}
            found[kernel] = _template("pair_patch", parameters, ("tiled_pair_patch",), headers)
    return found


def finish_name(pair: bool, result: Finish) -> str:
    """Name of the kernel that turns sums of int8, of one vector or of two, into results."""
    return f"tiled_{'pair' if pair else 'int8'}_finish_{result}"


def _int8_finishes() -> dict[str, str]:
    found = {}
    for pair in (False, True):
        for result in get_args(Finish):
            integers = result != "float"
            needs = ("requantize", "tiled_int8_layer") if integers else ("activate", "tiled_int8_result")
            kernel = finish_name(pair, result)
            parameters = {"kernel": kernel, "pair": pair, "result": result}
            found[kernel] = _template("int8_finish", parameters, needs, ("stdint.h",))
    return found


def depthwise_name(columns: int, dilation: int, stride: int, result: Finish, by4: bool = False) -> str:
    """Name of the kernel for convolutions of single channels of int8; ``by4``: that for four positions, if there is."""
    fast = columns == _DEPTHWISE_COLUMNS and dilation == 1 and stride in PAIR_STRIDES
    kind = f"{columns}{'_by4' if by4 else ''}_stride{stride}" if fast else ""
    return f"tiled_int8_depthwise{kind}_{result}"


_DEPTHWISE_COLUMNS = 3  # the width of windows whose pixels stay in registers


def _depthwise() -> dict[str, str]:
    found = {}
    for result in get_args(Finish):
        needs = ("requantize", "tiled_int8_layer") if result != "float" else ("activate", "tiled_int8_result")
        for columns, stride in ((0, 0), *((_DEPTHWISE_COLUMNS, stride) for stride in PAIR_STRIDES)):
            kernel = depthwise_name(columns, 1, stride, result)
            parameters = {"kernel": kernel, "columns": columns, "stride": stride, "result": result}
            found[kernel] = _template("int8_depthwise", parameters, ("window", *needs), ("stdint.h",))
        for stride in PAIR_STRIDES:
            kernel = depthwise_name(_DEPTHWISE_COLUMNS, 1, stride, result, by4=True)
            parameters = {"kernel": kernel, "stride": stride, "result": result}
            more = ("window", "four_bytes", "tiled_int8_inside", *needs)
            found[kernel] = _template("int8_depthwise_by4", parameters, more, ("stdint.h",))
    return found


def _sums() -> dict[str, str]:
    numbers = {instance("signed_sums", "float"): "float", instance("signed_sums", "fixed"): "int32_t"}
    return {
        kernel: _template("signed_sums", {"kernel": kernel, "number": number}, headers=("stdint.h",))
        for kernel, number in numbers.items()
    }


def mix_name(groups: int, arithmetic: Arithmetic, small: bool) -> str:
    """Name of the kernel that mixes the products of so many column groups; ``small`` prefers little code."""
    unrolled = arithmetic == "float" and groups in MIX_GROUPS and (groups <= _SMALL_MIX or not small)
    return instance(f"mix{groups if unrolled else ''}", arithmetic)


def _mixes() -> dict[str, str]:
    needs = ("activate", "tiled_mix_layer")
    found = {}
    for groups in MIX_GROUPS:
        kernel = mix_name(groups, "float", small=False)
        found[kernel] = _template("mix", {"kernel": kernel, "groups": groups}, needs)
    for kernel, block in zip(MIXES_WITH_MEMORY, (False, True), strict=True):
        more = ("tiled_fixed",) if block else ()
        found[kernel] = _template("mix_any", {"kernel": kernel, "block": block}, (*needs, *more))
    return found


INSTANCES = (
    _patches()
    | _filters()
    | _sums()
    | _rows("float", strided=False)
    | _rows("float", strided=True)
    | _rows("fixed", strided=False)
    | _rows("block", strided=False)
    | _rows("block", strided=True)
    | _rows("int8", strided=False)
    | _rows("pair", strided=False)
    | _pair_patches()
    | _int8_finishes()
    | _depthwise()
    | _mixes()
)
