"""Calls of the inference operators in a graph: their arguments by name, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from tbn_compiler.ops.schemas import make_layout
from tbn_compiler.tiling import TileLayout

_OPS = {getattr(torch.ops.tbn, name).default for name in ("linear", "conv1d", "conv2d", "conv3d")}


@dataclass(frozen=True)
class InferenceCall:
    """One call of ``tbn::linear`` or ``tbn::conv1d/2d/3d``.

    Attributes:
        node: the calling node.
        arguments: all arguments by their name in the schema, defaults included.
        layout: layout of the layer's weight.
    """

    node: fx.Node
    arguments: dict[str, Any]
    layout: TileLayout

    @property
    def groups(self) -> int:
        """Convolution groups; 1 for a linear layer."""
        return int(self.arguments.get("groups", 1))

    @property
    def channel_axis(self) -> int:
        """Axis of the features or channels, counted from the end, where a batch dimension makes no difference."""
        return -1 - len(self.arguments.get("kernel_size", ()))

    def tensor(self, gm: fx.GraphModule, name: str) -> Tensor | None:
        """The parameter or buffer that is passed as argument ``name``; ``None`` if the graph computes it."""
        return attribute(gm, self.arguments[name])

    def macs(self, gm: fx.GraphModule) -> int:
        """Multiply-adds for one output position: different rows only, neighbours and replicas summed first.

        Raises:
            ValueError: the graph computes the alphas.
        """
        alpha = self.tensor(gm, "alpha")
        if alpha is None:
            raise ValueError(f"the alphas of node {self.node.name} are no parameter or buffer")
        copies = self.tensor(gm, "input_alpha")
        inputs = self.layout.inputs_per_row(alpha.numel()) // (1 if copies is None else copies.numel())
        return self.groups * self.layout.rows_per_group(alpha.numel(), self.groups) * inputs

    def update(self, **changes: Any) -> None:
        """Set arguments of the call by name, in place."""
        names = [argument.name for argument in self.node.target._schema.arguments]  # type: ignore[union-attr]
        for name, value in changes.items():
            index = names.index(name)
            if index < len(self.node.args):
                self.node.update_arg(index, value)
            else:
                self.node.update_kwarg(name, value)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's call by their name in the schema, defaults included."""
    schema = node.target._schema  # type: ignore[union-attr]
    arguments = {argument.name: argument.default_value for argument in schema.arguments}
    return arguments | dict(zip(arguments, node.args, strict=False)) | node.kwargs


def inference_call(node: fx.Node) -> InferenceCall | None:
    """The call of an inference operator that ``node`` is, or ``None``."""
    if node.op != "call_function" or node.target not in _OPS:
        return None
    arguments = named_arguments(node)
    if "kernel_size" in arguments:
        shape = (arguments["out_channels"], arguments["in_channels"] // arguments["groups"], *arguments["kernel_size"])
    else:
        shape = (arguments["out_features"], arguments["in_features"])
    return InferenceCall(node, arguments, make_layout(shape, arguments["p"], arguments["p_in"], arguments["shift"]))


def attribute(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that a ``get_attr`` node reads, or ``None``."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, name = str(node.target).rpartition(".")
    value = getattr(gm.get_submodule(path), name, None)
    return value if isinstance(value, Tensor) else None
