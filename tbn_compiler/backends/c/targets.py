"""Every processor that C is written for, in one table: what kernels are chosen by, and how it is emulated.

Kernels are plain C: they use no DSP or vector instructions but those that the compiler finds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Target = Literal[
    "generic",
    "cortex-m0plus",
    "cortex-m3",
    "cortex-m4",
    "cortex-m7",
    "cortex-m33",
    "cortex-m55",
    "rv32imac",
    "rv32imafc",
    "esp32",
]
CountedCore = Literal["cortex-m4", "cortex-m3", "cortex-m0plus"]
"""A core on which instructions of the kernels were counted: a column of :mod:`~tbn_compiler.backends.c.costs`."""

# Exponent of the nanoseconds that qemu's -icount counts for each instruction: every one takes 64 ns, so that a timer
# of the board counts instructions.
ICOUNT_SHIFT = 6
_NANOSECONDS: int = 2**ICOUNT_SHIFT


@dataclass(frozen=True)
class Toolchain:
    """The programs that build and emulate for one family of processors.

    Attributes:
        compiler, size, emulator: names of the programs.
        packages: what to install, as Debian calls it.
        flags: options of the compiler for every core.
        startup: file of ``mcu/support`` with what runs before ``main``.
        machine_options: options of the emulator.
    """

    compiler: str
    size: str
    emulator: str
    packages: str
    flags: tuple[str, ...]
    startup: str
    machine_options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Memory:
    """Flash or RAM of a board: where it begins, and its size."""

    start: int
    nbytes: int


@dataclass(frozen=True)
class Board:
    """A board that is emulated.

    Attributes:
        machine: its name for ``-machine`` of the emulator.
        flash, ram: memory for code and constants, and for data and the stack.
        timer_hz: rate of the timer that the support code reads.
        define: preprocessor symbol that selects that timer.
        vectors: where the processor begins to run; the start of flash if ``None``.
    """

    machine: str
    flash: Memory
    ram: Memory
    timer_hz: int
    define: str
    vectors: int | None = None

    @property
    def ticks_per_instruction(self) -> float:
        """Timer ticks in the time of one emulated instruction."""
        return self.timer_hz * _NANOSECONDS / 1e9


@dataclass(frozen=True)
class Processor:
    """A target.

    Attributes:
        name: as options call it.
        title: what it is.
        costs: the core whose counts its estimates are made from.
        same_instructions: whether it executes the instructions of that core; else estimates are those of a neighbour.
        fpu: whether it computes float32 in hardware; else tiled layers in float compute in block fixed point.
        unaligned_loads: whether it loads words from any address at once.
        few_registers: whether most instructions reach eight registers only, so that sums in many variables do not pay.
        toolchain, flags: how C is compiled for it, by name and with options of its own; ``None``: not here.
        boards: where its programs run under emulation, the smallest first.
    """

    name: Target
    title: str
    costs: CountedCore
    fpu: bool
    same_instructions: bool = True
    unaligned_loads: bool = True
    few_registers: bool = False
    toolchain: Toolchain | None = None
    flags: tuple[str, ...] = ()
    boards: tuple[Board, ...] = ()


_ARM = Toolchain(
    compiler="arm-none-eabi-gcc",
    size="arm-none-eabi-size",
    emulator="qemu-system-arm",
    packages="gcc-arm-none-eabi, libnewlib-arm-none-eabi and qemu-system-arm",
    flags=("-mthumb",),
    startup="startup_arm.c",
)
_RISCV = Toolchain(
    compiler="riscv64-unknown-elf-gcc",
    size="riscv64-unknown-elf-size",
    emulator="qemu-system-riscv32",
    packages="gcc-riscv64-unknown-elf, picolibc-riscv64-unknown-elf and qemu-system-misc",
    flags=("--specs=picolibc.specs",),
    startup="startup_riscv.c",
    machine_options=("-bios", "none"),
)

_KB, _MB = 1 << 10, 1 << 20


def _mps2(image: str) -> Board:
    return Board(f"mps2-{image}", Memory(0, 4 * _MB), Memory(0x2000_0000, 4 * _MB), 25_000_000, "BOARD_MPS2")


_MICROBIT = Board("microbit", Memory(0, 256 * _KB), Memory(0x2000_0000, 16 * _KB), 16_000_000, "BOARD_MICROBIT")
# Addresses of the cores with TrustZone are secure ones, in which they start. The Cortex-M55 starts in its ITCM.
_MPS2_M33 = Board(
    "mps2-an505", Memory(0x1000_0000, 4 * _MB), Memory(0x3800_0000, 4 * _MB), 20_000_000, "BOARD_MPS2_SECURE"
)
_MPS3_M55 = Board(
    "mps3-an547",
    Memory(0x1100_0000, 2 * _MB),
    Memory(0x3100_0000, 4 * _MB),
    32_000_000,
    "BOARD_MPS3",
    vectors=0x1000_0000,
)
# No real board: all of its memory is RAM. It counts instructions itself, a "timer" of one tick for each.
_VIRT = Board("virt", Memory(0x8000_0000, 4 * _MB), Memory(0x8040_0000, 4 * _MB), 15_625_000, "BOARD_VIRT")

TARGETS: Mapping[Target, Processor] = {
    processor.name: processor
    for processor in (
        Processor("generic", "any, taken for a Cortex-M4", "cortex-m4", fpu=True, same_instructions=False),
        Processor(
            *("cortex-m0plus", "Arm Cortex-M0+", "cortex-m0plus"),
            fpu=False,
            unaligned_loads=False,
            few_registers=True,
            toolchain=_ARM,
            flags=("-mcpu=cortex-m0plus", "-mfloat-abi=soft"),
            # The micro:bit's Cortex-M0 faults on what Armv6-M lacks. What does not fit into it runs, with the same
            # instructions, on a Cortex-M3.
            boards=(_MICROBIT, _mps2("an385")),
        ),
        Processor(
            *("cortex-m3", "Arm Cortex-M3", "cortex-m3"),
            fpu=False,
            toolchain=_ARM,
            flags=("-mcpu=cortex-m3", "-mfloat-abi=soft"),
            boards=(_mps2("an385"),),
        ),
        Processor(
            *("cortex-m4", "Arm Cortex-M4 with FPU", "cortex-m4"),
            fpu=True,
            toolchain=_ARM,
            flags=("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"),
            boards=(_mps2("an386"),),
        ),
        Processor(
            *("cortex-m7", "Arm Cortex-M7 with FPU", "cortex-m4"),
            fpu=True,
            toolchain=_ARM,
            flags=("-mcpu=cortex-m7", "-mfpu=fpv5-sp-d16", "-mfloat-abi=hard"),
            boards=(_mps2("an500"),),
        ),
        Processor(
            *("cortex-m33", "Arm Cortex-M33 with FPU", "cortex-m4"),
            fpu=True,
            toolchain=_ARM,
            flags=("-mcpu=cortex-m33", "-mfpu=fpv5-sp-d16", "-mfloat-abi=hard"),
            boards=(_MPS2_M33,),
        ),
        Processor(
            *("cortex-m55", "Arm Cortex-M55 with FPU", "cortex-m4"),
            fpu=True,
            toolchain=_ARM,
            flags=("-mcpu=cortex-m55", "-mfloat-abi=hard"),
            boards=(_MPS3_M55,),
        ),
        Processor(
            *("rv32imac", "RISC-V RV32IMAC", "cortex-m3"),
            fpu=False,
            same_instructions=False,
            unaligned_loads=False,
            toolchain=_RISCV,
            flags=("-march=rv32imac", "-mabi=ilp32"),
            boards=(_VIRT,),
        ),
        Processor(
            *("rv32imafc", "RISC-V RV32IMAFC", "cortex-m4"),
            fpu=True,
            same_instructions=False,
            unaligned_loads=False,
            toolchain=_RISCV,
            flags=("-march=rv32imafc", "-mabi=ilp32f"),
            boards=(_VIRT,),
        ),
        Processor(
            *("esp32", "Xtensa LX6 and LX7 with FPU (ESP32, ESP32-S3)", "cortex-m4"), fpu=True, same_instructions=False
        ),
    )
}
CPUS: Mapping[str, Processor] = {name: processor for name, processor in TARGETS.items() if processor.boards}
"""The targets that are emulated."""
