"""What the kernels cost on each core: executed instructions for each unit of their work.

An implementation says how much work it does in units such as ``linear``, a multiply-add of that kernel, or
``linear.result``, one of its results; its cost is their sum with the figures of :data:`INSTRUCTIONS`. Those are fitted
to counts of ``backends/c/mcu`` (GCC 12 -O2) by ``python -m benchmarks.mcu_costs``, which prints the table anew and how
near it is. Kernels for tiles of whole rows have figures of their own in :mod:`~tbn_compiler.backends.c.tiled_rows`.

Without floating-point instructions the time of additions and multiplications depends on the numbers; figures are for
normally distributed ones.
"""

from __future__ import annotations

from collections.abc import Mapping

Work = Mapping[str, float]
"""Number of units of each kind."""

# Columns of the table. A generic target is taken for a Cortex-M4; an M7 executes the same instructions.
CORES = ("cortex-m4", "cortex-m3", "cortex-m0plus")
_COLUMN = {"generic": 0, "cortex-m4": 0, "cortex-m7": 0, "cortex-m3": 1, "cortex-m0plus": 2}

# fmt: off
INSTRUCTIONS: dict[str, tuple[float, float, float]] = {
    "call": (1.58, 0, 41.5),
    "copy": (2.24, 2.4, 3.31),
    "relu": (8.23, 42.2, 38.2),
    "abs": (5.01, 5.02, 6.88),
    "add_scalar": (5.01, 58.6, 83.2),
    "clamp": (9.53, 63.3, 62.2),
    "cos": (62.9, 928, 2.03e+03),
    "divide_scalar": (5.01, 153, 378),
    "elu": (35.2, 758, 1.58e+03),
    "erf": (82.6, 1.89e+03, 4.24e+03),
    "exp": (69.5, 1.05e+03, 2.24e+03),
    "gelu": (62.9, 1.54e+03, 3.6e+03),
    "gelu_tanh": (109, 2.13e+03, 4.82e+03),
    "hardsigmoid": (14, 283, 529),
    "hardswish": (13, 319, 651),
    "leaky_relu": (8.01, 58.9, 101),
    "log_sigmoid": (139, 2.51e+03, 5.44e+03),
    "maximum_scalar": (8.01, 41.5, 44.6),
    "minimum_scalar": (8.01, 45.5, 44.5),
    "mish": (241, 4.49e+03, 9.73e+03),
    "multiply_scalar": (5.01, 37.8, 121),
    "neg": (5.01, 5.02, 8.88),
    "reciprocal": (5.01, 151, 360),
    "sigmoid": (72.5, 1.25e+03, 2.7e+03),
    "silu": (72.5, 1.25e+03, 2.69e+03),
    "sin": (60.1, 850, 1.86e+03),
    "softplus": (137, 2.56e+03, 5.53e+03),
    "square": (5.01, 38, 125),
    "subtract_from_scalar": (5.01, 59.6, 85.1),
    "subtract_scalar": (5.01, 60.3, 92.6),
    "tanh": (104, 1.86e+03, 4.01e+03),
    "log": (76.9, 1.14e+03, 2.56e+03),
    "pow_scalar": (248, 4.31e+03, 8.89e+03),
    "rsqrt": (9.03, 473, 714),
    "sqrt": (8.02, 322, 326),
    "add": (7.01, 58.6, 78.8),
    "divide": (7.01, 154, 386),
    "maximum": (10.1, 66, 66.7),
    "minimum": (9.93, 60.3, 64.8),
    "multiply": (7.01, 38, 126),
    "subtract": (7.01, 59.7, 84.8),
    "broadcast": (16.2, 6.94, 11.6),
    "broadcast.row": (22.6, 58, 76.6),
    "prelu": (10.1, 62.1, 107),
    "copy.block": (4.05, 3.34, 45.7),
    "fill": (1.82, 14.8, 18.5),
    "strided_copy": (18.2, 0, 0),
    "strided_copy.row": (18, 0, 0),
    "channel_affine": (7.24, 58.2, 168),
    "reduce.result": (5.64, 0, 11.4),
    "reduce_argmax": (10.9, 68.8, 68),
    "reduce_argmin": (10.9, 66.3, 68.5),
    "reduce_maximum": (9.7, 71, 72.4),
    "reduce_mean": (4.78, 67.4, 95.1),
    "reduce_minimum": (9.76, 75.8, 73.1),
    "reduce_prod": (4.04, 35.8, 122),
    "reduce_sum": (4.04, 52.9, 70.1),
    "log_softmax": (92.3, 1.45e+03, 2.89e+03),
    "log_softmax.row": (68.2, 0, 0),
    "softmax": (92.2, 1.36e+03, 2.83e+03),
    "softmax.row": (2.21, 0, 0),
    "norm": (18, 340, 694),
    "norm.row": (23, 539, 1.06e+03),
    "max_pool": (7.3, 35.2, 49.1),
    "max_pool.line": (0, 96, 10.3),
    "max_pool.result": (54.1, 0, 127),
    "window_inside": (42.9, 163, 72.7),
    "avg_pool": (4.88, 59.4, 73.7),
    "avg_pool.line": (0, 33.2, 104),
    "avg_pool.result": (43.8, 0, 0),
    "adaptive_avg_pool": (6.1, 78.4, 78.1),
    "adaptive_avg_pool.result": (44.9, 0, 502),
    "adaptive_max_pool": (13.3, 76.9, 82.8),
    "adaptive_max_pool.result": (38.8, 29.6, 96),
    "resize_nearest": (4.44, 3.93, 19.7),
    "resize_nearest.result": (4.44, 3.93, 19.7),
    "linear": (5, 91, 193),
    "linear.result": (9.13, 59.3, 124),
    "linear_by_4x1": (2.74, 89.9, 193),
    "linear_by_4x1.result": (9.53, 67.1, 110),
    "linear_by_4x2": (2.08, 92.7, 194),
    "linear_by_4x2.result": (4.94, 34, 74.5),
    "matmul": (5.04, 91, 197),
    "matmul.result": (8.03, 0, 0),
    "matmul_by_4x1": (2.72, 89.8, 194),
    "matmul_by_4x1.result": (5.13, 0, 0),
    "matmul_by_4x2": (2.15, 90, 194),
    "matmul_by_4x2.result": (2.67, 0, 0),
    "attention": (6.18, 91.9, 198),
    "attention.pair": (0, 1.19e+03, 2.54e+03),
    "attention.query": (1.11e+03, 107, 250),
    "attention.result": (0, 340, 490),
    "attention_by_4": (3.75, 0, 0),
    "conv": (7.24, 95.6, 198),
    "conv.channel": (11, 16.4, 22.5),
    "conv.line": (9.48, 13.1, 33.3),
    "conv.position": (33.6, 22.1, 21.5),
    "conv.row": (0, 36.4, 0),
    "conv_by_1": (7.99, 363, 792),
    "conv_by_1.channel": (0, 18, 0),
    "conv_by_1.line": (3.5, 0.264, 0),
    "conv_by_1.position": (52.8, 58.2, 40.7),
    "conv_by_1_any": (11.2, 369, 783),
    "conv_by_1_any.channel": (15.6, 43.6, 0),
    "conv_by_1_any.line": (22.9, 23.4, 0),
    "conv_by_1_any.position": (47.7, 48.6, 164),
    "conv_by_4": (15.3, 719, 1.57e+03),
    "conv_by_4.channel": (28.6, 75.4, 90),
    "conv_by_4.line": (2.54, 25.4, 0),
    "conv_by_4.position": (19, 7.26, 0),
    "conv_by_4_any": (17.9, 737, 1.53e+03),
    "conv_by_4_any.channel": (52.7, 19.8, 12.2),
    "conv_by_4_any.line": (2.8, 63.5, 134),
    "conv_by_4_any.position": (161, 0, 167),
    "conv_edge_by_1": (9.24, 99.9, 199),
    "conv_edge_by_1.channel": (4.11, 0, 51.6),
    "conv_edge_by_1.line": (0, 0, 0),
    "conv_edge_by_1.position": (20.2, 0, 141),
    "conv_edge_by_4": (13, 378, 776),
    "conv_edge_by_4.channel": (84.3, 70.7, 61.4),
    "conv_edge_by_4.line": (0, 0, 0),
    "conv_edge_by_4.position": (0, 319, 831),
    "conv_transpose": (11.6, 71.6, 162),
    "conv_transpose.result": (0, 13.6, 409),
    "conv_transpose.weight": (0, 931, 473),
    "tiled_linear_bits": (12.1, 63.9, 85.3),
    "tiled_linear_bits.row": (101, 220, 329),
    "tiled_linear_bytes": (6, 60.1, 79.5),
    "tiled_linear_bytes.row": (0, 0, 0),
    "tiled_linear_float": (4.47, 93, 194),
    "tiled_linear_float.row": (58.2, 111, 338),
    "tiled_store": (13.7, 64.6, 92.6),
    "sum_neighbours": (8.43, 57.6, 88.9),
    "sum_neighbours.result": (4.22, 28.8, 44.4),
    "tiled_conv_bits": (8.83, 90, 56.6),
    "tiled_conv_bits.product": (78.7, 0, 384),
    "tiled_conv_float": (7.66, 112, 47.6),
    "tiled_conv_float.product": (75.1, 0, 503),
    "conv_transpose_bits": (11.6, 92.1, 132),
    "conv_transpose_bits.weight": (0.322, 2.56, 3.66),
    "conv_transpose_float": (11.5, 91, 130),
    "conv_transpose_float.weight": (0.318, 2.53, 3.6),
}
# fmt: on


def instructions(work: Work, target: str) -> int:
    """Estimated number of executed instructions."""
    column = _COLUMN[target]
    return round(sum(count * INSTRUCTIONS[unit][column] for unit, count in work.items()))


def round_up(count: int, step: int) -> int:
    """The next multiple of ``step``: what a kernel computes that takes so many at once."""
    return -(-count // step) * step
