"""Starting from a trained float model: its weights into the tiles, and the schedule from float to tiled weights.

The training loop stays the user's own. What :func:`~tbn_compiler.transform` returns is wrapped by DDP, FSDP2 and
``torch.compile`` as the float model is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar, get_args

import torch
from torch import Tensor, nn

from tbn_compiler.config import Latent, TilingConfig
from tbn_compiler.errors import ConfigError, SerializationError, TransformError
from tbn_compiler.graph.copying import share_tensors_copy
from tbn_compiler.graph.layers import apply_view, find_record, layer_calls
from tbn_compiler.graph.records import (
    LayerRecord,
    alpha_source_key,
    get_records,
    graph_parts,
    is_tiling_record,
    join_key,
    set_records,
    split_key,
)
from tbn_compiler.graph.tiled_parameters import STRENGTH, read_forms, read_tiled
from tbn_compiler.passes import Scope, run_passes
from tbn_compiler.passes.blend_weights import strength_keys
from tbn_compiler.passes.convert_latents import HoldTiles, HoldWeights, convert_parameters

Module = TypeVar("Module", bound=nn.Module)


def init_from_float(module: Module, source: nn.Module | Mapping[str, Any] | None = None) -> Module:
    """Start training with tiles from a trained float model.

    The tile of a layer is the sign of its aggregated weights (Eq. 2, 3), so the float weights set it already. This
    sets the alphas to their magnitudes: each alpha source ``A`` becomes a copy of its weight, and so each alpha
    ``mean(abs(W))`` over the elements that it scales (Eq. 7, 9). Layers with ``alpha_source="W"`` take their alphas
    from the weight anyway: there is nothing to set.

    Args:
        module: the result of :func:`~tbn_compiler.transform`; changed in place, before it is sharded.
        source: the trained float model, or a checkpoint of it, whose weights are loaded first; default: the weights
            that the module holds. It must have every key of the float model and no other.

    Returns:
        ``module``.

    Raises:
        TransformError: the module has no tiled layer in training form, or one that trains its tile.
        SerializationError: the checkpoint does not fit; the module is then unchanged.

    Example:
        >>> import tbn_compiler as tbn
        >>> trained = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> qat = tbn.init_from_float(tbn.transform(trained, tbn.TilingConfig(p=4)))
    """
    held = [record.name for record in _trained_records(module) if record.spec and record.spec.latent == "tile"]
    if held:
        raise TransformError(
            f"layer {held[0]!r} trains its tile (latent='tile'), which float weights do not fit: transform with "
            "latent='weight', call init_from_float, then convert_latent(module, 'tile')"
        )
    pairs = dict(_alpha_sources(module))
    if source is not None:
        state_dict = source.state_dict() if isinstance(source, nn.Module) else source
        if not isinstance(state_dict, Mapping):
            raise SerializationError(f"expected a float model or its state_dict, got {type(source).__name__}")
        _load_float(module, state_dict, set(pairs))
    parameters = dict(module.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for key, weight in pairs.items():
            parameters[key].copy_(weight)
    return module


def _alpha_sources(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The alpha sources of a module by key, each with the weight (as its layer sees it) that it belongs to."""
    for path, part in graph_parts(module):
        for call in layer_calls(part):
            record = find_record(get_records(part) or (), call) if call.form == "tiled" else None
            if record is None or record.spec is None:
                continue
            if record.spec.alpha_source == "A":
                weight = apply_view(part.get_parameter(record.parameter).detach(), call.view)
                yield join_key(path, alpha_source_key(record.weight)), weight
    for path, owner in module.named_modules(remove_duplicate=False):
        for form in read_forms(owner):
            record = form.record
            if not form.lowered and record.spec is not None and record.spec.alpha_source == "A":
                parameter = owner._parameters[record.parameter]
                assert parameter is not None
                weight = parameter.detach().t() if record.view else parameter.detach()
                yield join_key(path, alpha_source_key(record.weight)), weight


