"""Launches of a layer that are kept, and repeated for other tensors of the same form.

A layer's launches depend on the form of its call alone, on shapes, strides and alignments: grids, sizes and compiled
kernels are the same each time, and only the tensors lie elsewhere. What a call has launched is noted; where all of it
met the call's own tensors, its result and room in between, further calls launch the same with other addresses, and
make no plan, no view and no operand. Triton's launcher takes addresses as it takes tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tbn_compiler.backends.triton.counts import arrival_counts

# What was compiled for a launch of each kernel, and the constants that stand behind its arguments. A layer launches
# each kernel with one set of constants, so that the kernel alone tells what was kept.
Kernels = dict[Any, tuple[Any, tuple[Any, ...]]]

Grid = tuple[int, int, int]

# Arguments of a kernel that are the same in each launch of one form.
_NUMBERS = (int, float, bool, type(None))


@dataclasses.dataclass(frozen=True)
class Kept:
    """What is kept of a layer while one of its calls runs.

    Attributes:
        kernels: those of earlier launches whose arguments differ in the values and places of tensors only.
        notes: of what this call launches, or ``None``.
    """

    kernels: Kernels
    notes: Notes | None = None


class Notes:
    """What one call launches, and the tensors that its launches meet."""

    def __init__(self, tensors: Sequence[Tensor | None], result: Tensor) -> None:
        """Begin.

        Args:
            tensors: of the call, in the order in which a repeated one has them.
            result: of the call, freshly allocated and dense.
        """
        self._result = result
        self._given = len(tensors)
        self._held = [*tensors, result]  # nothing else is allocated at their addresses meanwhile
        self._counts: tuple[Tensor, int] | None = None
        self._launches: list[_Launch] = []
        self._complete = True

    def room(self, tensor: Tensor) -> None:
        """A tensor that was allocated for what a launch of this call leaves to a later one."""
        self._held.append(tensor)

    def counts(self, tensor: Tensor, blocks: int) -> None:
        """Counts of programs that have arrived, of so many blocks."""
        self._complete &= self._counts is None
        self._counts = tensor, blocks

    def launch(self, compiled: Any, grid: Grid, args: tuple[Any, ...], constants: tuple[Any, ...]) -> None:
        """A launch of a kernel that was kept."""
        places = {tensor.data_ptr(): place for place, tensor in enumerate(self._held) if tensor is not None}
        # Of two tensors at one address it is not known which one an argument is.
        self._complete &= len(places) == sum(tensor is not None for tensor in self._held)
        found = []
        for at, value in enumerate(args):
            if isinstance(value, Tensor):
                place = COUNTS if self._counts and value is self._counts[0] else places.get(value.data_ptr())
                self._complete &= place is not None  # a copy, or what PyTorch has computed
                found.append((at, place))
            else:
                self._complete &= isinstance(value, _NUMBERS)
        values = [None if isinstance(value, Tensor) else value for value in args]
        self._launches.append(_Launch(compiled[grid], [*values, *constants], found))

    def stop(self) -> None:
        """More is done in the call than is noted."""
        self._complete = False

    def replay(self, memory_format: torch.memory_format = torch.contiguous_format) -> Replay | None:
        """The call for other tensors, or ``None`` if it did more than launch kernels on its own tensors.

        A kernel reads what the call was given, or a room that an earlier one has written; the last one writes the
        result.

        Args:
            memory_format: of the result.
        """
        written = self._launches[-1].addresses if self._launches else []
        if not self._complete or self._given not in [place for _, place in written]:
            return None  # what makes the result is not among the launches, or does not find all it needs
        result, rooms = self._result, self._held[self._given + 1 :]
        offsets = [0]
        for room in rooms:
            assert room is not None
            offsets.append(offsets[-1] + -(-room.nbytes // ALIGNMENT) * ALIGNMENT)
        blocks = self._counts[1] if self._counts else 0
        return Replay(tuple(result.shape), result.dtype, result.device, memory_format, offsets, blocks, self._launches)


class Repeats:
    """What calls of one form have in common once their configuration is chosen.

    Attributes:
        kernels: those that were compiled for them.
        replay: does what such a call does, where that is known.
    """

    def __init__(self) -> None:
        self.kernels: Kernels = {}
        self.replay: Replay | None = None
        self._tries = 4  # the first call only finds its kernels

    def begin(self, tensors: Sequence[Tensor | None], result: Tensor) -> Kept:
        """A call begins, with these tensors and an empty result."""
        if self._tries <= 0:
            return Kept(self.kernels)
        self._tries -= 1
        return Kept(self.kernels, Notes(tensors, result))

    def end(self, kept: Kept, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        """It has launched everything; the result has this format."""
        if kept.notes is not None and self.replay is None:
            self.replay = kept.notes.replay(memory_format)


ALIGNMENT = 256  # of rooms, in bytes
COUNTS = -1  # behind all other addresses


@dataclasses.dataclass(frozen=True)
class _Launch:
    """One launch: a kernel with its grid, its arguments, and which of them are the addresses of what."""

    run: Callable[..., None]
    args: list[Any]
    addresses: list[tuple[int, Any]]


@dataclasses.dataclass(frozen=True, slots=True)
class Replay:
    """A call that launches what another one of the same form has launched.

    Attributes:
        shape: of the result.
        dtype: of the result.
        device: of all tensors.
        memory_format: of the result.
        rooms: where what launches leave to later ones begins in one room for all, and where it ends; in bytes.
        blocks: whose arrivals are counted, or 0.
        launches: in order.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    memory_format: torch.memory_format
    rooms: list[int]
    blocks: int
    launches: list[_Launch]

    def __call__(self, *tensors: Tensor | None) -> Tensor:
        """The result for tensors of the same form as the noted ones'."""
        device = self.device
        result = torch.empty(self.shape, dtype=self.dtype, device=device, memory_format=self.memory_format)
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        addresses.append(result.data_ptr())
        # Both are held until all is launched: memory of what is gone may be given to others.
        room = counts = None
        if self.rooms[-1]:
            room = torch.empty(self.rooms[-1], dtype=torch.uint8, device=device)
            first = room.data_ptr()
            addresses.extend([first + offset for offset in self.rooms[:-1]])
        if self.blocks:
            counts = arrival_counts(device, self.blocks)
            addresses.append(counts.data_ptr())
        for launch in self.launches:
            args = launch.args.copy()
            for at, place in launch.addresses:
                args[at] = addresses[place]
            launch.run(*args)
        return result


def start(kept: Kept | None, kernel: Any, grid: Grid, *args: Any, **constants: Any) -> None:
    """Launch a kernel; one that was kept is found without looking at the arguments again.

    Args:
        kept: of launches whose arguments differ in the values and places of tensors only.
        kernel: the kernel.
        grid: programs.
        args: all arguments before the first constant.
        constants: the constants by name, all of them, and options of the compiler.
    """
    found = None if kept is None else kept.kernels.get(kernel)
    if found is not None:
        compiled, behind = found
        compiled[grid](*args, *behind)
        if kept is not None and kept.notes is not None:
            kept.notes.launch(compiled, grid, args, behind)
        return
    compiled = kernel[grid](*args, **constants)
    if kept is not None:
        if kept.notes is not None:
            kept.notes.stop()
        if hasattr(compiled, "launch_metadata"):  # the interpreter compiles nothing
            kept.kernels[kernel] = compiled, tuple(constants[name] for name in kernel.arg_names[len(args) :])


def room(kept: Kept | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor for what one launch of a call leaves to a later one."""
    tensor = torch.empty(tuple(shape), dtype=dtype, device=device)
    if kept is not None and kept.notes is not None:
        kept.notes.room(tensor)
    return tensor
