"""Whole graphs from torch.export: called as the module is, with free sizes, or the reason why there is none."""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import host
from tbn_compiler.graph.capture import capture
from tbn_compiler.graph.records import get_records
from tests import oracle

ALL = tbn.TilingConfig(p=4, min_size=0)


class Options(nn.Module):
    """Arguments with defaults, one of them by name only."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor, scale: Tensor | None = None, *, shift: float = 0.0) -> Tensor:
        y: Tensor = self.fc(x) + shift
        return y if scale is None else y * scale


def packed(model: nn.Module) -> Any:
    return tbn.lower(tbn.transform(model, ALL))


def captured(model: nn.Module, example: Any) -> Any:
    gm = capture(model, example)
    assert isinstance(gm, fx.GraphModule), gm
    return gm


@pytest.mark.parametrize("duplicate", [lambda gm: gm, copy.deepcopy], ids=["itself", "copy"])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's own copy
def test_it_is_called_as_the_module_is(duplicate: Callable[[Any], Any]) -> None:
    model, x = packed(Options()), torch.randn(3, 16)
    calls: list[tuple[Any, list[tuple[tuple[Any, ...], dict[str, Any]]]]] = [
        (x, [((x,), {}), ((), {"x": x}), ((x, None), {}), ((x,), {"scale": None, "shift": 0.0})]),
        ((x, x), [((x, x), {}), ((x,), {"scale": x}), ((), {"scale": x, "x": x})]),
        ({"scale": x, "x": x}, [((x, x), {}), ((x,), {"scale": x}), ((), {"x": x, "scale": x})]),
    ]
    for example, ways in calls:
        gm = duplicate(captured(model, example))
        for args, kwargs in ways:
            oracle.assert_close(gm(*args, **kwargs), model(*args, **kwargs))


def test_what_was_not_seen_is_refused() -> None:
    gm, x = captured(packed(Options()), torch.randn(3, 16)), torch.randn(3, 16)
    for args, kwargs in (((x, x), {}), ((x,), {"scale": x}), ((x,), {"shift": 1.0}), ((x, None, 3), {}), ((), {})):
        with pytest.raises((ValueError, TypeError)):
            gm(*args, **kwargs)


Pair = namedtuple("Pair", ["a", "b"])


class Outputs(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(8, 8), kind

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        return {"dict": {"a": y, "b": (y + 1, [y])}, "named": Pair(y, y * 2), "tuple": (y, None, 3)}[self.kind]


@pytest.mark.parametrize("kind", ["dict", "named", "tuple"])
def test_structured_outputs(kind: str) -> None:
    model, x = packed(Outputs(kind)), torch.randn(2, 8)
    got, expected = captured(model, x)(x), model(x)
    assert type(got) is type(expected)
    oracle.assert_close(got, expected)


def test_state_and_records_are_those_of_the_module() -> None:
    model = packed(nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)))
    gm = captured(model, torch.randn(3, 16))
    assert not gm.training
    assert get_records(gm) == get_records(model)
    own = dict(model.named_buffers()) | dict(model.named_parameters())
    for name, tensor in (*gm.named_buffers(), *gm.named_parameters()):
        assert tensor is own[name] or torch.equal(tensor, own[name])
    assert set(oracle.tensors(gm)) <= set(oracle.tensors(model))


class Tokens(nn.Module):
    """Mixes batch and tokens by a reshape, after which a batch of one may be another case."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x - x[:, -1:]).transpose(1, 2).reshape(-1, 12, 8)
        return self.fc(tokens) + tokens.mean((1, 2), keepdim=True)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), Tokens()], ids=["conv", "tokens"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_example_runs_whatever_its_batch(model: nn.Module, batch: int) -> None:
    shape = (4, 6, 6) if isinstance(model, nn.Sequential) else (96, 7)
    low, x = packed(model), torch.randn(batch, *shape)
    gm = captured(low, x)
    oracle.assert_close(gm(x), low(x), 2e-6)
    if isinstance(model, nn.Sequential):  # every size is free
        for other in (torch.randn(1, 4, 6, 6), torch.randn(5, 4, 9, 7)):
            oracle.assert_close(gm(other), low(other), 2e-6)


def test_sizes_that_are_not_allowed_are_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x).view(3, 8)
            return y

    gm = captured(packed(Fixed()), torch.randn(3, 8))
    with pytest.raises((AssertionError, RuntimeError), match=r"Guard failed: .*x\.size\(\)"):
        gm(torch.randn(4, 8))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x if x.sum() > 0 else -x)
        return y


def test_a_module_without_a_graph_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    model, x = packed(Branches()), torch.randn(3, 8)
    reason = capture(model, x)
    assert isinstance(reason, str)
    assert reason.startswith("torch.export cannot trace Branches: ")
    assert "data-dependent" in reason
    assert "\n" not in reason
    assert capfd.readouterr().err == ""  # torch.export's own report is no news
    with pytest.warns(UserWarning, match="optimised layer by layer only: torch.export cannot trace Branches"):
        optimized = tbn.optimize(model, x)
    oracle.assert_close(optimized(x), model(x), 2e-6)


