from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tbn_compiler import TransformError
from tbn_compiler.graph.tracing import share_tensors_copy, trace, trace_whole
from tests import oracle


class Dropouts(nn.Module):
    """The two common ways in which a model passes its mode to a function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(self.fc(x), 0.5, training=self.training)
        return F.dropout(x, 0.5 if self.training else 0.0)


def test_mode_is_followed_in_both_directions() -> None:
    gm = trace(Dropouts())
    x = torch.randn(64, 8)
    for _ in range(2):
        gm.train()
        assert (gm(x) == 0).float().mean() > 0.5  # two dropouts of 0.5 leave a quarter
        gm.eval()
        assert torch.equal(gm(x), gm.get_submodule("fc")(x))
    scale = gm.train()(x) / gm.get_submodule("fc")(x)
    assert set(scale[scale != 0].round().tolist()) == {4.0}


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept_whatever_it_was(training: bool) -> None:
    model = nn.Sequential(Dropouts(), nn.BatchNorm1d(8)).train(training)
    model[1].eval()
    gm = trace(model)
    assert gm.training is training
    assert gm.get_submodule("1").training is False
    assert (model.training, model[0].training, model[1].training) == (training, training, False)


def test_training_flag_is_invisible_in_the_state() -> None:
    model = Dropouts()
    assert list(trace(model).state_dict()) == list(model.state_dict())
    assert list(dict(model.named_modules())) == ["", "fc"]


def test_mode_of_a_submodule_is_its_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Dropouts())
    gm = trace(model).train()
    gm.get_submodule("1").eval()
    x = torch.randn(16, 8)
    assert not (gm(x) == 0).any()


class Branches(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "data" and x.sum() > 0:
            x = -x
        if self.kind == "mode" and self.training:
            x = x + 1
        if self.kind == "constant":
            return self.fc(x) * (2.0 if self.training else 3.0)
        return self.fc(x)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("data", "cannot trace Branches as a whole: symbolically traced variables cannot be used as inputs to control"),
        ("mode", "its operations differ between training and evaluation mode"),
        ("constant", r"argument 2\.0 of .* becomes 3\.0 in evaluation mode"),
    ],
)
def test_untraceable_models(kind: str, message: str) -> None:
    with pytest.raises(TransformError, match=message):
        trace_whole(Branches(kind))


def test_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.stream = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(TransformError, match="cannot copy the structure of Sequential: cannot pickle 'generator'"):
        trace(model)


Pair = namedtuple("Pair", ["a", "b"])


class Outputs(nn.Module):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x)
        return {"dict": {"a": y, "b": (y + 1, [y])}, "named": Pair(y, y * 2), "tuple": (y, None, 3)}[self.kind]


@pytest.mark.parametrize("kind", ["dict", "named", "tuple"])
def test_structured_outputs(kind: str) -> None:
    model, x = Outputs(kind), torch.randn(2, 8)
    got, expected = trace(model)(x), model(x)
    assert type(got) is type(expected)
    oracle.assert_close(got, expected, 0)


class Awkward(nn.Module):
    """Things that a traced forward may hold besides layers."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.table = torch.arange(8.0)  # neither parameter nor buffer
        self.register_buffer("kept", torch.ones(8))
        self.register_buffer("temporary", torch.ones(8), persistent=False)
        self.own = nn.Parameter(torch.ones(8))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.kind == "buffers":
            return y * self.kept + self.temporary + self.own
        if self.kind == "literal":
            return y * torch.tensor(2.0)
        if self.kind == "attribute":
            return y + self.table
        if self.kind == "slice":
            return y[:, : x.shape[1] // 2]
        if self.kind == "nan":
            return y.masked_fill(y > 0, float("nan")).nan_to_num(5.0)
        if self.kind == "ellipsis":
            return y[..., None, 1:7:2]
        if self.kind == "dtype":
            return y.to(torch.float64).sum(dim=(-1,), keepdim=True)
        raise AssertionError(self.kind)


@pytest.mark.parametrize(
    "kind",
    [
        "buffers",
        "literal",
        "attribute",
        "slice",
        "nan",
        "ellipsis",
        "dtype",
    ],
)
def test_awkward_forwards(kind: str) -> None:
    model, x = Awkward(kind), torch.randn(3, 8)
    gm = trace(model)
    assert torch.equal(gm(x), model(x))
    assert torch.equal(gm.eval()(x), model.eval()(x))
    assert list(gm.state_dict()) == list(model.state_dict())
    inner = nn.Sequential(OrderedDict(inner=model))
    assert torch.equal(trace(inner)(x), model(x))


def test_concrete_args() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, flag: bool = False) -> Tensor:
            return x if flag else self.fc(x)

    model, x = Optional(), torch.randn(2, 8)
    assert type(trace(model)) is Optional
    with pytest.raises(TransformError, match="symbolically traced"):
        trace_whole(model)
    assert torch.equal(trace(model, {"flag": False})(x), model(x))


def test_share_tensors_copy() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.extra = torch.ones(3)
    clone = share_tensors_copy(model)
    assert clone is not model
    assert clone[0] is not model[0]
    originals, copies = (m.state_dict(keep_vars=True) for m in (model, clone))
    assert list(originals) == list(copies)
    assert all(copies[name] is tensor for name, tensor in originals.items())
    assert clone.extra is model.extra
    clone[0].register_parameter("new", nn.Parameter(torch.ones(1)))
    assert not hasattr(model[0], "new")


def test_shared_modules_and_parameters_stay_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.again = model[0]
    clone = share_tensors_copy(model)
    assert clone.again is clone[0]
    assert clone[1].weight is clone[0].weight is model[0].weight


def test_graph_module_is_copied_and_not_traced_again() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    before = gm.code
    copied = trace(gm)
    assert copied is not gm
    assert copied.graph is not gm.graph
    assert copied.get_parameter("0.weight") is gm.get_parameter("0.weight")
    assert gm.code == before


def test_unused_members_survive() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.unused = nn.Linear(4, 2)

    class First(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner
            self.spare = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.inner[0](x)  # type: ignore[index]

    first = First(model)
    gm = trace(first)
    assert list(gm.state_dict()) == list(first.state_dict())
    assert list(copy.deepcopy(gm).state_dict()) == list(first.state_dict())
    assert list(trace(gm).state_dict()) == list(first.state_dict())
