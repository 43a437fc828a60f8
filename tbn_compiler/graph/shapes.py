"""Run a graph, or the graphs in a module, on shapes only, and look at every node's result on the way."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.errors import TBNError
from tbn_compiler.graph.records import graph_parts
from tbn_compiler.torch_private import FakeTensorMode, tree_map_only

_Visit = Callable[[fx.Node, Any], None]


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments from a tensor, a tuple of arguments, or a dictionary of them by name."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    return tuple(example_inputs) if isinstance(example_inputs, tuple | list) else (example_inputs,), {}


def distinct_tensors(arguments: Any) -> Any:
    """Nested arguments in which no tensor comes twice: torch.export takes one that does for a single input."""
    seen: set[int] = set()

    def distinct(tensor: Tensor) -> Tensor:
        again = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.detach().clone() if again else tensor

    return tree_map_only(Tensor, distinct, arguments)


class _Visitor(fx.Interpreter):
    """Interprets a graph and shows each node with its result."""

    def __init__(self, gm: fx.GraphModule, visit: _Visit) -> None:
        super().__init__(gm)
        self.visit = visit

    def run_node(self, n: fx.Node) -> Any:
        """Run a node and show it."""
        result = super().run_node(n)
        self.visit(n, result)
        return result


def visit_results(module: nn.Module, example_inputs: Any, visit: _Visit) -> None:
    """Run a module on fake tensors: nothing is computed, and nothing is allocated.

    Args:
        module: a graph module, or a module that holds some; one that is called twice is visited twice.
        example_inputs: a tensor, a tuple of the arguments of ``forward``, or a dictionary of them by name.
        visit: called with each node of the graphs and its result, in the order of execution.

    Raises:
        TBNError: the module does not run on these inputs, or not without their values; the cause is chained.
    """
    arguments, by_name = split_inputs(example_inputs)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), ExitStack() as stack:
            for _, part in graph_parts(module):
                part.__dict__["forward"] = _visiting_forward(part, visit)
                stack.callback(part.__dict__.pop, "forward")
            # Fake mode would count real batches: the counter of a batch-norm is a scalar, which it computes.
            buffers: dict[str, Tensor] = {name: mode.from_tensor(buffer) for name, buffer in module.named_buffers()}
            fakes, named = tree_map_only(Tensor, mode.from_tensor, (arguments, by_name))
            torch.func.functional_call(module, buffers, fakes, named)
    except Exception as error:
        raise does_not_run(module, arguments, by_name, error) from error


def does_not_run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception) -> TBNError:
    """The error that a module does not run on example inputs, with their shapes."""
    shapes = tree_map_only(Tensor, lambda value: list(value.shape), kwargs or args)
    return TBNError(f"{type(module).__name__} does not run on example inputs of shapes {shapes}: {error}")


def _visiting_forward(part: fx.GraphModule, visit: _Visit) -> Callable[..., Any]:
    signature = inspect.signature(part.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return _Visitor(part, visit).run(*bound.args)

    return forward
