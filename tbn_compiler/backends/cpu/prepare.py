"""Prepared tiles: stored bits in the order in which the kernels read them, kept for as long as the tile lives.

A tile is prepared once for each way in which it is used. What is kept is right after any change of the tile: it is
compared by identity, memory address and version counter; inference tensors have no version counter and are compared by
content. (Writing through ``tile.data`` or a NumPy view moves no version counter, and nothing can notice it.)
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tbn_compiler.backends.cpu import library
from tbn_compiler.errors import TBNError
from tbn_compiler.tiling import hadamard_matrix
from tbn_compiler.torch_private import version

_ALIGNMENT = 64  # TBN_ALIGN

DOT_BYTES, DOT_ROWS, DOT_ZERO = 64, 16, 128
"""``TBN_DOT_BYTES``, ``TBN_DOT_ROWS``, ``TBN_DOT_ZERO``."""

ACTIVATIONS = {"float": 0, "int8": 1, "binary": 2}
"""``enum tbn_activation``."""


class Plan:
    """One layer as the library takes it.

    Attributes:
        call: the library's function for it.
        address: address of the C structure, its first argument.
        function: address of the function.
    """

    __slots__ = ("_memory", "_struct", "address", "call", "function")

    def __init__(self, call: Callable[..., int], struct: ctypes.Structure, memory: list[np.ndarray]) -> None:
        self.call = call
        self.address = ctypes.addressof(struct)
        self.function = ctypes.cast(call, ctypes.c_void_p).value  # type: ignore[arg-type]  # a function of the library
        self._struct, self._memory = struct, memory  # what the address, and the structure, point to

    def holds(self) -> list[Any]:
        """The structure, and the arrays that it points to."""
        return [self._struct, *self._memory]


class Prepared:
    """What is kept for one tile tensor, and the state of the tensor that it was made from.

    Attributes:
        plans: the plans by use.
        parts: prepared tiles by format; plans share them.
    """

    __slots__ = ("content", "parts", "plans", "pointer", "storage", "tile", "version")

    def __init__(self, tile: Tensor) -> None:
        key = id(tile)
        self.tile = weakref.ref(tile, lambda _: _prepared.pop(key, None))
        self.pointer = tile.data_ptr()
        # While the old memory is kept, no new tile can lie at its address.
        self.storage = tile.untyped_storage()
        self.version = None if tile.is_inference() else version(tile)
        self.content = tile.clone() if tile.is_inference() else None
        self.plans: dict[Hashable, Plan] = {}
        self.parts: dict[Hashable, np.ndarray] = {}

    def part(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The prepared tile in one format, made if it is not there."""
        if key not in self.parts:
            self.parts[key] = make()
        return self.parts[key]

    def current(self, tile: Tensor) -> bool:
        """Whether the plans are those of ``tile`` as it is now."""
        if self.tile() is not tile or self.pointer != tile.data_ptr():
            return False
        if self.version is None:
            return tile.is_inference() and torch.equal(tile, self.content)  # type: ignore[arg-type]
        return self.version == version(tile)


_prepared: dict[int, Prepared] = {}
_lock = threading.RLock()  # reentrant: a tile may be freed, and forgotten, in the middle of preparing another


def find(tile: Tensor, use: Hashable) -> Plan | None:
    """The plan of a tile for one use, if it was made and the tile has not changed since."""
    entry = _prepared.get(id(tile))
    return entry.plans.get(use) if entry is not None and entry.current(tile) else None


def find_or_make(tile: Tensor, use: Hashable, make: Callable[[Prepared], Plan]) -> Plan:
    """The plan of a tile for one use. It is made once, whatever the number of threads that ask."""
    with _lock:
        entry = _prepared.get(id(tile))
        if entry is None or not entry.current(tile):
            entry = Prepared(tile)  # before the tile is read: a change in between is noticed
            _prepared[id(tile)] = entry
        plan = entry.plans.get(use)
        if plan is None:
            plan = entry.plans[use] = make(entry)
        return plan


