"""Helpers of the tests of the deployment passes.

A lowered model comes in two forms, and each of the passes knows both. As one graph of ``torch.fx`` it calls modules,
functions and methods; :func:`lowered` gives that by default. From a module (``transform=tbn.transform``)
:func:`optimized` makes a graph of aten operators by ``torch.export``.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.compiler import optimize
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.records import get_records
from tbn_compiler.passes import GraphPass, deployment_pipeline, run_passes
from tbn_compiler.passes.deployment import note_values
from tests import oracle


def lowered(model: nn.Module, transform: Any = oracle.whole_graph, **options: Any) -> Any:
    """The model lowered, with norm statistics and affine parameters that do something."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return tbn.lower(transform(model.eval(), tbn.TilingConfig(**{"p": 4, "min_size": 0} | options)))


def noted(packed: fx.GraphModule, *inputs: Tensor) -> fx.GraphModule:
    """A copy of a graph in which ranks and dtypes are known."""
    gm = copy.deepcopy(packed)
    note_values(gm, inputs)
    return gm


def optimized(packed: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """Optimise for inputs like these."""
    if isinstance(packed, fx.GraphModule):
        return run_passes(noted(packed, *inputs), deployment_pipeline())
    result = optimize(packed, inputs)
    assert isinstance(result, fx.GraphModule)
    return result


def check(packed: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    """Optimise; the result equals the plain lowering in float32 and float64, and optimising it changes nothing."""
    before = set(packed.state_dict())
    result = optimized(packed, *inputs)
    assert set(packed.state_dict()) == before, "the lowered module must stay as it is"
    with torch.no_grad():
        oracle.assert_close(result(*inputs), packed(*inputs), rtol=1e-5)
        wide, doubles = copy.deepcopy(packed).double(), [value.double() for value in inputs]
        oracle.assert_close(optimized(wide, *doubles)(*doubles), wide(*doubles), rtol=1e-12)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # torch, when it copies an exported graph
            copied = copy.deepcopy(result)
        oracle.assert_close(copied(*inputs), result(*inputs))
    records = get_records(result)
    assert not any(modifies(graph_pass, result) for graph_pass in deployment_pipeline())
    assert get_records(result) == records
    return result


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
    """Types of the modules that a graph calls; not the check of the inputs' sizes that torch.export adds."""
    nodes = [node for node in gm.graph.nodes if node.op == "call_module" and node.target != "_guards_fn"]
    return [type(gm.get_submodule(str(node.target))).__name__ for node in nodes]


def called(gm: fx.GraphModule) -> list[str]:
    """What a graph calls, by the name of the module's type, operator or function; without the tiled layers."""
    names = []
    for node in gm.graph.nodes:
        if node.op == "call_method":
            names.append(str(node.target))
        elif node.op == "call_function" and tiled_call(node) is None:
            packet = getattr(node.target, "overloadpacket", node.target)
            names.append(packet.__name__)
        elif node.op == "call_module" and node.target != "_guards_fn":
            names.append(type(gm.get_submodule(str(node.target))).__name__)
    return names


def epilogues(gm: fx.GraphModule) -> list[str]:
    """The functions inside the tiled layers of a graph, in order."""
    calls = [call for node in gm.graph.nodes if (call := tiled_call(node))]
    return [call.arguments["epilogue"] for call in calls]
