"""What a generated header says about the run function: the one reader of such headers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tbn_compiler.backends.c.names import macro_prefix
from tbn_compiler.backends.c.number_formats import from_int8, to_int8
from tbn_compiler.errors import ExportError

_DTYPES: dict[str, np.dtype[Any]] = {
    "float": np.dtype(np.float32),
    "int32_t": np.dtype(np.int32),
    "int8_t": np.dtype(np.int8),
    "uint8_t": np.dtype(np.uint8),
}
# Name and scale of what is int8 in place of floats.
_INT8_PORT = re.compile(r"^/\* (\w+): int8 in place of the model's floats.*\n#define \w+ ([-+.e\d]+)f?$", re.MULTILINE)
# Type, name, shape, input, output and whether there is an initial value, of a member of the state.
_STATE_MEMBER = re.compile(
    r"^    (\w+) (\w+)\[\d+\]; /\* (\d+(?: x \d+)*), input (\d+) and output (\d+) of the model(, first \w+)? \*/$",
    re.MULTILINE,
)
_WORD = 4  # bytes; every array of several in one block begins at a whole one


@dataclass(frozen=True)
class Argument:
    """An array that the run function takes.

    Attributes:
        name: of the parameter.
        size: number of elements.
        dtype: ``float32``, ``int32``, ``int8`` or ``uint8``, which booleans are, too.
        scale: of int8 in place of the model's floats; ``None``: it is what the model takes or gives.
        shape: in the model.
    """

    name: str
    size: int
    dtype: np.dtype[Any]
    scale: float | None = None
    shape: tuple[int, ...] = ()

    @property
    def words(self) -> int:
        """Number of words that it takes."""
        return -(-self.size * self.dtype.itemsize // _WORD)

    def elements(self, array: np.ndarray) -> np.ndarray:
        """Numbers in the argument's type; floats are rounded where int8 stands in their place.

        Raises:
            ExportError: an integer argument does not hold one of them.
        """
        if self.scale is not None and array.dtype.kind == "f":
            return to_int8(array, self.scale)
        with np.errstate(invalid="ignore"):
            found = array.astype(self.dtype)
        if self.dtype.kind != "f" and not np.array_equal(found, array):
            raise ExportError(f"{self.name!r} takes {self.dtype} elements, and these are others")
        return found

    def numbers(self, elements: np.ndarray) -> np.ndarray:
        """The model's numbers: what elements of the argument's type stand for."""
        return elements if self.scale is None else from_int8(elements, self.scale)


@dataclass(frozen=True)
class StateMember:
    """An array of the state.

    Attributes:
        name: of the member.
        shape: of the model's input and output.
        dtype: of the elements.
        input, output: indices of the model's input that it is, and of the output that it becomes.
        zeros: whether it holds zeros before the first run.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    input: int
    output: int
    zeros: bool


