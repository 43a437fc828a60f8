"""What was tiled and what it saves: bits, alphas and multiply-adds per layer, or why a layer was left alone.

Bits are counted as in the paper: the stored bits of linear and convolution weights (``q`` for a binary tile),
with alphas listed beside them; biases, norms and embeddings are not part of the count. A total in millions is the
paper's "#Params (M-Bit)".
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import fx, nn

from tbn_compiler import html
from tbn_compiler.errors import TBNError
from tbn_compiler.graph.attention import ATTENTION_WEIGHTS, attention_layer
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.layers import (
    derived_kind,
    find_record,
    function_arguments,
    is_transposed,
    layer_calls,
    module_kind,
)
from tbn_compiler.graph.records import TRANSPOSED, LayerRecord, get_records, graph_parts, join_key, own_records
from tbn_compiler.graph.shapes import visit_results
from tbn_compiler.html import Bars, Column, Facts, Section
from tbn_compiler.html.pictures import Bar
from tbn_compiler.tables import as_text, markdown
from tbn_compiler.tiling import TiledProduct
from tbn_compiler.torch_private import original_module

_FLOAT_BITS = 32


@dataclass(frozen=True)
class LayerSummary:
    """One row of a summary.

    Attributes:
        name: qualified name of the layer.
        kind: ``"linear"``, ``"conv2d"``, ...
        shape: shape of the weight; empty if the weight is computed in the graph.
        weights: ``N``, number of weight elements.
        p: number of copies; ``None`` for a layer left in float, as are the next four.
        p_in: copies along the input axis, 1 in the paper's layout.
        tile_size: ``q``, number of tile elements.
        unique_rows: rows with different sign patterns.
        alphas: number of stored scales.
        stored_bits: stored bits of the weight, without alphas; 0 where an earlier row stores it.
        macs: multiply-adds of the dense layer (per output position, or per call of the example inputs).
        macs_tiled: multiply-adds when only the rows that differ are computed; in a module from
            :func:`~tbn_compiler.optimize`, those of its operators, which also read less.
        note: why the layer was left alone, or a remark on how it was tiled.
        stored_with: name of the earlier row that stores the same float weight; ``None`` for a weight of its own.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    p: int | None
    p_in: int | None
    tile_size: int | None
    unique_rows: int | None
    alphas: int | None
    stored_bits: int
    macs: int | None
    macs_tiled: int | None
    note: str
    stored_with: str | None = None

    @property
    def tiled(self) -> bool:
        """Whether the layer is tiled."""
        return self.p is not None

    @property
    def bits_per_weight(self) -> float:
        """Stored bits for each weight element; alphas are not counted."""
        return self.stored_bits / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Summary:
    """The summary of a transformed or lowered module.

    Attributes:
        layers: one row per linear or convolution weight.
        per_position: multiply-adds are per output position; otherwise for the whole example input.
    """

    layers: tuple[LayerSummary, ...]
    per_position: bool

    @property
    def totals(self) -> dict[str, Any]:
        """Sums over all layers: weights, each once, stored bits, alphas, multiply-adds, and the ratios that follow."""
        weights = sum(row.weights for row in self.layers if row.stored_with is None)
        bits = sum(row.stored_bits for row in self.layers)
        macs = sum(row.macs or 0 for row in self.layers)
        macs_tiled = sum(row.macs_tiled or 0 for row in self.layers)
        return {
            "weights": weights,
            "stored_bits": bits,
            "stored_megabits": bits / 1e6,
            "bits_per_weight": bits / weights if weights else 0.0,
            "alphas": sum(row.alphas or 0 for row in self.layers),
            "macs": macs,
            "macs_tiled": macs_tiled,
            "tiled_layers": sum(row.tiled for row in self.layers),
            "float_layers": sum(not row.tiled for row in self.layers),
        }

    def to_dict(self) -> dict[str, Any]:
        """The summary as plain data (ready for JSON): ``{"layers": [...], "totals": {...}}``."""
        layers = [dataclasses.asdict(row) | {"bits_per_weight": row.bits_per_weight} for row in self.layers]
        return {"layers": layers, "totals": self.totals, "macs_per_position": self.per_position}

    def to_markdown(self) -> str:
        """The summary as a GitHub-flavoured Markdown table, with exact numbers and a column of notes."""
        t = self.totals
        counts = f"{t['tiled_layers']} tiled, {t['float_layers']} left alone"
        rows = [[*_cells(row, "{:,}".format), row.note] for row in self.layers]
        return markdown([*_TITLES, "note"], [*rows, [*self._total_cells("{:,}".format), counts]], _LEFT)

    def table(self) -> RenderableType:
        """The summary as a ``rich`` table with rounded numbers, and the notes under it."""
        table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False, show_footer=True)
        for title, total in zip(_COLUMNS, self._total_cells(_compact), strict=True):
            left = title in _LEFT
            # Names may fold on a narrow terminal, numbers never do.
            width = 6 if left else None
            table.add_column(
                title, total, justify="left" if left else "right", overflow="fold", min_width=width, no_wrap=not left
            )
        for row in self.layers:
            table.add_row(*map(escape, _cells(row, _compact)))
        t = self.totals
        unit = "per output position" if self.per_position else "for the example input"
        lines = [f"{t['tiled_layers']} layers tiled, {t['float_layers']} left alone; multiply-adds (MACs) {unit}"]
        lines += [f"{row.name}: {row.note}" for row in self.layers if row.note]
        return Group(table, *map(Text, lines))

    def section(self) -> Section:
        """The summary as a part of a page: totals, where bits and multiply-adds are, and the exact table."""
        t = self.totals
        unit = "per output position" if self.per_position else "for the example input"
        ratio = f"{_FLOAT_BITS / t['bits_per_weight']:.1f}x" if t["bits_per_weight"] else "-"
        facts = (
            ("weights", f"{t['weights']:,}"),
            ("stored bits", f"{t['stored_bits']:,}"),
            ("bits per weight", f"{t['bits_per_weight']:.3f}"),
            ("smaller than float32", ratio),
            ("scales (alphas)", f"{t['alphas']:,}"),
            ("multiply-adds", f"{_compact(t['macs_tiled'])} of {_compact(t['macs'])}" if t["macs"] else "-"),
        )
        columns = [Column(title, title not in _LEFT and title != "shape", _HINTS.get(title, "")) for title in _TITLES]
        counts = f"{t['tiled_layers']} tiled, {t['float_layers']} left alone"
        table = html.Table(
            f"Layers; multiply-adds (MACs) {unit}",
            (*columns, Column("note")),
            tuple((*_cells(row, "{:,}".format), row.note) for row in self.layers),
            (*self._total_cells("{:,}".format), counts),
        )
        return Section("Layers", (Facts(facts), self._bars(), table))

    def _bars(self) -> Bars:
        bits = max((row.stored_bits for row in self.layers), default=0) or 1
        macs = max((row.macs or 0 for row in self.layers), default=0) or 1
        rows = []
        for row in self.layers:
            share = 100 * row.stored_bits / bits
            text = f"{_compact(row.stored_bits)} ({row.bits_per_weight:.3f} a weight)"
            dense, tiled = row.macs or 0, row.macs_tiled or 0
            computed = "-" if row.macs is None else f"{_compact(tiled)} of {_compact(dense)}"
            work = Bar("multiply-adds", 100 * dense / macs, 100 * tiled / macs, computed)
            rows.append((row.name, (Bar("stored bits", share, share, text), work)))
        return Bars("Where the bits are, and the multiply-adds: computed ones of the dense layer's", tuple(rows))

    def to_html(self) -> str:
        """The summary as an HTML fragment that needs nothing else, neither style nor script."""
        return html.fragment(self.section())

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return self.to_html()

    def __str__(self) -> str:
        """The table in its natural width, for files and pipes: no name is folded."""
        return as_text(self.table())

    def _total_cells(self, number: Callable[[int], str]) -> list[str]:
        t = self.totals
        sums = [number(t[key]) for key in ("weights", "alphas", "stored_bits", "macs", "macs_tiled")]
        bits_per_weight = f"{t['bits_per_weight']:.3f}"
        return ["total", "", "", sums[0], "", "", "", sums[1], sums[2], bits_per_weight, sums[3], sums[4]]


