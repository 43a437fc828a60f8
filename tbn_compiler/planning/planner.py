"""Planning: from a float model and budgets to a :class:`~tbn_compiler.planning.layer_plan.LayerPlan`.

1. :mod:`~tbn_compiler.planning.layers` finds what each layer may become.
2. :mod:`~tbn_compiler.planning.sensitivity` and :mod:`~tbn_compiler.planning.costs` say what each option does.
3. :mod:`~tbn_compiler.planning.search` chooses, by the program of :mod:`~tbn_compiler.planning.solve`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from tbn_compiler.compiler import tile_model
from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError, TBNError
from tbn_compiler.graph.records import get_records
from tbn_compiler.planning.costs import COSTS, Costs
from tbn_compiler.planning.layer_plan import LayerPlan, PlannedLayer
from tbn_compiler.planning.layers import (
    PlannableLayer,
    UniformModels,
    check_float_model,
    find_layers,
    option_name,
    tiling_text,
    untrained,
)
from tbn_compiler.planning.options import DEFAULT_CANDIDATES, Candidate, parse_options
from tbn_compiler.planning.search import LOSS, Search
from tbn_compiler.planning.sensitivity import Sensitivity, sensitivity
from tbn_compiler.planning.solve import Choice, Term

if TYPE_CHECKING:
    from tbn_compiler.backends.c.options import OptimizeFor
    from tbn_compiler.backends.c.targets import Target


def plan(
    model: nn.Module,
    *,
    budget: int | Mapping[str, float] | None = None,
    sensitivity: Sensitivity | None = None,
    objective: str = LOSS,
    example_inputs: Any = None,
    config: TilingConfig | None = None,
    candidates: Iterable[Candidate] | None = None,
    target: Target = "generic",
    optimize: OptimizeFor = "balanced",
) -> LayerPlan:
    """Choose an option for each layer: the one with the least loss within a budget, or the cheapest within a loss.

    The sum of the layers' changes is what the loss is predicted to change by: layers are taken for independent, as in
    HAWQ-V3 (arXiv 2011.10680) and AdaQuant (arXiv 2006.10518), whose integer program this is, with the costs of tiles.
    The solver proves that no other choice is better. Costs:

    ================  ==================================================================================
    ``bytes``         packed tiles, alphas (float32), and 4 bytes for each float weight that the summary lists
    ``macs``          multiply-adds of all linear and convolution layers for ``example_inputs``
    ``flash``         bytes of constants of the C file for ``target``: those of the weights, and all others
    ``ram``           bytes of its scratch memory
    ``instructions``  its estimated instructions
    ================  ==================================================================================

    Bytes and multiply-adds of layers add up exactly. Those of the C backend nearly do: they are taken from plans in
    which all layers have the same option, and corrected by the plan of what is chosen until that keeps the budget. Such
    a choice is optimal by the estimates, and its costs, of its own plan, are within the budget.

    Args:
        model: the trained float model. It is not changed.
        budget: the largest value of each cost by name, and of the predicted change, ``"loss"``. A number is that of
            ``"bytes"``.
        sensitivity: what :func:`sensitivity` measured on this model. Default: its measure without data.
        objective: ``"loss"``, or the cost that is to be least.
        example_inputs: what ``macs`` and the costs in C are counted for; as for :func:`~tbn_compiler.summary`, in C
            a tensor or a tuple of them.
        config: what the layers have beside their option, as for :func:`sensitivity`.
        candidates: options to choose from; default: those of ``sensitivity``, which must have measured each of them.
        target: processor of the costs in C.
        optimize: what the C backend chooses kernels for.

    Returns:
        A :class:`LayerPlan`; ``transform(model, plan.config)`` tiles as it says.

    Raises:
        ConfigError: a cost, an option or the target is not known, an example input is missing, there is neither a
            budget nor an objective that is a cost, or ``sensitivity`` is of another model.
        TBNError: no choice keeps the budget; the message says the least that can be reached. Or scipy is not installed.
        TransformError: no layer can be tiled.
        ExportError: costs in C of a model that the C backend does not support.

    Example:
        >>> import tbn_compiler as tbn
        >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
        >>> found = tbn.plan(model, budget={"bytes": 300})
        >>> found.choice
        {'0': 'p=4', '2': 'binary'}
        >>> qat = tbn.transform(model, found.config)
    """
    limits = _limits(budget, objective)
    config = TilingConfig() if config is None else config
    model = check_float_model(model)
    measured = _measured(model, config, sensitivity, candidates)
    options = measured.options if candidates is None else parse_options(candidates)
    models = UniformModels(model, config)
    layers = find_layers(models, options)
    changes = _changes(layers, measured)
    names = dict.fromkeys(name for name in (*limits, objective, "bytes") if name != LOSS)
    costs = Costs(model, tuple(names), example_inputs, target, optimize)
    terms = {LOSS: Term(changes)} | costs.terms(models, layers, options)
    search = Search(layers, options, config, costs, terms, limits, objective)
    choice = search.best()
    planned = {layer.name: search.named[choice[layer.name]] for layer in layers}
    final = search.config_of(choice)
    _check(model, final, layers, choice)
    return LayerPlan(
        tuple(
            PlannedLayer(
                layer.name,
                layer.kind,
                layer.shape,
                planned[layer.name],
                None if (spec := layer.specs[choice[layer.name]]) is None else spec.layout.p,
                changes[layer.name, choice[layer.name]],
                tuple((name, terms[name].values[layer.name, choice[layer.name]]) for name in costs.names),
            )
            for layer in layers
        ),
        final,
        measured.measure,
        terms[LOSS].of(choice),
        tuple(costs.of(final).items()),
        tuple(limits.items()),
        objective,
    )


def _limits(budget: int | Mapping[str, float] | None, objective: str) -> dict[str, float]:
    if budget is not None and not isinstance(budget, int | float | Mapping):
        raise ConfigError(f"budget must be a number of bytes or a mapping such as {{'flash': 20_000}}, got {budget!r}")
    limits: dict[str, float] = {"bytes": budget} if isinstance(budget, int | float) else dict(budget or {})
    for name, limit in limits.items():
        if name not in (LOSS, *COSTS):
            raise ConfigError(f"budget of {name!r}: there are {', '.join((LOSS, *COSTS))}")
        if isinstance(limit, bool) or not isinstance(limit, int | float) or not math.isfinite(limit):
            raise ConfigError(f"the budget of {name} must be a finite number, got {limit!r}")
    if objective not in (LOSS, *COSTS):
        raise ConfigError(f"objective={objective!r} is not one of {', '.join((LOSS, *COSTS))}")
    if objective == LOSS and not limits.keys() & COSTS.keys():
        raise ConfigError(f"the least loss needs a budget of a cost ({', '.join(COSTS)}), else every layer stays float")
    return limits


def _measured(
    model: nn.Module, config: TilingConfig, given: Sensitivity | None, candidates: Iterable[Candidate] | None
) -> Sensitivity:
    if given is None:
        chosen = DEFAULT_CANDIDATES if candidates is None else candidates
        return sensitivity(model, config=config, candidates=chosen)
    if not isinstance(given, Sensitivity):
        raise ConfigError(f"sensitivity must be what tbn_compiler.sensitivity returned, got {type(given).__name__}")
    return given


def _changes(layers: Iterable[PlannableLayer], measured: Sensitivity) -> dict[tuple[str, str], float]:
    """The measured change of each layer and option: that of the same tiling, whatever it is called.

    Raises:
        ConfigError: one was not measured.
    """
    known = {layer.name: layer for layer in measured.layers}
    found = {}
    for layer in layers:
        if layer.name not in known or known[layer.name].shape != layer.shape:
            raise ConfigError(f"the sensitivity is not of this model: it has no layer {layer.name!r} of {layer.shape}")
        of_tiling = dict(
            zip(known[layer.name].tilings, (change for _, change in known[layer.name].changes), strict=True)
        )
        for option, spec in layer.specs.items():
            tiling = tiling_text(spec)
            if tiling not in of_tiling:
                raise ConfigError(
                    f"the sensitivity of layer {layer.name!r} has no {option!r} ({tiling}): measure it with the same "
                    "candidates and config"
                )
            found[layer.name, option] = of_tiling[tiling]
    return found


def _check(model: nn.Module, config: TilingConfig, layers: Iterable[PlannableLayer], choice: Choice) -> None:
    """That a config gives what was planned."""
    records = {option_name(record): record for record in get_records(tile_model(model, untrained(config))) or ()}
    for layer in layers:
        if records[layer.name].spec != layer.specs[choice[layer.name]]:
            raise TBNError(
                f"layer {layer.name!r} cannot be told apart by its name: the plan gives it {choice[layer.name]!r}, and "
                f"the config {records[layer.name].spec or records[layer.name].reason}"
            )
