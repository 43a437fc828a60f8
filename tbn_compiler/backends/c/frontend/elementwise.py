"""Operators that treat each element alike."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.registry import Arguments, converts

_aten = torch.ops.aten


@converts(_aten.relu.default)
def _relu(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return ir.Relu(**importer.head(node, args["self"]))


@converts(_aten.add.Tensor)
def _add(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    if args["alpha"] != 1:
        raise importer.unsupported(node, f"alpha={args['alpha']} is not 1")
    if isinstance(args["other"], int | float):
        scalar = float(np.float32(args["other"]))
        if not math.isfinite(scalar):
            raise importer.unsupported(node, f"the number {args['other']} is not finite in float32")
        return ir.AddScalar(**importer.head(node, args["self"]), scalar=scalar)
    head = importer.head(node, args["self"], args["other"])
    if any(value.shape != head["output"].shape for value in head["inputs"]):
        raise importer.unsupported(node, "both operands must have the shape of the result")
    return ir.Add(**head)
