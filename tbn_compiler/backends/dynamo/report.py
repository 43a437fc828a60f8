"""What the backend made of each graph: :func:`tbn_compiler.explain`, and the log at level INFO."""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tbn_compiler import html
from tbn_compiler.errors import TBNError
from tbn_compiler.html import Column, Notes, Part, Section

_logger = logging.getLogger("tbn_compiler.backends.dynamo")


@dataclass(frozen=True)
class LayerReport:
    """One call of a tiled layer.

    Attributes:
        name: the layer, by the name of its weight in the compiled function.
        kind: ``"linear"``, ``"conv2d"``, ...
        lowered: whether it runs on a packed tile.
        done: what was done to it, in words.
        declined: what was not possible, and why.
    """

    name: str
    kind: str
    lowered: bool
    done: tuple[str, ...] = ()
    declined: tuple[str, ...] = ()

    def __str__(self) -> str:
        """What was done, in one line; reasons are listed by their graph, where several layers may share one."""
        return f"{self.name} ({self.kind}): {self.state}"

    @property
    def state(self) -> str:
        """What it runs on and what was done to it."""
        return ", ".join(("on a packed tile" if self.lowered else "in training form", *self.done))


@dataclass(frozen=True)
class GraphReport:
    """One graph that ``torch.compile`` handed to the backend.

    Attributes:
        form: ``"inference"``: rewritten for packed tiles; ``"gradients"`` or ``"no tiled layer"``: compiled as with
            ``backend="inductor"``.
        layers: the tiled layers, in order.
        notes: what holds for the graph as a whole.
    """

    form: str
    layers: tuple[LayerReport, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def lowered(self) -> int:
        """How many layers run on packed tiles."""
        return sum(layer.lowered for layer in self.layers)

    @property
    def reasons(self) -> dict[str, tuple[str, ...]]:
        """Why something was not done, each reason with the names of its layers, in order of first appearance."""
        names: dict[str, dict[str, None]] = {}
        for layer in self.layers:
            for reason in layer.declined:
                names.setdefault(reason, {})[layer.name] = None
        return {reason: tuple(layers) for reason, layers in names.items()}

    def __str__(self) -> str:
        """A heading, the notes, the layers, and each reason once with the layers that it holds for."""
        lines = [f"{self.form}: {self.lowered} of {_count(len(self.layers), 'tiled layer')} on packed tiles"]
        lines += [f"  {entry}" for entry in (*self.notes, *self.layers)]
        for reason, names in self.reasons.items():
            who = names[0] if len(names) == 1 else f"{len(names)} layers ({', '.join(names)})"
            lines.append(f"  but for {who}: {reason}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Explanation:
    """The graphs that were compiled for a module, oldest first; printable."""

    graphs: tuple[GraphReport, ...]

    @property
    def totals(self) -> dict[str, int]:
        """Numbers of graphs, tiled layers, those of them on packed tiles, and different reasons."""
        return {
            "graphs": len(self.graphs),
            "layers": sum(len(graph.layers) for graph in self.graphs),
            "lowered": sum(graph.lowered for graph in self.graphs),
            "reasons": len({reason for graph in self.graphs for reason in graph.reasons}),
        }

    @property
    def total_line(self) -> str:
        """The totals in one line, or that nothing was compiled yet."""
        if not self.graphs:
            return "nothing was compiled with backend='tbn' yet: call the module once"
        t = self.totals
        layers = f"{t['lowered']} of {_count(t['layers'], 'tiled layer')} on packed tiles"
        return f"total: {_count(t['graphs'], 'graph')}, {layers}, {_count(t['reasons'], 'reason')}"

    def to_dict(self) -> dict[str, Any]:
        """The reports as plain data (ready for JSON): ``{"graphs": [...], "totals": {...}}``."""
        return {"graphs": [dataclasses.asdict(graph) for graph in self.graphs], "totals": self.totals}

    def section(self) -> Section:
        """The reports as a part of a page: a table for each graph, and what was not done, with the layers' names."""
        columns = (Column("layer"), Column("kind"), Column("what it runs on, and what was done"))
        parts: list[Part] = [Notes((self.total_line,))]
        for index, graph in enumerate(self.graphs):
            title = f"Graph {index}, {graph.form}: {graph.lowered} of {len(graph.layers)} on packed tiles"
            rows = tuple((layer.name, layer.kind, layer.state) for layer in graph.layers)
            reasons = [f"{', '.join(names)}: {reason}" for reason, names in graph.reasons.items()]
            parts += [html.Table(title, columns, rows)] if rows else [Notes((title,))]
            parts += [Notes((*graph.notes, *reasons), listed=True)] if graph.notes or reasons else []
        return Section("Compiled graphs", tuple(parts))

    def to_html(self) -> str:
        """The reports as an HTML fragment that needs nothing else, neither style nor script."""
        return html.fragment(self.section())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.to_html()

    def __str__(self) -> str:
        """The reports of all graphs, and a line of totals."""
        return "\n".join([*(f"graph {index}, {graph}" for index, graph in enumerate(self.graphs)), self.total_line])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


@dataclass(frozen=True)
class _Entry:
    report: GraphReport
    weight_sets: Callable[[], Iterable[set[int]]]


# An entry lives as long as the compiled function that Dynamo keeps in its cache.
_entries: weakref.WeakKeyDictionary[Callable[..., Any], _Entry] = weakref.WeakKeyDictionary()


def add_report(
    compiled: Callable[..., Any], report: GraphReport, weight_sets: Callable[[], Iterable[set[int]]]
) -> None:
    """File a report, and log it.

    Args:
        compiled: the function that the backend returns for the graph.
        report: what was done.
        weight_sets: gives the sets of weights, by id, that the graph has run on: one for each layer of a kind that is
            compiled by itself.
    """
    _entries[compiled] = _Entry(report, weight_sets)
    _logger.info("%s", report)


def only_set(weights: Iterable[Tensor]) -> Callable[[], Iterable[set[int]]]:
    """``weight_sets`` of a graph that runs on these weights only; they are not kept alive."""
    refs = [weakref.ref(weight) for weight in weights]
    return lambda: [{id(ref()) for ref in refs}]


def explain(compiled: nn.Module) -> Explanation:
    """What ``torch.compile(..., backend="tbn")`` made of a module, with a reason for all that it left as it was.

    Args:
        compiled: the result of ``torch.compile``, or a module with parts that were compiled (``layer.compile()``).

    Returns:
        One report for each graph that was compiled so far and has run on weights of the module.

    Raises:
        TBNError: ``compiled`` is not a module.

    Example:
        >>> import torch, tbn_compiler as tbn
        >>> net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        >>> fast = torch.compile(tbn.lower(tbn.transform(net, tbn.TilingConfig(min_size=0))), backend="tbn")
        >>> print(tbn.explain(fast))
        nothing was compiled with backend='tbn' yet: call the module once
    """
    if not isinstance(compiled, nn.Module):
        raise TBNError(
            f"expected a compiled nn.Module, got {type(compiled).__name__}: pass the module that was compiled"
        )
    own = {id(tensor) for tensors in (compiled.parameters(), compiled.buffers()) for tensor in tensors}
    return Explanation(
        tuple(
            entry.report
            for entry in list(_entries.values())
            if any(weights and weights <= own for weights in entry.weight_sets())
        )
    )
