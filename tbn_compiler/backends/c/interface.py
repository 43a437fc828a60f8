"""What a generated header says about the run function: the one reader of such headers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tbn_compiler.backends.c.names import macro_prefix
from tbn_compiler.errors import ExportError

_DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "int32_t": np.dtype(np.int32),
    "uint8_t": np.dtype(np.bool_),
}


@dataclass(frozen=True)
class Argument:
    """An array that the run function takes.

    Attributes:
        name: of the parameter.
        size: number of elements.
        dtype: ``float32``, ``int32`` or ``bool``.
    """

    name: str
    size: int
    dtype: np.dtype[Any]


@dataclass(frozen=True)
class Interface:
    """What a model's header says about its run function.

    Attributes:
        name: prefix of the model's symbols.
        prototype: declaration of the run function, without semicolon.
        inputs, outputs: in the order of the arguments.
        scratch_bytes: memory that the caller has to provide.
        takes_scratch: whether the last argument is that memory.
    """

    name: str
    prototype: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    scratch_bytes: int
    takes_scratch: bool

    @property
    def input_size(self) -> int:
        """Elements of all inputs."""
        return sum(argument.size for argument in self.inputs)

    @property
    def output_size(self) -> int:
        """Elements of all outputs."""
        return sum(argument.size for argument in self.outputs)

    @property
    def call(self) -> str:
        """A call of the run function on ``input`` and ``output``, which hold all inputs and outputs in order."""
        arguments = [f"(input) + {start}" for start in _starts(self.inputs)]
        arguments += [f"(output) + {start}" for start in _starts(self.outputs)]
        return f"{self.name}_run({', '.join([*arguments, '(scratch)'] if self.takes_scratch else arguments)})"

    def require_floats(self) -> None:
        """Refuse a model with other inputs or outputs.

        Raises:
            ExportError: there is one of integers.
        """
        if any(argument.dtype != np.float32 for argument in (*self.inputs, *self.outputs)):
            raise ExportError(f"{self.prototype} takes other arrays than float: such a model cannot be measured")


def _starts(arguments: Sequence[Argument]) -> list[int]:
    return [sum(argument.size for argument in arguments[:index]) for index in range(len(arguments))]


def read_interface(header: Path) -> Interface:
    """The interface that a generated header declares.

    Raises:
        ExportError: it is not a header of this compiler.
    """
    try:
        text = header.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(f"{header} is no text: it is not a header of this compiler") from error
    except OSError as error:
        raise ExportError(f"cannot read the model's header {header}: {error.strerror}") from error
    found = re.search(r"^void (\w+)_run\(([^)]*)\);", text, re.MULTILINE)
    sizes = {key: int(value) for key, value in re.findall(r"^#define (\w+) (\d+)", text, re.MULTILINE)}
    if found is None:
        raise ExportError(f"{header} declares no function <name>_run: it is not a header of this compiler")
    name, parameters = found[1], [parameter.strip() for parameter in found[2].split(",")]
    takes_scratch = parameters[-1] == "void *scratch"
    inputs: list[Argument] = []
    outputs: list[Argument] = []
    try:
        for parameter in parameters[:-1] if takes_scratch else parameters:
            parts = re.fullmatch(r"(const )?(\w+) \*(\w+)", parameter)
            if parts is None or parts[2] not in _DTYPES:
                raise ExportError(f"{header}: {name}_run takes {parameter!r}: it is not a header of this compiler")
            size = sizes[f"{macro_prefix(name)}_{parts[3].upper()}_SIZE"]
            (inputs if parts[1] else outputs).append(Argument(parts[3], size, _DTYPES[parts[2]]))
        scratch_bytes = sizes[f"{macro_prefix(name)}_SCRATCH_BYTES"] if takes_scratch else 0
    except KeyError as error:
        raise ExportError(f"{header} does not define {error.args[0]}: it is not a header of this compiler") from error
    prototype = found[0].rstrip(";")
    return Interface(name, prototype, tuple(inputs), tuple(outputs), scratch_bytes, takes_scratch)
