"""Streams give what the model gives for the whole sequence, chunk by chunk, in PyTorch and in C."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.graph.records import get_records
from tests.backends.c.toolchain import needs_cc, run_strict

TIME = 61


class Function(nn.Module):
    """A function of two convolutions of three frames and of the input."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 4, 3, **(options or {})), nn.Conv1d(4, 4, 3, dilation=2)
        self.function = function
        self.register_buffer("ramp", torch.arange(float(TIME)))
        self.register_buffer("gain", torch.rand(4, 1))

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def past(x: Tensor, frames: int) -> Tensor:
    return F.pad(x, (frames, 0))


class Frames(nn.Module):
    """Time in the middle: features last, as in speech."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8)
        self.mix, self.scale, self.out = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        nn.init.normal_(self.norm.running_mean)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x)).relu().permute(0, 2, 1)
        y = self.scale(y + F.dropout(self.mix(y), 0.1, self.training))
        return self.out(y.reshape(1, -1, 2, 4).flatten(2)).log_softmax(-1)


CONV, IMAGE = (1, 4, TIME), (1, 1, TIME, 6)
# Model, shape of its input, axis of time, and hop, delay and warm-up of its stream.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int, tuple[int, int, int]]] = {
    "causal": (lambda: Function(lambda m, x: m.b(past(m.a(past(x, 2)).relu(), 4))), CONV, 2, (1, 0, 0)),
    "unpadded": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.GELU(), nn.Conv1d(8, 4, 5)), CONV, 2, (1, 6, 6)),
    "cut behind": (lambda: Function(lambda m, x: x + m.a(x)[:, :, :-2].relu(), {"padding": 2}), CONV, 2, (1, 0, 0)),
    "looks ahead": (lambda: Function(lambda m, x: x + m.a(x) * m.gain, {"padding": 1}), CONV, 2, (1, 1, 1)),
    "same": (lambda: Function(lambda m, x: m.a(m.a(x)), {"padding": "same"}), CONV, 2, (1, 2, 3)),
    "branches": (
        lambda: Function(lambda m, x: torch.cat([m.a(x)[:, :2, 2:], m.b(x), x[:, :, 4:]], 1)),
        CONV,
        2,
        (1, 4, 4),
    ),
    "in place": (
        lambda: Function(lambda m, x: (y := m.a(x), (z := 1 * x[:, :, 2:]).add_(y).relu_(), m.b(z))[2]),
        CONV,
        2,
        (1, 6, 6),
    ),
    "strides": (
        lambda: nn.Sequential(
            *(nn.Conv1d(4, 8, 5, stride=3, bias=False), nn.MaxPool1d(3, 2), nn.ReLU(True)),
            *(nn.Conv1d(8, 4, 2, padding=1), nn.AvgPool1d(2, 1), nn.Conv1d(4, 4, 1)),
        ),
        CONV,
        -1,
        (6, 2, 3),
    ),
    "padded poolings": (
        lambda: nn.Sequential(nn.MaxPool1d(3, 2, 1), nn.AvgPool1d(3, 1, 1), nn.AvgPool1d(3, 1, 1, False, False)),
        CONV,
        2,
        (2, 2, 5),
    ),
    # The first outputs of "a" are its bias: the stream has none of them, so the next windows have to do without.
    "padded further than a window": (
        lambda: Function(lambda m, x: m.b(past(m.a(past(x, 4)).relu(), 2))[:, :, 2:]),
        CONV,
        2,
        (1, 2, 4),
    ),
    "padded further than one frame": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 1, padding=2), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 4)),
        CONV,
        2,
        (1, 1, 3),
    ),
    "one in two": (lambda: nn.Conv1d(4, 4, 1, stride=2), CONV, 2, (2, 0, 0)),
    "skips the first": (lambda: nn.Sequential(nn.Conv1d(4, 4, 2), nn.Conv1d(4, 4, 1, stride=2)), CONV, 2, (2, 0, 0)),
    "frames": (Frames, CONV, 2, (2, 1, 1)),
    "spectrogram": (
        lambda: nn.Sequential(
            *(nn.Conv2d(1, 8, (5, 3), (2, 1), (4, 1)), nn.ReLU(), nn.MaxPool2d((1, 2))),
            *(nn.Conv2d(8, 8, 3, padding=(2, 1), groups=8), nn.Conv2d(8, 4, 1)),
        ),
        IMAGE,
        2,
        (2, 0, 0),
    ),
}


def run(stream: tbn.Stream, x: Tensor, axis: int, chunk: int) -> Tensor:
    """All outputs, chunk by chunk."""
    states, outputs = stream.states, []
    with torch.no_grad():
        for start in range(0, x.shape[axis] - chunk + 1, chunk):
            y, *states = stream.module(x.narrow(axis, start, chunk), *states)  # type: ignore[assignment]
            outputs.append(y)
    return torch.cat(outputs, time_of(outputs[0], x, axis))


def time_of(output: Tensor, x: Tensor, axis: int) -> int:
    return 1 if output.dim() == 3 and output.shape[-1] == 3 else axis % x.dim()


def assert_streams(stream: tbn.Stream, y: Tensor, whole: Tensor, time: int) -> None:
    """From the warm-up on all outputs are the model's, as far as there are both, and not before where there are any."""
    first = stream.warm_up - stream.delay
    count = min(y.shape[time] - stream.warm_up, whole.shape[time] - first)
    assert count > 3
    wanted = whole.narrow(time, first, count)
    error = (y.narrow(time, stream.warm_up, count) - wanted).abs().max()
    assert error <= 1e-5 * wanted.abs().max()
    if first:
        before = y.narrow(time, stream.warm_up - 1, 1) - whole.narrow(time, first - 1, 1)
        assert before.abs().max() > 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_a_stream_gives_what_the_model_gives(name: str) -> None:
    torch.manual_seed(0)
    make, shape, axis, expected = MODELS[name]
    model, x = make().eval(), torch.randn(shape)
    before = copy.deepcopy(model.state_dict())
    stream = tbn.streaming(model, x, axis=axis)
    assert (stream.hop, stream.delay, stream.warm_up) == expected
    whole = model(x).detach()
    for chunk in (stream.hop, 2 * stream.hop, 5 * stream.hop):
        y = run(stream, x, axis, chunk)
        assert_streams(stream, y, whole, time_of(y, x, axis))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_stream_is_copied_pickled_optimised_and_takes_int8(tmp_path: Path) -> None:
    torch.manual_seed(2)
    net = nn.Sequential(nn.ConstantPad1d((2, 0), 0.0), nn.Conv1d(4, 16, 3), nn.BatchNorm1d(16), nn.ReLU())
    net.append(nn.Conv1d(16, 4, 3, padding=2))
    stream = tbn.streaming(tbn.lower(tbn.transform(net, tbn.TilingConfig(p=2, min_size=0))), torch.randn(CONV))
    runs, states = [], stream.states
    for _ in range(8):
        runs.append((torch.randn(1, 4, 1), *states))
        _, *states = stream.module(*runs[-1])  # type: ignore[assignment]
    with torch.no_grad():
        wanted = stream.module(*runs[-1])
        again = (copy.deepcopy(stream.module), pickle.loads(pickle.dumps(stream.module)))
        for module in (*again, tbn.optimize(stream.module, runs[0])):
            for have, want in zip(module(*runs[-1]), wanted, strict=True):
                torch.testing.assert_close(have, want)
    small = tbn.optimize(stream.module, runs[0], activation="int8", calibration=runs)
    plan = tbn.export_c(small, runs[0], tmp_path / "net.c", state=stream.state, int8_inputs=True)
    assert [port.value.dtype for port in plan.inputs] == ["int8"]
    assert {state.value.dtype for state in plan.states} == {"float32"}


