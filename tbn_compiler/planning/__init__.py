"""What tiling will cost, before training: sensitivities, plans under a budget, sweeps."""

from tbn_compiler.planning.layer_plan import LayerPlan, PlannedLayer
from tbn_compiler.planning.options import LayerOption
from tbn_compiler.planning.planner import plan
from tbn_compiler.planning.sensitivity import LayerSensitivity, Sensitivity, sensitivity
from tbn_compiler.planning.sweep import Sweep, SweepPoint, sweep

__all__ = [
    "LayerOption",
    "LayerPlan",
    "LayerSensitivity",
    "PlannedLayer",
    "Sensitivity",
    "Sweep",
    "SweepPoint",
    "plan",
    "sensitivity",
    "sweep",
]
