"""Graph rewrites, one file a pass. The pipelines below read top to bottom."""

from __future__ import annotations

from tbn_compiler.passes.base import GraphPass, run_passes
from tbn_compiler.passes.blend_weights import BlendWeights, RemoveBlends
from tbn_compiler.passes.choose_tiling import Scope
from tbn_compiler.passes.convert_latents import HoldTiles
from tbn_compiler.passes.decompose_attention import DecomposeAttention
from tbn_compiler.passes.drop_absent_tensors import DropAbsentTensors
from tbn_compiler.passes.expose_attention import ExposeAttention
from tbn_compiler.passes.expose_linears import ExposeLinears
from tbn_compiler.passes.flow_replicas import FlowReplicas
from tbn_compiler.passes.fold_batchnorm import FoldBatchNorm
from tbn_compiler.passes.fuse_epilogue import FuseEpilogue
from tbn_compiler.passes.fuse_unpack import FuseUnpack
from tbn_compiler.passes.join_chains import JoinChains, attention_shares_rows
from tbn_compiler.passes.lower_tiles import LowerTiles, Stored
from tbn_compiler.passes.quantize_activations import QuantizeActivations, Scales
from tbn_compiler.passes.quantize_inputs import QuantizeInputs
from tbn_compiler.passes.quantize_intermediates import Intermediates, QuantizeIntermediates
from tbn_compiler.passes.remove_dead_nodes import RemoveDeadNodes
from tbn_compiler.passes.remove_noops import RemoveNoOps
from tbn_compiler.passes.tile_weights import TileWeights


def training_pipeline(scope: Scope) -> list[GraphPass]:
    """From a float graph to one that trains on tiles."""
    return [
        ExposeAttention(),
        ExposeLinears(),
        TileWeights(scope),
        *(
            [BlendWeights()]
            if scope.config.gradual
            else [DecomposeAttention(attention_shares_rows), JoinChains(), HoldTiles(scope)]
        ),
        QuantizeInputs(scope),
    ]


def inference_pipeline(stored: Stored | None = None) -> list[GraphPass]:
    """From a trained graph to inference operators on stored tiles."""
    return [
        DropAbsentTensors(),
        DecomposeAttention(),
        RemoveBlends(),
        LowerTiles(stored),
    ]


def deployment_pipeline(
    activation: str = "float", scales: Scales | None = None, intermediates: Intermediates | None = None
) -> list[GraphPass]:
    """From stored tiles, which a file can hold, to the least arithmetic, which it cannot.

    Args:
        activation: number format of the inputs of tiled layers.
        scales: as for :class:`QuantizeActivations`.
        intermediates: as for :class:`QuantizeIntermediates`; ``None``: what passes between layers stays a float.
    """
    return [
        RemoveDeadNodes(),
        RemoveNoOps(),
        ExposeLinears(),
        FuseUnpack(),
        FoldBatchNorm(),
        *([QuantizeActivations(activation, scales)] if activation != "float" else []),
        FlowReplicas(),
        *([QuantizeIntermediates(intermediates)] if intermediates is not None else []),
        FuseEpilogue(),
    ]


__all__ = [
    "BlendWeights",
    "DecomposeAttention",
    "DropAbsentTensors",
    "ExposeAttention",
    "ExposeLinears",
    "FlowReplicas",
    "FoldBatchNorm",
    "FuseEpilogue",
    "FuseUnpack",
    "GraphPass",
    "HoldTiles",
    "JoinChains",
    "LowerTiles",
    "QuantizeActivations",
    "QuantizeInputs",
    "QuantizeIntermediates",
    "RemoveBlends",
    "RemoveDeadNodes",
    "RemoveNoOps",
    "Scope",
    "Stored",
    "TileWeights",
    "deployment_pipeline",
    "inference_pipeline",
    "run_passes",
    "training_pipeline",
]
