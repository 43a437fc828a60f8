"""The two entry points: :func:`transform` for training, :func:`lower` for inference."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, overload

import torch
from torch import Tensor, fx, nn

from tbn_compiler.config import TilingConfig, derive_min_size
from tbn_compiler.errors import ConfigError, LoweringError, TransformError
from tbn_compiler.graph.capture import capture, exported_module
from tbn_compiler.graph.copying import share_tensors_copy
from tbn_compiler.graph.layer_graph import TiledGraph, adopt
from tbn_compiler.graph.random_state import keep_random_state
from tbn_compiler.graph.records import (
    SPLIT_MARK,
    LayerRecord,
    alpha_key,
    get_records,
    graph_parts,
    input_scale_key,
    layer_name,
    tile_key,
)
from tbn_compiler.input_scales import find_scales
from tbn_compiler.ops.schemas import ACTIVATIONS, Activation
from tbn_compiler.passes import Scope, deployment_pipeline, inference_pipeline, run_passes, training_pipeline
from tbn_compiler.passes.deployment import note_values
from tbn_compiler.passes.expose_attention import disable_fast_paths
from tbn_compiler.passes.lower_tiles import Stored, lower_parameters
from tbn_compiler.passes.quantize_activations import Scales, drop_scale
from tbn_compiler.passes.quantize_intermediates import Intermediates, set_scale
from tbn_compiler.passes.tile_modules import tile_modules
from tbn_compiler.tiling import TileSpec
from tbn_compiler.torch_private import original_module

if TYPE_CHECKING:
    from torch.export import ExportedProgram  # it loads sympy

Module = TypeVar("Module", bound=nn.Module)

# What is told of every model that transform, lower or load is about to return, and may add attributes to it.
model_observers: list[Callable[[nn.Module], None]] = []


def tell_observers(model: nn.Module) -> None:
    """Let all observers see a model."""
    for observe in model_observers:
        observe(model)


@overload
def transform(model: ExportedProgram, config: TilingConfig | None = None) -> fx.GraphModule: ...
@overload
def transform(model: Module, config: TilingConfig | None = None) -> Module: ...
def transform(model: nn.Module | ExportedProgram, config: TilingConfig | None = None) -> nn.Module:
    """Make a model that trains with tiled weights.

    A module is never traced: the result is a copy of the same class whose forward, methods, hooks, buffers and
    attributes run as they were written. In it each linear, convolution and attention *module* is a small graph module
    of tile, scale and layer (still an instance of its class), and a parameter that functions use as a weight reads as
    a tiled weight. A ``GraphModule`` or an exported program is rewritten as the graph that it is.
    ``docs/transform.md`` says what is kept.

    Args:
        model: any ``nn.Module`` or ``GraphModule``, or an ``ExportedProgram``. It is not changed; the result shares
            its parameters and buffers, so that a checkpoint of either holds the state of both. An optimiser has to be
            made from the result's parameters: one that was made before does not know the alpha sources.
        config: how to tile; default :class:`TilingConfig`.

    Returns:
        A copy of the model, or a ``GraphModule`` for a graph. It has the model's ``state_dict`` keys, plus
        ``<layer>.alpha_source`` for each tiled layer (``alpha_source="A"``), ``<layer>.tiling_strength``
        (``gradual=True``) and ``<module>._extra_state``, which says how the weights are tiled. Every linear and
        convolution is listed in its :func:`summary`. What is tiled already stays as it is, so transforming the result
        again changes nothing, and tiles a layer that was added since.

    Raises:
        TransformError: the model cannot be copied, or no layer of it can be tiled.
        ConfigError: ``config`` is no :class:`TilingConfig`.

    Warns:
        UserWarning: no layer has copies although ``p`` asks for them (all are under ``min_size``, say), so that the
            tiled layers keep a bit for each weight; or a pattern of the options matches no layer.

    Example:
        >>> net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> qat = transform(net, TilingConfig(p=4))
    """
    if config is None:
        config = TilingConfig()
    if not isinstance(config, TilingConfig):
        hint = f"TilingConfig(p={config})" if isinstance(config, int) else "TilingConfig(...)"
        raise ConfigError(f"config must be a TilingConfig, got {type(config).__name__} {config!r}: pass {hint}")
    model = exported_module(model)
    if not isinstance(model, nn.Module):
        raise TransformError(f"expected an nn.Module or an ExportedProgram, got {type(model).__name__}")
    module = tile_model(model, config)
    judge_tiling(module, config, {record.weight for record in get_records(model) or () if record.spec}, stacklevel=3)
    tell_observers(module)
    return module


def judge_tiling(module: nn.Module, config: TilingConfig, before: set[str], *, stacklevel: int) -> None:
    """Refuse a model without a tiled layer, and warn of options without effect; ``before``: weights tiled earlier.

    Raises:
        TransformError: no layer of the model is tiled.
    """
    records = get_records(module) or ()
    if not any(record.spec for record in records):
        listing = "".join(f"\n  {record.name} ({record.kind}): {record.reason}" for record in records)
        found = (
            f"none of its {len(records)} layers is eligible:{listing}" if records else "it has no linear or conv layer"
        )
        raise TransformError(f"nothing to tile in {type(module).__name__}: {found}")
    unmatched = config.unmatched_patterns(
        [layer_name(key) for record in records for key in (record.weight, record.parameter, *record.tied)]
    )
    if unmatched:
        names = ", ".join(record.name for record in records)
        warnings.warn(f"config patterns {unmatched} match no layer; layers: {names}", stacklevel=stacklevel)
    told = _why_no_saving(config, records, before)
    if told is not None:
        warnings.warn(told, stacklevel=stacklevel)


def _why_no_saving(config: TilingConfig, records: Sequence[LayerRecord], before: set[str]) -> str | None:
    """A word on a model that keeps a bit or more for each weight of its tiled layers although copies were asked for.

    Layers left alone do not count: each has its reason in the summary, which is often the user's own choice. Nor is
    anything amiss where most weights are binary because that was asked for, or were tiled ``before``.
    """
    tiled = {record: record.spec for record in records if record.spec is not None}
    bits, weights = sum(spec.tile_bits for spec in tiled.values()), sum(spec.layout.numel for spec in tiled.values())
    if bits < weights or any(spec.tile_dtype != "binary" for spec in tiled.values()):
        return None
    keys = {record: (record.weight, record.parameter, *record.tied) for record in tiled}
    asked = {record: config.for_layer(*map(layer_name, names)) for record, names in keys.items()}
    wanting = [record for record in tiled if asked[record].p not in (1, (1, 1)) and record.weight not in before]
    if 2 * sum(tiled[record].layout.numel for record in wanting) < weights or not wanting:
        return None
    record = max(wanting, key=lambda record: math.prod(record.shape))
    size, options = math.prod(record.shape), asked[record]
    what = "Give a p that divides its axes, or replicate='repeat'"
    if "min_size" in (record.note or ""):
        what = "Give a smaller min_size"
        what += ", or leave it out to have it derived from the model" if options.min_size is not None else ""
    return (
        f"the tiled layers keep {bits / weights:.3f} bits a weight although p={options.p} was asked for: no layer has "
        f"copies. The largest, {record.name!r} with {size:,} weights: {record.note or 'p=1'}. {what}; p=1 asks for a "
        "binary network"
    )


def tile_model(model: nn.Module, config: TilingConfig, specs: Mapping[str, TileSpec] | None = None) -> nn.Module:
    """Copy a model and tile its weights; ``specs`` as in :class:`~tbn_compiler.passes.Scope`.

    Raises:
        TransformError: the model cannot be copied.
    """
    model = unwrap(model, TransformError)
    if isinstance(model, torch.jit.ScriptModule):
        raise TransformError(
            f"{type(model).__name__} is compiled by TorchScript, whose layers are no modules: pass the Python model"
        )
    restore_random_state = keep_random_state(model)
    scope = Scope(config, specs)
    tiled = _tile_copy(model, scope)
    # Only the passes know which weights can be tiled. A model that is large enough is tiled once.
    min_size = _other_min_size(model, scope)
    if min_size is None:
        return tiled
    restore_random_state()
    return _tile_copy(model, Scope(config, specs, min_size=min_size))


def tile_in_place(model: nn.Module, config: TilingConfig, specs: Mapping[str, TileSpec] | None = None) -> None:
    """Tile the weights of a model that the caller owns and that is no graph; ``specs`` as for :func:`tile_model`."""
    min_size = None
    sizes = [config.min_size, *(dict(given).get("min_size", 0) for _, given in config.overrides)]
    if specs is None and None in sizes:  # one is to be derived
        restore_random_state, scope = keep_random_state(model), Scope(config)
        _tile_copy(model, scope)
        min_size = _other_min_size(model, scope)
        restore_random_state()
    _tile(model, Scope(config, specs) if min_size is None else Scope(config, min_size=min_size))


def _other_min_size(model: nn.Module, scope: Scope) -> int | None:
    """The ``min_size`` that suits a model, if it is to be derived and is not what the model was tiled with."""
    tiled_before = [math.prod(record.shape) for record in get_records(model) or () if record.spec]
    min_size = derive_min_size([*scope.sizes.values(), *((size, size) for size in tiled_before)])
    return None if not scope.sizes or min_size == scope.min_size else min_size


def _tile_copy(model: nn.Module, scope: Scope) -> nn.Module:
    """Tile a copy of a model."""
    try:
        copied = share_tensors_copy(model)
    except Exception as error:
        raise TransformError(f"cannot copy the structure of {type(model).__name__}: {error}") from error
    if isinstance(copied, fx.GraphModule):
        disable_fast_paths(copied)
        gm = copied if isinstance(copied, TiledGraph) else adopt(copied, copied.graph)
        return run_passes(gm, training_pipeline(scope))
    _tile(copied, scope)
    return copied


def _tile(model: nn.Module, scope: Scope) -> None:
    disable_fast_paths(model)
    tile_modules(model, scope)


_GATHER = (
    "gather the full state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
    "full_state_dict=True), load it into a module that transform made from the plain model, and pass that"
)


def unwrap(module: Any, error: type[Exception]) -> nn.Module:
    """The module behind ``torch.compile``; a parallel or averaging wrapper is refused, with a word on what to pass.

    Raises:
        error: ``module`` is such a wrapper, or no module, or layers of it are split over processes.
    """
    if not isinstance(module, nn.Module):
        raise error(f"expected an nn.Module, got {type(module).__name__}")
    original = original_module(module)
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel, torch.optim.swa_utils.AveragedModel)
    if isinstance(original, wrappers):
        raise error(f"{type(original).__name__} wraps the model: pass its .module")
    split = next((path for path, part in original.named_modules() if getattr(type(part), SPLIT_MARK, False)), None)
    if split is not None:
        raise error(f"layer {split!r} is split over processes: do this before parallelize_module, or {_GATHER}")
    return original


def lower(module: Module) -> Module:
    """Lower a trained module to inference operators on packed tiles.

    Args:
        module: the result of :func:`transform`, a submodule of it, or a module that holds such modules. It is not
            changed.

    Returns:
        A module of the same form in evaluation mode. It holds ``<weight>_tile`` (packed bits) and ``<weight>_alpha``
        instead of each tiled weight; layers left in float are kept as they are. A module that is lowered already comes
        back as an equal copy.

    Raises:
        LoweringError: the module was not transformed, its parameters are sharded over processes, a weight is not
            finite, or gradual tiling has not reached strength 1.
    """
    unwrapped = unwrap(module, LoweringError)
    if get_records(unwrapped) is None:
        raise LoweringError(
            f"{type(unwrapped).__name__} was not made by tbn_compiler.transform, or was traced again since: "
            "lower the module that transform returned"
        )
    _check_gathered(unwrapped)
    lowered = lower_model(share_tensors_copy(unwrapped))
    tell_observers(lowered)
    return cast("Module", lowered)


def _check_gathered(module: nn.Module) -> None:
    """Refuse sharded parameters. Gathering them takes every process, and often only one of them lowers."""
    for name, parameter in module.named_parameters():
        if hasattr(parameter, "full_tensor"):  # a DTensor
            raise LoweringError(
                f"parameter {name!r} is a {type(parameter).__name__}, sharded over processes: {_GATHER}"
            )


def lower_model(module: nn.Module, stored: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Lower every tiled weight of a transformed module in place.

    Args:
        module: the module.
        stored: tiles and alphas by full name, as read from a file; default: computed from the weights.
    """
    stored = None if stored is None else {**stored, **_under_all_names(module, stored)}
    shared = Stored(stored)
    for path, part in graph_parts(module):
        run_passes(part, inference_pipeline(shared.at(path)))
    for path, owner in list(module.named_modules()):
        lower_parameters(owner, shared.at(path))
    return module.eval()


