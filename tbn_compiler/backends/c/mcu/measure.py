"""Building an exported model for a processor and measuring it under emulation.

The count of instructions is exact and repeatable: ``-icount`` of qemu gives every instruction the same time, and the
support code reads a timer of the board before and after the call. It is not a count of cycles.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tbn_compiler.backends.c.interface import Interface, read_interface
from tbn_compiler.backends.c.targets import CPUS, ICOUNT_SHIFT, Board, Processor, Toolchain
from tbn_compiler.errors import ExportError

_SUPPORT = Path(__file__).parent / "support"
_FLAGS = ("-std=gnu99", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-nostartfiles")
_DEFAULT_FLAGS = ("-O2",)
_TIMEOUT_SECONDS = 300


def missing_tool(cpu: Processor = CPUS["cortex-m4"]) -> str | None:
    """The first program that is needed for a target and not installed, or ``None``."""
    tools = _toolchain(cpu)
    return next((tool for tool in (tools.compiler, tools.size, tools.emulator) if shutil.which(tool) is None), None)


def _toolchain(cpu: Processor) -> Toolchain:
    if cpu.toolchain is None:
        raise ExportError(f"{cpu.name} is not emulated; these are: {', '.join(CPUS)}")
    return cpu.toolchain


@dataclass(frozen=True, eq=False)
class Measurement:
    """One model on one core.

    Attributes:
        cpu, machine: the core, and the emulated board that ran it.
        instructions: executed instructions for each input.
        flash_bytes: code, constants and initial values, with what they pull in from the C library.
        static_bytes: static variables, the scratch memory and the state that the caller provides; without input and
            output.
        stack_bytes: stack below the caller of the run function.
        outputs: ``[inputs, output elements]``, ``float32`` or integers.
        max_error: largest difference from the expected outputs, ``None`` without them.
        passed_over: why smaller boards were not taken, a reason for each.
    """

    cpu: str
    machine: str
    instructions: tuple[int, ...]
    flash_bytes: int
    static_bytes: int
    stack_bytes: int
    outputs: np.ndarray
    max_error: float | None
    passed_over: tuple[str, ...] = ()

    @property
    def ram_bytes(self) -> int:
        """Memory beside the input and the output."""
        return self.static_bytes + self.stack_bytes


def measure(
    source: str | os.PathLike[str],
    cpu: Processor,
    inputs: Any,
    expected: Any = None,
    *,
    flags: Sequence[str] = _DEFAULT_FLAGS,
) -> Measurement:
    """Compile an exported model for a core, run it under emulation on each input and measure it.

    Args:
        source: the ``.c`` file that ``export_c`` wrote; its header lies beside it.
        cpu: one of :data:`~tbn_compiler.backends.c.targets.CPUS`. Of its boards the smallest one is taken that has room
            for code, data and stack.
        inputs: tensor or array ``[count, ...]`` with all inputs of the model behind one another in each row. With a
            state, runs follow one another.
        expected: ``[count, ...]``, all outputs in the same way, or ``None``.
        flags: options of the compiler beside those of the core.

    Raises:
        ExportError: a tool is missing, the model does not compile, fits no board, faults, or the arrays do not have
            the model's sizes. The message holds what the tool said, or the bytes that are needed and there.
    """
    tool = missing_tool(cpu)
    if tool is not None:
        raise ExportError(f"{tool} is not installed: install {_toolchain(cpu).packages}")
    source = Path(source).resolve()
    interface = read_interface(source.with_suffix(".h"))
    vectors = _vectors(inputs, interface.input_size, "inputs")
    wanted = None if expected is None else _vectors(expected, interface.output_size, "expected outputs")
    if wanted is not None and len(wanted) != len(vectors):
        raise ExportError(f"{len(vectors)} inputs but {len(wanted)} expected outputs")
    with tempfile.TemporaryDirectory() as folder:
        program = _Program(Path(folder), source, interface, cpu, tuple(flags))
        board, passed_over, (outputs, ticks, stack) = _build_and_run(program, vectors)
        flash, static = program.sizes(board)
    return Measurement(
        cpu=cpu.name,
        machine=board.machine,
        instructions=tuple(round(count / board.ticks_per_instruction) for count in ticks),
        flash_bytes=flash,
        static_bytes=static,
        stack_bytes=stack,
        outputs=outputs,
        # A NaN in either counts: it makes the maximum NaN.
        max_error=None if wanted is None else float(np.abs(outputs.astype(np.float64) - wanted).max()),
        passed_over=passed_over,
    )


def _vectors(array: Any, size: int, what: str) -> np.ndarray:
    values = torch.as_tensor(array).detach().cpu().numpy()
    if values.ndim == 0 or len(values) == 0 or values[0].size != size:
        raise ExportError(f"{what} must have {size} elements for each vector, got the shape {list(values.shape)}")
    return np.ascontiguousarray(values.reshape(len(values), size))


_Run = tuple[np.ndarray, list[int], int]
"""Outputs, the ticks of each call, and the most stack that one took."""

# Stack of the runner itself, above the model's.
_RUNNER_STACK = 256


def _build_and_run(program: _Program, vectors: np.ndarray) -> tuple[Board, tuple[str, ...], _Run]:
    """Run the model on the first board that has room for it and its stack.

    How much stack it takes is known only once it has run. A model that fails on a board runs on the next one, too: if
    it turns out there that static memory and stack exceed the first board, that was why, and the result stands.

    Returns:
        The board, why each one before it was not taken, and what the run gave.
    """
    boards = program.cpu.boards
    reasons: list[str] = []
    failed: tuple[Board, ExportError] | None = None
    for board in boards:
        reason = program.build(board)
        if reason is not None:
            reasons.append(reason)
            continue
        try:
            run = program.run(board, vectors)
        except ExportError as error:
            failed = failed or (board, error)
            continue
        if failed is not None:
            used, stack = program.ram_bytes(), run[2] + _RUNNER_STACK
            if used + stack <= failed[0].ram.nbytes:
                raise failed[1]
            reasons.append(
                f"{failed[0].machine} has {failed[0].ram.nbytes:,} bytes of RAM, the program takes {used:,} and "
                f"{stack:,} of stack"
            )
        return board, tuple(reasons), run
    if failed is not None:
        raise failed[1]
    raise ExportError(f"{program.source} fits no board for {program.cpu.name}: {'; '.join(reasons)}")


_OVERFLOW = re.compile(r"region `(\w+)' overflowed by (\d+) bytes")


@dataclass(frozen=True)
class _Program:
    """A model and its runner, built in a folder.

    Attributes:
        folder: where everything is written.
        source: the model; its header lies beside it.
        interface: what the header says.
        cpu: the processor.
        flags: options of the compiler beside those of the processor.
    """

    folder: Path
    source: Path
    interface: Interface
    cpu: Processor
    flags: tuple[str, ...]

    def build(self, board: Board) -> str | None:
        """Link the model and its runner for a board.

        Returns:
            Why it does not fit, or ``None``.

        Raises:
            ExportError: it does not compile.
        """
        error = self._link("model.elf", self.source, board)
        excess = {region: int(count) for region, count in _OVERFLOW.findall(error)}
        if not error:
            return None
        if not excess:
            raise ExportError(
                f"{_toolchain(self.cpu).compiler} cannot compile {self.source} for {self.cpu.name}:\n{error}"
            )
        sizes = {"FLASH": ("flash", board.flash.nbytes), "RAM": ("RAM", board.ram.nbytes)}
        return ", ".join(
            f"{board.machine} has {there:,} bytes of {what}, the program takes {there + excess[region]:,}"
            for region, (what, there) in sizes.items()
            if region in excess
        )

    def sizes(self, board: Board) -> tuple[int, int]:
        """The model's bytes of flash and of static memory.

        That is what the program has beyond one whose run function does nothing.
        """
        empty, interface = self.folder / "empty.c", self.interface
        state = f"{interface.name}_state"
        init = (
            f"void {interface.name}_init({state} *state)\n{{\n    (void)state;\n}}\n" if interface.state_bytes else ""
        )
        empty.write_text(f'#include "{self._header}"\n{interface.prototype}\n{{\n}}\n{init}')
        error = self._link("empty.elf", empty, board)
        if error:
            compiler = _toolchain(self.cpu).compiler
            raise ExportError(f"{compiler} cannot compile the support code for {self.cpu.name}:\n{error}")
        (flash, static), (empty_flash, empty_static) = self._sizes("model.elf"), self._sizes("empty.elf")
        return flash - empty_flash, static - empty_static + interface.scratch_bytes + interface.state_bytes

    def ram_bytes(self) -> int:
        """Static memory of the whole program."""
        return self._sizes("model.elf")[1]

    @property
    def _header(self) -> str:
        return self.source.with_suffix(".h").name

    def _link(self, program: str, code: Path, board: Board) -> str:
        """Compile and link the code of the run function with its runner.

        Returns:
            What the compiler said if it failed, else nothing.
        """
        tools, interface = _toolchain(self.cpu), self.interface
        defines = {
            board.define: "1",
            "MODEL_HEADER": f'"{self._header}"',
            "MODEL_RUN(input, output, scratch)": interface.call,
            "MODEL_INPUT_WORDS": interface.input_words,
            "MODEL_OUTPUT_WORDS": interface.output_words,
            "MODEL_SCRATCH_BYTES": interface.scratch_bytes,
        }
        if interface.state_bytes:
            defines |= {"MODEL_STATE": f"{interface.name}_state", "MODEL_INIT": f"{interface.name}_init"}
        places = {
            "VECTORS_START": board.flash.start if board.vectors is None else board.vectors,
            "FLASH_START": board.flash.start,
            "FLASH_BYTES": board.flash.nbytes,
            "RAM_START": board.ram.start,
            "RAM_BYTES": board.ram.nbytes,
        }
        support = [str(_SUPPORT / name) for name in (tools.startup, "runner.c")]
        command = [
            *(tools.compiler, *tools.flags, *self.cpu.flags, *_FLAGS, *self.flags),
            *(f"-I{_SUPPORT}", f"-I{self.source.parent}"),
            *(f"-D{name}={value}" for name, value in defines.items()),
            *(f"-Wl,--defsym={name}={value:#x}" for name, value in places.items()),
            *("-T", str(_SUPPORT / "memory.ld"), *support, str(code)),
            *("-o", str(self.folder / program), "-lm"),
        ]
        result = subprocess.run(command, capture_output=True, text=True)
        return result.stderr if result.returncode else ""

    def _sizes(self, program: str) -> tuple[int, int]:
        """Bytes of flash and of static memory."""
        command = [_toolchain(self.cpu).size, str(self.folder / program)]
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        text, data, bss = (int(field) for field in table.splitlines()[1].split()[:3])
        return text + data, data + bss

    def run(self, board: Board, vectors: np.ndarray) -> _Run:
        """Run what :meth:`build` built on all vectors."""
        emulator, folder = _toolchain(self.cpu).emulator, self.folder
        (folder / "input.bin").write_bytes(self.interface.pack_inputs(vectors))
        command = [
            *(emulator, "-machine", board.machine, *_toolchain(self.cpu).machine_options),
            *("-nographic", "-monitor", "none", "-serial", "none"),
            *("-icount", f"shift={ICOUNT_SHIFT}", "-semihosting-config", "enable=on,target=native"),
            *("-kernel", "model.elf"),
        ]
        try:
            result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            raise ExportError(f"{emulator} did not end within {_TIMEOUT_SECONDS} s; give it fewer inputs") from None
        if result.returncode:
            raise ExportError(f"the model stopped on {board.machine}: {(result.stdout + result.stderr).strip()}")
        outputs = self.interface.unpack_outputs((folder / "output.bin").read_bytes())
        measured = np.fromfile(folder / "measured.bin", np.uint32).reshape(-1, 2)
        if len(measured) != len(vectors):
            raise ExportError(f"{emulator} ran {len(measured)} of {len(vectors)} inputs: {result.stderr.strip()}")
        return outputs, measured[:, 0].tolist(), int(measured[:, 1].max())
