"""Machine instructions of compiled kernels for NVIDIA GPUs, by the disassembler that triton brings."""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T\d]+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Loop:
    """The body of a loop: how often each instruction occurs, by its first name (``BAR`` of ``BAR.SYNC``)."""

    counts: Counter[str]

    @property
    def instructions(self) -> int:
        """All of them."""
        return sum(self.counts.values())


def loops(kernel: Any, folder: Path) -> list[Loop]:
    """The loops of a kernel, in the order of their ends; an outer one holds the inner ones."""
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    text = subprocess.run([tool, "-sass", str(binary)], capture_output=True, text=True, check=True).stdout
    lines = [(int(address, 16), name, rest) for address, name, rest in _LINE.findall(text)]
    found = []
    for address, name, rest in lines:
        target = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        if target is not None and int(target[1], 16) < address:
            body = [other.split(".")[0] for at, other, _ in lines if int(target[1], 16) <= at <= address]
            found.append(Loop(Counter(body)))
    return found
