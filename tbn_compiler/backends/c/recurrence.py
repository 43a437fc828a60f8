"""The operation that a recurrent layer is: one layer in one direction, over all steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tbn_compiler.backends.c import ir

Cell = Literal["gru", "lstm", "rnn_tanh", "rnn_relu"]
GATES: dict[Cell, int] = {"gru": 3, "lstm": 4, "rnn_tanh": 1, "rnn_relu": 1}
"""Numbers that the input and the state have for each hidden element."""

Product = ir.Linear | ir.TiledLinear


@dataclass(frozen=True)
class Recurrence(ir.Operation):
    """``h = cell(of_input(x[t]), of_state(h))`` for every step ``t``, the last one first if ``reverse``.

    ``inputs`` are ``x [steps, batch, features]``, then the hidden state ``[batch, state]`` and, of an LSTM, the cell
    state ``[batch, hidden]`` before the first step; of zeros there is none.

    The output holds the hidden states behind all steps ``[steps, batch, state]``, or that behind the last one
    ``[batch, state]``; and behind it, where that is wanted, the cell state behind the last step ``[batch, hidden]``.

    Attributes:
        cell: what a step computes of the gates.
        steps, batch: sizes of ``x``.
        hidden: elements of a step's result; ``state`` are as many, or those of ``projection``.
        of_input, of_state: the layers that make the gates of one step of ``x``, and of the hidden state. What they read
            and write are no values of the graph.
        projection: the layer that makes the hidden state of a step's result (``proj_size``), or ``None``.
        given_state: whether there are states before the first step among ``inputs``.
        reverse: whether the last step comes first.
        all_steps: whether the output holds the hidden states of all steps.
        keeps_cell: whether it holds the cell state.
    """

    cell: Cell
    steps: int
    batch: int
    hidden: int
    of_input: Product
    of_state: Product
    projection: Product | None = None
    given_state: bool = False
    reverse: bool = False
    all_steps: bool = True
    keeps_cell: bool = False

    @property
    def overwritable(self) -> tuple[ir.Operand, ...]:
        """The hidden state, where the output is the next one."""
        if self.all_steps or self.keeps_cell or not self.given_state:
            return ()
        return self.inputs[1:2] if self.inputs.count(self.inputs[1]) == 1 else ()

    @property
    def state(self) -> int:
        """Elements of the hidden state of a sample."""
        made_by = self.of_state.inputs[0]
        return made_by.size // self.batch
