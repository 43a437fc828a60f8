"""The small typed graph between ``torch.export`` and the planner.

Values are row-major arrays of static shape. An operation reads values and constants and writes one value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from tbn_compiler.tiling import TileLayout

DType = Literal["float32", "int32"]


@dataclass(frozen=True)
class Value:
    """An array that exists while the model runs; ``name`` is its node in the exported graph.

    Every element takes four bytes: what is ``int64`` in PyTorch (indices) is ``int32`` here.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType = "float32"

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Number of bytes."""
        return 4 * self.size


@dataclass(frozen=True, eq=False)
class Constant:
    """An array stored with the program. Compared by identity.

    Attributes:
        name: ``state_dict`` key, or a description of what was made from one.
        array: the contents, read-only: ``float32``, ``uint8`` for a packed tile, or any other integer type of C in a
            table that a kernel brings.
    """

    name: str
    array: np.ndarray

    @property
    def packed(self) -> bool:
        """Whether this is a tile of bits."""
        return self.array.dtype == np.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.array.shape

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(self.array.size)


# What an operation reads: both are pointers in C.
Operand = Value | Constant


@dataclass(frozen=True)
class Operation:
    """One node of the graph.

    Attributes:
        name: name of the node in the exported graph.
        layer: qualified name of the layer it belongs to, or the node's name.
        inputs: what it reads; a stored tensor may stand for an activation.
        output: value that it writes.
    """

    # Whether element i of the output may overwrite element i of an input while the operation runs. That input then has
    # as many elements as the output.
    in_place: ClassVar[bool] = False

    name: str
    layer: str
    inputs: tuple[Operand, ...]
    output: Value


@dataclass(frozen=True)
class Alias(Operation):
    """The same elements in the same order under another shape: view, flatten, clone, ..."""


@dataclass(frozen=True)
class Copy(Operation):
    """The input's elements at another place; only the planner makes one."""


@dataclass(frozen=True)
class Relu(Operation):
    """``max(x, 0)``."""

    in_place: ClassVar[bool] = True


@dataclass(frozen=True)
class Add(Operation):
    """``a + b`` of equal shapes."""

    in_place: ClassVar[bool] = True


@dataclass(frozen=True)
class AddScalar(Operation):
    """``x + scalar``."""

    in_place: ClassVar[bool] = True

    scalar: float


@dataclass(frozen=True)
class Softmax(Operation):
    """Softmax over the last dimension."""

    in_place: ClassVar[bool] = True


@dataclass(frozen=True)
class SumNeighbours(Operation):
    """``y[i, s] = x[i * count, s] + ... + x[i * count + count - 1, s]``; only the planner makes one.

    Attributes:
        count: neighbours in each sum.
        inner: elements behind each of them: 1 for features, the image's size for channels.
    """

    count: int
    inner: int = 1


@dataclass(frozen=True)
class Linear(Operation):
    """``x [..., n] -> x @ weight.T + bias [..., m]`` with a float weight ``[m, n]``, and a ReLU if ``relu``."""

    weight: Constant
    bias: Constant | None
    relu: bool = False


@dataclass(frozen=True)
class TiledLinear(Operation):
    """A linear layer on a stored tile (``tbn::linear``).

    Attributes:
        tile: packed bits ``[ceil(q / 8)]``, or float32 ``[q]`` for a full-precision tile.
        alpha: scales, as many as ``layout.allows_alphas``.
        bias: ``[m]`` or ``None``.
        input_alpha: ``[k]``, the input stands for ``k`` copies of it with these scales, or ``None``.
        layout: shape of the weight and the way the tile fills it.
        relu: whether a ReLU follows.
    """

    tile: Constant
    alpha: Constant
    bias: Constant | None
    input_alpha: Constant | None
    layout: TileLayout
    relu: bool = False

    @property
    def replicas(self) -> int:
        """``k``: the input holds ``n / k`` elements for each row."""
        return 1 if self.input_alpha is None else self.input_alpha.size


@dataclass(frozen=True)
class Window:
    """How a window of a 2-D convolution or pooling slides over an image; 1-D has height 1. Pairs are (height, width).

    Attributes:
        input, output: sizes of the images.
        kernel: size of the window.
        stride, padding, dilation: as in PyTorch; the padding is that before the first row and column. The window may
            reach any distance beyond the last ones: what lies outside counts as padding.
    """

    input: tuple[int, int]
    output: tuple[int, int]
    kernel: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def input_size(self) -> int:
        """Elements of one channel of the input."""
        return math.prod(self.input)

    @property
    def output_size(self) -> int:
        """Elements of one channel of the output."""
        return math.prod(self.output)

    @property
    def kernel_size(self) -> int:
        """Elements of the window."""
        return math.prod(self.kernel)


@dataclass(frozen=True)
class TiledConv(Operation):
    """A convolution ``[N, C, H, W] -> [N, m, H', W']`` on a stored tile (``tbn::conv1d``, ``tbn::conv2d``).

    The weight is ``[m, C / groups, *kernel]`` (OIHW): rows are filters, and in a row the window's elements follow one
    another for each input channel.

    Attributes:
        tile, alpha, bias, relu: as of :class:`TiledLinear`; ``m`` is the number of output channels.
        input_alpha: ``[k]``, the input's ``C / k`` channels stand for ``k`` copies of them, or ``None``; ``groups`` is
            1 then.
        layout: shape of the weight and the way the tile fills it.
        window: the geometry.
        groups: the ``m / groups`` filters of group ``g`` read the channels from ``g * C / groups``.
    """

    tile: Constant
    alpha: Constant
    bias: Constant | None
    input_alpha: Constant | None
    layout: TileLayout
    window: Window
    groups: int = 1
    relu: bool = False

    @property
    def replicas(self) -> int:
        """``k``: copies that each input channel stands for."""
        return 1 if self.input_alpha is None else self.input_alpha.size

    @property
    def samples(self) -> int:
        """``N``."""
        return self.output.size // (self.layout.rows * self.window.output_size)

    @property
    def input_channels(self) -> int:
        """Channels of the input as it is stored, without copies."""
        return self.layout.shape[1] * self.groups // self.replicas


@dataclass(frozen=True)
class Graph:
    """A model: operations in an order in which they can run."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
