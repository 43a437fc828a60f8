"""Size against what several tilings of a network reached."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tbn_compiler.errors import ConfigError
from tbn_compiler.html import Column, Scatter, Section, Table
from tbn_compiler.html.pictures import Point


class Network(Protocol):
    """A network of a sweep: ``name``, ``bytes`` of its weights, and what it reached, NaN if nothing."""

    @property
    def name(self) -> str:
        """How it is tiled, in a few words."""

    @property
    def bytes(self) -> int:
        """Stored bytes of its weights and scales."""

    @property
    def metric(self) -> float:
        """What it reached."""


class Sweep(Protocol):
    """Networks of one architecture, with the name of what they were measured by."""

    @property
    def metric(self) -> str:
        """Such as ``"accuracy"``."""

    @property
    def points(self) -> Sequence[Network]:
        """The networks."""


@dataclass(frozen=True)
class _StoredNetwork:
    name: str
    bytes: int
    metric: float


@dataclass(frozen=True)
class _StoredSweep:
    metric: str
    points: tuple[_StoredNetwork, ...]


def read_sweep(path: str | os.PathLike[str]) -> Sweep:
    """A sweep from a JSON file: ``{"metric": "accuracy", "points": [{"name": ..., "bytes": ..., "metric": ...}]}``.

    What else stands there is not read; a ``metric`` of ``null`` is NaN.

    Raises:
        ConfigError: the file is missing or of another form.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from error
    if not isinstance(data, Mapping) or not isinstance(data.get("points"), list):
        raise ConfigError(f"{path} is no sweep: it has no list 'points'")
    points = tuple(_read_network(row, f"{path}: point {index}") for index, row in enumerate(data["points"]))
    return _StoredSweep(str(data.get("metric", "accuracy")), points)


def _read_network(row: Any, where: str) -> _StoredNetwork:
    found = row if isinstance(row, Mapping) else {}
    metric = math.nan if found.get("metric") is None else found["metric"]
    numbers = (found.get("bytes"), metric)
    wanted = isinstance(found.get("name"), str) and isinstance(numbers[0], int) and isinstance(numbers[1], int | float)
    if not wanted or any(isinstance(number, bool) for number in numbers):
        raise ConfigError(f"{where} must have name, bytes (an integer) and metric (a number), got {row!r}")
    return _StoredNetwork(found["name"], found["bytes"], float(metric))


def sweep_data(sweep: Sweep) -> dict[str, Any]:
    """A sweep as plain data, which :func:`read_sweep` reads."""
    points = [
        {"name": p.name, "bytes": p.bytes, "metric": p.metric if math.isfinite(p.metric) else None}
        for p in sweep.points
    ]
    return {"metric": sweep.metric, "points": points}


def sweep_section(sweep: Sweep) -> Section:
    """A sweep as a part of a page: a picture of the networks that reached something, and a table of all."""
    measured = [point for point in sweep.points if math.isfinite(point.metric)]
    places = tuple(Point(point.name, point.bytes, point.metric) for point in measured)
    columns = (
        *(Column("number", numeric=True), Column("network")),
        *(Column("stored bytes", numeric=True), Column(sweep.metric, numeric=True)),
    )
    rows = [
        (str(index), point.name, f"{point.bytes:,}", f"{point.metric:.4g}") for index, point in enumerate(measured, 1)
    ]
    rows += [("-", point.name, f"{point.bytes:,}", "-") for point in sweep.points if not math.isfinite(point.metric)]
    caption = "One point a network; the table has their names by number"
    picture = Scatter(caption, "stored bytes", sweep.metric, places)
    return Section(f"Size against {sweep.metric}", (picture, Table("Networks", columns, tuple(rows))))
