"""How the records of tilings travel in a ``state_dict``, and what is refused when one is loaded."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.graph.records import (
    EXTRA_STATE,
    decode_tilings,
    encode_tilings,
    get_records,
    is_tiling_record,
    record_holders,
    set_records,
    split_key,
    state_tilings,
)
from tbn_compiler.graph.tiling_data import describe_spec, spec_from_data, spec_to_data
from tbn_compiler.tiling import TileLayout, TileSpec
from tests import oracle

ALL = tbn.TilingConfig(p=4, min_size=0)
# torch.distributed.checkpoint warns that it runs in one process.
one_process = pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")


class Net(nn.Module):
    """A layer, a shared one, weights that functions use, one that is left in float and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)
        self.second.weight = self.first.weight
        self.w, self.right = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16, 8))
        self.head, self.embed = nn.Linear(8, 4), nn.Embedding(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(self.second(self.first(self.fc(x)).relu()), self.w)
        return self.head(y @ self.right)  # type: ignore[no-any-return]


CONFIG = ALL.replace(float_layers=("head",))


def tiled(config: tbn.TilingConfig = CONFIG, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return tbn.transform(Net(), config)


def graph(config: tbn.TilingConfig = CONFIG, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return tbn.transform(fx.symbolic_trace(Net()), config)


def lowered(config: tbn.TilingConfig = CONFIG, seed: int = 0) -> Any:
    return tbn.lower(tiled(config, seed))


BUILDS: dict[str, Callable[..., Any]] = {"module": tiled, "graph": graph, "lowered": lowered}
builds = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS.keys())


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(torch.linspace(-1, 1, 48).view(3, 16))
    return result


# Round trips


def by_torch(state: Mapping[str, Any], folder: Path) -> Any:
    torch.save(state, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def by_safetensors(state: Mapping[str, Any], folder: Path) -> Any:
    safetensors.torch.save_file({key: value.clone() for key, value in state.items()}, folder / "state.safetensors")
    return safetensors.torch.load_file(folder / "state.safetensors")


@builds
@pytest.mark.parametrize("through", [by_torch, by_safetensors])
def test_files_of_tensors(build: Any, through: Any, tmp_path: Path) -> None:
    source, target = build(seed=1), build(seed=2)
    assert not torch.equal(output(source), output(target))
    state = through(source.state_dict(), tmp_path)
    assert state_tilings(state) == {r.weight: r.spec for r in get_records(source) or () if r.spec} | (
        {} if build is graph else {"second.weight": get_spec(source, "first")}
    )
    assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
    assert torch.equal(output(source), output(target))


def get_spec(model: nn.Module, name: str) -> TileSpec:
    spec = next(record.spec for record in get_records(model) or () if record.name == name)
    assert spec is not None
    return spec


@one_process
@builds
@pytest.mark.parametrize("full", [False, True])
def test_distributed_checkpoints(build: Any, full: bool, tmp_path: Path) -> None:
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict

    source, target = build(seed=1), build(seed=2)
    options = StateDictOptions(full_state_dict=full)
    state = get_model_state_dict(source, options=options)
    assert {key for key in state if split_key(key)[1] == EXTRA_STATE}
    checkpoint.save(state, checkpoint_id=tmp_path)
    found = get_model_state_dict(target, options=options)
    checkpoint.load(found, checkpoint_id=tmp_path)
    set_model_state_dict(target, found, options=options)
    assert torch.equal(output(source), output(target))
    other = build(CONFIG.replace(p=8), seed=2)
    found = get_model_state_dict(other, options=options)
    if build is lowered:  # it compares the sizes of tiles
        with pytest.raises(CheckpointException, match=r"Size mismatch .* for fc\.weight_tile"):
            checkpoint.load(found, checkpoint_id=tmp_path)
        return
    checkpoint.load(found, checkpoint_id=tmp_path)
    with pytest.raises(RuntimeError, match="layer 'fc' is tiled with p=8, 1 alpha from A, in the checkpoint with p=4"):
        set_model_state_dict(other, found, options=options)


def test_where_records_stand() -> None:
    qat = tiled()
    assert {path for path, _ in record_holders(qat)} == {"", "fc", "first", "second", "head", "embed"}
    extra = {key for key in qat.state_dict() if split_key(key)[1] == EXTRA_STATE}
    assert extra == {EXTRA_STATE, *(f"{name}.{EXTRA_STATE}" for name in ("fc", "first", "second"))}
    names = [(r.name, r.weight, r.parameter, r.view, r.tied) for r in get_records(qat) or () if r.spec]
    assert names == [
        ("w", "w", "w", "", ()),
        ("right_0", "right_0", "right", ".t()", ()),
        ("fc", "fc.weight", "fc.weight", "", ()),
        ("first", "first.weight", "first.weight", "", ("second.weight",)),
    ]
    assert get_records(Net()) is None
    head = get_records(qat.head)
    assert head is not None
    assert "float_layers pattern" in str(head[0].reason)


def test_an_embedding_and_a_layer_that_share_a_weight_are_both_listed() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc, self.head = nn.Embedding(12, 16), nn.Linear(16, 16), nn.Linear(16, 12, bias=False)
            self.copied = nn.Linear(16, 12, bias=False)
            self.head.weight = self.copied.weight = self.embed.weight

    reasons = oracle.reasons(tbn.transform(Tied(), ALL))
    assert list(reasons) == ["embed", "fc", "head"]
    records = {record.name: record for record in get_records(tbn.transform(Tied(), ALL)) or ()}
    assert records["head"].tied == ("copied.weight",)
    assert "shared with Embedding 'embed'" in str(records["head"].reason)


def test_set_records_reaches_all_places_of_a_shared_weight() -> None:
    """The other place is the one that is left when the first is replaced, or used alone."""
    qat = tiled()
    other = get_spec(tiled(CONFIG.replace(p=8)), "first")
    records = [replaced(record, other) if record.name == "first" else record for record in get_records(qat) or ()]
    set_records(qat, records)
    assert get_records(qat) == tuple(records)
    for name in ("first", "second"):
        assert get_spec(nn.ModuleDict({name: getattr(qat, name)}), name) == other


def replaced(record: Any, spec: TileSpec) -> Any:
    import dataclasses

    return dataclasses.replace(record, spec=spec, note="changed")


def test_transforming_again_adds_no_records() -> None:
    """The alpha source of a weight that reads tiled is a matrix too, and no weight."""
    qat = tiled()
    again = tbn.transform(tbn.transform(qat, CONFIG), CONFIG)
    assert get_records(again) == get_records(qat)
    assert list(again.state_dict()) == list(qat.state_dict())


# What does not fit

OTHERS: dict[str, tuple[tbn.TilingConfig, str]] = {
    "p": (CONFIG.replace(p=8), "p=8, 1 alpha from A"),
    "pair": (CONFIG.replace(p=(2, 2)), r"p=\(2, 2\), 1 alpha from A"),
    "roll": (CONFIG.replace(replicate="roll", shift=3), r"p=4, replicate='roll' \(shift 3\), 1 alpha from A"),
    "signs": (CONFIG.replace(replicate="hadamard"), "p=4, replicate='hadamard', 1 alpha from A"),
    "alphas": (CONFIG.replace(alpha="tile"), "p=4, 4 alphas from A"),
    "source": (CONFIG.replace(alpha_source="W"), "p=4, 1 alpha from W"),
    "tile": (CONFIG.replace(tile_dtype="float"), "p=4, 1 alpha from A, full-precision tile"),
}


@builds
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_another_tiling_is_refused(build: Any, other: str, strict: bool) -> None:
    config, text = OTHERS[other]
    target, state = build(), build(config, seed=1).state_dict()
    before = copy.deepcopy(target.state_dict())
    message = f"layer 'fc' is tiled with p=4, 1 alpha from A, in the checkpoint with {text}"
    with pytest.raises(RuntimeError, match=message) as caught:
        target.load_state_dict(state, strict=strict)
    for name in ("w", "right_0", "first", "second") if build is not graph else ("w", "right_0", "first"):
        assert f"layer {name!r} is tiled with p=4, 1 alpha from A, in the checkpoint" in str(caught.value)
    # Nothing of a module that refuses is loaded; what a graph calls are modules of their own.
    others = ("head", "embed", *(("fc", "first", "second") if build is graph else ()))
    untouched = {key for key in before if not key.startswith(others)}
    assert all(torch.equal(target.state_dict()[key], before[key]) for key in untouched)


@pytest.mark.parametrize("strict", [True, False])
def test_a_part_compares_itself(strict: bool) -> None:
    state = tiled(CONFIG.replace(p=8)).fc.state_dict()
    with pytest.raises(RuntimeError, match=r"layer 'weight' is tiled with p=4, .*, in the checkpoint with p=8"):
        tiled().fc.load_state_dict(state, strict=strict)
    around = nn.Sequential(tiled())
    with pytest.raises(RuntimeError, match=r"layer '0\.fc' is tiled with p=4, .*, in the checkpoint with p=8"):
        around.load_state_dict(nn.Sequential(tiled(CONFIG.replace(p=8))).state_dict(), strict=strict)


@builds
@pytest.mark.parametrize("strict", [True, False])
def test_a_layer_that_is_float_on_one_side_is_refused(build: Any, strict: bool) -> None:
    some, more = CONFIG.replace(float_layers=("head", "fc", "right*")), CONFIG
    with pytest.raises(RuntimeError) as caught:
        build(some).load_state_dict(build(more).state_dict(), strict=strict)
    assert "layer 'fc'" in str(caught.value)
    assert "(p=4, 1 alpha from A)" in str(caught.value)
    assert "right_0'" in str(caught.value)
    with pytest.raises(RuntimeError) as caught:
        build(more).load_state_dict(build(some).state_dict(), strict=strict)
    assert "layer 'fc' is tiled (p=4, 1 alpha from A), in the checkpoint it is float" in str(caught.value)
    assert "layer 'right_0' is tiled (p=4, 1 alpha from A), in the checkpoint it is float" in str(caught.value)
    assert "'w'" not in str(caught.value)


def test_the_reason_is_told() -> None:
    some = CONFIG.replace(float_layers=("head", "fc"))
    message = r"layer 'fc' is float \(kept in float by name .* in the checkpoint it is tiled \(p=4, 1 alpha from A\)"
    with pytest.raises(RuntimeError, match=message):
        tiled(some).load_state_dict(tiled().state_dict(), strict=False)


def test_comparing_survives_copies() -> None:
    """A copy, a pickled one, one that was transformed again and a lowered one refuse as the first does."""
    some = tiled(CONFIG.replace(float_layers=("head", "fc")))
    file = io.BytesIO()
    torch.save(some, file)
    file.seek(0)
    again = tbn.transform(some, CONFIG.replace(float_layers=("head", "fc")))
    for model in (copy.deepcopy(some), torch.load(file, weights_only=False), again):
        with pytest.raises(RuntimeError, match="layer 'fc' is float") as caught:
            model.load_state_dict(tiled().state_dict(), strict=False)
        assert str(caught.value).count("layer 'fc'") == 1
    with pytest.raises(RuntimeError, match="layer 'fc' is float"):
        tbn.lower(some).load_state_dict(lowered().state_dict(), strict=False)


def test_a_part_of_a_checkpoint_loads() -> None:
    """Nothing is said about layers that it has not."""
    source, target = tiled(seed=1), tiled(seed=2)
    state = {key: value for key, value in source.state_dict().items() if key.startswith("fc")}
    target.load_state_dict(state, strict=False)
    assert torch.equal(target.fc.alpha_source, source.fc.alpha_source)
    assert not torch.equal(target.first.alpha_source, source.first.alpha_source)


# Checkpoints without records


def test_a_float_checkpoint_loads() -> None:
    torch.manual_seed(3)
    trained, qat = Net(), tiled()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = qat.load_state_dict(trained.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert {split_key(key)[1].rpartition("alpha_source")[1] for key in result.missing_keys} == {"alpha_source"}
    for key, value in trained.state_dict().items():
        assert torch.equal(qat.state_dict()[key], value), key
    with pytest.raises(RuntimeError, match="Missing key"):
        qat.load_state_dict(trained.state_dict())


def test_a_checkpoint_of_tiled_layers_goes_into_the_float_model() -> None:
    """Which is no transformed model, and compares nothing."""
    model, qat = Net(), tiled(seed=4)
    result = model.load_state_dict(qat.state_dict(), strict=False)
    assert result.missing_keys == []
    assert torch.equal(model.fc.weight, qat.fc.weight)


@builds
def test_a_checkpoint_of_version_01_loads_with_one_warning(build: Any) -> None:
    source, target = build(seed=1), build(seed=2)
    state = {key: value for key, value in source.state_dict().items() if split_key(key)[1] != EXTRA_STATE}
    for _ in range(2):  # at each call, not once for good
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
        assert len(caught) == 1
        assert "does not say how they are tiled (it is of version 0.1, or was edited)" in str(caught[0].message)
    assert torch.equal(output(source), output(target))


# Classes with extra state of their own


class Counting(nn.Module):
    """Extra state beside a weight that reads tiled."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.steps = nn.Parameter(torch.randn(16, 16)), 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return F.linear(x, self.w)

    def get_extra_state(self) -> Any:
        return {"steps": self.steps}

    def set_extra_state(self, state: Any) -> None:
        self.steps = state["steps"]


class CountingLinear(nn.Linear):
    """A layer, which is replaced by its graph, with a tensor as extra state."""

    steps = 0

    def get_extra_state(self) -> Any:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Any) -> None:
        self.steps = int(state)


@pytest.mark.parametrize("build", [Counting, lambda: CountingLinear(16, 16)], ids=["reads", "layer"])
@pytest.mark.parametrize("whole", [False, True])
def test_extra_state_of_the_users_class(build: Any, whole: bool) -> None:
    def make(config: tbn.TilingConfig = ALL) -> tuple[Any, Any]:
        model = tbn.transform(nn.Sequential(build()), config)
        return (model, model[0]) if whole else (model[0], model[0])

    (source, inner), (target, copied) = make(), make()
    inner.steps = 7
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert set(state_tilings(state).values()) == {TileSpec(TileLayout((16, 16), 4), 1, "A")}
    assert str(target.load_state_dict(state)) == "<All keys matched successfully>"
    assert copied.steps == 7
    other, untouched = make(ALL.replace(p=8))
    with pytest.raises(RuntimeError, match="p=8, 1 alpha from A, in the checkpoint with p=4, 1 alpha from A"):
        other.load_state_dict(state, strict=False)
    assert untouched.steps == 0


@pytest.mark.parametrize("build", [Counting, lambda: CountingLinear(16, 16)], ids=["reads", "layer"])
def test_float_checkpoints_with_extra_state(build: Any) -> None:
    trained = nn.Sequential(build())
    trained[0].steps = 5
    qat = tbn.transform(nn.Sequential(build()), ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert qat.load_state_dict(trained.state_dict(), strict=False).unexpected_keys == []
    assert qat[0].steps == 5
    again = tbn.transform(nn.Sequential(build()), ALL)
    tbn.init_from_float(again, trained.state_dict())
    assert again[0].steps == 5
    model = nn.Sequential(build())
    tbn.lower(again)  # has it too
    assert tbn.lower(again)[0].steps == 5
    assert model[0].steps == 0


# Damage

SPECS = {
    "weight": TileSpec(TileLayout((8, 12), 4), 4),
    "pair": TileSpec(TileLayout((10, 6), 4, p_in=2), 2, "W"),
    "rolled": TileSpec(TileLayout((6, 8), 4, shift=5), 1, "A", "float"),
    "signs": TileSpec(TileLayout((8, 12), 4, hadamard=True), 4),
    "experts": TileSpec(TileLayout((3, 8, 8), 4, batch=3), 3),
}


def record_of(specs: Mapping[str, TileSpec]) -> dict[str, Any]:
    return {"version": 1, "layers": {name: spec_to_data(spec) for name, spec in specs.items()}}


def as_tensor(data: Any) -> Tensor:
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def test_records_are_plain_json() -> None:
    record = tiled().state_dict()[EXTRA_STATE]
    assert is_tiling_record(record)
    assert record.dtype == torch.uint8
    layout = {"shape": [16, 16], "p": 4, "p_in": 1, "shift": 0}
    options = {"alphas": 1, "alpha_source": "A", "tile_dtype": "binary"}
    assert json.loads(bytes(record.tolist())) == {
        "version": 1,
        "layers": {"w": layout | options, "right_0": layout | {"shape": [8, 16]} | options},
    }


@pytest.mark.parametrize("name", SPECS)
def test_tilings_as_data(name: str) -> None:
    spec = SPECS[name]
    assert spec_from_data(json.loads(json.dumps(spec_to_data(spec)))) == spec
    assert decode_tilings(as_tensor(record_of(SPECS))) == SPECS
    assert len({describe_spec(spec) for spec in SPECS.values()}) == len(SPECS)


def test_encoding_leaves_out_what_is_float() -> None:
    records = get_records(tiled()) or ()
    assert list(decode_tilings(encode_tilings(records))) == ["w", "right_0", "fc.weight", "first.weight"]


DAMAGES: list[tuple[Any, str]] = [
    ("", "it is not valid JSON"),
    ('{"version":1,"layers"', "it is not valid JSON"),
    ('{"version":1,"version":1,"layers":{}}', "it gives a field twice"),
    ('{"version":' + "[" * 100_000, "it is not valid JSON"),
    ('{"version":' + "9" * 5000, "it is not valid JSON"),
    ('{"version":NaN,"layers":{}}', "its version is nan"),
    ([1], r"it is \[1\], not an object"),
    ({"version": 1}, "it lacks 'layers'"),
    ({"version": 1, "layers": {}, "scale": 2}, "it has the unknown field 'scale'"),
    ({"version": True, "layers": {}}, "its version is True, not a positive integer"),
    ({"version": "1", "layers": {}}, "its version is '1'"),
    ({"version": 0, "layers": {}}, "its version is 0"),
    ({"version": 1, "layers": [1]}, r"its layers are \[1\], not an object"),
    ({"version": 1, "layers": {"weight": 3}}, "its entry 'weight' is 3, not an object"),
]
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"spiral": True}, "has the unknown field 'spiral'"),
    ({"hadamard": 1}, "hadamard is 1, not a bool"),
    ({"hadamard": True, "shift": 3}, "neither two-axis"),
    ({"p": True}, "p holds True, not an integer of at least 1"),
    ({"p": 4.0}, r"p holds 4\.0"),
    ({"p": "4"}, "p holds '4'"),
    ({"p": 10**400}, "p holds a huge integer"),
    ({"p": 5}, "p=5 does not divide the 96 elements"),
    ({"p_in": 3}, "p_in=3 must divide"),
    ({"p_in": 1.0}, r"p_in holds 1\.0"),
    ({"shift": None}, "shift holds None"),
    ({"shift": 2**62}, r"shift is \d+, too large"),
    ({"batch": "1"}, "batch holds '1'"),
    ({"batch": 0}, "batch=0 times p=4 does not divide"),
    ({"alphas": False}, "alphas holds False"),
    ({"alphas": 3}, "alphas=3 is no number of alphas of TileLayout"),
    ({"alpha_source": ["A"]}, r"alpha_source is \['A'\], not one of 'A', 'W'"),
    ({"tile_dtype": "int"}, "tile_dtype is 'int', not one of 'binary', 'float'"),
    ({"shape": [8.0, 12]}, r"shape holds 8\.0"),
    ({"shape": "8x12"}, "shape is '8x12', not a list of 1 to 8 sizes"),
    ({"shape": [2**40, 2**40]}, "shape is .*, too large for any tensor"),
]
DAMAGES += [(record_of({"weight": SPECS["weight"]}), text) for _, text in FIELDS]
for _damage, (_changes, _) in zip(DAMAGES[-len(FIELDS) :], FIELDS, strict=True):
    _damage[0]["layers"]["weight"].update(_changes)


@pytest.mark.parametrize(("data", "message"), DAMAGES)
@pytest.mark.parametrize("strict", [True, False])
def test_damaged_records(data: Any, message: str, strict: bool) -> None:
    with pytest.raises(tbn.SerializationError, match=f"the record of its tiling is damaged: .*{message}"):
        decode_tilings(as_tensor(data))
    layer = tbn.transform(nn.Sequential(nn.Linear(12, 8)), ALL)
    state = layer.state_dict() | {f"0.{EXTRA_STATE}": as_tensor(data)}
    with pytest.raises(RuntimeError, match="layer '0': the record of its tiling is damaged"):
        layer.load_state_dict(state, strict=strict)


@pytest.mark.parametrize("value", [torch.zeros(4), torch.zeros(0, dtype=torch.uint8), 3, {}, {"steps": 3}])
def test_what_is_no_record(value: Any) -> None:
    layer = tbn.transform(nn.Sequential(nn.Linear(12, 8)), ALL)
    with pytest.raises(RuntimeError, match="layer '0': the record of its tiling is damaged: it is none"):
        layer.load_state_dict(layer.state_dict() | {f"0.{EXTRA_STATE}": value})


def test_a_damaged_record_beside_the_users_state() -> None:
    model = tbn.transform(nn.Sequential(Counting()), ALL)
    state = model.state_dict()
    (key,) = (key for key, value in state[f"0.{EXTRA_STATE}"].items() if is_tiling_record(value))
    state[f"0.{EXTRA_STATE}"] |= {key: torch.zeros(3)}
    with pytest.raises(RuntimeError, match="layer '0': the record of its tiling is damaged: it is none"):
        model.load_state_dict(state)


def test_a_later_version_is_named() -> None:
    later = as_tensor({"version": 2, "layers": {}, "scale": 3})
    with pytest.raises(tbn.SerializationError, match="format version 2; this tbn_compiler reads up to 1: upgrade it"):
        decode_tilings(later)
    with pytest.raises(tbn.SerializationError, match="format version a huge integer"):
        decode_tilings(as_tensor({"version": 10**40}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(data=st.data())
def test_random_damage(data: Any) -> None:
    """Refused, or read as tilings that can be."""
    record = record_of(SPECS)
    for _ in range(data.draw(st.integers(1, 3))):
        entry = record["layers"][data.draw(st.sampled_from(list(SPECS)))]
        if isinstance(entry, dict):
            entry[data.draw(st.sampled_from([*entry, "batch", "x"]))] = data.draw(JSON | st.integers(-9, 99))
    content = bytearray(json.dumps(record).encode())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = decode_tilings(torch.frombuffer(content, dtype=torch.uint8))
    except tbn.SerializationError:
        return
    assert all(isinstance(spec, TileSpec) and describe_spec(spec) for spec in found.values())
