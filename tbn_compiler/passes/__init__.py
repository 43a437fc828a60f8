"""Graph rewrites, one file a pass. The pipelines below read top to bottom."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from tbn_compiler.config import TilingConfig
from tbn_compiler.passes.base import GraphPass, run_passes
from tbn_compiler.passes.blend_weights import BlendWeights, RemoveBlends
from tbn_compiler.passes.decompose_attention import DecomposeAttention
from tbn_compiler.passes.expose_linears import ExposeLinears
from tbn_compiler.passes.flow_replicas import FlowReplicas
from tbn_compiler.passes.fold_batchnorm import FoldBatchNorm
from tbn_compiler.passes.fuse_epilogue import FuseEpilogue
from tbn_compiler.passes.lower_tiles import LowerTiles
from tbn_compiler.passes.quantize_activations import QuantizeActivations
from tbn_compiler.passes.remove_noops import RemoveNoOps
from tbn_compiler.passes.tile_weights import TileWeights
from tbn_compiler.tiling import TileSpec


def training_pipeline(
    config: TilingConfig,
    specs: Mapping[str, TileSpec] | None = None,
    path: str = "",
    shared: Mapping[int, str] | None = None,
) -> list[GraphPass]:
    """From a float graph to one that trains on tiles; the arguments are those of :class:`TileWeights`."""
    return [
        DecomposeAttention(),
        ExposeLinears(),
        TileWeights(config, specs, path, shared),
        *([BlendWeights()] if config.gradual else []),
    ]


def inference_pipeline(stored: Mapping[str, Tensor] | None = None) -> list[GraphPass]:
    """From a trained graph to inference operators on stored tiles."""
    return [
        RemoveBlends(),
        LowerTiles(stored),
    ]


def deployment_pipeline(activation: str = "float") -> list[GraphPass]:
    """From stored tiles, which a file can hold, to the least arithmetic, which it cannot."""
    return [
        RemoveNoOps(),
        FoldBatchNorm(),
        FlowReplicas(),
        *([QuantizeActivations(activation)] if activation != "float" else []),
    ]


__all__ = [
    "BlendWeights",
    "DecomposeAttention",
    "ExposeLinears",
    "FlowReplicas",
    "FoldBatchNorm",
    "FuseEpilogue",
    "GraphPass",
    "LowerTiles",
    "QuantizeActivations",
    "RemoveBlends",
    "RemoveNoOps",
    "TileWeights",
    "deployment_pipeline",
    "inference_pipeline",
    "run_passes",
    "training_pipeline",
]
