"""Running exported models on emulated processors: ``measure`` builds and measures.

``targets`` has the table of processors and boards; ``support`` holds what a bare program needs: start-up code, a linker
script, semihosting and a runner.
"""

from tbn_compiler.backends.c.mcu.measure import Measurement, measure, missing_tool
from tbn_compiler.backends.c.targets import CPUS, Board, Processor

__all__ = ["CPUS", "Board", "Measurement", "Processor", "measure", "missing_tool"]