def memory() -> tuple[int, int]:
    """Number of prepared tiles, and the bytes that they take."""
    entries = list(_prepared.values())
    return len(entries), sum(part.nbytes for entry in entries for part in list(entry.parts.values()))


def _aligned(nbytes: int) -> np.ndarray:
    whole = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -whole.ctypes.data % _ALIGNMENT
    return whole[start : start + nbytes]


def native() -> tuple[Any, str, int]:
    """The library, the level in use, and the address of its kernels.

    Raises:
        TBNError: there is no library, or it is turned off.
    """
    lib, level = library.load()[0], library.level()
    if lib is None or level is None:
        raise TBNError("the native CPU kernels are not in use")
    return lib, level, lib.tbn_level(level.encode())


def pack(signs: Tensor, *, integer: bool) -> np.ndarray:
    """Prepare the different rows of a weight for lookups.

    Args:
        signs: ``int8 [rows, columns]`` or ``[groups, rows, columns]``, contiguous, positive for +1.
        integer: in the format of integer activations.

    Returns:
        The prepared tile, those of several groups one behind the other.
    """
    lib, _, kernels = native()
    rows, columns = signs.shape[-2:]
    groups = signs.numel() // (rows * columns)
    nbytes = lib.tbn_pack_bytes(kernels, integer, rows, columns)
    out = _aligned(groups * nbytes)
    for group in range(groups):
        source = signs.data_ptr() + group * rows * columns
        lib.tbn_pack(kernels, integer, source, rows, columns, out.ctypes.data + group * nbytes)
    return out


def pack_dots(runs: Tensor) -> np.ndarray:
    """Prepare the different rows of a weight for products of bytes.

    Args:
        runs: ``int8 [groups, rows, runs, bytes]``: the weights, +1 and -1, of runs of neighbouring bytes of an input.
    """
    lib, _, kernels = native()
    groups, rows = runs.shape[:2]
    positive = F.pad(runs > 0, (0, -runs.shape[3] % DOT_BYTES))
    steps = positive.reshape(groups, rows, -1, DOT_BYTES // 4, 4)
    blocks = F.pad(steps, (0, 0, 0, 0, 0, 0, 0, -rows % DOT_ROWS)).unflatten(1, (-1, DOT_ROWS))
    order = (0, 3, 1, 2, 4, 5) if lib.tbn_dots_by_rows(kernels) else (0, 1, 3, 4, 2, 5)
    ordered = blocks.permute(order).contiguous().numpy()
    bits = np.packbits(ordered.reshape(-1), bitorder="little")
    out = _aligned(bits.nbytes)
    out[:] = bits
    return out


def dot_corrections(signs: Tensor, mixes: int) -> np.ndarray:
    """What is added to sums of bytes for the zero that they are shifted by.

    Args:
        signs: ``int8 [groups, rows, ...]``, the weights of each row, also those that fill it up.
        mixes: column groups whose sums are mixed; if more than 1, ``signs`` has so many groups.

    Returns:
        ``int32 [groups, rows]``, after sums are mixed.
    """
    lib, _, kernels = native()
    if lib.tbn_dots_by_rows(kernels):
        return np.zeros(signs.shape[:2], np.int32)
    sums = -DOT_ZERO * signs.flatten(2).sum(2, dtype=torch.float64)  # whole numbers
    if mixes > 1:
        sums = hadamard_matrix(mixes, sums) @ sums
    return sums.to(torch.int32).contiguous().numpy()


def pack_sums(signs: Tensor) -> np.ndarray:
    """Prepare the different rows of a weight, ``int8 [rows, columns]`` or by group, for tables in memory."""
    lib, _, _ = native()
    rows, columns = signs.shape[-2:]
    groups = signs.numel() // (rows * columns)
    nbytes = lib.tbn_pack_sums_bytes(rows, columns)
    out = _aligned(groups * nbytes)
    for group in range(groups):
        source = signs.data_ptr() + group * rows * columns
        lib.tbn_pack_sums(source, rows, columns, out.ctypes.data + group * nbytes)
    return out
