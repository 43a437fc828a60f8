"""Kernels for tiles that hold whole rows: how each one stores the rows' signs, what it needs and what it costs.

All compute the same: the products of one input vector with ``rows`` rows of signs. They differ in how many rows or
inputs share an addition.

* *bucket*: 4 or 8 rows share an addition for each input; a fixed cost for each pass over the inputs.
* *lookup*, *table*: 4 inputs share an addition for each row, fast and in little code.

Without floating-point instructions the same kernels work in block fixed point (``templates/tiled_fixed.c``).

Where copies have Hadamard signs, each column group of the inputs has products of its own: a kernel is called once for
each group, or, if it is a lookup for several groups, once for each so many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.plan import Argument, Workspace
from tbn_compiler.backends.c.tiled_instances import (
    BUCKET_LANES,
    LOOKUP_GROUPS,
    Arithmetic,
    instance,
    lookup_stem,
)

# Bytes of working memory that a kernel may take.
_MEMORY = {"speed": 4096, "balanced": 1024}
_INT32_BITS = 31
_MANTISSA_BITS = 24


@dataclass(frozen=True)
class _Costs:
    """Executed instructions of each kernel on one kind of processor.

    Fitted by least squares of the relative error to counts of ``backends/c/mcu``, GCC 12 -O2, for 18 shapes from 4 x 32
    to 64 x 784, and rounded: the fit is within 11 %, but for lookups of inputs that fill no whole word.

    Attributes:
        bucket: by rows that share a bucket: for each input and group of rows, each input, each group.
        lookup: for each word of 32 inputs and row, each input, each row.
        table: for each four inputs and row, each four inputs, each row.
        scan: for each input, once: finding the largest one.
        patch: for each input that a convolution gathers.
        finish: for each output, at least: scale and store.
        finish_rows: for each output, if groups have rows of their own: scale and store.
        combine: for each output that is a sum of products, at least, and for each product.
        lookup_group: in a lookup, for each word and row, for each column group beside the first one.
        regroup: for each input that is put in the order of column groups.
        mix: for each output and stage of a Hadamard transform.
    """

    bucket: dict[int, tuple[float, float, float]]
    lookup: tuple[float, float, float]
    table: tuple[float, float, float]
    scan: float
    patch: float
    finish: float
    finish_rows: float
    combine: tuple[float, float]
    lookup_group: float = 3
    regroup: float = 5
    mix: float = 2


_FPU = _Costs(
    bucket={4: (6.1, 0.7, 154), 8: (5.1, 1.3, 1146)},
    lookup=(41, 12.5, 0),
    table=(9, 150, 0),
    scan=0,
    patch=8,
    finish=12,
    finish_rows=19,
    combine=(22, 8),
)
_COSTS = {
    "cortex-m4": _FPU,
    "cortex-m3": _Costs(
        bucket={4: (6.2, 17.4, 457), 8: (5.7, 19.6, 1868)},
        lookup=(43, 36, 72),
        table=(8.5, 274, 78),
        scan=8,
        patch=8,
        finish=100,
        finish_rows=110,
        combine=(110, 90),
    ),
    "cortex-m0plus": _Costs(
        bucket={4: (8.6, 29.7, 1002), 8: (7.3, 24.4, 3386)},
        lookup=(66, 50, 200),
        table=(11, 380, 184),
        scan=5,
        patch=6,
        finish=230,
        finish_rows=250,
        combine=(200, 160),
    ),
}


@dataclass(frozen=True)
class RowsKernel:
    """One way to compute the products of an input with rows of signs.

    Attributes:
        kernel: name of the C function.
        arithmetic: what it computes in.
        granule: the kernel writes a multiple of so many products.
        size: argument behind the number of inputs: passes or rows.
        memory: elements of working memory; 0 if the kernel takes none.
        needs_sums: whether it collects integers for all rows, and takes memory for them.
        make_table: from signs ``bool [rows, inputs]``, of all groups one behind the other, to the stored table.
        table_bytes: size of that table.
        instructions: estimated number, on the target.
        groups: column groups of the inputs, each with products of its own.
    """

    kernel: str
    arithmetic: Arithmetic
    granule: int
    size: int
    memory: int
    needs_sums: bool
    make_table: Callable[[np.ndarray], np.ndarray]
    table_bytes: int
    instructions: int
    groups: int = 1


def choose(rows: int, inputs: int, options: Options) -> tuple[RowsKernel, str]:
    """The kernel for ``rows`` rows of ``inputs`` signs that serves the user's choice best, and why."""
    if options.optimize == "size":
        return _table(rows, inputs, options, _arithmetic(options)), "least code"
    return _fastest(candidates(rows, inputs, options), _most_bytes(rows, inputs), 1, options)


