"""Helpers of the tests of the deployment passes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.compiler import optimize
from tbn_compiler.passes import GraphPass, deployment_pipeline
from tests import oracle


def lowered(model: nn.Module, **options: Any) -> fx.GraphModule:
    """The model lowered, with norm statistics and affine parameters that do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    qat = tbn.transform(model, tbn.TilingConfig(**{"p": 4, "min_size": 0} | options))
    return tbn.lower(qat)


def check(packed: fx.GraphModule, *inputs: Tensor) -> fx.GraphModule:
    """Optimise; the result equals the plain lowering in float32 and float64, and optimising it changes nothing."""
    before = set(packed.state_dict())
    optimized = optimize(packed, inputs)
    assert set(packed.state_dict()) == before, "the lowered module must stay as it is"
    with torch.no_grad():
        oracle.assert_close(optimized(*inputs), packed(*inputs), rtol=1e-5)
        wide, doubles = copy.deepcopy(packed).double(), [value.double() for value in inputs]
        oracle.assert_close(optimize(wide, tuple(doubles))(*doubles), wide(*doubles), rtol=1e-12)
        oracle.assert_close(copy.deepcopy(optimized)(*inputs), optimized(*inputs))
    notes = [record.note for record in optimized.meta["tbn_layers"]]
    assert not any(modifies(graph_pass, optimized) for graph_pass in deployment_pipeline())
    assert [record.note for record in optimized.meta["tbn_layers"]] == notes
    return optimized


def modifies(graph_pass: GraphPass, gm: fx.GraphModule) -> bool:
    """Run a pass; whether it says that it changed anything."""
    return graph_pass.call(gm).modified


def note(module: nn.Module, name: str) -> str:
    """The note of a layer in the summary."""
    return {row.name: row.note for row in tbn.summary(module).layers}[name]


def macs(module: nn.Module, *inputs: Tensor) -> dict[str, int]:
    """Multiply-adds that each layer computes."""
    return {row.name: row.macs_tiled or 0 for row in tbn.summary(module, inputs).layers}


def modules_called(gm: fx.GraphModule) -> list[str]:
    """Types of the modules that a graph calls."""
    return [type(gm.get_submodule(str(n.target))).__name__ for n in gm.graph.nodes if n.op == "call_module"]
