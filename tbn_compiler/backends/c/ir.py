"""The small typed graph between ``torch.export`` and the planner.

Values are row-major float32 arrays of static shape. An operation reads values and constants and writes one value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tbn_compiler.tiling import TileLayout


@dataclass(frozen=True)
class Value:
    """A float32 array that exists while the model runs; ``name`` is its node in the exported graph."""

    name: str
    shape: tuple[int, ...]

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
    """An array stored with the program: ``float32``, or ``uint8`` for a packed tile. Compared by identity.

    Attributes:
        name: ``state_dict`` key.
        array: the contents, read-only.
    """

    name: str
    array: np.ndarray

    @property
    def packed(self) -> bool:
        """Whether this is a tile of bits."""
        return self.array.dtype == np.uint8


@dataclass(frozen=True)
class Operation:
    """One node of the graph.

    Attributes:
        name: name of the node in the exported graph.
        layer: qualified name of the layer it belongs to, or the node's name.
        inputs: values that it reads.
        output: value that it writes.
    """

    # Whether element i of the output may overwrite element i of an input while the operation runs.
    in_place: ClassVar[bool] = False

    name: str
    layer: str
    inputs: tuple[Value, ...]
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
    """``y[i] = x[i * count] + ... + x[i * count + count - 1]``; only the planner makes one."""

    count: int


@dataclass(frozen=True)
class Linear(Operation):
    """``x [..., n] -> x @ weight.T + bias [..., m]`` with a float weight ``[m, n]``."""

    weight: Constant
    bias: Constant | None


@dataclass(frozen=True)
class TiledLinear(Operation):
    """A linear layer on a stored tile (``tbn::linear``).

    Attributes:
        tile: packed bits ``[ceil(q / 8)]``, or float32 ``[q]`` for a full-precision tile.
        alpha: scales, as many as ``layout.allows_alphas``.
        bias: ``[m]`` or ``None``.
        input_alpha: ``[k]``, the input stands for ``k`` copies of it with these scales, or ``None``.
        layout: shape of the weight and the way the tile fills it.
    """

    tile: Constant
    alpha: Constant
    bias: Constant | None
    input_alpha: Constant | None
    layout: TileLayout

    @property
    def replicas(self) -> int:
        """``k``: the input holds ``n / k`` elements for each row."""
        return 1 if self.input_alpha is None else self.input_alpha.array.size


@dataclass(frozen=True)
class Graph:
    """A model: operations in an order in which they can run."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
