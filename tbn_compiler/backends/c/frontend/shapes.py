"""Operators that move elements."""

from __future__ import annotations

import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.importer import Importer
from tbn_compiler.backends.c.frontend.registry import Arguments, converts

_aten = torch.ops.aten


# The same elements under another shape. Dropout in evaluation arrives as a clone.
@converts(
    _aten._to_copy.default,
    _aten._unsafe_view.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten.contiguous.default,
    _aten.detach.default,
    _aten.flatten.using_ints,
    _aten.reshape.default,
    _aten.squeeze.default,
    _aten.squeeze.dim,
    _aten.squeeze.dims,
    _aten.unflatten.int,
    _aten.unsqueeze.default,
    _aten.view.default,
)
def _alias(importer: Importer, node: fx.Node, args: Arguments) -> ir.Operation:
    return ir.Alias(**importer.head(node, next(iter(args.values()))))
