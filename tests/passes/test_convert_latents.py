"""``convert_latent`` and the passes behind it: from weights to tiles and back, and what stays as it is."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import ConfigError, SerializationError, TilingConfig, TransformError
from tbn_compiler.graph.records import get_records
from tbn_compiler.passes import HoldTiles, Scope
from tbn_compiler.passes.convert_latents import HoldWeights
from tests import oracle
from tests.test_latent_training import ALL, CASES, every_case, twins


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in oracle.tensors(module).items()}


# Both ways


@every_case
def test_round_trip(name: str) -> None:
    """Outputs stay equal, names too; shapes come back."""
    qat, held, x = twins(name)
    before = copy.deepcopy(qat.state_dict())
    qat.eval(), held.eval()
    oracle.assert_close(held(x), qat(x), 1e-12)
    back = tbn.convert_latent(held, "weight")
    assert shapes(back) == shapes(qat) or name == "transformer"
    oracle.assert_close(back(x), qat(x), 1e-12)
    again = tbn.convert_latent(back, "tile")
    assert shapes(again) == shapes(held)
    oracle.assert_close(again(x), qat(x), 1e-12)
    for key, value in before.items():  # nothing of the first module has changed
        if isinstance(value, Tensor):
            assert torch.equal(qat.state_dict()[key], value)
    assert {r.spec.latent for r in get_records(held) or () if r.spec} == {"tile"}
    assert {r.spec.latent for r in get_records(back) or () if r.spec} == {"weight"}


@every_case
def test_shapes_of_the_parameters(name: str) -> None:
    qat, held, _ = twins(name)
    specs = {record.trained: record.spec for record in get_records(held) or () if record.spec}
    found = dict(held.named_parameters())
    for key, spec in specs.items():
        assert found[key].shape == spec.layout.tile_shape
        assert found[key].is_contiguous()
    if name != "transformer":
        assert held.state_dict().keys() == qat.state_dict().keys()


@every_case
def test_converting_twice_changes_nothing(name: str) -> None:
    qat, held, _ = twins(name)
    again = tbn.convert_latent(held, "tile")
    assert [id(p) for p in again.parameters()] == [id(p) for p in held.parameters()]
    same = tbn.convert_latent(qat, "weight")
    assert [id(p) for p in same.parameters()] == [id(p) for p in qat.parameters()]


def test_other_parameters_and_buffers_are_shared() -> None:
    qat, _, _ = twins("cnn")
    held = tbn.convert_latent(qat, "tile")
    for key in ("stem.bias", "norm.weight", "head.bias"):
        assert held.get_parameter(key) is qat.get_parameter(key)
    assert held.norm.running_mean is qat.norm.running_mean
    assert held.stem.weight is not qat.stem.weight


def test_what_is_frozen_stays_frozen() -> None:
    qat, _, _ = twins("alphas")
    qat.get_parameter("0.weight").requires_grad_(False)
    qat.get_parameter("2.alpha_source").requires_grad_(False)
    held = tbn.convert_latent(qat, "tile")
    for module in (held, tbn.convert_latent(held, "weight")):
        assert {k for k, p in module.named_parameters() if not p.requires_grad} == {"0.weight", "2.alpha_source"}


def test_hooks_attributes_and_mode_are_kept() -> None:
    qat, _, x = twins("mlp")
    seen: list[str] = []
    qat[0].register_forward_hook(lambda *_: seen.append("layer"))
    qat.register_forward_pre_hook(lambda *_: seen.append("model"))
    qat.note = "mine"
    qat.eval()
    held = tbn.convert_latent(qat, "tile")
    held(x)
    assert seen == ["model", "layer"]
    assert held.note == "mine"
    assert not held.training
    assert type(held).__name__ == "Sequential"


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_and_device_are_kept(name: str, dtype: torch.dtype) -> None:
    qat, held, _ = twins(name, dtype)
    assert {p.dtype for p in held.parameters()} == {dtype}
    meta = tbn.convert_latent(copy.deepcopy(qat).to("meta"), "tile")
    assert all(p.is_meta for p in meta.parameters())


# Shared weights


def test_tied_weights_stay_tied() -> None:
    qat, held, _ = twins("tied")
    assert held.one._parameters["weight"] is held.two._parameters["weight"]
    assert len(list(held.parameters())) == len(list(qat.parameters()))
    back = tbn.convert_latent(held, "weight")
    assert back.one._parameters["weight"] is back.two._parameters["weight"]


def test_a_module_in_two_places() -> None:
    layer = nn.Linear(16, 16)
    qat = tbn.transform(nn.Sequential(layer, nn.ReLU(), layer), ALL)
    held = tbn.convert_latent(qat, "tile")
    assert held[0] is held[2]
    x = torch.randn(3, 16)
    oracle.assert_close(held(x), qat(x), 1e-5)


# Views of packed weights


class Packed(nn.Module):
    """A user's attention: one parameter for three projections."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * size, size) / 4)
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv.chunk(3)
        scores = F.linear(x, q) @ F.linear(x, k).mT
        return self.out(scores.softmax(-1) @ F.linear(x, v))  # type: ignore[no-any-return]


