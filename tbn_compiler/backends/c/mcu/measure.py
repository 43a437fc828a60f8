"""Building an exported model for a Cortex-M core and measuring it under emulation.

The count of instructions is exact and repeatable: ``qemu-system-arm -icount`` gives every instruction the same time,
and the support code reads a timer of the board before and after the call. It is not a count of cycles.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tbn_compiler.backends.c.interface import Interface, read_interface
from tbn_compiler.backends.c.mcu.boards import ICOUNT_SHIFT, Board, Cpu
from tbn_compiler.errors import ExportError

COMPILER = "arm-none-eabi-gcc"
_SIZE = "arm-none-eabi-size"
_EMULATOR = "qemu-system-arm"
_SUPPORT = Path(__file__).parent / "support"
_FLAGS = ("-std=gnu99", "-mthumb", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections", "-nostartfiles")
_DEFAULT_FLAGS = ("-O2",)
_TIMEOUT_SECONDS = 300


def missing_tool() -> str | None:
    """The first program that is needed and not installed, or ``None``."""
    return next((tool for tool in (COMPILER, _SIZE, _EMULATOR) if shutil.which(tool) is None), None)


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
    """

    cpu: str
    machine: str
    instructions: tuple[int, ...]
    flash_bytes: int
    static_bytes: int
    stack_bytes: int
    outputs: np.ndarray
    max_error: float | None

    @property
    def ram_bytes(self) -> int:
        """Memory beside the input and the output."""
        return self.static_bytes + self.stack_bytes


