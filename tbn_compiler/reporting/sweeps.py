"""Size against what several tilings of a network reached."""

from __future__ import annotations

import math

from tbn_compiler.html import Column, Scatter, Section, Table
from tbn_compiler.html.pictures import Point
from tbn_compiler.planning import Sweep


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
