"""Operators that combine the elements along axes."""

from __future__ import annotations

import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.registry import Arguments, converts

_aten = torch.ops.aten


@converts(_aten.softmax.int, _aten._softmax.default)
def _softmax(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    operation = ir.Softmax(**importer.head(node, args["self"]))
    rank = len(operation.output.shape)
    if rank == 0 or args["dim"] not in (-1, rank - 1):
        raise importer.unsupported(node, f"dim={args['dim']} is not the last dimension")
    return operation
