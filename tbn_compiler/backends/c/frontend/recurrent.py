"""Recurrent layers and their cells.

A layer is one :class:`~tbn_compiler.backends.c.recurrence.Recurrence` for each layer inside it and direction. The
converter is asked for each result in use and gives the same operations each time; they are added once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.frontend.importer import Importer, layer_of
from tbn_compiler.backends.c.frontend.registry import Arguments, Converter, ResultConverter, converts, converts_results
from tbn_compiler.backends.c.frontend.shapes import moved
from tbn_compiler.backends.c.recurrence import GATES, Cell, Product, Recurrence
from tbn_compiler.graph.calls import named_arguments
from tbn_compiler.tiling import TileLayout

_aten, _tbn = torch.ops.aten, torch.ops.tbn


@dataclass(frozen=True)
class _Weights:
    """The arguments of an operator that are the parameters of one layer in one direction."""

    of_input: Any
    of_state: Any
    input_bias: Any = None
    state_bias: Any = None
    projection: Any = None


@dataclass(frozen=True)
class _Results:
    """What one layer in one direction gives; ``None``: not wanted."""

    outputs: ir.Value | None
    hidden: ir.Value
    cell: ir.Value | None


class _Layers:
    """Adds the operations of one call of a recurrent operator.

    Attributes:
        importer: what takes them.
        node: the call.
        name: the cell.
        wanted: indices of the results that are read.
    """

    def __init__(self, importer: Importer, node: fx.Node, name: Cell, wanted: set[int]) -> None:
        self.importer, self.node, self.cell, self.wanted = importer, node, name, wanted
        self.layer = layer_of(node)

    def value(self, name: str, *shape: int) -> ir.Value:
        """A value between the operations."""
        return self.importer.temporary(self.node, name, shape)

    def add(self, operation: ir.Operation) -> ir.Value:
        """Add an operation, if no other result needed it."""
        self.importer.add_once(operation)
        return operation.output

    def move(self, name: str, source: ir.Operand, access: ir.Access) -> ir.Value:
        """Elements of an operand at another place."""
        output = ir.Value(f"{self.node.name}_{name}", access.sizes, "float32")
        return self.add(moved(output.name, self.layer, source, output, access))

    def part(self, name: str, source: ir.Operand, offset: int, *shape: int) -> ir.Value:
        """Neighbouring elements of an operand."""
        return self.move(name, source, ir.Access(shape, ir.row_major(shape), offset))

    def turned(self, name: str, source: ir.Operand) -> ir.Value:
        """The first two dimensions exchanged."""
        a, b, *rest = source.shape
        first, second, *others = ir.row_major(source.shape)
        return self.move(name, source, ir.Access((b, a, *rest), (second, first, *others)))

    def joined(self, name: str, parts: Sequence[ir.Value], outer: int, *shape: int) -> ir.Value:
        """Values one behind the other in each of ``outer`` rows."""
        if len(parts) == 1:
            return self.part(name, parts[0], 0, *shape)
        blocks = tuple(part.size // outer for part in parts)
        output = self.value(name, *shape)
        return self.add(ir.Concat(output.name, self.layer, tuple(parts), output, outer=outer, blocks=blocks))

    def product(self, name: str, weight: Any, bias: Any, batch: int) -> Product:
        """The layer that multiplies the inputs of one step, or the states."""
        importer, node = self.importer, self.node
        stored = importer.optional_constant(node, bias)
        if isinstance(weight, fx.Node) and weight.target is _tbn.unpack.default:
            args = named_arguments(weight)
            tile, alpha = importer.tile(node, args["tile"]), importer.constant(node, args["alpha"])
            options = {key: args[key] for key in ("p_in", "shift", "batch", "hadamard")}
            layout = TileLayout(tuple(args["shape"]), args["p"], **options)
            head = self._head(name, tile.name.removesuffix("_tile"), batch, *layout.shape)
            return ir.TiledLinear(**head, tile=tile, alpha=alpha, bias=stored, input_alpha=None, layout=layout)
        matrix = importer.constant(node, weight)
        return ir.Linear(**self._head(name, matrix.name, batch, *matrix.shape), weight=matrix, bias=stored)

    def _head(self, name: str, layer: str, batch: int, rows: int, columns: int) -> dict[str, Any]:
        values = [self.value(f"{name}_{what}", batch, size) for what, size in (("of", columns), ("made", rows))]
        return {"name": f"{self.node.name}_{name}", "layer": layer, "inputs": (values[0],), "output": values[1]}

    def run(
        self,
        name: str,
        x: ir.Operand,
        weights: _Weights,
        states: Sequence[ir.Operand],
        *,
        all_steps: bool,
        reverse: bool = False,
    ) -> _Results:
        """One layer in one direction on ``x [steps, batch, features]``."""
        steps, batch, _ = x.shape
        all_steps &= steps > 1  # one step is the last one
        of_input = self.product(f"{name}_input", weights.of_input, weights.input_bias, batch)
        of_state = self.product(f"{name}_state", weights.of_state, weights.state_bias, batch)
        projection = None
        if weights.projection is not None:
            projection = self.product(f"{name}_projection", weights.projection, None, batch)
        hidden, state = of_input.output.size // (batch * GATES[self.cell]), of_state.inputs[0].size // batch
        keeps_cell = self.cell == "lstm" and 2 in self.wanted
        result = (steps if all_steps else 1) * batch * state
        size = result + (batch * hidden if keeps_cell else 0)
        done = self.add(
            Recurrence(
                f"{self.node.name}_{name}",
                self.layer,
                (x, *states),
                self.value(name, size),
                self.cell,
                steps,
                batch,
                hidden,
                of_input,
                of_state,
                projection,
                given_state=bool(states),
                reverse=reverse,
                all_steps=all_steps,
                keeps_cell=keeps_cell,
            )
        )
        last = result - batch * state if all_steps and not reverse else 0
        return _Results(
            self.part(f"{name}_outputs", done, 0, steps, batch, state) if all_steps or steps == 1 else None,
            self.part(f"{name}_hidden", done, last, batch, state),
            self.part(f"{name}_cell", done, result, batch, hidden) if keeps_cell else None,
        )

    def states(self, name: str, given: Sequence[Any], index: int) -> tuple[ir.Operand, ...]:
        """The states before the first step, of ``[count, batch, size]`` that with this index; none if all are zeros."""
        importer = self.importer
        if all(importer.is_stored(value) and not importer.stored(value).any() for value in given):
            return ()
        found = [importer.operand(self.node, value, "float32") for value in given]
        return tuple(
            self.part(f"{name}_before{i}", state, index * math.prod(state.shape[-2:]), *state.shape[-2:])
            for i, state in enumerate(found)
        )


def _convert_layer(cell: Cell) -> ResultConverter:
    def convert(importer: Importer, node: fx.Node, args: Arguments, index: int) -> Sequence[ir.Operation]:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if args["train"] and args["dropout"]:
            raise importer.unsupported(source, "it drops elements at random: export in evaluation mode")
        wanted = {user.args[1] for user in source.users if user.users}
        layers = _Layers(importer, source, cell, {int(i) for i in wanted})  # type: ignore[arg-type]
        x: ir.Operand = importer.operand(source, args["input"], "float32")
        if args["batch_first"]:
            x = layers.turned("steps", x)
        steps, batch, _ = x.shape
        given = list(args["hx"]) if cell == "lstm" else [args["hx"]]
        directions = 2 if args["bidirectional"] else 1
        count = args["num_layers"] * directions
        size = len(args["params"]) // count
        per_layer = [args["params"][start : start + size] for start in range(0, size * count, size)]
        results: list[_Results] = []
        for place in range(args["num_layers"]):
            last = place == args["num_layers"] - 1
            found = []
            for direction in range(directions):
                number = place * directions + direction
                name = f"l{place}{'_reverse' if direction else ''}"
                weights = _weights(per_layer[number], args["has_biases"])
                before = layers.states(name, given, number)
                all_steps = not last or 0 in wanted
                found.append(layers.run(name, x, weights, before, all_steps=all_steps, reverse=direction == 1))
            results += found
            outputs = [result.outputs for result in found if result.outputs is not None]
            if outputs:
                width = sum(output.shape[-1] for output in outputs)
                x = layers.joined(f"l{place}_joined", outputs, steps * batch, steps, batch, width)
        value = importer.value_of(node)
        if index == 0:
            result: ir.Operand = layers.turned("outputs", x) if args["batch_first"] else x
        else:
            states = [result.cell if index == 2 else result.hidden for result in results]
            result = layers.joined(f"states{index}", [s for s in states if s is not None], 1, *value.shape)
        return (ir.Alias(value.name, layers.layer, (result,), value),)

    return convert


def _weights(parameters: Sequence[Any], has_biases: bool) -> _Weights:
    """The parameters of one layer in one direction by name; a projection comes behind all others."""
    of_input, of_state, *others = parameters
    biases = others[:2] if has_biases else (None, None)
    rest = others[2:] if has_biases else others
    return _Weights(of_input, of_state, *biases, *rest)


converts_results(_aten.gru.input)(_convert_layer("gru"))
converts_results(_aten.lstm.input)(_convert_layer("lstm"))
converts_results(_aten.rnn_tanh.input)(_convert_layer("rnn_tanh"))
converts_results(_aten.rnn_relu.input)(_convert_layer("rnn_relu"))


def _step(
    importer: Importer, node: fx.Node, result: fx.Node, args: Arguments, cell: Cell, index: int
) -> Sequence[ir.Operation]:
    """One step, on ``[batch, features]``."""
    given = list(args["hx"]) if cell == "lstm" else [args["hx"]]
    # As results of a layer: the states behind the last step are 1 and 2.
    wanted = {int(user.args[1]) + 1 for user in node.users if user.users} if cell == "lstm" else {1}  # type: ignore[arg-type]
    layers = _Layers(importer, node, cell, wanted)
    x = importer.operand(node, args["input"], "float32")
    x = layers.part("step", x, 0, 1, *x.shape)
    weights = _Weights(args["w_ih"], args["w_hh"], args["b_ih"], args["b_hh"])
    found = layers.run("cell", x, weights, layers.states("cell", given, 0), all_steps=False)
    value = importer.value_of(result)
    state = found.cell if index else found.hidden
    assert state is not None
    return (ir.Alias(value.name, layers.layer, (state,), value),)


def _convert_cell(cell: Cell) -> Converter:
    def convert(importer: Importer, node: fx.Node, args: Arguments) -> Sequence[ir.Operation]:
        return _step(importer, node, node, args, cell, 0)

    return convert


converts(_aten.gru_cell.default)(_convert_cell("gru"))
converts(_aten.rnn_tanh_cell.default)(_convert_cell("rnn_tanh"))
converts(_aten.rnn_relu_cell.default)(_convert_cell("rnn_relu"))


@converts_results(_aten.lstm_cell.default)
def _lstm_cell(importer: Importer, node: fx.Node, args: Arguments, index: int) -> Sequence[ir.Operation]:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return _step(importer, source, node, args, "lstm", index)