def test_example_inputs_that_do_not_fit() -> None:
    with pytest.raises(tbn.TBNError, match=r"Branches does not run on example inputs of shapes \(\[3, 5\],\)"):
        capture(packed(Branches()), torch.randn(3, 5))


def test_a_graph_is_a_graph_already() -> None:
    gm = packed(fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8))))
    assert capture(gm, torch.randn(3, 8)) is gm


class Remembers(nn.Module):
    """Keeps what it sees, in every place that a module has, and draws random numbers; torch.export cannot trace it."""

    def __init__(self, data_dependent: bool) -> None:
        super().__init__()
        self.fc, self.norm, self.data_dependent = nn.Linear(8, 8), nn.BatchNorm1d(8), data_dependent
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(8))
        self.plain = torch.zeros(8)
        self.count, self.log = 0, []  # type: ignore[var-annotated]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.fc(x if not self.data_dependent or x.sum() > -1e9 else -x))
        self.seen += y[0].detach()
        self.plain.add_(1)
        self.count += 1
        self.log.append(y)
        x.mul_(2)
        return y + torch.rand_like(y)


@pytest.mark.parametrize("data_dependent", [False, True], ids=["traced", "run"])
def test_the_module_is_left_alone(data_dependent: bool) -> None:
    model, x = packed(Remembers(data_dependent)), torch.randn(3, 8)
    model.norm.train()  # it would move its statistics
    before, given = {key: value.clone() for key, value in model.state_dict().items()}, x.clone()
    versions = [value._version for value in (*model.parameters(), *model.buffers(), x)]
    generator = torch.get_rng_state()
    result = capture(model, x)
    assert isinstance(result, str) == data_dependent
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(x, given)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [v._version for v in (*model.parameters(), *model.buffers(), x)] == versions
    assert torch.equal(model.plain, torch.zeros(8))
    assert (model.count, model.log) == (0, [])
    assert model.norm.training


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Linear(32, 8)

    def forward(self, x: Tensor, more: dict[str, Any], *, scale: Tensor) -> dict[str, Any]:
        y = self.norm(self.conv(x)).relu().flatten(1)
        y = self.fc(y) + more["a"][0]
        return {"y": y, "rest": (y * scale, [more["b"]])}


@pytest.mark.parametrize("again", [lambda gm: pickle.loads(pickle.dumps(gm)), copy.deepcopy], ids=["pickle", "copy"])
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's own copy
def test_an_optimised_model_is_copied_and_pickled(again: Callable[[Any], Any]) -> None:
    def inputs(batch: int) -> dict[str, Any]:
        x = torch.randn(batch, 4, 6)
        return {"x": x, "more": {"a": (x[:, 0, :1],), "b": x}, "scale": torch.randn(8)}

    low = packed(Nested())
    fast = tbn.optimize(low, inputs(3))
    for copied in (again(fast), again(again(fast))):
        assert list(copied.state_dict()) == list(fast.state_dict())
        assert get_records(copied) == get_records(fast)
        for some in (inputs(1), inputs(5)):
            oracle.assert_close(copied(**some), fast(**some), 0)
            oracle.assert_close(copied(some["x"], some["more"], scale=some["scale"]), low(**some), 2e-6)
        wrong = {**inputs(3), "x": torch.randn(3, 4, 9)}
        with pytest.raises((AssertionError, RuntimeError)) as error:
            copied(**wrong)
        with pytest.raises(type(error.value)) as expected:
            fast(**wrong)
        assert str(error.value) == str(expected.value)
        torch.nn.init.zeros_(copied.get_buffer("fc.weight_alpha"))
        assert not torch.equal(copied(**some)["y"], fast(**some)["y"])  # they share no tensor
        with pytest.raises(ValueError, match="input tree spec"):
            copied(some["x"], some["more"], scale=[some["scale"]])


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.a(x) - 2 * self.b(y)


@pytest.mark.parametrize("rows", [1, 3])
def test_one_tensor_as_two_example_inputs_stands_for_two_inputs(rows: int, tmp_path: Path) -> None:
    """torch.export takes it for a single one."""
    model, same = packed(Two()), torch.zeros(rows, 16)
    x, y = torch.randn(rows, 16), torch.randn(rows, 16)
    with torch.no_grad():
        expected = model(x, y)
        oracle.assert_close(tbn.optimize(model, (same, same))(x, y), expected)
    tbn.export_onnx(model, (same, same), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x.numpy(), "y": y.numpy()})
    oracle.assert_close(torch.from_numpy(found), expected)
    tbn.export_c(model, (same, same), tmp_path / "model.c")
    if host.find_compiler() is not None:
        (found,) = host.run_arrays(tmp_path / "model.c", [x.numpy(), y.numpy()]).values()
        oracle.assert_close(torch.from_numpy(found.reshape(rows, 16).copy()), expected)
