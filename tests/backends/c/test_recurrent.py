"""Recurrent layers and cells against PyTorch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tests.backends.c.programs import Network, check
from tests.backends.c.toolchain import needs_cc

INPUTS, HIDDEN, STEPS = 8, 6, 5

pytestmark = [needs_cc, pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")]


class Recurrent(nn.Module):
    """A recurrent layer whose results are picked, all of them or some."""

    def __init__(self, kind: type[nn.RNNBase], pick: Callable[..., Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.rnn, self.pick = kind(INPUTS, HIDDEN, **options), pick  # type: ignore[call-arg, arg-type]

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        given = states if len(states) < 2 else (states,)
        y, after = self.rnn(x, *given)
        found = (y, *(after if isinstance(after, tuple) else (after,)))
        return found if self.pick is None else self.pick(*found)


KINDS = [nn.GRU, nn.LSTM, nn.RNN]
OPTIONS: list[dict[str, Any]] = [
    {"batch_first": True},
    {"num_layers": 2, "bias": False},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
]


# With which options, whether the states are zeros, and the batch.
CASES = [(OPTIONS[0], True, 1), (OPTIONS[0], False, 3), (OPTIONS[1], False, 1), (OPTIONS[2], True, 3)]


def states_of(kind: type[nn.RNNBase], count: int, batch: int) -> list[Tensor]:
    return [torch.randn(count, batch, HIDDEN) for _ in range(2 if kind is nn.LSTM else 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_layers_with_and_without_states(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = []
    for options, zeros, batch in CASES:
        first, second = (batch, STEPS) if options.get("batch_first") else (STEPS, batch)
        count = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
        samples: list[tuple[Tensor, ...]] = [(torch.randn(first, second, INPUTS),) for _ in range(2)]
        if not zeros:
            samples = [(*sample, *states_of(kind, count, batch)) for sample in samples]
        export = {"optimize": ("speed", "balanced", "size")[len(networks) % 3]}
        networks.append(Network(Recurrent(kind, **options), samples, export))
    check(networks, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_some_results_and_less_usual_inputs(kind: type[nn.RNNBase], tmp_path: Path) -> None:
    torch.manual_seed(1)
    sequence, picks = torch.randn(STEPS, 1, INPUTS), [lambda y, *h: h[-1], lambda y, *h: y[-1] + 1]
    networks = [Network(Recurrent(kind, pick), [(sequence,)]) for pick in picks]
    networks += [
        Network(Recurrent(kind), [(torch.randn(STEPS, INPUTS),)]),  # without a batch
        Network(Recurrent(kind), [(torch.randn(1, 1, INPUTS), *states_of(kind, 1, 1))]),  # one step
        Network(Recurrent(kind, bidirectional=True), [(sequence,)], {"scratch": "caller", "layer_hook": True}),
    ]
    if kind is nn.RNN:
        networks.append(Network(Recurrent(kind, nonlinearity="relu"), [(sequence,)]))
    if kind is nn.LSTM:
        networks += [
            Network(Recurrent(kind, proj_size=3), [(sequence,)]),
            Network(
                Recurrent(kind, proj_size=4, num_layers=2, bidirectional=True, bias=False),
                [(torch.randn(STEPS, 2, INPUTS),)],
            ),
        ]
    check(networks, tmp_path)


class Cells(nn.Module):
    """One step of every cell."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gru, self.lstm = nn.GRUCell(INPUTS, HIDDEN, bias), nn.LSTMCell(HIDDEN, HIDDEN, bias)
        self.tanh, self.relu = nn.RNNCell(HIDDEN, HIDDEN, bias), nn.RNNCell(HIDDEN, 4, bias, nonlinearity="relu")

    def forward(self, x: Tensor, h: Tensor, g: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        h = self.gru(x, h)
        g, c = self.lstm(h, (g, c))
        return h, g, c, self.relu(self.tanh(g))


def test_cells(tmp_path: Path) -> None:
    torch.manual_seed(2)
    sizes = (INPUTS, HIDDEN, HIDDEN, HIDDEN)
    networks = [Network(Cells(bias), [tuple(torch.randn(2, n) for n in sizes)] * 2) for bias in (False, True)]
    networks.append(Network(Cells(True), [tuple(torch.randn(n) for n in sizes)]))
    check(networks, tmp_path)


class Smoothed(nn.Module):
    """One step of a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRUCell(INPUTS, HIDDEN)

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.gru(x, h)


TILINGS: list[dict[str, Any]] = [
    *({"p": 4, "alpha": "tile"}, {"p": 2, "replicate": "roll"}, {"p": 4, "tile_dtype": "float"}),
    {"p": 2, "replicate": "hadamard"},
]


def test_tiled_cells_run_on_the_kernels_for_tiles(tmp_path: Path) -> None:
    """Also with a batch, whose samples follow one another in each step."""
    torch.manual_seed(3)
    networks = []
    for index, config in enumerate(TILINGS):
        tiled = tbn.transform(Smoothed(), tbn.TilingConfig(min_size=0, **config))
        samples = [tuple(torch.randn(1 + index % 3, n) for n in (INPUTS, HIDDEN))]
        networks.append(Network(tiled, samples, {"target": ("generic", "cortex-m0plus")[index % 2]}))
    check(networks, tmp_path)
    for network in networks:
        assert network.plan is not None
        assert not any(step.notes for step in network.plan.steps)
        gru, *_ = network.plan.steps
        assert gru.title.startswith("gru: tiled GRU 8 -> 6")
        assert "linear_by" not in gru.kernel


def test_steps_are_a_loop_and_memory_is_that_of_one_step(tmp_path: Path) -> None:
    """The code is as long for many steps as for few, and without their outputs, memory does not grow with them."""
    plans, texts = [], []
    for steps in (3, 60):
        model = nn.Sequential(Recurrent(nn.GRU, lambda y, h: h[-1]), nn.Linear(HIDDEN, 2))
        plans.append(tbn.export_c(model, torch.randn(steps, 1, INPUTS), tmp_path / f"net{steps}.c", optimize="size"))
        text = (tmp_path / f"net{steps}.c").read_text()
        texts.append(re.sub(r"\d+", "0", text[text.index("void model_run") :]))
    assert texts[0] == texts[1]
    assert plans[0].scratch_bytes == plans[1].scratch_bytes
    assert plans[1].cost > 10 * plans[0].cost
    assert plans[0].steps[0].kernel == "fill, linear, gru_step"


def test_dropout_that_runs_is_refused(tmp_path: Path) -> None:
    class Always(nn.GRU):
        def train(self, mode: bool = True) -> Any:
            return super().train(True)

    model = Always(INPUTS, HIDDEN, num_layers=2, dropout=0.5)
    with pytest.raises(tbn.ExportError, match="it drops elements at random: export in evaluation mode"):
        tbn.export_c(model, torch.randn(STEPS, 1, INPUTS), tmp_path / "net.c")