@needs_cc
@pytest.mark.parametrize("name", ["strides", "frames", "spectrogram"])
def test_a_tiled_stream_in_c(name: str, tmp_path: Path) -> None:
    """The step computes the new outputs alone: as many instructions a frame as the whole sequence takes, or less."""
    torch.manual_seed(1)
    make, shape, axis, _ = MODELS[name]
    packed = tbn.lower(tbn.transform(make(), tbn.TilingConfig(p=2, min_size=0, alpha="tile"))).eval()
    x = torch.randn(shape)
    stream = tbn.streaming(packed, x, axis=axis)
    assert {record.weight for record in get_records(stream.module) or ()} == {
        record.weight for record in get_records(packed) or ()
    }
    chunk = x.narrow(axis, 0, stream.hop)
    plan = tbn.export_c(stream.module, (chunk, *stream.states), tmp_path / "net.c", state=stream.state)
    chunks = torch.stack(x.narrow(axis, 0, TIME // stream.hop * stream.hop).split(stream.hop, axis))
    found = torch.from_numpy(np.ascontiguousarray(run_strict(tmp_path / "net.c", chunks)))
    time = time_of(run(stream, x, axis, stream.hop), x, axis)
    wanted = torch.stack(run(stream, x, axis, stream.hop).split(1, time)).flatten(1)
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    whole = tbn.export_c(packed, x, tmp_path / "whole.c")
    assert plan.cost * (TIME // stream.hop) < 2 * whole.cost
    if name in ("frames", "spectrogram"):
        assert plan.scratch_bytes + plan.state_bytes < whole.scratch_bytes


class Ramp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(float(TIME))


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "global pooling": (
        lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.AdaptiveAvgPool1d(1)),
        r"cannot stream '1' \(aten.adaptive_avg_pool1d.default\): it pools over all frames of the sequence",
    ),
    "mean": (lambda: Function(lambda m, x: m.a(x).mean(-1)), "it is a mean over all frames of the sequence"),
    "flatten": (lambda: nn.Sequential(nn.Conv1d(4, 4, 3), nn.Flatten()), "'1' .*: it mixes time with another axis"),
    "features of frames": (lambda: nn.Linear(TIME, 4), "it computes along time"),
    "norm along time": (lambda: nn.LayerNorm(TIME), "it computes along time"),
    "softmax along time": (lambda: nn.Softmax(-1), "it computes along time"),
    "reflected": (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), "something else than zeros"),
    "padding that is scaled": (lambda: Function(lambda m, x: m.b(past(x, 4) + 1)), "it reads the padding of"),
    "padding that is given": (lambda: nn.ConstantPad1d((2, 0), 0.0), "what is padded in front is not read"),
    "outputs of padding": (lambda: nn.Conv1d(4, 4, 3, padding=3), r"'conv1d' .*: outputs come before the first frame"),
    "outputs of padding that are changed": (
        lambda: Function(lambda m, x: m.b(m.a(past(x, 4)).exp())),
        "'a' .*there is more padding in front than the windows reach back",
    ),
    "a part": (lambda: Function(lambda m, x: m.a(x)[:, :, 5:20]), "it takes a part of the sequence"),
    "rates": (lambda: Function(lambda m, x: m.a(x)[:, :, :5] + m.b(x)[:, :, :5].exp()), "a part of the sequence"),
    "backwards": (lambda: Function(lambda m, x: m.a(x.flip(-1))), "flip.*how it treats time is not known"),
    "stored frames": (Ramp, "it reads stored values for each frame of the sequence"),
    "ceil_mode": (lambda: nn.MaxPool1d(2, ceil_mode=True), "ceil_mode gives windows that end behind the last frame"),
    "joined along time": (lambda: Function(lambda m, x: torch.cat([x, x], -1)), "it joins along time"),
    "several outputs": (lambda: Function(lambda m, x: (x, m.a(x))), "takes 1 inputs and gives 2"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_stream_is_refused_by_name(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(tbn.TransformError, match=message):
        tbn.streaming(make(), torch.randn(CONV))


def tiled(net: nn.Module, activation: Any, input_scale: Any) -> nn.Module:
    config = tbn.TilingConfig(p=2, min_size=0, activation=activation, input_scale=input_scale)
    module = tbn.transform(net, config)
    if input_scale == "layer":
        tbn.calibrate_inputs(module, [torch.randn(CONV)])
    return tbn.lower(module).eval()


@pytest.mark.parametrize("activation", ["int8", "binary"])
def test_a_scale_of_the_whole_sequence_is_refused(activation: str) -> None:
    """Chunks would have scales of their own; one number for the layer is the same for them."""
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv1d(4, 4, 3, padding=2), nn.ReLU(), nn.Conv1d(4, 4, 3))
    message = (
        f"cannot stream '0' .*: the scale of its {activation} input is found .*input_scale='layer'.*calibrate_inputs"
    )
    with pytest.raises(tbn.TransformError, match=message):
        tbn.streaming(tiled(net, activation, "token"), torch.randn(CONV))
    packed, x = tiled(net, activation, "layer"), torch.randn(CONV)
    stream = tbn.streaming(packed, x)
    # The zeros of a state are -1 as binary numbers, those of the layer's padding are 0.
    assert (stream.delay, stream.warm_up) == ((2, 4) if activation == "binary" else (2, 2))
    with torch.no_grad():
        assert_streams(stream, run(stream, x, 2, 4), packed(x), 2)


@pytest.mark.parametrize("activation", ["int8", "binary"])
def test_the_scale_of_a_frame_streams(activation: str) -> None:
    packed, x = tiled(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)), activation, "token"), torch.randn(1, TIME, 4)
    stream = tbn.streaming(packed, x, axis=1)
    with torch.no_grad():
        torch.testing.assert_close(run(stream, x, 1, 1), packed(x))


@pytest.mark.parametrize("axis", [3, -4, "time", None, True, 1.0])
def test_the_axis_is_checked(axis: Any) -> None:
    with pytest.raises(tbn.TransformError, match=rf"axis={axis!r} is no axis of the example, which is \[1, 4, 61\]"):
        tbn.streaming(nn.Conv1d(4, 4, 3), torch.randn(CONV), axis=axis)


def test_arguments_are_checked() -> None:
    model = nn.Conv1d(4, 4, 3, stride=2)
    with pytest.raises(tbn.TransformError, match=r"expected an nn.Module, got int"):
        tbn.streaming(3, torch.randn(CONV))  # type: ignore[arg-type]
    with pytest.raises(tbn.TransformError, match="the example has to be a tensor, not list"):
        tbn.streaming(model, [1.0])  # type: ignore[arg-type]
    with pytest.raises(tbn.TransformError, match="the model is a graph already"):
        tbn.streaming(torch.fx.symbolic_trace(model), torch.randn(CONV))
    stream = tbn.streaming(model, torch.randn(CONV))
    with pytest.raises(ValueError, match="a chunk has 3 frames along axis 2: it takes a multiple of 2"):
        stream.module(torch.randn(1, 4, 3), *stream.states)
