"""PEFT: adapters on top of tiled layers.

LoRA and its relatives work on lowered layers (as QLoRA does on 4-bit ones) and on layers in training: the adapter is a
branch beside the layer, whose gradients pass through it. What cannot work is to merge it: a tile has no room for an
update that differs from copy to copy. PEFT would add it to a weight that is decoded for this call, or to the trained
weight that only signs are taken from, and the adapter would be lost without a word; here it is refused.
"""

from __future__ import annotations

from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from tbn_compiler.graph.records import get_records

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
