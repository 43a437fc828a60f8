"""State in the caller's memory: exact over many steps, whatever reads the old values and makes the new ones."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import host
from tbn_compiler.backends.c.interface import read_interface
from tbn_compiler.backends.c.mcu import CPUS, measure
from tbn_compiler.cli import main
from tbn_compiler.verify import CFile, verify
from tests.backends.c.programs import Network, check
from tests.backends.c.toolchain import WARNINGS, needs_arm, needs_cc, run_strict, sanitizer_flags

SIZE, STEPS = 8, 7


class Step(nn.Module):
    """A function of an input and two arrays of state, with weights."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.a, self.b = function, nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)

    def forward(self, x: Tensor, s: Tensor, t: Tensor) -> Any:
        return self.function(self, x, s, t)


def made_early(m: Step, x: Tensor, s: Tensor, t: Tensor) -> Any:
    """Both new values are made before the old ones are read last."""
    u, v = m.a(x).tanh(), m.b(x).relu()
    return u + v + s * t, u, v


def joined(m: Step, x: Tensor, s: Tensor, t: Tensor) -> Any:
    """What is joined into a new value would lie there before the old one was read."""
    u, v = m.a(x)[:, :4].tanh(), m.b(x)[:, 4:].tanh()
    return m.a(s) + t, torch.cat([u, v], 1), torch.cat([t[:, 1:], x[:, :1]], 1)


# Name, function of a step, and the copies among its operations.
FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "in place": (lambda m, x, s, t: (x.relu(), 0.5 * s + x, t - x), 0),
    "read, then made": (lambda m, x, s, t: (m.a(s) + m.b(t), m.a(x).tanh(), m.b(x)), 0),
    "made from the state": (lambda m, x, s, t: (x + 1, m.a(s + x), m.b(t) * 0.5), 1),
    "made early": (made_early, 2),
    "exchanged": (lambda m, x, s, t: (x + s - t, t, s), 3),
    "delayed": (lambda m, x, s, t: (s - t, x, s), 2),
    "unchanged": (lambda m, x, s, t: (x + s + t, s, 0.5 * t), 0),
    "parts": (lambda m, x, s, t: (s[:, :3] + t[:, 3:6], torch.cat([s[:, 1:], x[:, :1]], 1), t.flip(1) + x), 2),
    "joined": (joined, 1),
    "an output, too": (lambda m, x, s, t: (h := m.a(s) + x, h, t + h), 1),
    "one from the other": (lambda m, x, s, t: (m.b(s), s * 0.5 + t, s + x), 1),
}


@needs_cc
def test_new_values_are_written_when_nothing_reads_the_old_ones(tmp_path: Path) -> None:
    torch.manual_seed(0)
    networks = [
        Network(
            Step(function),
            [(torch.randn(1, SIZE), torch.zeros(1, SIZE), torch.zeros(1, SIZE)) for _ in range(STEPS)],
            {
                "state": {"s": 1, "t": 2},
                "initial_state": {"t": torch.randn(1, SIZE)},
                "scratch": ("static", "caller")[index % 2],
                "self_test": index % 3 == 0,
            },
        )
        for index, (function, _) in enumerate(FUNCTIONS.values())
    ]
    check(networks, tmp_path)
    for network, (name, (_, expected)) in zip(networks, FUNCTIONS.items(), strict=True):
        assert network.plan is not None
        copies = [step for step in network.plan.steps if step.implementation.title == "copy" and step.kernel]
        assert len(copies) == expected, name


