"""Kernels in float that are printed from one template with different parameters, by the name of the C function.

They compute several results at once, so that what is loaded serves more than one product.
"""

from __future__ import annotations

from tbn_compiler.backends.c.instances import template

# Widths of the windows whose rows are multiplied without a loop.
CONV_COLUMNS = range(1, 8)
# Filters that a convolution takes at once, and output positions.
CONV_POSITIONS = {4: 2, 1: 4}


def conv_name(filters: int, columns: int, dilation: int, down: bool = False) -> str:
    """Name of the convolution that takes so many filters at once, for windows of so many columns."""
    unrolled = columns in CONV_COLUMNS and (dilation == 1 or columns == 1)
    return f"conv_{'down_' if down else ''}by_{filters}{f'_columns{columns}' if unrolled else ''}"


def linear_name(vectors: int) -> str:
    """Name of the linear layer that takes 4 rows and so many vectors at once."""
    return f"linear_by_4x{vectors}"


def matmul_name(columns: int) -> str:
    """Name of the product that takes 4 rows and so many columns at once."""
    return f"matmul_by_4x{columns}"


def _convs() -> dict[str, str]:
    found = {}

    def add_block(kernel: str, filters: int, positions: int, columns: int, down: bool = False) -> None:
        parameters = {"kernel": kernel, "filters": filters, "positions": positions, "columns": columns, "down": down}
        found[kernel] = template("float/conv_block", parameters, ("activate", "conv_part"))

    for filters, positions in CONV_POSITIONS.items():
        add_block(f"conv_edge_by_{filters}", filters, 1, 0)
        for columns in (0, *CONV_COLUMNS):
            add_block(f"{conv_name(filters, columns, 1)}_block", filters, positions, columns)
    # Down the columns of the output, one filter at a time; the window's columns may be partly outside the image.
    part = f"{conv_name(1, 0, 1, down=True)}_block"
    for columns in (0, *CONV_COLUMNS):
        down, stem = conv_name(1, columns, 1, down=True), conv_name(1, columns, 1).removeprefix("conv_")
        whole, some_columns = f"{down}_block", f"conv_columns_{stem}"
        add_block(whole, 1, CONV_POSITIONS[1], columns, down=True)
        parameters = {"kernel": some_columns, "whole": whole, "part": part}
        needs: tuple[str, ...] = ("window_inside", "conv_edge_by_1", part, whole)
        found[some_columns] = template("float/conv_columns", parameters, needs)
        needs = ("conv_start", some_columns)
        found[down] = template("float/conv_down", {"kernel": down, "columns": some_columns}, needs)
    for filters, more in ((4, "conv_edge_by_4"), (1, "conv_columns_by_1")):
        for columns in (0, *CONV_COLUMNS):
            kernel = conv_name(filters, columns, 1)
            block = f"{kernel}_block"
            needs = ("window_inside", "conv_start", more, block)
            found[kernel] = template(f"float/conv_by_{filters}", {"kernel": kernel, "block": block}, needs)
    return found


def _products() -> dict[str, str]:
    found = {}
    for vectors in (1, 2):
        kernel = linear_name(vectors)
        found[kernel] = template("float/linear", {"kernel": kernel, "vectors": vectors}, ("activate",))
    for columns in (1, 2):
        kernel = matmul_name(columns)
        found[kernel] = template("float/matmul", {"kernel": kernel, "columns": columns}, ("matmul_sizes",))
    return found


INSTANCES = _convs() | _products()
