"""The emulated boards, and the Cortex-M cores that run on them."""

from __future__ import annotations

from dataclasses import dataclass

# Exponent of the nanoseconds that qemu's -icount counts for each instruction: every one takes 64 ns, so that a timer
# of the board counts instructions.
ICOUNT_SHIFT = 6
_NANOSECONDS: int = 2**ICOUNT_SHIFT


@dataclass(frozen=True)
class Board:
    """A board that qemu-system-arm emulates.

    Attributes:
        machine: its name for ``qemu-system-arm -M``.
        flash_bytes, ram_bytes: memory at address 0 and at 0x20000000.
        timer_hz: rate of the timer that the support code reads.
        define: preprocessor symbol that selects that timer.
    """

    machine: str
    flash_bytes: int
    ram_bytes: int
    timer_hz: int
    define: str

    @property
    def ticks_per_instruction(self) -> float:
        """Timer ticks in the time of one emulated instruction."""
        return self.timer_hz * _NANOSECONDS / 1e9


@dataclass(frozen=True)
class Cpu:
    """A processor core.

    Attributes:
        name: name on the command line.
        flags: options of ``arm-none-eabi-gcc``.
        boards: where its programs run; the first one with enough memory is taken.
        fpu: whether it has floating-point instructions.
    """

    name: str
    flags: tuple[str, ...]
    boards: tuple[Board, ...]
    fpu: bool


def _mps2(image: str) -> Board:
    return Board(f"mps2-{image}", 4 << 20, 4 << 20, 25_000_000, "BOARD_MPS2")


_MICROBIT = Board("microbit", 256 << 10, 16 << 10, 16_000_000, "BOARD_MICROBIT")

CPUS = {
    cpu.name: cpu
    for cpu in (
        Cpu("cortex-m4", ("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"), (_mps2("an386"),), True),
        Cpu("cortex-m7", ("-mcpu=cortex-m7", "-mfpu=fpv5-sp-d16", "-mfloat-abi=hard"), (_mps2("an500"),), True),
        Cpu("cortex-m3", ("-mcpu=cortex-m3", "-mfloat-abi=soft"), (_mps2("an385"),), False),
        # The micro:bit's Cortex-M0 faults on what Armv6-M lacks. What does not fit into it runs, with the same
        # instructions, on a Cortex-M3.
        Cpu("cortex-m0plus", ("-mcpu=cortex-m0plus", "-mfloat-abi=soft"), (_MICROBIT, _mps2("an385")), False),
    )
}
