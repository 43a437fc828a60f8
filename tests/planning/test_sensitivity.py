from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.planning import Sensitivity


class Net(nn.Module):
    """A norm with statistics, dropout, an attention, a weight that a function uses, a counter and a shared weight."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.w = nn.Parameter(torch.randn(16, 16) / 4)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.5)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.second.weight = self.first.weight
        self.head = nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.attention(x, x, x)[0].mean(1) @ self.w
        y = self.second(self.first(self.drop(self.norm(y))))
        return self.head(y + 0.01 * torch.rand_like(y))


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    return [(torch.randn(6, 3, 16), torch.randint(4, (6,))) for _ in range(2)]


def mean_loss(model: nn.Module, batches: list[tuple[Tensor, Tensor]], seed: int = 5) -> float:
    torch.manual_seed(seed)
    with torch.no_grad():
        return sum(float(F.cross_entropy(model(x), y)) for x, y in batches) / len(batches)


OPTIONS: list[Any] = ["float", "binary", 2, {"p": 4, "alpha": "tile"}, {"p": 4, "replicate": "hadamard"}, (2, 2)]


def test_each_change_is_that_of_the_layer_alone(batches: Any) -> None:
    """Against the model that transform gives with all other layers in float and alphas from the weights."""
    torch.manual_seed(0)
    model = Net().eval()
    torch.manual_seed(5)
    found = tbn.sensitivity(model, batches, candidates=OPTIONS)
    before = mean_loss(model, batches)
    assert found.loss == pytest.approx(before, rel=1e-6)
    assert [layer.name for layer in found.layers] == [
        *("w_0", "attention.in_proj_weight_0", "attention.in_proj_weight_1", "attention.in_proj_weight_2"),
        *("attention.out_proj", "first", "head"),
    ]
    for name in ("w_0", "attention.out_proj", "first", "head"):
        for option in found.options[1:]:
            others = [layer.name for layer in found.layers if layer.name != name]
            config = tbn.TilingConfig(alpha_source="W", overrides={name: dict(option.options)}, float_layers=others)
            tiled = tbn.transform(model, config).eval()
            change = found[name][option.name]
            assert change == pytest.approx(mean_loss(tiled, batches) - before, abs=2e-6), (name, option)
            assert change != 0
        assert found[name]["float"] == 0


def test_views_of_one_parameter_are_measured_apart(batches: Any) -> None:
    torch.manual_seed(0)
    model = Net().eval()
    torch.manual_seed(5)
    found = tbn.sensitivity(model, batches, candidates=[2])
    before = mean_loss(model, batches)
    for index in range(3):
        other = copy.deepcopy(model)
        with torch.no_grad():
            part = other.attention.in_proj_weight.chunk(3)[index]
            part.copy_(part.abs().mean() * part.view(2, -1).sum(0).sign().repeat(2).view(16, 16))
        change = found[f"attention.in_proj_weight_{index}"]["p=2"]
        assert change == pytest.approx(mean_loss(other, batches) - before, abs=2e-6)


def test_the_model_stays_as_it_is(batches: Any) -> None:
    model = Net()
    model.norm.eval()  # modes may differ
    before, modes = copy.deepcopy(model.state_dict()), [part.training for part in model.modules()]
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    torch.manual_seed(3)
    state = torch.get_rng_state()
    tbn.sensitivity(model, iter(batches))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_passes_are_alike(batches: Any) -> None:
    """Options with the same weight have the same loss, whatever ran before: random numbers and buffers start alike."""
    model = Net()
    options = [{"p": 1, "alpha": alpha} for alpha in ("layer", "tile")]
    runs = []
    for candidates in ([2, *options], [options[1], 2]):
        torch.manual_seed(4)
        runs.append(tbn.sensitivity(model, batches, candidates=candidates))
    first, second = (run["head"] for run in runs)
    assert first["p=2"] == second["p=2"]
    assert first["p=1 alpha=layer"] == second["p=1 alpha=tile"]
    assert "p=1 alpha=tile" not in first  # it is the same tiling as the one before


def test_loss_and_inputs_of_the_users_own() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor, *, y: Tensor) -> dict[str, Tensor]:
            return {"z": self.fc(x + y)}

    model, (x, y) = Two(), torch.randn(2, 5, 16)
    found = tbn.sensitivity(
        model, [({"x": x, "y": y}, 3.0)], loss=lambda output, target: output["z"].square().mean() + target
    )
    assert found.loss is not None
    assert found.loss > 3


def test_without_data_the_errors_of_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    nn.init.zeros_(model[1].weight)
    found = tbn.sensitivity(model, candidates=["float", "binary", 4])
    w = model[0].weight.detach()
    alpha = w.abs().mean()
    tile = w.view(4, -1).sum(0).sign().repeat(4).view(16, 16)
    assert found.measure == "weight"
    assert found.loss is None
    assert found["0"]["float"] == 0
    assert found["0"]["binary"] == pytest.approx(float((w - alpha * w.sign()).square().sum() / w.square().sum()))
    assert found["0"]["p=4"] == pytest.approx(float((w - alpha * tile).square().sum() / w.square().sum()))
    assert found["1"] == {"float": 0, "binary": 0, "p=4": 0}


def test_a_loss_that_is_not_finite(batches: Any) -> None:
    model = nn.Linear(16, 16)

    def loss(output: Tensor, _: Any) -> Tensor:
        return torch.where((output - expected).abs().max() < 1e-5, torch.ones(()), torch.tensor(math.nan))

    x = torch.randn(3, 16)
    expected = model(x).detach()
    found = tbn.sensitivity(model, [(x, None)], loss=loss, candidates=["float", 2])
    assert found["weight"] == {"float": 0.0, "p=2": math.inf}
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["layers"][0]["changes"]["p=2"] is None
    assert Sensitivity.from_dict(data) == found
    with pytest.raises(tbn.TBNError, match="loss of the float model is nan"):
        tbn.sensitivity(model, [(x, None)], loss=lambda *_: torch.tensor(math.nan))


def test_what_is_refused() -> None:
    model, x = nn.Linear(16, 16), torch.randn(2, 16)
    for batches, told in (([], "at least one batch"), ([x], "a pair"), ([(x, x, x)], "a pair")):
        with pytest.raises(tbn.TBNError, match=told):
            tbn.sensitivity(model, batches)  # type: ignore[arg-type]
    with pytest.raises(tbn.TBNError, match=r"must give a scalar tensor, got \(2, 16\)"):
        tbn.sensitivity(model, [(x, x)], loss=lambda output, _: output)
    with pytest.raises(tbn.TBNError, match="must give a scalar tensor, got float"):
        tbn.sensitivity(model, [(x, x)], loss=lambda *_: 1.0)  # type: ignore[arg-type, return-value]
    with pytest.raises(tbn.TransformError, match="is tiled already: pass the trained float model"):
        tbn.sensitivity(tbn.transform(model))


def test_data_and_tables() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 3))
    found = tbn.sensitivity(model, candidates=["binary", 4, {"p": 8, "replicate": "hadamard"}])
    assert Sensitivity.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert found.layers[1].change("p=8 hadamard") is None  # 3 rows: as binary
    lines = found.to_markdown().splitlines()
    assert lines[0] == "| layer | kind | shape | binary | p=4 | p=8 hadamard |"
    assert len(lines) == 2 + 2 + 2
    assert str(found).splitlines()[0].split()[:3] == ["layer", "kind", "shape"]
    with pytest.raises(KeyError):
        found["2"]
    for data in (
        {},
        {"version": 2, "measure": "loss"},
        found.to_dict() | {"layers": [1]},
        found.to_dict() | {"loss": "x"},
        found.to_dict() | {"loss": math.nan},
        found.to_dict() | {"layers": [found.to_dict()["layers"][0] | {"changes": {"binary": math.nan}}]},
    ):
        with pytest.raises(tbn.ConfigError, match=r"[sS]ensitivity"):
            Sensitivity.from_dict(data)


def test_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    tbn.sensitivity(model).draw(tmp_path / "sensitivity.svg")
    text = (tmp_path / "sensitivity.svg").read_text()
    assert all(f"<!-- {name} -->" in text for name in ("0", "1", "2", "float", "binary", "p=8"))


def test_a_forward_that_writes_to_its_input() -> None:
    class Doubles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.mul_(2))

    model, x, labels = Doubles(), torch.randn(16, 32), torch.randint(8, (16,))
    kept = x.clone()
    found = tbn.sensitivity(model, [(x, labels)], candidates=["float", 2])
    assert torch.equal(x, kept)
    plain = nn.Sequential(nn.Linear(32, 8))
    plain[0].load_state_dict(model.fc.state_dict())
    assert found["fc"]["p=2"] == tbn.sensitivity(plain, [(2 * x, labels)], candidates=["float", 2])["0"]["p=2"]


def test_batches_count_by_their_length() -> None:
    model, x, labels = nn.Sequential(nn.Linear(32, 8)), torch.randn(40, 32), torch.randint(8, (40,))
    parts = list(zip(x.split(39), labels.split(39), strict=True))
    whole, split = (tbn.sensitivity(model, batches, candidates=[2])["0"]["p=2"] for batches in ([(x, labels)], parts))
    assert split == pytest.approx(whole, abs=1e-6)


def test_a_batch_that_does_not_fit_is_said() -> None:
    with pytest.raises(tbn.TBNError, match="the model, or the loss, does not take a batch: mat1 and mat2"):
        tbn.sensitivity(nn.Linear(32, 8), [(torch.randn(2, 31), torch.zeros(2, dtype=torch.long))])