def _load_float(module: nn.Module, state_dict: Mapping[str, Any], sources: set[str]) -> None:
    """Load a float checkpoint; what training with tiles adds to the module's own state stays as it is."""
    own = {
        key: value
        for key, value in module.state_dict().items()
        if key not in sources and split_key(key)[1] != STRENGTH and not is_tiling_record(value)
    }
    problems = {
        "it lacks": sorted(own.keys() - state_dict.keys()),
        "it has other keys:": sorted(state_dict.keys() - own.keys()),
        "shapes differ:": [
            f"{key} {tuple(value.shape)} in the file, {tuple(own[key].shape)} in the model"
            for key, value in state_dict.items()
            if isinstance(value, Tensor) and isinstance(own.get(key), Tensor) and value.shape != own[key].shape
        ],
    }
    found = [f"{text} {', '.join(map(str, keys))}" for text, keys in problems.items() if keys]
    if found:
        raise SerializationError(
            f"the state_dict is not one of the float model of {type(module).__name__}: {'; '.join(found)}"
        )
    module.load_state_dict(state_dict, strict=False)


def distillation_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    weight: float = 0.7,
    temperature: float = 2.0,
    label_smoothing: float = 0.0,
    dim: int = 1,
) -> Tensor:
    """Loss of a classifier that learns from another one's answers, and from labels.

    ``(1 - weight) * cross_entropy(logits, labels) + weight * T^2 * KL(softmax(teacher / T) || softmax(logits / T))``
    (Hinton, Vinyals, Dean 2015, arXiv 1503.02531); ``T^2`` keeps the size of the gradient. The teacher of a tiled
    network is mostly the float one that it was made from.

    Args:
        logits: of the network that learns, ``[N, C]``, or ``[N, C, ...]`` with the classes of many places, as
            ``cross_entropy`` takes them; with ``dim``, classes on any axis. The loss is computed in at least float32,
            under autocast too.
        teacher_logits: those of the other network for the same inputs, of the same shape; no gradient reaches them.
        labels: as ``cross_entropy`` takes them, ``[N, ...]``, or probabilities of the shape of ``logits``; default:
            learn from the teacher alone, whatever ``weight``.
        weight: of the teacher, 0 to 1.
        temperature: above 0; more lets the less likely classes count for more.
        label_smoothing: as for ``cross_entropy``.
        dim: axis of the classes; ``-1`` for the ``[N, T, C]`` of a language model.

    Returns:
        The mean over examples, and over places.

    Raises:
        ConfigError: ``weight`` or ``temperature`` is out of range, or the shapes differ.

    Example:
        >>> logits, teacher = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0]])
        >>> float(distillation_loss(logits[:1], teacher[:1]))
        0.0
    """
    if not 0 <= weight <= 1:
        raise ConfigError(f"weight must be between 0 and 1, got {weight!r}")
    if not 0 < temperature < float("inf"):
        raise ConfigError(f"temperature must be above 0, got {temperature!r}")
    if logits.shape != teacher_logits.shape or logits.dim() < 2:
        raise ConfigError(
            f"logits are {tuple(logits.shape)}, those of the teacher {tuple(teacher_logits.shape)}: both must be "
            "[N, C, ...]"
        )
    if type(dim) is not int or not -logits.dim() <= dim < logits.dim() or dim % logits.dim() == 0:
        raise ConfigError(f"dim must be an axis of the logits {tuple(logits.shape)} other than the first, got {dim!r}")
    if labels is not None and labels.shape == logits.shape:
        labels = labels.movedim(dim, 1)
    logits, teacher_logits = logits.movedim(dim, 1), teacher_logits.movedim(dim, 1)
    with torch.autocast(logits.device.type, enabled=False):
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits, teacher = logits.to(wide), teacher_logits.detach().to(wide)
        student_log, teacher_log = ((each / temperature).log_softmax(1) for each in (logits, teacher))
        divergence = nn.functional.kl_div(student_log, teacher_log, reduction="none", log_target=True).sum(1).mean()
        soft = divergence * temperature**2
        if labels is None:
            return soft
        hard = nn.functional.cross_entropy(logits, labels, label_smoothing=label_smoothing)
        return (1 - weight) * hard + weight * soft