_COLUMNS = (
    "layer",
    "kind",
    "shape",
    "N",
    "p",
    "q",
    "unique\nrows",
    "alphas",
    "stored\nbits",
    "bits/\nweight",
    "MACs\ndense",
    "MACs\ntiled",
)
_TITLES = tuple(title.replace("/\n", "/").replace("\n", " ") for title in _COLUMNS)  # in one line
_LEFT = ("layer", "kind", "note")
_HINTS = {
    "N": "weight elements",
    "p": "copies of the tile",
    "q": "elements of the tile",
    "unique rows": "rows with different signs: all that is multiplied",
    "alphas": "stored scales",
    "MACs dense": "multiply-adds of the layer without tiles",
    "MACs tiled": "multiply-adds of the rows that differ",
}


def _compact(value: int) -> str:
    """A number in at most six characters: exact below 10,000, else with a decimal prefix (k, M, G, T)."""
    if value < 10_000:
        return str(value)
    power = min((len(str(value)) - 1) // 3, 4)
    return f"{value / 1000**power:.1f}{' kMGT'[power]}"


def _cells(row: LayerSummary, number: Callable[[int], str]) -> list[str]:
    def optional(value: int | None) -> str:
        return "-" if value is None else number(value)

    counts = (row.tile_size, row.unique_rows, row.alphas, row.stored_bits)
    p = optional(row.p)
    if row.p is not None and row.p_in is not None and row.p_in > 1:
        p = f"{row.p // row.p_in}x{row.p_in}"
    shape = "x".join(map(str, row.shape)) or "-"
    bits_per_weight = f"{row.bits_per_weight:.3f}"
    macs = (optional(row.macs), optional(row.macs_tiled))
    return [row.name, row.kind, shape, number(row.weights), p, *map(optional, counts), bits_per_weight, *macs]


def summary(module: nn.Module, example_inputs: Any = None) -> Summary:
    """Summarise a module that :func:`~tbn_compiler.transform` or :func:`~tbn_compiler.lower` returned.

    Args:
        module: the transformed or lowered module.
        example_inputs: a tensor, or the arguments of ``forward`` as a tuple or by name. With it multiply-adds are
            counted for this input, every call of a layer included; without it they are given per output position.
            Nothing is computed: shapes are propagated.

    Returns:
        A :class:`Summary`: ``print`` gives a table, ``to_dict()`` and ``to_markdown()`` give data.

    Raises:
        TBNError: the module holds no layer records.
    """
    module = original_module(module)
    records = get_records(module)
    if records is None:
        raise TBNError(
            f"{type(module).__name__} has no layer records: pass the module that transform or lower returned"
        )
    calls = _calls_by_weight(module)
    sizes = None if example_inputs is None else _output_sizes(module, example_inputs)
    rows = [_summarize(record, calls.get(record.weight, []), sizes) for record in records]
    return Summary(_each_stored_once(module, records, rows), per_position=sizes is None)


def _each_stored_once(
    module: nn.Module, records: Iterable[LayerRecord], rows: Iterable[LayerSummary]
) -> tuple[LayerSummary, ...]:
    """The rows, with nothing stored by layers whose float weight an earlier row has, as an output layer's embedding."""
    first: dict[int, str] = {}
    found = []
    for record, row in zip(records, rows, strict=True):
        if record.spec is None and record.view in ("", TRANSPOSED):
            try:
                weight = id(module.get_parameter(record.parameter))
            except AttributeError:  # computed, or on a module that has no such parameter
                weight = id(row)
            if first.setdefault(weight, row.name) != row.name:
                known = repr(first[weight]) in row.note
                note = row.note if known else f"{row.note}; stored with {first[weight]!r}"
                row = dataclasses.replace(row, stored_bits=0, stored_with=first[weight], note=note)
        found.append(row)
    return tuple(found)


def summarize_records(records: Iterable[LayerRecord]) -> Summary:
    """Summarise records of layers whose calls are not known: multiply-adds are per output position, by the kind."""
    return Summary(tuple(_summarize(record, [], None) for record in records), per_position=True)


def _summarize(record: LayerRecord, calls: list[_Call], sizes: Counter[fx.Node] | None) -> LayerSummary:
    numel = math.prod(record.shape) if record.shape else 0
    countable = bool(record.shape) and record.kind.startswith(("linear", "conv"))
    times, computed = _count(record, calls, sizes)
    macs = numel * times if countable and times is not None else None
    if record.spec is None:
        return LayerSummary(
            record.name,
            record.kind,
            record.shape,
            numel,
            p=None,
            p_in=None,
            tile_size=None,
            unique_rows=None,
            alphas=None,
            stored_bits=_FLOAT_BITS * numel,
            macs=macs,
            macs_tiled=macs,
            note=f"left alone: {record.reason}",
        )
    layout, num_alphas = record.spec.layout, record.spec.num_alphas
    notes = [record.note] if record.note else []
    if record.tied:
        notes.append(f"shared with {', '.join(record.tied)}")
    if layout.kind == "hadamard":
        additions = TiledProduct(layout, num_alphas, record.groups).additions
        mixed = f", {additions:,} additions mix their results" if additions else ""
        notes.append(f"copies with Hadamard signs: no rows repeat{mixed}")
    elif layout.shift:
        notes.append(f"copies rolled by {layout.shift}: no rows repeat")
    elif layout.p > 1 and not layout.aligned:
        notes.append(f"misaligned: p does not divide {layout.rows} rows")
    return LayerSummary(
        record.name,
        record.kind,
        record.shape,
        numel,
        p=layout.p,
        p_in=layout.p_in,
        tile_size=layout.tile_size,
        unique_rows=layout.unique_rows,
        alphas=num_alphas,
        stored_bits=record.spec.tile_bits,
        macs=macs,
        macs_tiled=computed if countable else None,
        note="; ".join(notes),
    )


@dataclass(frozen=True)
class _Call:
    """One call of a weight: the place that has its positions, values in each, and multiply-adds for one of them.

    The place is the calling node, or for a transpose convolution the node of its input: there every input position
    takes part in the same number of multiply-adds. So it is for the projections of an attention, which are no nodes. It
    is a module where that calls its weight without a graph.
    """

    place: fx.Node | nn.Module
    values: int
    macs: int


def _calls_by_weight(module: nn.Module) -> dict[str, list[_Call]]:
    """The calls of each weight, by the name that the records of ``module`` have.

    A lowered call is counted as its operator stands in the graph: it may read and compute less than its record says.
    """
    calls: dict[str, list[_Call]] = {}
    for path, part in graph_parts(module):
        records = get_records(part) or ()
        for call in layer_calls(part):
            record = find_record(records, call)
            if record is None or not record.shape:
                continue
            operator = tiled_call(call.node)
            if is_transposed(call.kind):
                found = _Call(call.node.all_input_nodes[0], record.shape[0], _macs(record))
            elif call.node.target is attention_layer:
                place = function_arguments(call.node)[ATTENTION_WEIGHTS[call.argument]]
                found = _Call(place, record.shape[1], _macs(record))
            elif operator is None:
                found = _Call(call.node, record.shape[0], _macs(record))
            else:
                found = _Call(call.node, operator.layout.rows, operator.macs(part))
            calls.setdefault(join_key(path, record.weight), []).append(found)
    for path, layer in module.named_modules():
        for record in own_records(layer) or ():
            if _is_plain_layer(layer) and record.shape:
                found = _Call(layer, record.shape[0], _macs(record))
                calls.setdefault(join_key(path, record.weight), []).append(found)
    return calls


def _is_plain_layer(module: nn.Module) -> bool:
    """Whether a module is a layer with a record that is no graph: left alone, or with a weight that is read tiled."""
    is_graph = isinstance(module, fx.GraphModule)
    return derived_kind(module) is not None and not is_graph and own_records(module) is not None


def _macs(record: LayerRecord) -> int:
    """Multiply-adds of a layer for one output position (input position if it is transposed), by its record."""
    if record.spec is None or (is_transposed(record.kind) and record.groups > 1):
        return math.prod(record.shape) if record.shape else 0
    return TiledProduct(record.spec.layout, record.spec.num_alphas, record.groups).macs


def _count(record: LayerRecord, calls: list[_Call], sizes: Counter[Any] | None) -> tuple[int | None, int | None]:
    """Output positions of a weight over all its calls, and the multiply-adds for them; else one of the first call.

    ``None`` for a weight that functions use outside all graphs: how often is not known.
    """
    if sizes is None:
        return 1, calls[0].macs if calls else _macs(record)
    if record.spec is not None and not calls:
        return None, None
    positions = [sizes[call.place] // call.values for call in calls]
    if record.spec is not None and not any(positions) and any(isinstance(call.place, nn.Module) for call in calls):
        return None, None  # other code reads the weight of this layer
    return sum(positions), sum(times * call.macs for times, call in zip(positions, calls, strict=True))


def _output_sizes(module: nn.Module, example_inputs: Any) -> Counter[Any]:
    """Number of elements of every node's and layer module's results over all runs, by running it on shapes only."""
    sizes: Counter[Any] = Counter()

    def visit(place: Any, result: Any) -> None:
        if isinstance(result, torch.Tensor):
            sizes[place] += result.numel()

    def visit_layer(layer: nn.Module, inputs: tuple[Any, ...], result: Any) -> None:
        visit(layer, inputs[0] if is_transposed(module_kind(layer) or "") else result)

    with ExitStack() as stack:
        for layer in filter(_is_plain_layer, module.modules()):
            stack.callback(layer.register_forward_hook(visit_layer).remove)
        visit_results(module, example_inputs, visit)
    return sizes