@dataclass(frozen=True)
class Interface:
    """What a model's header says about its run function.

    Attributes:
        name: prefix of the model's symbols.
        prototype: declaration of the run function, without semicolon.
        inputs, outputs: in the order of the arguments.
        scratch_bytes: memory that the caller has to provide.
        takes_scratch: whether the last argument is that memory.
        state_bytes: size of the state that the first argument points to; 0: there is none.
        state: members of the state.
    """

    name: str
    prototype: str
    inputs: tuple[Argument, ...]
    outputs: tuple[Argument, ...]
    scratch_bytes: int
    takes_scratch: bool
    state_bytes: int = 0
    state: tuple[StateMember, ...] = ()

    @property
    def input_size(self) -> int:
        """Elements of all inputs."""
        return sum(argument.size for argument in self.inputs)

    @property
    def output_size(self) -> int:
        """Elements of all outputs."""
        return sum(argument.size for argument in self.outputs)

    @property
    def input_words(self) -> int:
        """Words that hold all inputs, each from a whole word on."""
        return sum(argument.words for argument in self.inputs)

    @property
    def output_words(self) -> int:
        """Words that hold all outputs, each from a whole word on."""
        return sum(argument.words for argument in self.outputs)

    @property
    def call(self) -> str:
        """A call of the run function on ``input`` and ``output``, arrays of words with all inputs and outputs.

        With a state there is a variable ``state``.
        """
        arguments = ["&state"] if self.state_bytes else []
        arguments += [f"(const void *)((input) + {start})" for start in _starts(self.inputs)]
        arguments += [f"(void *)((output) + {start})" for start in _starts(self.outputs)]
        return f"{self.name}_run({', '.join([*arguments, '(scratch)'] if self.takes_scratch else arguments)})"

    def pack_inputs(self, vectors: np.ndarray) -> bytes:
        """What ``input`` holds for each of some vectors, in which all inputs stand one behind the other.

        Raises:
            ExportError: an integer input does not hold what stands for it.
        """
        rows = np.zeros((len(vectors), _WORD * self.input_words), np.uint8)
        column = 0
        for argument, start in zip(self.inputs, _starts(self.inputs), strict=True):
            part = np.ascontiguousarray(argument.elements(vectors[:, column : column + argument.size]))
            place = _WORD * start
            rows[:, place : place + part.shape[1] * argument.dtype.itemsize] = part.view(np.uint8)
            column += argument.size
        return rows.tobytes()

    def unpack_outputs(self, data: bytes) -> np.ndarray:
        """``[vectors, elements]``: the numbers of all outputs in order, from what ``output`` held for each vector."""
        rows = np.frombuffer(data, np.uint8).reshape(-1, _WORD * self.output_words)
        parts = []
        for argument, start in zip(self.outputs, _starts(self.outputs), strict=True):
            end = _WORD * start + argument.size * argument.dtype.itemsize
            parts.append(argument.numbers(np.ascontiguousarray(rows[:, _WORD * start : end]).view(argument.dtype)))
        return np.concatenate(parts, 1)


def _starts(arguments: Sequence[Argument]) -> list[int]:
    return [sum(argument.words for argument in arguments[:index]) for index in range(len(arguments))]


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
    sizes = {key: int(value) for key, value in re.findall(r"^#define (\w+) (\d+)(?=\s)", text, re.MULTILINE)}
    shapes = dict(re.findall(r"^#define (\w+_SIZE) \d+ /\* (\d+(?: x \d+)*) \*/$", text, re.MULTILINE))
    scales = {name: float(scale) for name, scale in _INT8_PORT.findall(text)}
    if found is None:
        raise ExportError(f"{header} declares no function <name>_run: it is not a header of this compiler")
    name, parameters = found[1], [parameter.strip() for parameter in found[2].split(",")]
    takes_state = parameters[0] == f"{name}_state *state"
    parameters = parameters[1:] if takes_state else parameters
    takes_scratch = parameters[-1] == "void *scratch"
    inputs: list[Argument] = []
    outputs: list[Argument] = []
    try:
        for parameter in parameters[:-1] if takes_scratch else parameters:
            parts = re.fullmatch(r"(const )?(\w+) \*(\w+)", parameter)
            if parts is None or parts[2] not in _DTYPES:
                raise ExportError(f"{header}: {name}_run takes {parameter!r}: it is not a header of this compiler")
            macro = f"{macro_prefix(name)}_{parts[3].upper()}_SIZE"
            size = sizes[macro]
            shape = _shape(shapes.get(macro, str(size)))
            argument = Argument(parts[3], size, _DTYPES[parts[2]], scales.get(parts[3]), shape)
            (inputs if parts[1] else outputs).append(argument)
        state_bytes = sizes[f"{macro_prefix(name)}_STATE_BYTES"] if takes_state else 0
        scratch_bytes = sizes[f"{macro_prefix(name)}_SCRATCH_BYTES"] if takes_scratch else 0
    except KeyError as error:
        raise ExportError(f"{header} does not define {error.args[0]}: it is not a header of this compiler") from error
    prototype = found[0].rstrip(";")
    members = tuple(
        StateMember(member, _shape(shape), _DTYPES[kind], int(before), int(after), not given)
        for kind, member, shape, before, after, given in _STATE_MEMBER.findall(text)
    )
    return Interface(name, prototype, tuple(inputs), tuple(outputs), scratch_bytes, takes_scratch, state_bytes, members)


def _shape(text: str) -> tuple[int, ...]:
    """A shape as the header has it, ``1 x 28 x 28``."""
    return tuple(map(int, text.split(" x ")))
