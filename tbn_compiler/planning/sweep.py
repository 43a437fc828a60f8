"""Training a few tilings of one model: accuracy over stored bytes."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tbn_compiler.compiler import transform
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError
from tbn_compiler.files import replacing
from tbn_compiler.graph.copying import copy_with_tensors
from tbn_compiler.graph.random_state import keep_random_state
from tbn_compiler.graph.records import get_records
from tbn_compiler.planning.costs import stored_bytes
from tbn_compiler.planning.layer_plan import LayerPlan
from tbn_compiler.planning.layers import check_float_model, uniform
from tbn_compiler.planning.options import LayerOption
from tbn_compiler.planning.planner import plan
from tbn_compiler.planning.sensitivity import Sensitivity
from tbn_compiler.summary import summary
from tbn_compiler.tables import PlainTable, Tabular

if TYPE_CHECKING:
    from tbn_compiler.backends.c.targets import Target

_VERSION = 1
Point = TilingConfig | LayerPlan | Mapping[str, float] | str
"""A tiling, a plan, a budget for one (``{"bytes": 20_000}``), or ``"float"``."""


@dataclass(frozen=True)
class SweepPoint:
    """One trained network.

    Attributes:
        name: of the point.
        config: how it was tiled, as plain data; ``None`` for the float network.
        bytes: of packed tiles, alphas (float32) and float weights of linear and convolution layers.
        bits_per_weight: of these layers, alphas not counted.
        metric: what training or evaluation gave; not a number where that was none.
        seconds: that training and evaluation took.
        seed: of the random numbers that it started with.
    """

    name: str
    config: Mapping[str, Any] | None
    bytes: int
    bits_per_weight: float
    metric: float
    seconds: float
    seed: int = 0


@dataclass(frozen=True)
class Sweep(Tabular):
    """Trained points of one model. ``print`` gives a table.

    Attributes:
        metric: what the number of a point is called.
        points: in the order in which they were asked for.
    """

    metric: str
    points: tuple[SweepPoint, ...]

    def __getitem__(self, name: str) -> SweepPoint:
        """A point by its name."""
        for point in self.points:
            if point.name == name:
                return point
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; a metric that is not a number is ``None``."""
        points = [
            {
                "name": point.name,
                "config": point.config,
                "bytes": point.bytes,
                "bits_per_weight": point.bits_per_weight,
                "metric": point.metric if math.isfinite(point.metric) else None,
                "seconds": point.seconds,
                "seed": point.seed,
            }
            for point in self.points
        ]
        return {"version": _VERSION, "metric": self.metric, "points": points}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sweep:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: the data is of another form or version.
        """
        try:
            if data["version"] != _VERSION:
                raise ConfigError(f"a sweep of version {data['version']!r}")
            points = tuple(
                SweepPoint(
                    str(point["name"]),
                    point["config"],
                    int(point["bytes"]),
                    float(point["bits_per_weight"]),
                    math.nan if point["metric"] is None else float(point["metric"]),
                    float(point["seconds"]),
                    int(point["seed"]),
                )
                for point in data["points"]
            )
            return cls(str(data["metric"]), points)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"not the data of a Sweep: {type(error).__name__} {error}") from error

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Sweep:
        """The sweep in a file that :func:`sweep` has written.

        Raises:
            ConfigError: the file is missing or of another form.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from error
        except ValueError as error:
            raise ConfigError(f"{path} is no JSON file: {error}") from error
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    def _plain_table(self) -> PlainTable:
        rows = [
            [p.name, f"{p.bytes:,}", f"{p.bits_per_weight:.3f}", f"{p.metric:.4g}", f"{p.seconds:.1f}"]
            for p in self.points
        ]
        titles = ("point", "bytes", "bits/weight", self.metric, "seconds")
        return PlainTable(titles, rows, "bytes of the weights and alphas of linear and convolution layers")

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture, the metric over bytes; the suffix gives the format. Needs matplotlib."""
        from tbn_compiler.planning.pictures import draw_sweep

        draw_sweep(self, path)


def sweep(
    model: nn.Module,
    points: Mapping[str, Point] | Iterable[Point],
    train: Callable[[nn.Module], Any],
    evaluate: Callable[[nn.Module], Any] | None = None,
    *,
    metric: str = "accuracy",
    path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    sensitivity: Sensitivity | None = None,
    example_inputs: Any = None,
    config: TilingConfig | None = None,
    target: Target = "generic",
) -> Sweep:
    """Train one model under several tilings and compare what they reach with what they store.

    Every point starts from a copy of ``model``, weights included, with the same random numbers. After each the results
    are written to ``path``, and points that are there already are not trained again, so that a sweep that was stopped
    goes on, and one more point costs one training. The file is read again before it is written, so that sweeps of
    several processes can share one.

    Args:
        model: the float model, trained or not. It is not changed.
        points: what to train, by name or not: each a :class:`~tbn_compiler.TilingConfig`, a :class:`LayerPlan`, a
            budget as :func:`plan` takes (``{"bytes": 20_000}``), or ``"float"``.
        train: trains the module that it gets in place, on any device; without ``evaluate`` it returns the metric.
        evaluate: returns the metric of the trained module, which is in the mode that ``train`` left.
        metric: what it is called.
        path: JSON file with the results, made if there is none.
        seed: of PyTorch's generators at the start of each point; they go on afterwards as if nothing had been.
        sensitivity: of budgets, as for :func:`plan`, as are the next ones.
        example_inputs: what costs are counted for.
        config: what the layers have beside their option.
        target: processor of the costs in C.

    Returns:
        A :class:`Sweep`, with the points that were asked for in their order.

    Raises:
        ConfigError: a point is not valid, two have one name, the file is of something else or has a point of this name
            with another tiling, or the metric is no number.
        TBNError: no plan keeps a budget.

    Example:
        >>> import tbn_compiler as tbn
        >>> model = nn.Linear(64, 64)
        >>> train = lambda module: -module(torch.ones(1, 64)).square().mean().item()
        >>> found = tbn.sweep(model, ["float", tbn.TilingConfig(p=4), {"bytes": 100}], train, metric="score")
        >>> [point.bytes for point in found.points]
        [16384, 132, 68]
    """
    model = check_float_model(model)
    wanted = _named(points)
    known = {} if path is None else _read(Path(path), metric)
    found: list[SweepPoint] = []
    for name, point in wanted.items():
        if isinstance(point, Mapping):
            point = plan(
                model,
                budget=point,
                sensitivity=sensitivity,
                example_inputs=example_inputs,
                config=config,
                target=target,
            )
        tiling = _tiling(point)
        data = None if tiling is None else json.loads(json.dumps(_data(tiling)))
        if name in known:
            earlier = (known[name].config, known[name].bytes, known[name].seed)
            if earlier != (data, _size(_tiled(copy_with_tensors(model), tiling))[0], seed):
                raise ConfigError(
                    f"{path} has a point {name!r} of another model, tiling or seed: give the point another name, or "
                    "the sweep another file"
                )
        else:
            known[name] = _train(model, name, tiling, data, train, evaluate, seed)
            if path is not None:
                _write(Path(path), Sweep(metric, tuple(known.values())))
        found.append(known[name])
    return Sweep(metric, tuple(found))


def _named(points: Mapping[str, Point] | Iterable[Point]) -> dict[str, Point]:
    if isinstance(points, str):
        raise ConfigError(f"points must be a mapping or a sequence, got {points!r}")
    pairs = list(points.items()) if isinstance(points, Mapping) else [(point_name(point), point) for point in points]
    named = dict(pairs)
    if len(named) < len(pairs):
        twice = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
        raise ConfigError(f"two points are called {twice!r}: give them names in a mapping")
    if not named:
        raise ConfigError("there are no points to train")
    return named


def point_name(point: Point) -> str:
    """What a point is called where the user gives no name."""
    if isinstance(point, TilingConfig):
        p = point.p if isinstance(point.p, int) else "x".join(map(str, point.p))
        layout = "" if point.replicate == "repeat" else f" {point.replicate}"
        return f"p={p}{layout}"
    if isinstance(point, LayerPlan):
        return _budget_name(dict(point.budget))
    return _budget_name(point) if isinstance(point, Mapping) else str(point)


def _budget_name(budget: Mapping[str, float]) -> str:
    return ", ".join(f"{name} <= {limit:,.12g}" for name, limit in budget.items()) or "plan"


def _tiling(point: object) -> TilingConfig | None:
    if isinstance(point, LayerPlan):
        return None if set(point.choice.values()) == {"float"} else point.config
    if isinstance(point, TilingConfig):
        return point
    if point == "float":
        return None
    raise ConfigError(f"point {point!r} is no TilingConfig, LayerPlan or budget, nor 'float'")


def _data(config: TilingConfig) -> dict[str, Any]:
    named = (
        {}
        if config.filter is None
        else {"filter": getattr(config.filter, "__qualname__", type(config.filter).__name__)}
    )
    return config.to_dict() | named


def _train(
    model: nn.Module,
    name: str,
    config: TilingConfig | None,
    data: Mapping[str, Any] | None,
    train: Callable[[nn.Module], Any],
    evaluate: Callable[[nn.Module], Any] | None,
    seed: int,
) -> SweepPoint:
    restore = keep_random_state(model)
    try:
        torch.manual_seed(seed)
        module = _tiled(copy_with_tensors(model), config)
        size, bits = _size(module)
        begin = time.perf_counter()
        result = train(module)
        if evaluate is not None:
            result = evaluate(module)
        seconds = time.perf_counter() - begin
    finally:
        restore()
    try:
        value = float(result)
    except (TypeError, ValueError):
        source = "train" if evaluate is None else "evaluate"
        raise ConfigError(f"{source} must return the metric of point {name!r} as a number, got {result!r}") from None
    value = value if math.isfinite(value) else math.nan
    return SweepPoint(name, data, size, bits, value, round(seconds, 3), seed)


def _tiled(model: nn.Module, config: TilingConfig | None) -> nn.Module:
    return model if config is None else transform(model, config)


def _size(module: nn.Module) -> tuple[int, float]:
    """Stored bytes of a network's weights and alphas, and bits for each weight."""
    counted = module if get_records(module) else uniform(module, TilingConfig(), LayerOption("float"))
    found = summary(counted)
    return sum(map(stored_bytes, found.layers)), found.totals["bits_per_weight"]


def _read(path: Path, metric: str) -> dict[str, SweepPoint]:
    if not path.exists():
        return {}
    earlier = Sweep.read(path)
    if earlier.metric != metric:
        raise ConfigError(f"{path} holds the metric {earlier.metric!r}, not {metric!r}")
    return {point.name: point for point in earlier.points}


def _write(path: Path, found: Sweep) -> None:
    """Write a sweep, with the points that another one has written to the same file since."""
    try:
        theirs = _read(path, found.metric)
    except ConfigError as error:
        kept = path.with_name(f"{path.stem}-kept{path.suffix}")
        _write(kept, found)
        raise ConfigError(f"{error}; the points of this sweep are in {kept}") from error
    points = theirs | {point.name: point for point in found.points}
    found = Sweep(found.metric, tuple(points.values()))
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")