def convert_latent(module: Module, latent: Latent) -> Module:
    """Let a module train its tiles instead of weights, or weights instead of tiles; the network computes the same.

    To the tile, each weight becomes the sum of its copies (Eq. 2) and each alpha source ``A`` the alphas themselves
    (Eq. 7, 9): parameters and optimiser state are ``2 p`` times smaller. To the weight, every copy takes its part of
    the tile, ``W_i = s / p``, and every element of ``A`` the alpha that it gives.

    Args:
        module: the result of :func:`~tbn_compiler.transform`, before it is sharded. It is not changed.
        latent: ``"tile"`` or ``"weight"``, as in :class:`~tbn_compiler.TilingConfig`.

    Returns:
        A copy that shares all other parameters. Build the optimiser anew from its parameters.

    Raises:
        ConfigError: ``latent`` is neither of both.
        TransformError: the module has no tiled layer to train, or a layer takes its alphas from the weight
            (``alpha_source="W"``) or is blended with it (``gradual``), so that no tile can stand for it.

    Example:
        >>> import tbn_compiler as tbn
        >>> qat = tbn.transform(nn.Linear(512, 512), tbn.TilingConfig(p=4))
        >>> small = tbn.convert_latent(qat, "tile")
        >>> small.weight.shape
        torch.Size([128, 512])
    """
    if latent not in get_args(Latent):
        raise ConfigError(f"latent={latent!r} is not one of {', '.join(map(repr, get_args(Latent)))}")
    for record in _trained_records(module):
        assert record.spec is not None
        if latent == "tile" and record.spec.alpha_source == "W":
            raise TransformError(
                f"layer {record.name!r} takes its alphas from its weight (alpha_source='W'): a tile has none"
            )
    if latent == "tile" and any(STRENGTH in part._buffers for part in module.modules()):
        raise TransformError("gradual tiling blends tiled and float weights, and a tile has none of the latter")
    result = share_tensors_copy(module)
    scope = Scope(TilingConfig())
    for _, part in graph_parts(result):
        if latent == "tile":
            set_records(part, map(_asking_for_tile, get_records(part) or ()))
        run_passes(part, [HoldTiles(scope) if latent == "tile" else HoldWeights(scope)])
    for owner in result.modules():
        forms = read_forms(owner)
        if latent == "tile" and any(not form.lowered for form in forms):
            read_tiled(owner, [replace(form, record=_asking_for_tile(form.record)) for form in forms])
        convert_parameters(owner, latent, scope)
    return result


def _asking_for_tile(record: LayerRecord) -> LayerRecord:
    return record if record.spec is None else replace(record, spec=replace(record.spec, latent="tile"))


def _trained_records(module: nn.Module) -> list[LayerRecord]:
    """The records of the tiled layers in training form.

    Raises:
        TransformError: there are none.
    """
    found = []
    for path, part in graph_parts(module):
        records = [find_record(get_records(part) or (), call) for call in layer_calls(part) if call.form == "tiled"]
        found += [record.inside(path) for record in records if record is not None and record.spec is not None]
    for path, owner in module.named_modules():
        found += [form.record.inside(path) for form in read_forms(owner) if not form.lowered]
    if not found:
        raise TransformError(
            f"{type(module).__name__} has no tiled layer to train: pass the module that tbn_compiler.transform "
            "returned, before it is lowered"
        )
    return found


def set_tiling_strength(module: nn.Module, value: float) -> None:
    """Move gradual tiling: every tiled layer uses ``(1 - value) * W + value * alpha * B``.

    Call it from the training loop with any schedule that ends at 1, and train on at 1 for a while: a module is
    lowered at 1 only. It writes into a buffer, so a compiled module is not compiled again; under DDP or FSDP2, every
    process calls it.

    Args:
        module: made by :func:`~tbn_compiler.transform` with ``gradual=True``, or anything that holds such a module.
        value: 0 (the float network, exactly) to 1 (the tiled one, exactly).

    Raises:
        ConfigError: ``value`` is not between 0 and 1.
        TransformError: the module was not transformed with ``gradual=True``.

    Example:
        >>> import tbn_compiler as tbn
        >>> qat = tbn.transform(nn.Linear(64, 64), tbn.TilingConfig(gradual=True))
        >>> for epoch in range(10):
        ...     tbn.set_tiling_strength(qat, min(1.0, epoch / 5))
    """
    if not 0 <= value <= 1:
        raise ConfigError(f"the tiling strength must be between 0 (float) and 1 (tiled), got {value!r}")
    for strength in _strengths(module):
        strength.fill_(value)


def tiling_strength(module: nn.Module) -> float:
    """The strength that gradual tiling stands at, 0 (float) to 1 (tiled); the least one if parts differ.

    Raises:
        TransformError: the module was not transformed with ``gradual=True``.
    """
    return min(float(strength) for strength in _strengths(module))


def _strengths(module: nn.Module) -> list[Any]:
    found = [submodule._buffers[STRENGTH] for submodule in module.modules() if STRENGTH in submodule._buffers]
    found += [part.get_buffer(key) for _, part in graph_parts(module) for key in strength_keys(part) if "." in key]
    if not found:
        raise TransformError(
            f"{type(module).__name__} has no gradual tiling: transform the model with TilingConfig(gradual=True)"
        )
    return found