def measure(
    source: str | os.PathLike[str],
    cpu: Cpu,
    inputs: Any,
    expected: Any = None,
    *,
    flags: Sequence[str] = _DEFAULT_FLAGS,
) -> Measurement:
    """Compile an exported model for a core, run it under emulation on each input and measure it.

    Args:
        source: the ``.c`` file that ``export_c`` wrote; its header lies beside it.
        cpu: one of :data:`~tbn_compiler.backends.c.mcu.boards.CPUS`.
        inputs: tensor or array ``[count, ...]`` with all inputs of the model behind one another in each row. With a
            state, runs follow one another.
        expected: ``[count, ...]``, all outputs in the same way, or ``None``.
        flags: options of the compiler beside those of the core.

    Raises:
        ExportError: a tool is missing, the model does not compile, does not fit, faults, or the arrays do not have
            the model's sizes. The message holds what the tool said.
    """
    tool = missing_tool()
    if tool is not None:
        raise ExportError(
            f"{tool} is not installed: install gcc-arm-none-eabi, libnewlib-arm-none-eabi and qemu-system-arm"
        )
    source = Path(source).resolve()
    interface = read_interface(source.with_suffix(".h"))
    vectors = _vectors(inputs, interface.input_size, "inputs")
    wanted = None if expected is None else _vectors(expected, interface.output_size, "expected outputs")
    if wanted is not None and len(wanted) != len(vectors):
        raise ExportError(f"{len(vectors)} inputs but {len(wanted)} expected outputs")
    with tempfile.TemporaryDirectory() as folder:
        board, flash, static, (outputs, ticks, stack) = _build_and_run(
            Path(folder), source, interface, cpu, vectors, flags
        )
    return Measurement(
        cpu=cpu.name,
        machine=board.machine,
        instructions=tuple(round(count / board.ticks_per_instruction) for count in ticks),
        flash_bytes=flash,
        static_bytes=static,
        stack_bytes=stack,
        outputs=outputs,
        # A NaN in either counts: it makes the maximum NaN.
        max_error=None if wanted is None else float(np.abs(outputs - wanted).max()),
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


def _build_and_run(
    folder: Path, source: Path, interface: Interface, cpu: Cpu, vectors: np.ndarray, flags: Sequence[str]
) -> tuple[Board, int, int, _Run]:
    """Run the model on the first board that has room for it and its stack.

    How much stack it takes is known only once it has run. A model that fails on a board runs on the next one, too: if
    it turns out there that static memory and stack exceed the first board, that was why, and the result stands.

    Returns:
        The board, the model's bytes of flash and of static memory, and what the run gave.
    """
    boards, failed, failure = cpu.boards, None, None
    while True:
        board, flash, static = _build(folder, source, interface, replace(cpu, boards=boards), flags)
        try:
            run = _run(folder, board, interface, vectors)
        except ExportError as error:
            failed, failure = failed or board, failure or error
            boards = boards[boards.index(board) + 1 :]
            if not boards:
                raise failure from None
            continue
        if failed and failure and _sizes(folder / "model.elf")[1] + run[2] + _RUNNER_STACK <= failed.ram_bytes:
            raise failure
        return board, flash, static, run


def _build(folder: Path, source: Path, interface: Interface, cpu: Cpu, flags: Sequence[str]) -> tuple[Board, int, int]:
    """Link the model and its runner for the first board that has room.

    Returns:
        The board, and the model's bytes of flash and of static memory: what the program has beyond one whose run
        function does nothing.
    """
    error = ""
    for board in cpu.boards:
        error = _link(folder / "model.elf", source, source, interface, cpu, board, flags)
        if not error:
            break
        if "region `" not in error or "overflowed" not in error:
            raise ExportError(f"{COMPILER} cannot compile {source} for {cpu.name}:\n{error}")
    else:
        raise ExportError(f"{source} does not fit into the memory of {cpu.boards[-1].machine}:\n{error}")
    empty = folder / "empty.c"
    state = f"{interface.name}_state"
    init = f"void {interface.name}_init({state} *state)\n{{\n    (void)state;\n}}\n" if interface.state_bytes else ""
    empty.write_text(f'#include "{source.with_suffix(".h").name}"\n{interface.prototype}\n{{\n}}\n{init}')
    error = _link(folder / "empty.elf", empty, source, interface, cpu, board, flags)
    if error:
        raise ExportError(f"{COMPILER} cannot compile the support code for {cpu.name}:\n{error}")
    (flash, static), (empty_flash, empty_static) = _sizes(folder / "model.elf"), _sizes(folder / "empty.elf")
    return board, flash - empty_flash, static - empty_static + interface.scratch_bytes + interface.state_bytes


def _link(
    program: Path, code: Path, source: Path, interface: Interface, cpu: Cpu, board: Board, flags: Sequence[str]
) -> str:
    """Compile and link the code of the run function with its runner.

    Returns:
        What the compiler said if it failed, else nothing.
    """
    defines = {
        board.define: "1",
        "MODEL_HEADER": f'"{source.with_suffix(".h").name}"',
        "MODEL_RUN(input, output, scratch)": interface.call,
        "MODEL_INPUT_WORDS": interface.input_words,
        "MODEL_OUTPUT_WORDS": interface.output_words,
        "MODEL_SCRATCH_BYTES": interface.scratch_bytes,
    }
    if interface.state_bytes:
        defines |= {"MODEL_STATE": f"{interface.name}_state", "MODEL_INIT": f"{interface.name}_init"}
    command = [
        *(COMPILER, *cpu.flags, *_FLAGS, *flags, f"-I{_SUPPORT}", f"-I{source.parent}"),
        *(f"-D{name}={value}" for name, value in defines.items()),
        *(f"-Wl,--defsym=FLASH_BYTES={board.flash_bytes}", f"-Wl,--defsym=RAM_BYTES={board.ram_bytes}"),
        *("-T", str(_SUPPORT / "memory.ld"), str(_SUPPORT / "startup.c"), str(_SUPPORT / "runner.c"), str(code)),
        *("-o", str(program), "-lm"),
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stderr if result.returncode else ""


def _sizes(program: Path) -> tuple[int, int]:
    """Bytes of flash and of static memory."""
    table = subprocess.run([_SIZE, str(program)], capture_output=True, text=True, check=True).stdout
    text, data, bss = (int(field) for field in table.splitlines()[1].split()[:3])
    return text + data, data + bss


def _run(folder: Path, board: Board, interface: Interface, vectors: np.ndarray) -> _Run:
    """Run the program."""
    (folder / "input.bin").write_bytes(interface.pack_inputs(vectors))
    command = [
        *(_EMULATOR, "-machine", board.machine, "-nographic", "-monitor", "none", "-serial", "none"),
        *("-icount", f"shift={ICOUNT_SHIFT}", "-semihosting-config", "enable=on,target=native"),
        *("-kernel", "model.elf"),
    ]
    try:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        raise ExportError(f"{_EMULATOR} did not end within {_TIMEOUT_SECONDS} s; give it fewer inputs") from None
    if result.returncode:
        raise ExportError(f"the model stopped on {board.machine}: {(result.stdout + result.stderr).strip()}")
    outputs = interface.unpack_outputs((folder / "output.bin").read_bytes())
    measured = np.fromfile(folder / "measured.bin", np.uint32).reshape(-1, 2)
    if len(measured) != len(vectors):
        raise ExportError(f"{_EMULATOR} ran {len(measured)} of {len(vectors)} inputs: {result.stderr.strip()}")
    return outputs, measured[:, 0].tolist(), int(measured[:, 1].max())
