"""The files of a training run: checkpoint, log, result and curves.

| file | holds |
|---|---|
| ``checkpoint.pt`` | all that training goes on from |
| ``log.jsonl`` | one JSON object a line: a header, one for each epoch, the result |
| ``result.json`` | the same objects as one document, once the run is finished |
| ``packed.safetensors`` | the lowered network (``model.safetensors`` for one without tiles) |
| ``curves.png`` | loss and measure over epochs, if asked for |

Nothing in them names a folder of the machine or a version of a repository.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tbn_compiler as tbn

Record = dict[str, Any]

# Fields of each kind of record with their types; a record has no others, but for the measures of an epoch.
FIELDS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "header": {
        "recipe": str, "settings": dict, "changes": dict, "stated": list, "note": str, "network": str, "tiling": dict,
        "seed": int, "amp": str, "compile": (str, type(None)), "fast": bool, "graph": bool, "device": str,
        "processes": int, "data": dict, "metric": str, "parameters": int, "steps_per_epoch": int, "machine": dict,
        "versions": dict, "started": str,
    },
    "epoch": {
        "epoch": int, "step": int, "loss": float, "lr": float, "seconds": float, "test_seconds": float, "test": dict,
    },
    "result": {
        "metric": str, "trained": dict, "lowered": (dict, type(None)), "output_difference": (float, type(None)),
        "epochs": int, "train_seconds": float, "file_bytes": int, "tensor_bytes": int, "weights": int,
        "stored_bits": int, "bits_per_weight": float, "alphas": int, "tiled_layers": int, "parameters_sha256": str,
        "restarts": int, "failure": (str, type(None)), "packed": bool,
    },
}  # fmt: skip
LATER = {"fast", "graph", "failure", "packed"}  # which records of earlier versions lack


def check_record(record: Mapping[str, Any]) -> None:
    """Compare a record of a log with :data:`FIELDS`.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    kind = record.get("kind")
    if kind not in FIELDS:
        raise ValueError(f"a record is of kind {kind!r}, not {', '.join(FIELDS)}")
    found, fields = set(record) - {"kind"}, FIELDS[kind]
    if not set(fields) - LATER <= found <= set(fields):
        raise ValueError(f"a record of kind {kind!r} differs in the fields {', '.join(sorted(found ^ set(fields)))}")
    for name in found:
        value, types = record[name], fields[name]
        if not isinstance(value, types) or (isinstance(value, bool) and types is int):
            raise ValueError(f"{name!r} of a record of kind {kind!r} is {value!r}")


def machine(device: torch.device) -> Record:
    """Processor, cores, threads, and the accelerator if it is used."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found: Record = {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
    return found


def versions() -> dict[str, str]:
    """Of what computes; this package need not be installed."""
    packages = {name: version(name) for name in ("torch", "numpy")}
    return {"python": platform.python_version(), **packages, "tbn-compiler": tbn.__version__}


def now() -> str:
    """Time of day in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write beside ``path`` and rename, so that a reader finds the old content or the new one."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


class Log:
    """The records of a run, in memory and in ``log.jsonl``; without a folder (other processes) in memory only."""

    def __init__(self, folder: Path | None, records: Sequence[Record] = ()) -> None:
        self.records: list[Record] = list(records)
        self._path = folder / "log.jsonl" if folder else None
        if self._path:
            # What was logged behind the checkpoint is computed, and logged, again.
            write_atomically(self._path, "".join(map(_line, self.records)))

    def add(self, kind: str, **fields: Any) -> Record:
        """Append a record."""
        record: Record = {"kind": kind, **fields}
        check_record(record)
        self.records.append(record)
        if self._path:
            with open(self._path, "a") as file:
                file.write(_line(record))
        return record

    def epochs(self) -> list[Record]:
        """The records of epochs."""
        return [record for record in self.records if record["kind"] == "epoch"]


def _line(record: Record) -> str:
    return json.dumps(record, allow_nan=True) + "\n"


def document(records: Sequence[Record]) -> Record:
    """The records of a finished run as one document: ``{"header": ..., "epochs": [...], "result": ...}``."""

    def of(kind: str) -> list[Record]:
        return [{key: value for key, value in record.items() if key != "kind"} for record in records
                if record["kind"] == kind]  # fmt: skip

    return {"header": of("header")[0], "epochs": of("epoch"), "result": of("result")[-1]}


def write_result(folder: Path, records: Sequence[Record]) -> None:
    """Write ``result.json``."""
    write_atomically(folder / "result.json", json.dumps(document(records), indent=1) + "\n")


def title(header: Record) -> str:
    """What a table calls the network of a run."""
    if header["network"] != "tbn":
        return str(header["network"])
    tiling = header["tiling"]
    p = tiling["p"]
    parts = [f"tbn {'x'.join(map(str, p)) if isinstance(p, list) else p}"]
    parts += [tiling["replicate"]] if tiling["replicate"] != "repeat" else []
    parts += ["tile trained"] if tiling["latent"] == "tile" else []
    return ", ".join(parts)


def draw_curves(path: Path, records: Sequence[Record], title: str, metric: str) -> None:
    """Draw training loss and test measure over epochs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    epochs = [record for record in records if record["kind"] == "epoch"]
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    places = [record["epoch"] for record in epochs]
    for axes, values, label in (
        (left, [record["loss"] for record in epochs], "training loss"),
        (right, [record["test"][metric] for record in epochs], metric.replace("_", " ")),
    ):
        axes.plot(places, values, marker="." if len(places) < 50 else "")
        axes.set(xlabel="epoch", ylabel=label)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)
