"""Running exported models on emulated Cortex-M cores: ``boards`` describes them, ``measure`` builds and measures.

``support`` holds what a bare program needs: start-up code, a linker script, semihosting and a runner.
"""

from tbn_compiler.backends.c.mcu.boards import CPUS, Board, Cpu
from tbn_compiler.backends.c.mcu.measure import Measurement, measure, missing_tool

__all__ = ["CPUS", "Board", "Cpu", "Measurement", "measure", "missing_tool"]
