"""What a tiling costs: stored bytes, multiply-adds, and what the C backend's own plan says.

Bytes and multiply-adds of a layer depend on its own option alone. What the C backend plans does not quite: a layer that
keeps copies lets the next one sum them, buffers share memory. Its figures for a layer come from the plan in which every
layer has the same option, and are corrected by the plan of what was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, get_args

from torch import nn

from tbn_compiler.compiler import tile_model
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError
from tbn_compiler.graph.records import LayerRecord, get_records
from tbn_compiler.planning.layers import PlannableLayer, UniformModels, option_name, untrained
from tbn_compiler.planning.options import LayerOption
from tbn_compiler.planning.solve import Term
from tbn_compiler.summary import LayerSummary, summary

if TYPE_CHECKING:
    from tbn_compiler.backends.c import Plan
    from tbn_compiler.backends.c.options import OptimizeFor
    from tbn_compiler.backends.c.targets import Target

_ALPHA_BYTES = 4  # float32, as they are stored
COSTS = {
    "bytes": "stored bytes of the weights",
    "macs": "multiply-adds",
    "flash": "bytes of constants in C",
    "ram": "bytes of scratch memory in C",
    "instructions": "estimated instructions in C",
}
_OF_C = ("flash", "ram", "instructions")


@dataclass(frozen=True)
class Costs:
    """The figures that are asked for, of a model on example inputs.

    Attributes:
        model: the float model.
        names: keys of :data:`COSTS`.
        example_inputs: as for :func:`~tbn_compiler.summary`, or :func:`~tbn_compiler.export_c`.
        target: the processor whose instructions are estimated.
        optimize: what the C backend chooses kernels for.
    """

    model: nn.Module
    names: Sequence[str]
    example_inputs: Any = None
    target: Target = "generic"
    optimize: OptimizeFor = "balanced"
    _known: dict[TilingConfig, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that all figures can be had."""
        for name in self.names:
            if name not in COSTS:
                raise ConfigError(f"{name!r} is no cost: there are {', '.join(COSTS)}")
            if name != "bytes" and self.example_inputs is None:
                raise ConfigError(f"the cost {name!r} ({COSTS[name]}) is that of an input: give example_inputs")
        if not self._in_c and (self.target, self.optimize) == ("generic", "balanced"):
            return
        from tbn_compiler.backends.c.options import OptimizeFor  # it loads the C backend
        from tbn_compiler.backends.c.targets import Target

        for option, choices in (("target", Target), ("optimize", OptimizeFor)):
            if getattr(self, option) not in get_args(choices):
                raise ConfigError(f"{option}={getattr(self, option)!r} is not one of {', '.join(get_args(choices))}")

    @property
    def _in_c(self) -> bool:
        return bool(set(self.names).intersection(_OF_C))

    def of(self, config: TilingConfig) -> dict[str, int]:
        """The figures of the model tiled as ``config`` says."""
        if config not in self._known:
            module = tile_model(self.model, untrained(config)).eval()  # shapes of norms are those of inference
            self._known[config] = self._totals(module, self._plan(module))
        return self._known[config]

    def terms(
        self, models: UniformModels, layers: Sequence[PlannableLayer], options: Sequence[LayerOption]
    ) -> dict[str, Term]:
        """The figures of each layer under each option that it takes."""
        values: dict[str, dict[tuple[str, str], float]] = {name: {} for name in self.names}
        rests: dict[str, list[float]] = {name: [] for name in self.names}
        specs = {layer.name: layer.specs for layer in layers}
        for option in options:
            if not any(option.name in taken for taken in specs.values()):
                continue
            module = models[option]
            plan = self._plan(module)
            totals = self._totals(module, plan)
            parts = _parts(module, self.names, self.example_inputs, plan, specs)
            for name in self.names:
                found = {(layer, option.name): value for layer, value in parts[name].items()}
                others = _live(plan, specs)[1] if name == "ram" and plan else totals[name] - sum(found.values())
                rests[name].append(others)
                values[name] |= {item: value for item, value in found.items() if option.name in specs[item[0]]}
        return {name: Term(values[name], name == "ram", _typical(name, rests[name])) for name in self.names}

    def _plan(self, module: nn.Module) -> Plan | None:
        if not self._in_c:
            return None
        from tbn_compiler.backends.c.frontend import import_graph
        from tbn_compiler.backends.c.options import Options
        from tbn_compiler.backends.c.planner import build_plan

        return build_plan(
            import_graph(module, self.example_inputs), Options(target=self.target, optimize=self.optimize)
        )

    def _totals(self, module: nn.Module, plan: Plan | None) -> dict[str, int]:
        rows = summary(module, self.example_inputs if "macs" in self.names else None).layers
        found = {"bytes": sum(map(stored_bytes, rows)), "macs": sum(row.macs_tiled or 0 for row in rows)}
        if plan is not None:
            found |= {"flash": plan.weight_bytes, "ram": plan.scratch_bytes, "instructions": plan.cost}
        return {name: found[name] for name in self.names}


def stored_bytes(row: LayerSummary) -> int:
    """Bytes of a packed tile and its alphas, or of a float weight."""
    return -(-row.stored_bits // 8) + _ALPHA_BYTES * (row.alphas or 0)


def _typical(name: str, rests: Sequence[float]) -> float:
    """What the rest of the network takes. Of memory at least this; else the mean, which is corrected later."""
    if not rests:
        return 0.0
    return min(rests) if name == "ram" else sum(rests) / len(rests)


def _parts(
    module: nn.Module,
    names: Sequence[str],
    example_inputs: Any,
    plan: Plan | None,
    layers: Mapping[str, object],
) -> dict[str, dict[str, float]]:
    """What each layer takes of each figure, by its name."""
    rows = summary(module, example_inputs if "macs" in names else None).layers
    records: Sequence[LayerRecord] = get_records(module) or ()
    of_layer = {option_name(record): row for record, row in zip(records, rows, strict=True)}
    parts: dict[str, dict[str, float]] = {name: dict.fromkeys(layers, 0.0) for name in names}
    for layer in layers:
        row = of_layer[layer]
        if "bytes" in parts:
            parts["bytes"][layer] = stored_bytes(row)
        if "macs" in parts:
            if row.macs_tiled is None:
                raise ConfigError(
                    f"how often the weight {layer!r} is used is not known, as functions read it: no budget of "
                    "multiply-adds can be kept. Give instructions, or flash and ram"
                )
            parts["macs"][layer] = row.macs_tiled
    if plan is not None:
        for step in plan.steps:
            if step.layer in layers:
                for name, value in (("flash", step.constant_bytes), ("instructions", step.cost)):
                    if name in parts:
                        parts[name][step.layer] += value
        if "ram" in parts:
            parts["ram"] = _live(plan, layers)[0]
    return parts


def _live(plan: Plan, layers: Mapping[str, object]) -> tuple[dict[str, float], float]:
    """The most scratch memory that is in use at a layer's steps, and at all others."""
    most: dict[str, float] = dict.fromkeys(layers, 0.0)
    others = 0.0
    for step, live in zip(plan.steps, plan.live_bytes, strict=True):
        if step.layer in layers:
            most[step.layer] = max(most[step.layer], live)
        else:
            others = max(others, live)
    return most, others
