import copy
import json
import struct

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tbn_compiler as tbn
from tbn_compiler.fileformat import _digest
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.records import get_records, graph_parts
from tbn_compiler.passes import FuseEpilogue, run_passes
from tbn_compiler.passes.deployment import register_buffer
from tests import files_v01
from tests.test_fileformat import damage_header, damage_tensors


class Net(nn.Module):
    """Tiled, binary, tied and float layers, a norm, and a functional weight."""

    def __init__(self, width=16):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.mix = nn.Parameter(torch.randn(width, width))
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)
        self.b.weight = self.a.weight
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        x = nn.functional.linear(x, self.mix)
        return self.head(self.b(self.a(x)))


CONFIG = tbn.TilingConfig(p=4, alpha="tile", min_size=0, float_layers=("head",))
X = torch.randn(3, 1, 6, 6)


@pytest.fixture
def packed():
    torch.manual_seed(0)
    qat = tbn.transform(Net(), CONFIG)
    qat(X)  # moves the running statistics
    return tbn.lower(qat)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_round_trip(packed, tmp_path, device):
    tbn.save(packed, tmp_path / "net.safetensors")
    with torch.device(device):
        model = Net()
    loaded = tbn.load(tmp_path / "net.safetensors", model)
    assert torch.equal(loaded(X), packed(X))
    assert not loaded.training
    assert tbn.summary(loaded) == tbn.summary(packed)
    expected, actual = packed.state_dict(), loaded.state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("options", [{"tile_dtype": "float"}, {"alpha_source": "W"}, {"p": 1}])
def test_round_trip_of_other_tilings(tmp_path, options):
    packed = tbn.lower(tbn.transform(Net(), CONFIG.replace(**options)))
    tbn.save(packed, tmp_path / "net.safetensors")
    loaded = tbn.load(tmp_path / "net.safetensors", Net())
    assert torch.equal(loaded(X), packed(X))
    assert tbn.summary(loaded) == tbn.summary(packed)