def choose_mixed(rows: int, inputs: int, groups: int, options: Options, strided: bool) -> tuple[RowsKernel, str]:
    """The kernel for ``rows`` rows of ``inputs`` signs in each of so many column groups, and why.

    It computes as many groups at a time as it says. Inputs are ``strided`` where groups alternate. Where the processor
    has no floating-point instructions, all groups have the integers of one block.
    """
    if options.optimize == "size":
        return _table(rows, inputs, options, _mixed_arithmetic(options), strided), "least code"
    found = mixed_candidates(rows, inputs, groups, options, strided)
    return _fastest(found, _most_bytes(rows, inputs * groups), groups, options)


def _fastest(found: Iterable[RowsKernel], most_bytes: int, groups: int, options: Options) -> tuple[RowsKernel, str]:
    """The kernel with the fewest instructions for all column groups, of those that take little memory, and why."""
    limit = _MEMORY[options.optimize]
    # Instructions and bytes for all groups, and the kernel.
    costs = [
        (kernel.instructions * calls, kernel.table_bytes * calls, kernel)
        for kernel in found
        for calls in [groups // kernel.groups]
        if 4 * kernel.memory <= limit
    ]
    most = max(most_bytes, min(size for _, size, _ in costs))
    allowed = sorted((cost for cost in costs if cost[1] <= most), key=lambda cost: cost[0])
    (instructions, _, best), *others = allowed
    vector = "a vector" if groups == 1 else f"a vector in {groups} column groups"
    reason = f"about {instructions:,} instructions for {vector}, with at most {limit:,} bytes of memory"
    return best, reason + (f"; {others[0][2].kernel} takes {others[0][0]:,}" if others else "")


def _most_bytes(rows: int, inputs: int) -> int:
    """What a table may take: signs that only fill it up no more than an eighth of the tile, or make it four rows."""
    return max((rows * inputs + 7) // 8 * 9 // 8 + 4, (4 * inputs + 7) // 8)


def mixed_candidates(rows: int, inputs: int, groups: int, options: Options, strided: bool) -> Iterator[RowsKernel]:
    """Every kernel that can compute ``rows`` rows of ``inputs`` signs in each of so many column groups."""
    arithmetic = _mixed_arithmetic(options)
    yield from _candidates(rows, inputs, options, arithmetic, strided)
    if inputs % 4 == 0:
        yield _lookup(rows, inputs, options, arithmetic, strided, min(groups, max(LOOKUP_GROUPS)))


def _mixed_arithmetic(options: Options) -> Arithmetic:
    return "float" if options.processor.fpu else "block"


def memory_limit(options: Options) -> int:
    """Bytes of working memory that a kernel may take; with the least code it is what suits less memory."""
    return _MEMORY.get(options.optimize, min(_MEMORY.values()))


def patch_instructions(inputs: int, options: Options) -> int:
    """Estimated instructions for gathering the inputs of one output position."""
    return round(_COSTS[options.processor.costs].patch * inputs)


def finish_instructions(outputs: int, options: Options) -> int:
    """Estimated instructions for scaling and storing the results of one vector."""
    return round(_COSTS[options.processor.costs].finish * outputs)


def finish_rows_instructions(outputs: int, options: Options) -> int:
    """Estimated instructions for scaling and storing the results of one vector, if groups have rows of their own."""
    return round(_COSTS[options.processor.costs].finish_rows * outputs)


def combine_instructions(outputs: int, products: int, options: Options) -> int:
    """Estimated instructions for results of one vector that are sums of so many products in all."""
    per_output, per_product = _COSTS[options.processor.costs].combine
    return round(per_output * outputs + per_product * products)


def piece_instructions(pieces: int) -> int:
    """Estimated instructions for calling a kernel once more in a loop over pieces of the inputs."""
    return 25 if pieces > 1 else 0


def multiply_arguments(kernel: RowsKernel, rows: int, inputs: int) -> tuple[Argument, ...]:
    """What a kernel takes between its inputs and its products."""
    arguments: list[Argument] = [inputs, kernel.size]
    if kernel.arithmetic == "fixed":
        arguments.append(precision(inputs))
    dtype = "int32" if kernel.arithmetic == "fixed" else "float32"
    if kernel.memory:
        arguments.append(Workspace("memory", kernel.memory, dtype))
    if kernel.needs_sums:
        arguments.append(Workspace("sums", rows + rows % kernel.granule, dtype))
    return tuple(arguments)


def regroup_instructions(inputs: int, options: Options) -> int:
    """Estimated instructions for putting the inputs of one vector in the order of column groups."""
    return round(_COSTS[options.processor.costs].regroup * inputs)


def scan_instructions(inputs: int, options: Options) -> int:
    """Estimated instructions for finding the largest input of one vector."""
    return round(_COSTS[options.processor.costs].scan * inputs)


def mix_instructions(outputs: int, groups: int, options: Options) -> int:
    """Estimated instructions for mixing, scaling and storing the results of one vector."""
    costs = _COSTS[options.processor.costs]
    return round((costs.mix * (groups.bit_length() - 1) + costs.finish) * outputs)


def precision(inputs: int) -> int:
    """Bits of the fixed-point inputs: the most that no signed sum of them can overflow, and no more than a mantissa.

    An input is at most ``2**precision`` in magnitude.
    """
    largest: int = min((2**_INT32_BITS - 1) // inputs, 2**_MANTISSA_BITS)
    return largest.bit_length() - 1


def candidates(rows: int, inputs: int, options: Options) -> Iterator[RowsKernel]:
    """Every kernel that can compute ``rows`` rows of ``inputs`` signs."""
    return _candidates(rows, inputs, options, _arithmetic(options))


def _arithmetic(options: Options) -> Arithmetic:
    return "float" if options.processor.fpu else "fixed"


def _candidates(
    rows: int, inputs: int, options: Options, arithmetic: Arithmetic, strided: bool = False
) -> Iterator[RowsKernel]:
    yield _table(rows, inputs, options, arithmetic, strided)
    if inputs % 4 == 0:
        yield _lookup(rows, inputs, options, arithmetic, strided)
    for bits, all_lanes in BUCKET_LANES.items():
        groups = -(-rows // bits)
        for lanes in all_lanes:
            if groups % lanes == 0:
                yield _bucket(rows, inputs, options, arithmetic, strided, bits, lanes)


def integer_candidates(rows: int, inputs: int, arithmetic: Arithmetic, options: Options) -> Iterator[RowsKernel]:
    """The kernels for ``rows`` rows of ``inputs`` int8 numbers, or pairs of them, that serve the user's choice."""
    if options.optimize == "size":
        yield _table(rows, inputs, options, arithmetic)
        return
    found = list(_candidates(rows, inputs, options, arithmetic))
    most = max(_most_bytes(rows, inputs), min(kernel.table_bytes for kernel in found))
    limit = _MEMORY[options.optimize]
    yield from (kernel for kernel in found if kernel.table_bytes <= most and 4 * kernel.memory <= limit)


def integer_instructions(what: str, count: int, options: Options) -> int:
    """Estimated instructions on int8: to gather inputs of two vectors, finish an output, or for a sign of a filter."""
    return round(_INTEGER_PARTS[options.processor.costs][what] * count)


# From differences of networks with one layer more. A product of 64 bits is a call on the smallest core.
_LONG_PRODUCTS = {"patch": 9.0, "finish": 13.0, "depthwise": 5.1, "depthwise by 4": 1.5}
_INTEGER_PARTS = {
    "cortex-m4": _LONG_PRODUCTS,
    "cortex-m3": _LONG_PRODUCTS,
    "cortex-m0plus": {"patch": 12.0, "finish": 55.0, "depthwise": 4.0, "depthwise by 4": 4.0},
}
# Without conversions, integers take what floats take where there are instructions for them.
_INTEGER_COSTS = _FPU
_M0_INTEGER_COSTS = replace(
    _COSTS["cortex-m0plus"],
    bucket={4: (8.6, 3, 1002), 8: (7.3, 3, 3386)},
    lookup=(66, 25, 0),
    table=(11, 300, 0),
)


def _table(rows: int, inputs: int, options: Options, arithmetic: Arithmetic, strided: bool = False) -> RowsKernel:
    even, groups = rows + rows % 2, -(-inputs // 4)
    costs = _costs(options, arithmetic)
    per_row_of_group, per_group, per_row = costs.table
    return RowsKernel(
        kernel=instance("table_any" if inputs % 4 else "table", arithmetic, strided),
        arithmetic=arithmetic,
        granule=2,
        size=even,
        memory=0,
        needs_sums=arithmetic == "fixed",
        make_table=lambda signs: _pack(_padded(signs, 2, 4).reshape(even, groups, 4).swapaxes(0, 1)),
        table_bytes=groups * even // 2,
        instructions=round(
            groups * (per_row_of_group * even + per_group) + per_row * even + _scan(costs, arithmetic) * inputs
        ),
    )


def _lookup(
    rows: int, inputs: int, options: Options, arithmetic: Arithmetic, strided: bool, groups: int = 1
) -> RowsKernel:
    share, costs = 32 // groups, _costs(options, arithmetic)  # bits of a word for each group
    words = -(-inputs // share)
    per_word, per_input, per_row = costs.lookup
    per_word += costs.lookup_group * (groups - 1)

    def make_table(signs: np.ndarray) -> np.ndarray:
        apart = _padded(signs.reshape(rows * groups, inputs), 1, share).reshape(rows, groups, words, share)
        return _pack(apart.transpose(2, 0, 1, 3)).view("<u4").astype(np.uint32)

    return RowsKernel(
        kernel=instance(lookup_stem(groups), arithmetic, strided),
        arithmetic=arithmetic,
        granule=1,
        size=rows,
        memory=8 * 16,
        needs_sums=arithmetic == "fixed",
        make_table=make_table,
        table_bytes=4 * words * rows,
        instructions=round(
            per_word * words * rows + (per_input + _scan(costs, arithmetic)) * inputs * groups + per_row * rows * groups
        ),
        groups=groups,
    )


def _bucket(
    rows: int, inputs: int, options: Options, arithmetic: Arithmetic, strided: bool, bits: int, lanes: int
) -> RowsKernel:
    costs = _costs(options, arithmetic)
    per_addition, per_input, per_group = costs.bucket[bits]
    passes = -(-rows // (bits * lanes))
    pass_bytes = -(-inputs * bits * lanes // 8)
    one_pass = (per_addition * lanes + per_input) * inputs + per_group * lanes

    def make_table(signs: np.ndarray) -> np.ndarray:
        by_input = _padded(signs, bits * lanes, 1).reshape(passes, bits * lanes, inputs).swapaxes(1, 2)
        return np.concatenate([_pack(signs_of_pass) for signs_of_pass in by_input])

    return RowsKernel(
        kernel=instance(f"bucket{bits}x{lanes}", arithmetic, strided),
        arithmetic=arithmetic,
        granule=bits * lanes,
        size=passes,
        memory=2**bits * lanes,
        needs_sums=False,
        make_table=make_table,
        table_bytes=passes * pass_bytes,
        instructions=round(passes * one_pass + _scan(costs, arithmetic) * inputs),
    )


def _costs(options: Options, arithmetic: Arithmetic) -> _Costs:
    """The figures for an arithmetic on the target."""
    if arithmetic in ("int8", "pair"):
        return _M0_INTEGER_COSTS if options.processor.costs == "cortex-m0plus" else _INTEGER_COSTS
    return _COSTS[options.processor.costs]


def _scan(costs: _Costs, arithmetic: Arithmetic) -> float:
    """What the kernel itself spends on each input, once, to find the largest one."""
    return costs.scan if arithmetic == "fixed" else 0


def _padded(signs: np.ndarray, rows: int, inputs: int) -> np.ndarray:
    """Signs with rows and inputs rounded up to multiples."""
    return np.pad(signs, ((0, -signs.shape[0] % rows), (0, -signs.shape[1] % inputs)))


def _pack(signs: np.ndarray) -> np.ndarray:
    """Bits in row-major order, lowest first."""
    return np.packbits(signs.reshape(-1), bitorder="little")
