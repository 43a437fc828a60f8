"""Starting from a trained float model: its weights into the tiles, and the schedule from float to tiled weights.

The training loop stays the user's own. What :func:`~tbn_compiler.transform` returns is wrapped by DDP, FSDP2 and
``torch.compile`` as the float model is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tbn_compiler.errors import ConfigError, SerializationError, TransformError
from tbn_compiler.graph.layers import apply_view, find_record, layer_calls
from tbn_compiler.graph.records import alpha_source_key, get_records, graph_parts, is_tiling_record, join_key, split_key
from tbn_compiler.graph.tiled_parameters import STRENGTH, read_forms
from tbn_compiler.passes.blend_weights import strength_keys

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
        TransformError: the module has no tiled layer in training form.
        SerializationError: the checkpoint does not fit; the module is then unchanged.

    Example:
        >>> import tbn_compiler as tbn
        >>> trained = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> qat = tbn.init_from_float(tbn.transform(trained, tbn.TilingConfig(p=4)))
    """
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
    tiled = False
    for path, part in graph_parts(module):
        for call in layer_calls(part):
            record = find_record(get_records(part) or (), call) if call.form == "tiled" else None
            if record is None or record.spec is None:
                continue
            tiled = True
            if record.spec.alpha_source == "A":
                weight = apply_view(part.get_parameter(record.parameter).detach(), call.view)
                yield join_key(path, alpha_source_key(record.weight)), weight
    for path, owner in module.named_modules(remove_duplicate=False):
        for form in read_forms(owner):
            record = form.record
            tiled |= not form.lowered
            if not form.lowered and record.spec is not None and record.spec.alpha_source == "A":
                parameter = owner._parameters[record.parameter]
                assert parameter is not None
                weight = parameter.detach().t() if record.view else parameter.detach()
                yield join_key(path, alpha_source_key(record.weight)), weight
    if not tiled:
        raise TransformError(
            f"{type(module).__name__} has no tiled layer to train: pass the module that tbn_compiler.transform "
            "returned, before it is lowered"
        )


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
