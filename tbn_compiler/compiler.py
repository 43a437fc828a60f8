"""The two entry points: :func:`transform` for training, :func:`lower` for inference."""

from __future__ import annotations

import warnings
from typing import Any

from torch import fx, nn

from tbn_compiler.config import TilingConfig
from tbn_compiler.errors import LoweringError, TransformError
from tbn_compiler.layers import get_records
from tbn_compiler.passes import inference_pipeline, run_passes, training_pipeline
from tbn_compiler.tracing import share_tensors_copy, trace


def transform(
    model: nn.Module, config: TilingConfig | None = None, *, concrete_args: dict[str, Any] | None = None
) -> fx.GraphModule:
    """Rewrite a model so that it trains with tiled weights.

    Args:
        model: an ``nn.Module`` that ``torch.fx`` can trace, or a ``GraphModule``. It is not changed; the result
            shares its parameters and buffers, so an optimiser or a checkpoint of either works for both.
        config: how to tile; default :class:`TilingConfig`.
        concrete_args: arguments of ``forward`` to fix, as in :func:`torch.fx.symbolic_trace`.

    Returns:
        A ``GraphModule`` with the model's ``state_dict`` keys, plus ``<layer>.alpha_source`` for each tiled layer
        (``alpha_source="A"``). Every linear and convolution is listed in its :func:`summary`. Transforming the
        result again changes nothing.

    Raises:
        TransformError: the model cannot be traced, or no layer of it can be tiled.

    Example:
        >>> net = nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10))
        >>> qat = transform(net, TilingConfig(p=4))
    """
    if config is None:
        config = TilingConfig()
    if not isinstance(model, nn.Module):
        raise TransformError(f"expected an nn.Module, got {type(model).__name__}")
    gm = trace(model, concrete_args)
    run_passes(gm, training_pipeline(config))
    records = get_records(gm) or ()
    if not any(record.spec for record in records):
        listing = "".join(f"\n  {record.name} ({record.kind}): {record.reason}" for record in records)
        found = (
            f"none of its {len(records)} layers is eligible:{listing}" if records else "it has no linear or conv layer"
        )
        raise TransformError(f"nothing to tile in {type(model).__name__}: {found}")
    unmatched = config.unmatched_patterns([record.name for record in records])
    if unmatched:
        names = ", ".join(record.name for record in records)
        warnings.warn(f"config patterns {unmatched} match no layer; layers: {names}", stacklevel=2)
    return gm


def lower(module: nn.Module) -> fx.GraphModule:
    """Lower a trained module to inference operators on packed tiles.

    Args:
        module: the result of :func:`transform`. It is not changed.

    Returns:
        A ``GraphModule`` in evaluation mode that holds, for each tiled layer, ``<weight>_tile`` (packed bits) and
        ``<weight>_alpha`` instead of the float weight. Layers left in float are kept as they are. A module that
        is lowered already comes back as an equal copy.

    Raises:
        LoweringError: the module was not transformed, or a weight is not finite.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    if get_records(module) is None:
        raise LoweringError(
            f"{type(module).__name__} was not made by tbn_compiler.transform, or was traced again since: "
            "lower the module that transform returned"
        )
    gm: fx.GraphModule = share_tensors_copy(module)
    return run_passes(gm, inference_pipeline()).eval()