def test_chunks_of_a_graphs_weight() -> None:
    """Each becomes a parameter of its own, in eager mode, lowered, compiled and exported."""
    gm = fx.symbolic_trace(Packed())
    qat = tbn.transform(gm, ALL.replace(alpha="tile"))
    held = tbn.convert_latent(qat, "tile")
    x = torch.randn(2, 5, 16)
    oracle.assert_close(held(x), qat(x), 1e-5)
    assert "qkv" not in dict(held.named_parameters())
    assert sum(p.numel() for k, p in held.named_parameters() if "qkv" in k and "alpha" not in k) == 3 * 16 * 16 // 4
    oracle.assert_close(tbn.lower(held)(x), qat(x), 1e-5)
    oracle.assert_close(torch.export.export(held, (x,)).module()(x), qat(x), 1e-5)
    back = tbn.convert_latent(held, "weight")
    oracle.assert_close(back(x), qat(x), 1e-5)
    oracle.assert_close(tbn.lower(back)(x), qat(x), 1e-5)
    held.load_state_dict(copy.deepcopy(held).state_dict())
    direct = tbn.transform(fx.symbolic_trace(Packed()), ALL.replace(alpha="tile", latent="tile"))
    assert shapes(direct) == shapes(held)


def test_chunks_of_which_one_stays_float() -> None:
    """The parameter stays, for what reads it in float."""
    gm = fx.symbolic_trace(Packed())
    names = [record.name for record in get_records(tbn.transform(gm, ALL)) or ()]
    kept = next(name for name in names if name.endswith("1"))
    qat = tbn.transform(gm, ALL.replace(float_layers=(kept,)))
    # What one place needs in float, no place reads tiled.
    assert [name for name, reason in oracle.reasons(qat).items() if reason is None] == ["out"]
    x = torch.randn(2, 5, 16)
    held = tbn.convert_latent(qat, "tile")
    oracle.assert_close(held(x), qat(x), 1e-5)
    oracle.assert_close(tbn.lower(held)(x), qat(x), 1e-5)
    held(x).square().sum().backward()
    assert held.get_parameter("qkv").grad is not None
    direct = tbn.transform(gm, ALL.replace(float_layers=(kept,), latent="tile"))
    assert shapes(direct) == shapes(held)
    tbn.summary(direct)


def test_a_projection_of_an_attention_that_stays_float() -> None:
    model = nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 5, 16)
    names = [record.name for record in get_records(tbn.transform(nn.Sequential(model), ALL)) or ()]
    for kept in names:
        qat = tbn.transform(nn.ModuleDict({"a": model}), ALL.replace(float_layers=(f"a{kept[1:]}",)))
        held = tbn.convert_latent(qat, "tile")
        oracle.assert_close(held["a"](x, x, x), qat["a"](x, x, x), 1e-5)
        oracle.assert_close(tbn.lower(held)["a"](x, x, x), qat["a"](x, x, x), 1e-5)


