"""Arrays that exist while the model runs, or are stored with the program, and what reads and writes them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

DType = Literal["float32", "int32", "int8", "uint8", "bool"]
BYTES: tuple[DType, ...] = ("int8", "uint8")
"""What holds activations in a number format, or an input of that type."""


@dataclass(frozen=True)
class Value:
    """An array that exists while the model runs; ``name`` is its node in the exported graph.

    What is ``int64`` in PyTorch (indices) is ``int32`` here, and a ``bool`` is a byte. ``int8`` are activations in a
    number format, from -127 to 127, whose scale the operations around them know; or, as ``uint8``, an input of that
    type, which is only moved, converted or looked up.
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
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def storage_bytes(self) -> int:
        """Number of bytes in scratch memory, where everything begins at a whole word."""
        return -(-self.nbytes // 4) * 4


@dataclass(frozen=True, eq=False)
class Constant:
    """An array stored with the program. Compared by identity.

    Attributes:
        name: ``state_dict`` key, or a description of what was made from one.
        array: the contents, read-only: ``float32``, ``int32`` or ``bool``, ``uint8`` for a packed tile, or any other
            integer type of C in a table that a kernel brings.
        tile_bytes: size of the tile that the elements were decoded from, where no kernel reads that; else ``None``.
        packed: whether these are bytes of bits. What reads them says so: other tensors may be ``uint8``, too.
    """

    name: str
    array: np.ndarray
    tile_bytes: int | None = None
    packed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.array.shape

    @property
    def dtype(self) -> str:
        """Type of the elements."""
        return self.array.dtype.name

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

    in_place: ClassVar[bool] = False

    name: str
    layer: str
    inputs: tuple[Operand, ...]
    output: Value

    @property
    def overwritable(self) -> tuple[Operand, ...]:
        """Inputs whose element ``i`` the output's element ``i`` may overwrite while the operation runs."""
        return self.inputs[:1] if self.in_place else ()
