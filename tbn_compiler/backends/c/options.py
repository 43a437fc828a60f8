"""What the user of :func:`~tbn_compiler.backends.c.export_c` may choose, checked in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from tbn_compiler.backends.c.names import check_identifier
from tbn_compiler.backends.c.targets import TARGETS, Processor, Target
from tbn_compiler.errors import ExportError

ScratchOwner = Literal["static", "caller"]
OptimizeFor = Literal["balanced", "speed", "size"]


@dataclass(frozen=True)
class Options:
    """How to write the C program.

    Attributes:
        name: prefix of every symbol.
        scratch: ``"static"``, one block in the file, or ``"caller"``, handed to the run function.
        optimize: what the choice of kernels favours: few instructions, small code, constants and scratch memory, or
            speed as long as memory stays small.
        target: the processor that costs are estimated for, one of :data:`~tbn_compiler.backends.c.targets.TARGETS`;
            the C stays portable.
        skip_zeros: let kernels skip inputs that are 0, which makes the run time depend on the data.
        layer_hook: call the macro ``<NAME>_LAYER_HOOK(index, layer)`` after every step.
        int8_inputs, int8_outputs: take and give int8 in place of floats.
        state: names of inputs that the caller's memory keeps, each with the index of the output that it becomes.

    Raises:
        ExportError: a value that is not one of the choices, or a name that is no C identifier.
    """

    name: str = "model"
    scratch: ScratchOwner = "static"
    optimize: OptimizeFor = "balanced"
    target: Target = "generic"
    skip_zeros: bool = False
    layer_hook: bool = False
    int8_inputs: bool = False
    int8_outputs: bool = False
    state: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        """Check every value."""
        check_identifier(self.name)
        for option, choices in (("scratch", ScratchOwner), ("optimize", OptimizeFor), ("target", Target)):
            value = getattr(self, option)
            if value not in get_args(choices):
                raise ExportError(f"{option}={value!r} is not one of {', '.join(map(repr, get_args(choices)))}")

    @property
    def processor(self) -> Processor:
        """What the kernels need to know of the target."""
        return TARGETS[self.target]