class Conv1D(nn.Module):
    """A layer with a transposed weight, as GPT-2 has it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 4)
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


@oracle.both_forms
def test_transposed_weights(transform: Any) -> None:
    model = nn.Sequential(Conv1D(12, 16), nn.ReLU(), Conv1D(16, 8))
    qat = transform(model, ALL.replace(alpha="tile"))
    held = tbn.convert_latent(qat, "tile")
    x = torch.randn(3, 12)
    oracle.assert_close(held(x), qat(x), 1e-5)
    assert shapes(held)["0.weight"] == (4, 12)  # the unique rows, as the layer sees them
    oracle.assert_close(tbn.lower(held)(x), qat(x), 1e-5)
    back = tbn.convert_latent(held, "weight")
    assert shapes(back)["0.weight"] == (12, 16)
    oracle.assert_close(back(x), qat(x), 1e-5)
    held(x).sum().backward()


def test_a_layer_whose_weight_other_code_reads() -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) @ self.fc.weight + self.fc.weight.norm()

    qat = tbn.transform(Reader(), ALL)
    held = tbn.convert_latent(qat, "tile")
    x = torch.randn(3, 16)
    oracle.assert_close(held(x), qat(x), 1e-5)
    assert held.fc.weight.shape == (16, 16)
    assert held.fc._parameters["weight"].shape == (4, 16)
    oracle.assert_close(tbn.lower(held)(x), qat(x), 1e-5)
    back = tbn.convert_latent(held, "weight")
    oracle.assert_close(back(x), qat(x), 1e-5)


def test_a_model_of_which_parts_are_tiled() -> None:
    """Float layers, layers of another latent, and a part that is a graph."""
    part = tbn.transform(fx.symbolic_trace(nn.Sequential(nn.Linear(16, 16), nn.ReLU())), ALL)
    model = nn.ModuleDict({"graph": part, "held": tbn.transform(nn.Linear(16, 8), ALL.replace(latent="tile"))})
    model["plain"] = nn.Linear(8, 8)

    def run(model: Any, x: Tensor) -> Tensor:
        return model["plain"](model["held"](model["graph"](x)))  # type: ignore[no-any-return]

    x = torch.randn(3, 16)
    for latent, other in (("tile", "weight"), ("weight", "tile")):
        converted = tbn.convert_latent(model, latent)  # type: ignore[arg-type]
        oracle.assert_close(run(converted, x), run(model, x), 1e-5)
        assert {r.spec.latent for r in get_records(converted) or () if r.spec} == {latent}
        assert converted["plain"].weight is model["plain"].weight
        oracle.assert_close(run(tbn.convert_latent(converted, other), x), run(model, x), 1e-5)  # type: ignore[arg-type]


def test_overrides_choose_what_each_layer_trains() -> None:
    config = ALL.replace(overrides={"2": {"latent": "tile"}})
    qat = tbn.transform(CASES["mlp"][0](), config)
    assert {r.name: r.spec.latent for r in get_records(qat) or () if r.spec} == {
        "0": "weight",
        "2": "tile",
        "4": "weight",
    }
    assert qat.get_parameter("2.weight").shape == (4, 32)
    x = torch.randn(3, 16)
    for latent in ("tile", "weight"):
        oracle.assert_close(tbn.convert_latent(qat, latent)(x), qat(x), 1e-5)  # type: ignore[arg-type]


# Refusals


def test_refusals() -> None:
    qat, held, _ = twins("mlp", torch.float32)
    with pytest.raises(ConfigError, match=r"latent='tiles' is not one of 'weight', 'tile'"):
        tbn.convert_latent(qat, "tiles")  # type: ignore[arg-type]
    with pytest.raises(TransformError, match=r"Linear has no tiled layer to train: pass the module that .*transform"):
        tbn.convert_latent(nn.Linear(16, 16), "tile")
    for module in (qat, held):
        with pytest.raises(TransformError, match=r"before it is lowered"):
            tbn.convert_latent(tbn.lower(module), "tile")
    own = tbn.transform(CASES["mlp"][0](), ALL.replace(alpha_source="W"))
    with pytest.raises(TransformError, match=r"layer '0' takes its alphas from its weight \(alpha_source='W'\)"):
        tbn.convert_latent(own, "tile")
    assert tbn.convert_latent(own, "weight") is not own
    gradual = tbn.transform(CASES["mlp"][0](), ALL.replace(gradual=True))
    with pytest.raises(TransformError, match=r"gradual tiling blends"):
        tbn.convert_latent(gradual, "tile")
    with pytest.raises(TransformError, match=r"layer '0' trains its tile .* convert_latent\(module, 'tile'\)"):
        tbn.init_from_float(held)


# Checkpoints


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("name", ["mlp", "cnn", "experts", "tied", "transformer"])
def test_checkpoints_do_not_fit_the_other_latent(name: str, strict: bool) -> None:
    qat, held, _ = twins(name, torch.float32)
    for module, other in ((qat, held), (held, qat)):
        file = io.BytesIO()
        torch.save(other.state_dict(), file)
        file.seek(0)
        before = copy.deepcopy(module.state_dict())
        with pytest.raises((RuntimeError, SerializationError), match="latent='tile'") as error:
            module.load_state_dict(torch.load(file, weights_only=True), strict=strict)
        assert "convert_latent" in str(error.value)
        torch.testing.assert_close(tensors_of(module.state_dict()), tensors_of(before))


def tensors_of(state: Any) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if isinstance(value, Tensor)}


@every_case
def test_checkpoints(name: str, tmp_path: Path) -> None:
    """By ``torch.save`` and as safetensors, into a fresh model."""
    safetensors = pytest.importorskip("safetensors.torch")
    _, held, x = twins(name, torch.float32)
    held.eval()
    build, _, config = CASES[name]
    file = io.BytesIO()
    torch.save(held.state_dict(), file)
    file.seek(0)
    for state in (torch.load(file, weights_only=True), None):
        fresh = tbn.transform(build(), config.replace(latent="tile")).eval()
        if state is None:
            safetensors.save_model(held, str(tmp_path / "held.safetensors"))
            safetensors.load_model(fresh, str(tmp_path / "held.safetensors"), strict=False)
        else:
            fresh.load_state_dict(state)
        oracle.assert_close(fresh(x), held(x), 1e-6)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_a_packed_file_for_a_model_that_trains_tiles(name: str, tmp_path: Path) -> None:
    """It gives what it gives for any model: the lowered one."""
    _, held, x = twins(name, torch.float32)
    tbn.save(tbn.lower(held.eval()), str(tmp_path / "packed.safetensors"))
    fresh = tbn.transform(CASES[name][0](), CASES[name][2].replace(latent="tile")).eval()
    results = []
    for module in (fresh, tbn.convert_latent(fresh, "weight")):
        try:
            loaded = tbn.load(str(tmp_path / "packed.safetensors"), module)
        except tbn.TBNError as error:
            results.append(str(error)[:40])
            continue
        oracle.assert_close(loaded(x), held(x), 1e-5)
        results.append("loaded")
    assert len(set(results)) == 1


# The passes alone


def test_passes_tell_whether_they_changed_something() -> None:
    gm = oracle.whole_graph(CASES["mlp"][0](), ALL.replace(latent="tile"))
    assert not HoldTiles(Scope(TilingConfig())).call(gm).modified
    assert HoldWeights(Scope(TilingConfig())).call(gm).modified
    assert not HoldWeights(Scope(TilingConfig())).call(gm).modified
    assert not HoldTiles(Scope(TilingConfig())).call(gm).modified  # the records ask for no tiles
