"""A choice of options for all layers: the result of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tbn_compiler.config import TilingConfig
from tbn_compiler.planning.options import LayerOption
from tbn_compiler.tables import PlainTable, Tabular

if TYPE_CHECKING:
    import os


@dataclass(frozen=True)
class PlannedLayer:
    """One layer of a :class:`LayerPlan`.

    Attributes:
        name: of the layer, as patterns of :class:`~tbn_compiler.TilingConfig` see it.
        kind: ``"linear"``, ``"conv2d"``, ...
        shape: shape of the weight.
        option: what it is to be.
        p: copies that it gets, the divisor of its size; ``None`` for a float layer.
        change: what the sensitivity says of the option.
        costs: its part of the costs, by name; of those of the C backend an estimate.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    option: LayerOption
    p: int | None
    change: float
    costs: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class LayerPlan(Tabular):
    """Which option each layer is to take. ``print`` gives a table.

    Attributes:
        layers: in the order of the model's summary.
        config: what :func:`~tbn_compiler.transform` takes; it gives each layer its option.
        measure: of the sensitivity, ``"loss"`` or ``"weight"``.
        change: sum of the layers' changes: the predicted change of the loss before training.
        costs: of the whole model, by name: counted, or from the C backend's plan of this very choice.
        budget: largest value of each cost, and of ``"loss"``, that was allowed.
        objective: what is least among all choices within the budget.
    """

    layers: tuple[PlannedLayer, ...]
    config: TilingConfig
    measure: str
    change: float
    costs: tuple[tuple[str, int], ...]
    budget: tuple[tuple[str, float], ...]
    objective: str

    @property
    def choice(self) -> dict[str, str]:
        """Name of the option of each layer."""
        return {layer.name: layer.option.name for layer in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON. ``TilingConfig(**data["config"])`` gives the config, but for its filter."""
        layers = [
            {
                "name": layer.name,
                "kind": layer.kind,
                "shape": list(layer.shape),
                "option": layer.option.to_data(),
                "p": layer.p,
                "change": layer.change,
                "costs": dict(layer.costs),
            }
            for layer in self.layers
        ]
        return {
            "objective": self.objective,
            "budget": dict(self.budget),
            "measure": self.measure,
            "change": self.change,
            "costs": dict(self.costs),
            "layers": layers,
            "config": self.config.to_dict(),
        }

    def _plain_table(self) -> PlainTable:
        names = [name for name, _ in self.costs]
        rows = [
            [
                *(layer.name, layer.kind, "x".join(map(str, layer.shape)), layer.option.name),
                "-" if layer.p is None else str(layer.p),
                f"{layer.change:.4g}",
                *(f"{round(dict(layer.costs)[name]):,}" for name in names),
            ]
            for layer in self.layers
        ]
        rows.append(["total", "", "", "", "", f"{self.change:.4g}", *(f"{value:,}" for _, value in self.costs)])
        limits = ", ".join(f"{name} at most {limit:,.12g}" for name, limit in self.budget) or "no budget"
        change = "loss" if self.measure == "loss" else "error"
        told = f"least {self.objective}; {limits}; totals are those of the whole model"
        return PlainTable(("layer", "kind", "shape", "option", "p", change, *names), rows, told, left=4)

    def draw(self, path: str | os.PathLike[str]) -> None:
        """Write a picture: bars for each layer's change and costs. The suffix gives the format. Needs matplotlib."""
        from tbn_compiler.planning.pictures import draw_plan

        draw_plan(self, path)
