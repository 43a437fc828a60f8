"""The two entry points: :func:`transform` for training, :func:`lower` for inference."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import ConfigError, LoweringError, TransformError
from tbn_compiler.graph.layers import (
    LayerRecord,
    get_records,
    graph_parts,
    join_key,
    layer_name,
    module_kind,
    set_records,
)
from tbn_compiler.graph.tracing import share_tensors_copy, trace
from tbn_compiler.ops.schemas import ACTIVATIONS
from tbn_compiler.passes import deployment_pipeline, inference_pipeline, run_passes, training_pipeline
from tbn_compiler.passes.decompose_attention import attention_module, disable_fast_paths, why_not_decomposed
from tbn_compiler.passes.deployment import copy_notes, propagate_ranks
from tbn_compiler.passes.eligibility import module_kind_or_name, unsupported_reason
from tbn_compiler.tiling import TileSpec


def transform(
    model: nn.Module | ExportedProgram,
    config: TilingConfig | None = None,
    *,
    concrete_args: dict[str, Any] | None = None,
) -> Any:
    """Rewrite a model so that it trains with tiled weights.

    Args:
        model: any ``nn.Module`` or ``GraphModule``, or an ``ExportedProgram``. It is not changed; the result shares
            its parameters and buffers, so an optimiser or a checkpoint of either works for both.
        config: how to tile; default :class:`TilingConfig`.
        concrete_args: arguments of ``forward`` to fix, as in :func:`torch.fx.symbolic_trace`.

    Returns:
        A ``GraphModule``; or, of a model that ``torch.fx`` cannot trace as a whole (data-dependent control flow,
        optional arguments), a copy with the same class and signature in which the largest parts that could be
        traced are graph modules. Either has the model's ``state_dict`` keys, plus ``<layer>.alpha_source`` for each
        tiled layer (``alpha_source="A"``) and ``tiling_strength`` (``gradual=True``). Every linear and
        convolution is listed in its :func:`summary`. Transforming the result again changes nothing.

    Raises:
        TransformError: the model cannot be copied or traced, or no layer of it can be tiled.

    Example:
        >>> net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> qat = transform(net, TilingConfig(p=4))
    """
    if config is None:
        config = TilingConfig()
    if isinstance(model, ExportedProgram):
        model = model.module()
    if not isinstance(model, nn.Module):
        raise TransformError(f"expected an nn.Module or an ExportedProgram, got {type(model).__name__}")
    module = tile_model(model, config, concrete_args=concrete_args)
    records = get_records(module) or ()
    if not any(record.spec for record in records):
        listing = "".join(f"\n  {record.name} ({record.kind}): {record.reason}" for record in records)
        found = (
            f"none of its {len(records)} layers is eligible:{listing}" if records else "it has no linear or conv layer"
        )
        raise TransformError(f"nothing to tile in {type(model).__name__}: {found}")
    unmatched = config.unmatched_patterns(
        [layer_name(key) for record in records for key in (record.weight, *record.tied)]
    )
    if unmatched:
        names = ", ".join(record.name for record in records)
        warnings.warn(f"config patterns {unmatched} match no layer; layers: {names}", stacklevel=2)
    return module


def tile_model(
    model: nn.Module,
    config: TilingConfig,
    specs: Mapping[str, TileSpec] | None = None,
    concrete_args: dict[str, Any] | None = None,
) -> nn.Module:
    """Trace a model, as a whole or part by part, and tile its weights; ``specs`` as in :class:`TileWeights`."""
    module = trace(model, concrete_args, _build_part)
    disable_fast_paths(module)
    if isinstance(module, fx.GraphModule):
        return run_passes(module, training_pipeline(config, specs))
    records = []
    parts = graph_parts(module)
    for path, part in parts:
        shared = _held_outside(module, part)
        run_passes(part, training_pipeline(config, specs, path, shared))
        records += [record.inside(path) for record in get_records(part) or ()]
    set_records(module, [*records, *_untraced(module, [part for _, part in parts])])
    return module


def _build_part(module: nn.Module) -> fx.GraphModule | None:
    """The graph of a module that tracing alone cannot take apart."""
    if isinstance(module, nn.MultiheadAttention) and why_not_decomposed(module) is None:
        return attention_module(module)
    return None


def _held_outside(module: nn.Module, part: nn.Module) -> dict[int, str]:
    """The parameters of a part that modules outside it hold too, by id, with the place."""
    inside = set(part.modules())
    return {
        id(parameter): f"{type(owner).__name__} {path!r}"
        for path, owner in module.named_modules()
        if owner not in inside
        for parameter in owner._parameters.values()
        if parameter is not None
    }


def _untraced(module: nn.Module, parts: list[fx.GraphModule]) -> Iterator[LayerRecord]:
    """Records of the weights outside all parts that a linear or convolution may use."""
    inside = {submodule for part in parts for submodule in part.modules()}
    attentions: list[str] = []
    for path, owner in module.named_modules():
        if owner in inside:
            continue
        kind = module_kind_or_name(owner)
        reason = unsupported_reason(owner) or f"torch.fx cannot trace the forward of {type(owner).__name__}"
        if isinstance(owner, nn.MultiheadAttention):
            attentions.append(path)
        inside_of = next((attention for attention in attentions if path.startswith(f"{attention}.")), None)
        if module_kind(owner):  # it could be traced, and was left out
            reason = "the code of a module around it reads its weight"
        if inside_of is not None:
            reason = f"inside {type(module.get_submodule(inside_of)).__name__} {inside_of!r}, which is not decomposed"
        weights = {name: parameter for name, parameter in owner._parameters.items() if parameter is not None}
        if kind:
            shape = tuple(next(iter(weights.values())).shape) if weights else ()
            yield LayerRecord(path, kind, join_key(path, "weight"), shape, reason=reason)
            continue
        for name, parameter in weights.items():
            # A matrix of any other module may be a layer's weight; vectors and single rows are not.
            if parameter.dim() >= 2 and min(parameter.shape[:2]) > 1:
                key = join_key(path, name)
                yield LayerRecord(layer_name(key), "parameter", key, tuple(parameter.shape), reason=reason)


def lower(module: nn.Module) -> Any:
    """Lower a trained module to inference operators on packed tiles.

    Args:
        module: the result of :func:`transform`. It is not changed.

    Returns:
        A module of the same form (a ``GraphModule``, or the model with its traced parts) in evaluation mode. It
        holds ``<weight>_tile`` (packed bits) and ``<weight>_alpha`` instead of each tiled weight; layers left in
        float are kept as they are. A module that is lowered already comes back as an equal copy.

    Raises:
        LoweringError: the module was not transformed, its parameters are sharded over processes, a weight is not
            finite, or gradual tiling has not reached strength 1.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if get_records(module) is None:
        raise LoweringError(
            f"{type(module).__name__} was not made by tbn_compiler.transform, or was traced again since: "
            "lower the module that transform returned"
        )
    _check_gathered(module)
    return lower_model(share_tensors_copy(module))


