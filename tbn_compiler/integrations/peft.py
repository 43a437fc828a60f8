"""PEFT: adapters on top of tiled layers.

LoRA and its relatives work on lowered layers (as QLoRA does on 4-bit ones) and on layers in training: the adapter is a
branch beside the layer, whose gradients pass through it. What cannot work is to merge it: a tile has no room for an
update that differs from copy to copy. PEFT would add it to a weight that is decoded for this call, or to the trained
weight that only signs are taken from, and the adapter would be lost without a word; here it is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

from peft.tuners.lora import layer as lora
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from tbn_compiler.graph.records import get_records, own_records

_usual_check: Any = BaseTuner._check_merge_allowed


def _check_merge_allowed(self: BaseTuner) -> None:
    """PEFT's own check, and that no adapter belongs to a tiled layer.

    Raises:
        ValueError: one does.
    """
    _usual_check(self)
    for name, module in self.model.named_modules():
        adapter = isinstance(module, BaseTunerLayer)
        if adapter and any(record.spec for record in get_records(cast("nn.Module", module)) or ()):
            raise ValueError(
                f"the adapter of {name!r} cannot be merged: the layer is tiled, and its tile has no room for it. Keep "
                "the adapter beside the layer, or merge it into a dense model, which dequantize() gives"
            )


BaseTuner._check_merge_allowed = _check_merge_allowed  # type: ignore[method-assign]


# Methods whose adapters multiply by the weight of their layer, beside calling it or in place of that.
_MULTIPLY_BY_THE_WEIGHT = frozenset({"DEFT", "FROD", "HIRA", "HRA", "PEANUT", "SHIRA", "SUPERTUNING"})
_usual_injection: Any = BaseTuner.inject_adapter


def _inject_adapter(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """PEFT's own step, for layers whose weight is what the adapter takes it for.

    Raises:
        ValueError: the adapter would multiply by a weight that only a tile is taken from; nothing was changed.
    """
    config: Any = self.peft_config[adapter_name]
    method = str(getattr(config.peft_type, "value", config.peft_type))
    reads = method in _MULTIPLY_BY_THE_WEIGHT or getattr(config, "use_dora", False)
    for name, layer in model.named_modules() if reads else ():
        trained = any(record.spec and record.parameter in layer._parameters for record in own_records(layer) or ())
        every = getattr(config, "target_modules", None) == "all-linear"
        if trained and (every or self._check_target_module_exists(config, name)):
            raise ValueError(
                f"{'DoRA' if method == 'LORA' else method} multiplies by the weight of {name!r}, which in training is "
                "not the one that the tile gives: lower the model first, or take plain LoRA"
            )
    _usual_injection(self, model, adapter_name, *args, **kwargs)


BaseTuner.inject_adapter = _inject_adapter  # type: ignore[method-assign]


def _refused(method: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A method of an adapter that writes to the weight of its layer, refused where that is tiled."""

    @functools.wraps(method)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if any(record.spec for record in get_records(self) or ()):
            raise ValueError(f"{what} would change the weight of a layer that is tiled, which its tile has no room for")
        return method(self, *args, **kwargs)

    return call


for _name in ("pissa_init", "olora_init", "loftq_init", "corda_init"):
    if hasattr(lora.LoraLayer, _name):
        _init = _refused(getattr(lora.LoraLayer, _name), f"init_lora_weights by {_name.removesuffix('_init')}")
        setattr(lora.LoraLayer, _name, _init)
for _layer in (lora.Linear, lora._ConvNd):
    _layer.merge = _refused(_layer.merge, "merging the adapter")  # type: ignore[method-assign]