class Recurrent(nn.Module):
    """Layers with states of their own, one frame at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.lstm, self.head = nn.GRU(SIZE, 6, num_layers=2), nn.LSTM(6, 5), nn.Linear(5, 3)

    def forward(self, frame: Tensor, hidden: Tensor, state: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        y, hidden = self.gru(frame, hidden)
        y, (state, cell) = self.lstm(y, (state, cell))
        return self.head(y), hidden, state, cell


NAMES = {"hidden": 1, "state": 2, "cell": 3}


def frames(count: int) -> list[tuple[Tensor, ...]]:
    zeros = torch.zeros(1, 1, 5)
    return [(torch.randn(1, 1, SIZE), torch.zeros(2, 1, 6), zeros, zeros) for _ in range(count)]


@needs_cc
def test_recurrent_layers_step_by_step(tmp_path: Path) -> None:
    """As over many frames at once, too."""
    torch.manual_seed(1)
    model, steps = Recurrent().eval(), frames(20)
    networks = [Network(model, steps, {"state": NAMES, "optimize": way}) for way in ("speed", "size")]
    check(networks, tmp_path)
    with torch.no_grad():
        whole = model(torch.cat([frame for frame, *_ in steps]), *steps[0][1:])[0].flatten(1)
    stepped = run_strict(tmp_path / "net0.c", torch.stack([frame for frame, *_ in steps]))
    assert np.abs(stepped - whole.numpy()).max() < 1e-6
    header = (tmp_path / "net0.h").read_text()
    assert "void net0_run(net0_state *state, const float *input, float *output);" in header
    assert "    float state[5]; /* 1 x 1 x 5, input 2 and output 2 of the model */" in header
    assert "#define NET0_STATE_BYTES 88 " in header


_TWO_STATES = """
#include "model.h"
#include <stdio.h>
int main(void)
{
    static model_state states[2];
    float input[MODEL_INPUT_SIZE], output[MODEL_OUTPUT_SIZE];
    model_init(&states[0]);
    model_init(&states[1]);
    for (int i = 0; fread(input, sizeof input, 1, stdin) == 1; ++i) {
        model_run(&states[i % 2], input, output);
        fwrite(output, sizeof output, 1, stdout);
    }
    return 0;
}
"""


@needs_cc
def test_states_are_independent(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model, steps = Recurrent().eval(), frames(10)
    tbn.export_c(model, steps[0], tmp_path / "model.c", state=NAMES)
    (tmp_path / "main.c").write_text(_TWO_STATES)
    command = [host.find_compiler() or "cc", "-std=c99", *WARNINGS, *sanitizer_flags(), "main.c", "model.c", "-lm"]
    subprocess.run([*command, "-o", "main"], cwd=tmp_path, check=True)
    x = torch.stack([frame for frame, *_ in steps])
    ran = subprocess.run([tmp_path / "main"], input=x.numpy().tobytes(), capture_output=True, check=True)
    found = np.frombuffer(ran.stdout, np.float32).reshape(10, -1)
    for first in (0, 1):
        alone = run_strict(tmp_path / "model.c", x[first::2])
        assert np.array_equal(found[first::2], alone)
    assert not np.array_equal(run_strict(tmp_path / "model.c", x), found)


@needs_arm
def test_a_measurement_runs_steps_on_one_state(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model, steps = Recurrent().eval(), frames(4)
    plan = tbn.export_c(model, steps[0], tmp_path / "net.c", state=NAMES, target="cortex-m4")
    x = torch.stack([frame for frame, *_ in steps])
    with torch.no_grad():
        whole = model(x[:, 0], *steps[0][1:])[0].flatten(1)
    result = measure(tmp_path / "net.c", CPUS["cortex-m4"], x, whole)
    assert result.max_error is not None
    assert result.max_error < 1e-5
    every_run = tbn.export_c(model, steps[0], tmp_path / "plain.c", name="plain", target="cortex-m4")
    plain = measure(tmp_path / "plain.c", CPUS["cortex-m4"], torch.zeros(1, SIZE + 12 + 5 + 5))
    without = [m.static_bytes - p.scratch_bytes for m, p in ((result, plan), (plain, every_run))]
    assert without[0] - without[1] == plan.state_bytes == 88


class Counter(nn.Module):
    """State of every type, beside which bytes have to be aligned."""

    def forward(self, flag: Tensor, count: Tensor, byte: Tensor, total: Tensor) -> tuple[Tensor, ...]:
        return total + count.float(), flag.logical_not(), count + flag.int(), byte, total + count.float()


def test_types_and_the_size_of_the_structure(tmp_path: Path) -> None:
    inputs = (torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int32))
    inputs += (torch.zeros(5, dtype=torch.uint8), torch.zeros(3))  # type: ignore[assignment]
    state = {"flag": 1, "count": 2, "byte": 3, "total": 4}
    first = {"flag": torch.tensor([True, False, True]), "byte": torch.arange(5, dtype=torch.uint8)}
    networks = [Network(Counter(), [inputs] * 4, {"state": state, "initial_state": first})]
    check(networks, tmp_path)
    interface = read_interface(tmp_path / "net0.h")
    assert interface.state_bytes == 4 + 12 + 8 + 12
    assert [(member.name, member.shape, member.zeros) for member in interface.state] == [
        ("flag", (3,), False),
        ("count", (3,), True),
        ("byte", (5,), False),
        ("total", (3,), True),
    ]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no dictionary": ({"state": ["s"]}, "must be a dictionary from names of inputs to indices of outputs"),
    "no index": ({"state": {"s": "t"}}, "must be a dictionary from names of inputs to indices of outputs"),
    "no input": ({"state": {"h": 1}}, "state names the input 'h': the model's inputs are x, s, t"),
    "no output": ({"state": {"s": 3}}, r"state\['s'\]=3: the model has the outputs 0 to 2"),
    "twice": ({"state": {"s": 1, "t": 1}}, "output 1 cannot be the next value of two inputs"),
    "other shapes": ({"state": {"s": 0}}, r"is float32 \[1, 8\] and the output float32 \[1, 4\], so they cannot"),
    "all outputs": ({"state": {"x": 0, "s": 1, "t": 2}}, "cannot be one array|the run function would give nothing"),
    "no state": ({"initial_state": {"s": torch.zeros(1, SIZE)}}, "initial_state has 's', which state does not name"),
    "initial shape": (
        {"state": {"s": 1}, "initial_state": {"s": torch.zeros(SIZE)}},
        r"initial_state\['s'\] has the shape \[8\], the input \[1, 8\]",
    ),
    "a list": ({"state": {"s": 1}, "initial_state": [1]}, r"initial_state=\[1\] must be a dictionary from names"),
    "a tensor": (
        {"state": {"s": 1}, "initial_state": torch.zeros(1, SIZE)},
        "must be a dictionary from names of inputs",
    ),
    **{
        name: ({"state": {"s": 1}, "initial_state": {"s": given}}, rf"initial_state\['s'\] {message}")
        for name, given, message in (
            ("a string", "zeros", "is no tensor: "),
            ("ragged", [[0.0], [0.0, 1.0]], "is no tensor: "),
            ("complex", torch.ones(1, SIZE, dtype=torch.complex64), "is complex64: state holds real numbers"),
            (
                "double precision",
                np.full((1, SIZE), 0.1),
                "is float64, with elements that float32 has not: convert it to float32",
            ),
        )
    },
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_state_is_refused(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    model, example = Step(lambda m, x, s, t: ((x + s + t)[:, :4], s + x, t + x)), torch.zeros(1, SIZE)
    with pytest.raises(tbn.ExportError, match=message):
        tbn.export_c(model, (example, example, example), tmp_path / "net.c", **options)
    assert not list(tmp_path.iterdir())


def test_a_model_of_nothing_but_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tbn.ExportError, match="state names all outputs: the run function would give nothing"):
        tbn.export_c(nn.ReLU(), torch.zeros(1, SIZE), tmp_path / "net.c", state={"input": 0})


FIRST: dict[str, Any] = {
    "negative zeros": torch.full((1, SIZE), -0.0),
    "NaN": torch.full((1, SIZE), float("nan")),
    "bfloat16": torch.linspace(-1, 1, SIZE, dtype=torch.bfloat16)[None],
    "a list": [[0.5 * place for place in range(SIZE)]],
}


class Delay(nn.Module):
    """Gives what came before."""

    def forward(self, x: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        return s.clone(), x


@needs_cc
@pytest.mark.parametrize("name", FIRST)
def test_a_state_begins_with_the_bytes_of_its_initial_value(name: str, tmp_path: Path) -> None:
    x = torch.zeros(1, SIZE)
    tbn.export_c(Delay(), (x, x), tmp_path / "net.c", state={"s": 1}, initial_state={"s": FIRST[name]})
    found = run_strict(tmp_path / "net.c", torch.ones(2, SIZE))
    first = torch.as_tensor(FIRST[name]).float().numpy()
    assert np.array_equal(found, np.concatenate([first, np.ones((1, SIZE))]), equal_nan=True)
    assert np.array_equal(np.signbit(found[0]), np.signbit(first[0])) or name == "NaN"


class Generator(nn.Module):
    """All that it takes is state."""

    def forward(self, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return s.cos() + t, 0.5 * s, t + 1


@needs_cc
def test_a_program_without_inputs_runs_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, zeros, source = Generator(), torch.zeros(1, SIZE), tmp_path / "net.c"
    tbn.export_c(model, (zeros, zeros), source, state={"s": 1, "t": 2})
    program = CFile(source)
    inputs = program.random_inputs(None, np.random.default_rng(0))
    found = program.run(inputs)
    assert found["output"].shape == (1, SIZE)
    assert verify(found, model, inputs, program.run_model).within(1e-6)
    assert main(["bench-mcu", str(source)]) == 1
    assert "has no inputs, they are all state" in capsys.readouterr().err


@needs_cc
def test_a_state_that_nothing_touches_is_no_warning(tmp_path: Path) -> None:
    x = torch.zeros(1, SIZE)
    model = Step(lambda m, x, s, t: (x + 1, s, t))
    tbn.export_c(model, (x, x, x), tmp_path / "net.c", state={"s": 1, "t": 2})
    assert np.array_equal(run_strict(tmp_path / "net.c", x), np.ones((1, SIZE)))
    assert "(void)state;" in (tmp_path / "net.c").read_text()


def test_a_change_in_place_points_to_state(tmp_path: Path) -> None:
    x = torch.zeros(1, SIZE)
    with pytest.raises(
        tbn.ExportError, match=r"'s' while it runs: state has to be an input whose new value is returned"
    ):
        tbn.export_c(Step(lambda m, x, s, t: x + s.add_(x)), (x, x, x), tmp_path / "net.c")