def _check_gathered(module: nn.Module) -> None:
    """Refuse sharded parameters. Gathering them takes every process, and often only one of them lowers."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor
            raise LoweringError(
                f"parameter {name!r} is a {type(parameter).__name__}, sharded over processes: gather the full state "
                "dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True), load "
                "it into a module that transform made from the plain model, and lower that"
            )


def lower_model(module: nn.Module, stored: Mapping[str, Tensor] | None = None) -> Any:
    """Lower every part of a transformed module in place; ``stored`` as in :class:`LowerTiles`, by full name."""
    for path, part in graph_parts(module):
        prefix = f"{path}." if path else ""
        inside = None if stored is None else {key.removeprefix(prefix): tensor for key, tensor in stored.items()}
        run_passes(part, inference_pipeline(inside))
    return module.eval()


def optimize(module: nn.Module, example_inputs: Any = None, *, activation: str = "float") -> Any:
    """Rewrite a lowered module for the least arithmetic; results are equal up to rounding.

    Batch-norm is folded into the tiled layer before it, the copies in a tiled layer's result are left out where the
    next layers can do without them, and dropout and identities are removed. What was not possible, and why, is in
    the notes of the module's :func:`~tbn_compiler.summary`.

    The result is what a backend compiles. It is not what a file holds: save the lowered module, and optimise again
    after :func:`~tbn_compiler.load`.

    Args:
        module: the result of :func:`lower` or :func:`transform` (which is lowered first). It is not changed.
        example_inputs: a tensor, a tuple of the arguments of ``forward``, or a dictionary of them by name. Only
            numbers of dimensions are taken from it; without them flattening stops the copies, and ``BatchNorm1d`` is
            not folded.
        activation: number format of the inputs of tiled layers. Any but ``"float"`` changes results: ``"int8"``, with
            one scale for each token (linear) or sample (convolution), or ``"binary"``. Transpose convolutions
            keep float, with a note.

    Returns:
        A module of the same form in evaluation mode.

    Raises:
        ConfigError: ``activation`` is not one of the formats.
        LoweringError: the module was not transformed.
        TBNError: the module does not run on the example inputs.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation={activation!r} is not one of {', '.join(map(repr, ACTIVATIONS))}")
    packed = lower(module)
    if example_inputs is not None:
        propagate_ranks(packed, example_inputs)
    for path, part in graph_parts(packed):
        run_passes(part, deployment_pipeline(activation))
        copy_notes(part, packed, path)
    return packed
