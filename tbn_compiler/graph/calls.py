"""Calls of the inference operators in a graph: their arguments by name, and what they cost."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, fx

from tbn_compiler.ops.calls import OPERATORS, TRAINING_OPERATORS, TiledCall
from tbn_compiler.tiling import TiledProduct
from tbn_compiler.torch_private import OpOverload, operator_schema

_OPERATORS = {operator.overload: operator for operator in OPERATORS.values()}
_TRAINING_OPERATORS = {operator.overload: operator for operator in TRAINING_OPERATORS.values()}


@dataclass(frozen=True, eq=False)
class InferenceCall(TiledCall):
    """One call of an inference operator by a node, which has nodes in place of tensors.

    Attributes:
        node: the calling node.
    """

    node: fx.Node

    def tensor(self, gm: fx.GraphModule, name: str) -> Tensor | None:
        """The parameter or buffer that is passed as argument ``name``; ``None`` if there is none, or it is computed."""
        return attribute(gm, self.arguments.get(name))

    def is_stored(self, gm: fx.GraphModule) -> bool:
        """Whether tile and alphas, those of the input too, are parameters or buffers: the graph computes none."""
        names = [name for name in ("tile", "alpha", "input_alpha") if self.arguments.get(name) is not None]
        return all(self.tensor(gm, name) is not None for name in names)

    def product(self, gm: fx.GraphModule) -> TiledProduct:
        """What the call multiplies.

        Raises:
            ValueError: the graph computes the alphas.
        """
        alpha, input_alpha = self.tensor(gm, "alpha"), self.tensor(gm, "input_alpha")
        if alpha is None or (input_alpha is None and self.arguments.get("input_alpha") is not None):
            raise ValueError(f"the alphas of node {self.node.name} are no parameter or buffer")
        replicas = 1 if input_alpha is None else input_alpha.numel()
        return TiledProduct(self.layout, alpha.numel(), self.groups, replicas)

    def macs(self, gm: fx.GraphModule) -> int:
        """Multiply-adds for one output position: different rows only, neighbours and replicas summed first.

        Of a transpose convolution it is one *input* position; with groups, its rows are all multiplied.

        Raises:
            ValueError: the graph computes the alphas.
        """
        product = self.product(gm)
        return self.layout.numel if self.transposed and self.groups > 1 else product.macs

    def update(self, **changes: Any) -> None:
        """Set arguments of the call by name, in place."""
        for name, value in changes.items():
            index = self.operator.names.index(name)
            if index < len(self.node.args):
                self.node.update_arg(index, value)
            else:
                self.node.update_kwarg(name, value)


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of an operator's call by their name in the schema, defaults included."""
    schema = operator_schema(cast(OpOverload, node.target))
    arguments = {argument.name: argument.default_value for argument in schema.arguments}
    return arguments | dict(zip(arguments, node.args, strict=False)) | node.kwargs


def tiled_call(node: fx.Node) -> InferenceCall | None:
    """The call of an inference operator that ``node`` is, or ``None``."""
    operator = _OPERATORS.get(node.target) if node.op == "call_function" else None  # type: ignore[call-overload]
    return None if operator is None else InferenceCall(operator, named_arguments(node), node)


def training_call(node: fx.Node) -> TiledCall | None:
    """The call of an operator that trains a layer that ``node`` is, with nodes in place of tensors, or ``None``."""
    operator = _TRAINING_OPERATORS.get(node.target) if node.op == "call_function" else None  # type: ignore[call-overload]
    return None if operator is None else TiledCall(operator, named_arguments(node))


def all_among(graph: fx.Graph, layers: Container[fx.Node]) -> bool:
    """Whether a graph has layers on tiles, all of them among ``layers``."""
    found = [node for node in graph.nodes if tiled_call(node) is not None]
    return bool(found) and all(node in layers for node in found)


def attribute(gm: fx.GraphModule, node: Any) -> Tensor | None:
    """The parameter or buffer that a ``get_attr`` node reads, or ``None``."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    path, _, name = str(node.target).rpartition(".")
    value = getattr(gm.get_submodule(path), name, None)
    return value if isinstance(value, Tensor) else None
