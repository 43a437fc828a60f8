"""Graph rewrites, one file a pass. The pipelines below read top to bottom."""

from __future__ import annotations

from tbn_compiler.config import TilingConfig
from tbn_compiler.passes.base import GraphPass, run_passes
from tbn_compiler.passes.lower_tiles import LowerTiles
from tbn_compiler.passes.tile_weights import TileWeights


def training_pipeline(config: TilingConfig) -> list[GraphPass]:
    """From a float graph to one that trains on tiles."""
    return [
        TileWeights(config),
    ]


def inference_pipeline() -> list[GraphPass]:
    """From a trained graph to inference operators on stored tiles."""
    return [
        LowerTiles(),
    ]


__all__ = ["GraphPass", "LowerTiles", "TileWeights", "inference_pipeline", "run_passes", "training_pipeline"]
