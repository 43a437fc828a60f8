"""What the passes of the deployment pipeline share: ranks, recorded refusals, removal of what nothing uses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler.graph.calls import InferenceCall, attribute
from tbn_compiler.graph.records import get_records, set_records, split_key
from tbn_compiler.graph.shapes import visit_results

_RANK, _DTYPE, _SIZES = "tbn_rank", "tbn_dtype", "tbn_sizes"


def note_values(module: nn.Module, example_inputs: Any) -> None:
    """Note what the passes ask of every node's value, by running the module on shapes only.

    Args:
        module: a graph module, or a module with graph modules in it.
        example_inputs: a tensor, a tuple of the arguments of ``forward``, or a dictionary of them by name.

    Raises:
        TBNError: the module does not run on these inputs; the cause is chained.
    """
    ranks: dict[fx.Node, set[int]] = {}
    dtypes: dict[fx.Node, set[torch.dtype]] = {}

    def visit(node: fx.Node, result: Any) -> None:
        if isinstance(result, Tensor):
            ranks.setdefault(node, set()).add(result.dim())
            dtypes.setdefault(node, set()).add(result.dtype)

    visit_results(module, example_inputs, visit)
    for node in ranks:
        # A part may be called with values of different ranks; then the rank is not known.
        for key, found in ((_RANK, ranks[node]), (_DTYPE, dtypes[node])):
            node.meta[key] = next(iter(found)) if len(found) == 1 else None


def note_value(node: fx.Node, value: Tensor) -> None:
    """Note what the passes ask of a node's value: its number of dimensions, its dtype and its sizes."""
    node.meta[_RANK], node.meta[_DTYPE] = value.dim(), value.dtype
    node.meta[_SIZES] = _known_sizes(value)


def rank(node: fx.Node) -> int | None:
    """Number of dimensions of a node's value, where it was propagated or came with an exported graph."""
    value = node.meta.get("val")
    return node.meta.get(_RANK, value.dim() if isinstance(value, Tensor) else None)


def dtype(node: fx.Node) -> torch.dtype | None:
    """Dtype of a node's value, where it was noted or came with an exported graph."""
    value = node.meta.get("val")
    return node.meta.get(_DTYPE, value.dtype if isinstance(value, Tensor) else None)


def sizes(node: fx.Node) -> tuple[int | None, ...] | None:
    """Sizes of a node's value where it was captured, ``None`` for one that varies; passes may change its channels."""
    value = node.meta.get("val")
    return node.meta.get(_SIZES, _known_sizes(value) if isinstance(value, Tensor) else None)


def _known_sizes(value: Tensor) -> tuple[int | None, ...]:
    return tuple(size if type(size) is int else None for size in value.shape)


def describe(gm: fx.GraphModule, node: fx.Node) -> str:
    """A node in words: the name that the model's author knows, and what it does."""
    if node.op == "call_module":
        return f"{type(gm.get_submodule(str(node.target))).__name__} {node.target!r}"
    return f"{node.target if isinstance(node.target, str) else node.target.__name__} (node {node.name!r})"


def weight_name(call: InferenceCall) -> str:
    """Name of the weight behind a call, as its record has it."""
    return str(call.arguments["tile"].target).removesuffix("_tile")


def record_refusal(gm: fx.GraphModule, weight: str, reason: str) -> None:
    """Add ``reason`` to the note of a weight's record, which the summary prints; once only."""
    records = [
        replace(record, note="; ".join(filter(None, (record.note, reason))))
        if record.weight == weight and reason not in (record.note or "")
        else record
        for record in get_records(gm) or ()
    ]
    set_records(gm, records)


def remove_unused(gm: fx.GraphModule, nodes: Iterable[fx.Node]) -> None:
    """Remove the modules and tensors that erased nodes named, under every name, unless the graph still uses them.

    So are modules that then hold nothing of use, such as a norm whose counter of batches is left.

    Args:
        gm: the module, with ``nodes`` erased from its graph.
        nodes: erased ``call_module`` and ``get_attr`` nodes.
    """
    used: set[int] = set()
    for node in gm.graph.nodes:
        if node.op == "call_module":
            for module in gm.get_submodule(str(node.target)).modules():
                used |= {id(module), *map(id, module.parameters(False)), *map(id, module.buffers(False))}
        elif node.op == "get_attr" and node.users:  # the base removes dead ones
            used.add(id(attribute(gm, node)))
    named: list[nn.Module | Tensor | None] = []
    for node in nodes:
        name = str(node.target)
        if node.op == "call_module":
            named.append(gm.get_submodule(name))
            continue
        named.append(attribute(gm, node))
        owner = gm.get_submodule(split_key(name)[0])
        if owner is not gm and used.isdisjoint(map(id, (*owner.modules(), *owner.parameters(), *owner.buffers()))):
            named.append(owner)
    for value in named:
        if value is not None and id(value) not in used:
            _drop(gm, value)


def _drop(gm: fx.GraphModule, value: nn.Module | Tensor) -> None:
    """Remove a module or tensor under every name that it has."""
    for owner in list(gm.modules()):
        for registry in (owner._parameters, owner._buffers, owner._modules):
            for name in [name for name, entry in registry.items() if entry is value]:
                delattr(owner, name)


def register_buffer(gm: fx.GraphModule, key: str, value: Tensor) -> None:
    """Register a buffer under a ``state_dict`` key; another call of the same layer may have done so already."""
    path, name = split_key(key)
    gm.get_submodule(path).register_buffer(name, value)
