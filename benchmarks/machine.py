"""What a figure depends on besides the code."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch


def machine(**more: Any) -> dict[str, Any]:
    """Processor, cores that may be used, versions and date; ``more`` is added."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        **more,
    }


def with_rows(path: Path, found: dict[str, Any], rows: list[dict[str, Any]], key: Callable[[Any], Any]) -> list[Any]:
    """New rows and those of a result file that they do not replace, if these are from the same machine and versions.

    Args:
        path: the result file.
        found: from :func:`machine`.
        rows: the new ones.
        key: what tells rows apart.
    """
    old: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    same = all(old.get("machine", {}).get(name) == value for name, value in found.items() if name != "date")
    kept = {key(row): row for row in old.get("rows", [])} if same else {}
    return list((kept | {key(row): row for row in rows}).values())
