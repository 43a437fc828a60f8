"""tbn_compiler: a compiler for Tiled Bit Networks (Gorbett, Shirazi, Ray, CIKM 2024).

>>> import torch, tbn_compiler as tbn
>>> net = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
>>> qat = tbn.transform(net, tbn.TilingConfig(p=4))  # train this with any loop
>>> packed = tbn.lower(qat)                          # inference on packed tiles
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tbn_compiler import backends, integrations
from tbn_compiler.calibration import calibrate, calibrate_inputs
from tbn_compiler.compiler import lower, optimize, transform
from tbn_compiler.config import LayerInfo, TilingConfig
from tbn_compiler.errors import (
    ConfigError,
    ExportError,
    LoweringError,
    SerializationError,
    TBNError,
    TransformError,
)
from tbn_compiler.planning import LayerPlan, Sensitivity, Sweep, plan, sensitivity, sweep
from tbn_compiler.serialize import load, save
from tbn_compiler.streaming import Stream, streaming
from tbn_compiler.summary import Summary, summary
from tbn_compiler.training import (
    convert_latent,
    distillation_loss,
    init_from_float,
    set_tiling_strength,
    tiling_strength,
)
from tbn_compiler.version import __version__

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tbn_compiler.backends.c import Package, Plan
    from tbn_compiler.backends.c.options import OptimizeFor, ScratchOwner
    from tbn_compiler.backends.c.targets import Target
    from tbn_compiler.backends.dynamo import Explanation
    from tbn_compiler.backends.onnx import ExportedFile, WeightForm
    from tbn_compiler.reporting import Report

backends.register()
integrations.register()


def export_c(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: str | os.PathLike[str],
    *,
    name: str = "model",
    scratch: ScratchOwner = "static",
    optimize: OptimizeFor = "balanced",
    target: Target = "generic",
    skip_zeros: bool = False,
    layer_hook: bool = False,
    int8_inputs: bool = False,
    int8_outputs: bool = False,
    state: Mapping[str, int] | None = None,
    initial_state: Mapping[str, Tensor] | None = None,
    self_test: bool | Sequence[Tensor | Sequence[Tensor]] = False,
    package: Package | None = None,
    package_version: str = "1.0.0",
    package_vendor: str = "tbn_compiler",
) -> Plan:
    """Write a model as one standalone C99 file and a header; see :func:`tbn_compiler.backends.c.export_c`."""
    from tbn_compiler.backends.c import export_c as export  # backends load when used

    return export(
        module,
        example_inputs,
        path,
        name=name,
        scratch=scratch,
        optimize=optimize,
        target=target,
        skip_zeros=skip_zeros,
        layer_hook=layer_hook,
        int8_inputs=int8_inputs,
        int8_outputs=int8_outputs,
        state=state,
        initial_state=initial_state,
        self_test=self_test,
        package=package,
        package_version=package_version,
        package_vendor=package_vendor,
    )


def export_onnx(
    module: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    weights: WeightForm = "bits",
    dynamic_batch: bool | Sequence[str] = True,
    opset: int = 18,
    optimized: bool = True,
    bits: int = 4,
    accuracy_level: int = 0,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> ExportedFile:
    """Write a lowered module as an ONNX file; see :func:`tbn_compiler.backends.onnx.export_onnx`."""
    from tbn_compiler.backends.onnx import export_onnx as export  # backends load when used

    return export(
        module,
        example_inputs,
        path,
        weights=weights,
        dynamic_batch=dynamic_batch,
        opset=opset,
        optimized=optimized,
        bits=bits,
        accuracy_level=accuracy_level,
        input_names=input_names,
        output_names=output_names,
    )


def report(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    title: str | None = None,
    optimize: OptimizeFor = "balanced",
    target: Target = "generic",
    sweep: Sweep | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Make the report of a network, one page to look at; see :func:`tbn_compiler.reporting.report`."""
    from tbn_compiler.reporting import report as make_report  # it asks the backends

    return make_report(
        module, example_inputs, title=title, optimize=optimize, target=target, sweep=sweep, on_stage=on_stage
    )


def explain(compiled: nn.Module) -> Explanation:
    """What ``torch.compile(..., backend="tbn")`` made of a module; see :func:`tbn_compiler.backends.dynamo.explain`."""
    from tbn_compiler.backends.dynamo import explain as explain_compiled

    return explain_compiled(compiled)


__all__ = [
    "ConfigError",
    "ExportError",
    "LayerInfo",
    "LayerPlan",
    "LoweringError",
    "Sensitivity",
    "SerializationError",
    "Stream",
    "Summary",
    "Sweep",
    "TBNError",
    "TilingConfig",
    "TransformError",
    "__version__",
    "calibrate",
    "calibrate_inputs",
    "convert_latent",
    "distillation_loss",
    "explain",
    "export_c",
    "export_onnx",
    "init_from_float",
    "load",
    "lower",
    "optimize",
    "plan",
    "report",
    "save",
    "sensitivity",
    "set_tiling_strength",
    "streaming",
    "summary",
    "sweep",
    "tiling_strength",
    "transform",
]