def test_file_holds_packed_bytes_and_shared_tensors_once(packed, tmp_path):
    path = tmp_path / "net.safetensors"
    tbn.save(packed, path)
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
    tensors = safetensors.torch.load_file(path)
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == path.stat().st_size - 8 - header_bytes
    assert tensors["conv.weight_tile"].dtype == torch.uint8
    assert tensors["conv.weight_tile"].numel() == -(-16 * 9 // 4 // 8)
    assert not [name for name in tensors if name in ("conv.weight", "a.weight", "b.weight", "mix")]
    assert "b.weight_tile" not in tensors


def test_load_leaves_the_model_alone(packed, tmp_path):
    tbn.save(packed, tmp_path / "net.safetensors")
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tbn.load(tmp_path / "net.safetensors", model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_loaded_module_can_be_saved_again(packed, tmp_path):
    tbn.save(packed, tmp_path / "one.safetensors")
    tbn.save(tbn.load(tmp_path / "one.safetensors", Net()), tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_save_wants_a_lowered_module(tmp_path):
    with pytest.raises(tbn.SerializationError, match=r"still a trainable weight: call tbn_compiler.lower first"):
        tbn.save(tbn.transform(Net(), CONFIG), tmp_path / "net.safetensors")
    with pytest.raises(tbn.SerializationError, match="Net is not a lowered module"):
        tbn.save(Net(), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def rewritten(change):
    """A lowered network after ``change`` of its module."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8, 8, bias=False), nn.ReLU()]
    packed = tbn.lower(tbn.transform(nn.Sequential(*layers, nn.Linear(8, 8)), CONFIG.replace(float_layers=())))
    return change(packed) or packed


def edit_calls(**changes):
    """Change arguments of every call that has them; ``alpha="other"`` names another tensor."""

    def edit(packed):
        for _, part in graph_parts(packed):
            for node in part.graph.nodes:
                call = tiled_call(node)
                for name, value in changes.items():
                    if call is not None and name in call.arguments and call.arguments[name] != value:
                        if name in ("alpha", "bias"):
                            key = str(call.arguments["tile"].target).replace("_tile", f"_{value}")
                            register_buffer(part, key, call.tensor(part, "alpha").clone())
                            with part.graph.inserting_before(node):
                                value = part.graph.get_attr(key)
                        call.update(**{name: value})
            part.recompile()

    return edit


def fuse(packed):
    for _, part in graph_parts(packed):
        run_passes(part, [FuseEpilogue()])


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            lambda packed: tbn.optimize(packed, torch.zeros(1, 1, 3, 3)),
            "epilogue=relu, not none",
        ),
        (lambda packed: tbn.optimize(packed, torch.zeros(1, 1, 3, 3), activation="int8"), "activation=int8, not float"),
        (lambda packed: tbn.optimize(packed, activation="binary"), "activation=binary, not float"),
        (edit_calls(activation="int8"), "activation=int8, not float"),
        (edit_calls(epilogue="relu"), "epilogue=relu, not none"),
        (edit_calls(alpha="other_alpha"), "its alpha is .*weight_other_alpha, not .*weight_alpha"),
        (edit_calls(bias="fused_bias_0"), "its bias is .*weight_fused_bias_0"),
        (edit_calls(p=2), "p=2, not 4"),
        (edit_calls(shift=1), "shift=1, not 0"),
        (edit_calls(out_features=4), r"its weight is computed as \(4, 8\), not \(8, 8\)"),
        (edit_calls(kernel_size=(1, 9)), r"its weight is computed as \(8, 1, 1, 9\), not \(8, 1, 3, 3\)"),
    ],
)
def test_save_refuses_a_rewritten_module(change, difference, tmp_path):
    with pytest.raises(
        tbn.SerializationError, match=rf"rewritten by tbn_compiler\.optimize, .*{difference}.*save the low"
    ):
        tbn.save(rewritten(change), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_save_refuses_folded_norms_and_flowing_copies(tmp_path):
    config = CONFIG.replace(float_layers=())
    folded = tbn.transform(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)), config)
    flown = tbn.transform(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8)), config)
    with pytest.raises(tbn.SerializationError, match=r"its alpha is 0\.weight_folded_alpha, not 0\.weight_alpha"):
        tbn.save(tbn.optimize(folded, torch.zeros(1, 1, 3, 3)), tmp_path / "net.safetensors")
    with pytest.raises(tbn.SerializationError, match=r"its weight is computed as \(2, 8\), not \(8, 8\)"):
        tbn.save(tbn.optimize(flown, torch.zeros(1, 8)), tmp_path / "net.safetensors")


class Fusable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        return self.layer(x).relu()


def exported(model, x):
    return torch.export.export(model, (x,))


def test_save_refuses_a_fused_module(tmp_path):
    x = torch.randn(2, 8)
    packed = tbn.lower(tbn.transform(exported(Fusable(), x), CONFIG.replace(float_layers=())))
    tbn.save(packed, tmp_path / "net.safetensors")
    fuse(packed)
    with pytest.raises(tbn.SerializationError, match=r"'layer\.weight' was rewritten .*epilogue=relu, not none"):
        tbn.save(packed, tmp_path / "other.safetensors")


def test_save_refuses_a_rewritten_exported_module(tmp_path):
    x = torch.randn(2, 8)
    packed = tbn.lower(tbn.transform(exported(Fusable(), x), CONFIG.replace(float_layers=())))
    again = exported(packed, x).module()
    quantised = exported(tbn.optimize(packed, x, activation="int8"), x)
    for module in (tbn.optimize(packed, x, activation="int8"), quantised.module()):
        with pytest.raises(tbn.SerializationError, match=r"'layer\.weight' was rewritten .*activation=int8, not float"):
            tbn.save(module, tmp_path / "net.safetensors")
    tbn.save(again, tmp_path / "net.safetensors")
    for model in (Fusable(), exported(Fusable(), x), exported(Fusable(), x).module(), exported(packed, x).module()):
        assert torch.equal(tbn.load(tmp_path / "net.safetensors", model)(x), packed(x))


class Counted(nn.BatchNorm2d):
    def get_extra_state(self):
        return {"seen": 3}


@pytest.mark.parametrize("entry", ["meta", "sparse", "extra"])
def test_save_refuses_what_is_no_dense_tensor(entry, tmp_path):
    packed = tbn.lower(tbn.transform(Net(), CONFIG))
    if entry == "meta":
        packed.norm.running_mean = packed.norm.running_mean.to("meta")
    elif entry == "sparse":
        packed.norm.running_mean = packed.norm.running_mean.to_sparse()
    else:
        packed.norm = Counted(16)
    what = {"meta": "'norm.running_mean' is on the meta device", "sparse": "is stored as torch.sparse_coo"}
    with pytest.raises(tbn.SerializationError, match=what.get(entry, "'norm._extra_state' is a dict, not a tensor")):
        tbn.save(packed, tmp_path / "net.safetensors")


class Stateful(nn.Module):
    """Extra state of the user's own, in a module whose parameter is read tiled."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, 16))
        self.steps = 0

    def forward(self, x):
        return x @ self.w + self.steps

    def get_extra_state(self):
        return torch.tensor(self.steps)

    def set_extra_state(self, state):
        self.steps = int(state)


def test_extra_state_of_the_user(tmp_path):
    model = Stateful()
    model.steps = 7
    packed = tbn.lower(tbn.transform(model, CONFIG.replace(float_layers=())))
    tbn.save(packed, tmp_path / "net.safetensors")
    loaded = tbn.load(tmp_path / "net.safetensors", Stateful())
    assert loaded.steps == 7
    x = torch.randn(2, 16)
    assert torch.equal(loaded(x), packed(x))


def test_shared_tensors_stay_shared(packed, tmp_path):
    tbn.save(packed, tmp_path / "net.safetensors")
    loaded = tbn.load(tmp_path / "net.safetensors", Net())
    assert loaded.a.weight_tile is loaded.b.weight_tile


def test_save_names_a_layer_that_no_file_holds(packed, tmp_path):
    next(value for key, value in packed.state_dict().items() if key == "conv.weight_alpha")[0] = torch.nan
    with pytest.raises(tbn.SerializationError, match=r"cannot be saved: layer 'conv\.weight': its alphas are no means"):
        tbn.save(packed, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_failed_save_keeps_the_older_file(packed, tmp_path, monkeypatch):
    path = tmp_path / "net.safetensors"
    path.write_bytes(b"older")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left on device"):
        tbn.save(packed, path)
    assert path.read_bytes() == b"older"
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_truncated_file(packed, tmp_path, size):
    path = tmp_path / "net.safetensors"
    tbn.save(packed, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(tbn.SerializationError, match=r"net\.safetensors is truncated or no safetensors file"):
        tbn.load(path, Net())


def test_foreign_file(tmp_path):
    path = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(tbn.SerializationError, match=r"was not written by tbn_compiler\.save"):
        tbn.load(path, Net())


def test_other_architecture(packed, tmp_path):
    path = tmp_path / "net.safetensors"
    tbn.save(packed, path)
    with pytest.raises(tbn.SerializationError, match=r"weight '\S+' has shape \(16, .* in the file, \(32, "):
        tbn.load(path, Net(width=32))
    with pytest.raises(tbn.SerializationError, match=r"has no linear or conv weight '(mix|conv\.weight)'"):
        tbn.load(path, nn.Sequential(nn.Linear(4, 4)))


def test_mismatched_float_tensor(packed, tmp_path):
    path = tmp_path / "net.safetensors"
    tbn.save(packed, path)
    model = Net()
    model.head = nn.Linear(16, 12)
    with pytest.raises(tbn.SerializationError, match=r"does not fit Net: [\s\S]*head\.weight"):
        tbn.load(path, model)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        tbn.load(tmp_path / "nowhere.safetensors", Net())


# Architectures that have tilings of their own


OTHER_TILINGS = {
    "p": {"p": 2},
    "pair": {"p": (2, 2)},
    "roll": {"replicate": "roll"},
    "shift": {"replicate": "roll", "shift": 3},
    "signs": {"replicate": "hadamard"},
    "alphas": {"alpha": "layer"},
    "alpha_source": {"alpha_source": "W"},
    "tile_dtype": {"tile_dtype": "float"},
    "binary": {"p": 1},
}


@pytest.mark.parametrize("form", ["transformed", "lowered"])
@pytest.mark.parametrize("options", OTHER_TILINGS.values(), ids=OTHER_TILINGS)
def test_model_of_another_tiling(packed, options, form, tmp_path):
    tbn.save(packed, tmp_path / "net.safetensors")
    overrides = {"overrides": {"a": options}} if form == "transformed" else options
    model = tbn.transform(Net(), CONFIG.replace(**overrides))
    name = r"a\.weight" if form == "transformed" else r"\S+"
    if form == "lowered":
        model = tbn.lower(model)
    message = (
        rf"net\.safetensors does not fit .*'{name}' is tiled with p=4, 4 alphas from A in the file, with p=.* in the"
    )
    with pytest.raises(tbn.SerializationError, match=message):
        tbn.load(tmp_path / "net.safetensors", model)


def test_model_that_tiles_more_or_less(packed, tmp_path):
    tbn.save(packed, tmp_path / "net.safetensors")
    more = tbn.transform(Net(), CONFIG.replace(float_layers=()))
    for model in (more, tbn.lower(more)):
        with pytest.raises(tbn.SerializationError, match=r"'head.weight' is tiled with p=4, .* but not in the file"):
            tbn.load(tmp_path / "net.safetensors", model)
    less = tbn.transform(Net(), CONFIG.replace(float_layers=("head", "conv")))
    for model in (less, tbn.lower(less)):
        assert torch.equal(tbn.load(tmp_path / "net.safetensors", model)(X), packed(X))


def tilings(module):
    return {record.weight: record.spec for record in get_records(module) if record.spec}


def test_model_of_the_same_tiling(packed, tmp_path):
    tbn.save(packed, tmp_path / "net.safetensors")
    transformed = tbn.transform(Net(), CONFIG)
    lowered = tbn.lower(tbn.transform(Net(), CONFIG))
    for model in (transformed, lowered, packed, tbn.load(tmp_path / "net.safetensors", Net())):
        before = {key: value.clone() for key, value in model.state_dict().items()}
        loaded = tbn.load(tmp_path / "net.safetensors", model)
        assert torch.equal(loaded(X), packed(X))
        assert tilings(loaded) == tilings(packed)
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)


def test_model_that_was_rewritten(tmp_path):
    tbn.save(rewritten(lambda packed: None), tmp_path / "net.safetensors")
    model = rewritten(lambda packed: tbn.optimize(packed, activation="int8"))
    with pytest.raises(
        tbn.SerializationError, match=r"of the model was rewritten since it was lowered .*load into the fl"
    ):
        tbn.load(tmp_path / "net.safetensors", model)


def test_model_in_gradual_tiling(packed, tmp_path):
    tbn.save(packed, tmp_path / "net.safetensors")
    model = tbn.transform(Net(), CONFIG.replace(gradual=True))
    with pytest.raises(tbn.SerializationError, match=r"net\.safetensors does not fit .*strength"):
        tbn.load(tmp_path / "net.safetensors", model)
    tbn.set_tiling_strength(model, 1.0)
    assert torch.equal(tbn.load(tmp_path / "net.safetensors", model)(X), packed(X))


def test_meta_model_with_values_that_no_file_holds(packed, tmp_path):
    class Rotary(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("angles", torch.ones(10), persistent=False)

        def forward(self, x):
            return super().forward(x) * self.angles

    torch.manual_seed(0)
    rotary = tbn.lower(tbn.transform(Rotary(), CONFIG))
    tbn.save(rotary, tmp_path / "net.safetensors")
    assert torch.equal(tbn.load(tmp_path / "net.safetensors", Rotary())(X), rotary(X))
    with torch.device("meta"):
        model = Rotary()
    with pytest.raises(tbn.SerializationError, match=r"'angles' is no part of the state_dict, .* meta device"):
        tbn.load(tmp_path / "net.safetensors", model)


def test_other_precision(packed, tmp_path):
    half = copy.deepcopy(packed).to(torch.bfloat16)
    tbn.save(half, tmp_path / "net.safetensors")
    loaded = tbn.load(tmp_path / "net.safetensors", Net())
    assert torch.equal(loaded(X.bfloat16()), half(X.bfloat16()))


def test_wrapped_module(packed, tmp_path):
    with pytest.raises(tbn.SerializationError, match=r"DataParallel wraps the model: pass its \.module"):
        tbn.save(nn.DataParallel(packed), tmp_path / "net.safetensors")
    tbn.save(torch.compile(packed, backend="eager"), tmp_path / "net.safetensors")
    assert torch.equal(tbn.load(tmp_path / "net.safetensors", Net())(X), packed(X))


# Files of version 0.1


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", files_v01.MODELS)
def test_file_of_version_01(name, device, tmp_path):
    build, config, _ = files_v01.MODELS[name]
    with torch.device(device):
        model = build()
    path = files_v01.FOLDER / f"{name}.safetensors"
    x = files_v01.example_input(name)
    expected = torch.from_numpy(np.load(files_v01.FOLDER / "outputs.npz")[name])
    loaded = tbn.load(path, model)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-6)
    # The records are those of the present version, and a new file holds the same.
    fresh = {record.weight: record.spec for record in get_records(tbn.lower(tbn.transform(build(), config)))}
    assert {record.weight: record.spec for record in get_records(loaded)} == fresh
    tbn.save(loaded, tmp_path / "again.safetensors")
    assert torch.equal(tbn.load(tmp_path / "again.safetensors", build())(x), loaded(x))


class Views(nn.Module):
    """Three views of one parameter: weights of a graph only."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(24, 8))

    def forward(self, x):
        q, k, v = (nn.functional.linear(x, self.qkv[i : i + 8]) for i in (0, 8, 16))
        return q * k + v


def test_file_of_a_graph(tmp_path):
    packed = tbn.lower(tbn.transform(torch.fx.symbolic_trace(Views()), CONFIG.replace(float_layers=())))
    tbn.save(packed, tmp_path / "net.safetensors")
    x = torch.randn(2, 8)
    loaded = tbn.load(tmp_path / "net.safetensors", torch.fx.symbolic_trace(Views()))
    assert torch.equal(loaded(x), packed(x))
    with pytest.raises(tbn.SerializationError, match=r"'qkv_0' .*give the graph itself \(torch\.fx\.symbolic_trace"):
        tbn.load(tmp_path / "net.safetensors", Views())


# Random damage


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A file, and what its model computes."""
    torch.manual_seed(0)
    packed = tbn.lower(
        tbn.transform(Net(), CONFIG.replace(overrides={"a": {"p": (2, 2)}, "mix": {"tile_dtype": "float"}}))
    )
    path = tmp_path_factory.mktemp("damage") / "net.safetensors"
    tbn.save(packed, path)
    return path, packed(X)


@pytest.mark.parametrize("sealed", [False, True])
@given(data=st.data())
def test_random_damage(small, sealed, data):
    """Damage raises or changes nothing. Under a checksum of its own it is another file, and may raise nothing else."""
    path, expected = small
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["tbn"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for _ in range(data.draw(st.integers(1, 2))):
        if data.draw(st.booleans()) and isinstance(header, dict):
            header = damage_header(header, data.draw)
        elif tensors:
            damage_tensors(tensors, data.draw)
    if sealed and isinstance(header, dict):
        header["sha256"] = _digest(header, tensors)
    damaged = path.with_name("damaged.safetensors")
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # safetensors refuses shared memory
    safetensors.torch.save_file(tensors, damaged, {"tbn": json.dumps(header)})
    try:
        loaded = tbn.load(damaged, Net())
    except tbn.SerializationError as error:
        assert "damaged.safetensors" in str(error)  # noqa: PT017 (most damage raises, some changes nothing)
    else:
        assert sealed or torch.equal(loaded(X), expected)