def _under_all_names(module: nn.Module, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The stored tensors of shared weights under the names that a file leaves out."""
    return {
        key(other): stored[key(record.weight)]
        for record in get_records(module) or ()
        for key in (tile_key, alpha_key)
        if key(record.weight) in stored
        for other in record.tied_weights
    }


def optimize(
    module: nn.Module,
    example_inputs: Any = None,
    *,
    activation: Activation = "float",
    calibration: Iterable[Any] | None = None,
    intermediates: Literal["float", "int8"] = "float",
    outputs: Literal["float", "int8"] = "float",
) -> nn.Module:
    """Rewrite a lowered module for the least arithmetic; results are equal up to rounding.

    With example inputs, ``torch.export`` gives the graph of the whole model. In it batch-norm is folded into the tiled
    layer before it, the copies in a tiled layer's result are left out where the next layers can do without them, added
    constants and functions are computed inside the layer, and dropout and identities are removed. What was not
    possible, and why, is in the notes of the module's :func:`~tbn_compiler.summary`.

    Without example inputs there is no graph across modules: a module keeps its form, and only what concerns each layer
    alone is done (``activation``). A ``GraphModule`` is a whole graph already.

    The result is what a backend compiles. It is not what a file holds: save the lowered module, and optimise again
    after :func:`~tbn_compiler.load`.

    Args:
        module: the result of :func:`lower` or :func:`transform` (which is lowered first). It is not changed.
        example_inputs: a tensor, a tuple of the arguments of ``forward``, or a dictionary of them by name. Every size
            in them may be another one later where the model allows that.
        activation: number format of the inputs of tiled layers. Any but ``"float"`` changes results: ``"int8"``, with
            one scale for each token (linear) or sample (convolution), or ``"binary"``. Transpose convolutions
            keep float, with a note.
        calibration: batches of inputs (each as ``example_inputs``) from which each layer gets one scale for all its
            inputs, with the least mean square error, in place of one for each token. They run through the network once,
            in floating point. Layers that train with a format keep the scales that they have.
        intermediates: ``"int8"`` brings sums, products, means, joins and functions between layers into int8, too, each
            with a scale from the batches, so that C and the kernels of a CPU keep them in a quarter of the memory. It
            takes ``example_inputs``, ``activation="int8"`` and ``calibration``.
        outputs: ``"int8"`` rounds the results of the model to int8, each with a scale from the batches, so that C can
            give integers (``export_c(..., int8_outputs=True)``). It takes what ``intermediates`` does.

    Returns:
        A ``GraphModule`` that is called as the model is, in evaluation mode; it can be copied and pickled. Where
        ``torch.export`` cannot trace the model, the lowered module itself with what needs no graph, and a warning that
        says why.

    Raises:
        ConfigError: ``activation`` is not one of the formats, or ``"float"`` with ``calibration``; ``intermediates``
            or ``outputs`` is not one, or ``"int8"`` without what it takes.
        LoweringError: the module was not transformed.
        TBNError: the module does not run on the example inputs, there are no calibration batches, or an input of a
            layer is not finite.
    """
    if activation not in ACTIVATIONS:
        raise ConfigError(f"activation={activation!r} is not one of {', '.join(map(repr, ACTIVATIONS))}")
    if activation == "float" and calibration is not None:
        raise ConfigError("calibration finds the scales of integer inputs: give activation='int8' or 'binary' too")
    for option, value in (("intermediates", intermediates), ("outputs", outputs)):
        if value not in ("float", "int8"):
            raise ConfigError(f"{option}={value!r} is neither 'float' nor 'int8'")
        if value == "int8" and (activation != "int8" or calibration is None or example_inputs is None):
            raise ConfigError(f"{option}='int8' takes example inputs, activation='int8' and calibration batches")
    scales: Scales | None = None if calibration is None else {}
    between = Intermediates(between=intermediates == "int8", results=outputs == "int8")
    asked = between if between.between or between.results else None
    optimized, reason = deploy(lower(module), example_inputs, activation, scales=scales, intermediates=asked)
    if calibration is not None:
        _calibrate(optimized, calibration, scales or {}, between)
    if reason is not None:
        warnings.warn(f"optimised layer by layer only: {reason}", stacklevel=2)
    return optimized


def deploy(
    packed: nn.Module,
    example_inputs: Any = None,
    activation: Activation = "float",
    *,
    free_sizes: bool = True,
    scales: Scales | None = None,
    intermediates: Intermediates | None = None,
) -> tuple[nn.Module, str | None]:
    """Run the deployment pipeline on a lowered module that the caller owns.

    Args:
        packed: the module; used up.
        example_inputs: as for :func:`optimize`.
        activation: as for :func:`optimize`.
        free_sizes: whether inputs may have other sizes later.
        scales: takes the layers whose inputs have one scale, which is NaN still; ``None``: each token has its own.
        intermediates: what else is wanted in int8; takes the values that are brought into it, whose scales are NaN
            still; ``None``: they stay floats.

    Returns:
        The result, and why it is not the graph of the whole model although there are example inputs.

    Raises:
        TBNError: the module does not run on the example inputs.
    """
    reason = None
    if example_inputs is not None and isinstance(packed, fx.GraphModule):
        note_values(packed, example_inputs)
    if example_inputs is not None:
        captured = capture(packed, example_inputs, free_sizes=free_sizes)
        if isinstance(captured, fx.GraphModule):
            return run_passes(captured, deployment_pipeline(activation, scales, intermediates)), None
        reason = captured
    for _, part in graph_parts(packed):
        run_passes(part, deployment_pipeline(activation, scales))
    return packed, reason


def _calibrate(module: nn.Module, batches: Iterable[Any], layers: Scales, between: Intermediates) -> None:
    """Set the scales of layers, and of values between them, that :func:`deploy` has given one."""
    buffers = [gm.get_buffer(input_scale_key(weight)) for gm, weight in layers]
    found = find_scales(module, batches, [*buffers, *(gm.get_buffer(name) for gm, name in between.found)])
    for (gm, weight), buffer, scale in zip(layers, buffers, found, strict=False):
        if scale:
            buffer.fill_(scale)
            continue
        why = "no calibration batch reached it" if scale is None else "its inputs were all 0 in the calibration batches"
        drop_scale(gm, weight, f"{why}: each token has a scale of its own")
    for (gm, name), scale in zip(between.found, found[len(buffers) :], strict=True):
        set_scale(gm, name, scale)
