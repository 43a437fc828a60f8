"""Plans in one piece, for files and for programs without Python.

A plan (:mod:`~tbn_compiler.backends.cpu.bound`) is a structure with pointers. Stored, it is a ``uint8`` tensor that
holds the structure, all that it points to, and where the pointers lie (``src/stored.c``, which reads it)::

    header | pointers: where, kind, target | body: the structure, structures and arrays behind it

The prepared tiles in it are those of one vector level. The operators take a stored plan in place of another; another
processor, version or a damaged file is an error at the first call.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbn_compiler.backends.cpu import library, prepare
from tbn_compiler.backends.cpu.bound_network import Step

_HEADER = struct.Struct("<8sIHH16sQQQQ")
_POINTER = struct.Struct("<QQQ")
_ALIGNMENT = 64
_TO_BODY, _TO_KERNELS, _TO_DOTS, _TO_FUNCTION = range(4)
_KINDS = {library.BoundLayer: 1, library.Network: 2}  # enum tbn_plan_kind
_FUNCTIONS = ("tbn_linear", "tbn_linear_dots", "tbn_conv", "tbn_conv_dots")  # in the order of stored.c


def store(plan: library.BoundLayer | library.Network) -> Tensor:
    """A plan as a ``uint8`` tensor that can be copied and saved.

    Args:
        plan: of a layer or a network, made for the level in use.
    """
    lib, level, kernels = prepare.native()
    blocks = {address: (value, size) for value, address, size in _blocks(plan)}
    places, end = {}, 0
    for address, (_, size) in blocks.items():
        places[address], end = end, _rounded(end + size)
    special = {kernels: (_TO_KERNELS, 0), lib.tbn_dots_of(kernels): (_TO_DOTS, 0)}
    for number, name in enumerate(_FUNCTIONS):
        special[ctypes.cast(getattr(lib, name), ctypes.c_void_p).value] = (_TO_FUNCTION, number)
    body, pointers = np.zeros(end, np.uint8), []
    for address, (value, size) in blocks.items():
        place = places[address]
        body[place : place + size] = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))
        if isinstance(value, ctypes.Structure | ctypes.Array):
            for at, target in _pointers(value, type(value), 0):
                body[place + at : place + at + 8] = 0
                kind, where = special[target] if target in special else (_TO_BODY, places[target])
                pointers.append(_POINTER.pack(place + at, kind, where))
    begin = _rounded(_HEADER.size + len(pointers) * _POINTER.size)
    rest = np.zeros(begin - _HEADER.size + end, np.uint8)
    rest[: len(pointers) * _POINTER.size] = np.frombuffer(b"".join(pointers), np.uint8)
    rest[begin - _HEADER.size :] = body
    words = rest.view(np.uint64)
    with np.errstate(over="ignore"):
        total = int((words * (2 * np.arange(len(words), dtype=np.uint64) + np.uint64(1))).sum(dtype=np.uint64))
    header = _HEADER.pack(
        *(b"tbnplan", library.INTERFACE, _KINDS[type(plan)], ctypes.sizeof(plan)),
        *(level.encode(), len(pointers), begin, end, total),
    )
    return torch.from_numpy(np.concatenate([np.frombuffer(header, np.uint8), rest]))


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _blocks(plan: Any) -> Iterator[tuple[Any, int, int]]:
    """Everything that a plan holds, itself first, with addresses and sizes."""
    if isinstance(plan, ctypes.Structure | ctypes.Array):
        yield plan, ctypes.addressof(plan), ctypes.sizeof(plan)
    elif isinstance(plan, np.ndarray):
        yield plan, plan.ctypes.data, plan.nbytes
    elif isinstance(plan, Tensor):
        yield plan, plan.data_ptr(), plan.nbytes
    for held in _held(plan):
        yield from _blocks(held)


def _held(plan: Any) -> Iterator[Any]:
    if isinstance(plan, library.BoundLayer | library.Network):
        for held in plan.operands:
            yield from held if isinstance(held, list | tuple) else (held,)
    elif isinstance(plan, prepare.Plan):
        yield from plan.holds()
    elif isinstance(plan, Step):
        yield from (plan.factors, plan.offsets)
    elif isinstance(plan, library.ConvPlan) and plan.lookups:
        yield plan.looked_up


def _pointers(value: Any, kind: Any, at: int) -> Iterator[tuple[int, int]]:
    """Where pointers lie in a structure or an array of some, and the addresses in them; empty ones are left out."""
    if issubclass(kind, ctypes.Array):
        if issubclass(kind._type_, ctypes.Structure):
            for index in range(kind._length_):
                yield from _pointers(value[index], kind._type_, at + index * ctypes.sizeof(kind._type_))
    elif issubclass(kind, ctypes.Structure):
        for name, field, *_ in kind._fields_:
            offset, held = at + getattr(kind, name).offset, getattr(value, name)
            if field is ctypes.c_void_p:
                if held:
                    yield offset, held
            else:
                yield from _pointers(held, field, offset)
