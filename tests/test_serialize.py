import json
import struct

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

import tbn_compiler as tbn


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


def rewrite_header(path, change):
    """Apply ``change`` to the tbn entry of a file."""
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["tbn"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header)
    safetensors.torch.save_file(tensors, path, {"tbn": json.dumps(header)})


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


def test_save_refuses_an_optimised_module(tmp_path):
    config = CONFIG.replace(float_layers=())
    folded = tbn.optimize(tbn.transform(nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8)), config))
    flown = tbn.optimize(tbn.transform(nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8)), config))
    for module in (folded, flown):
        with pytest.raises(tbn.SerializationError, match=r"rewritten by tbn_compiler\.optimize, which no file holds"):
            tbn.save(module, tmp_path / "net.safetensors")


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


def test_newer_file(packed, tmp_path):
    path = tmp_path / "net.safetensors"
    tbn.save(packed, path)
    rewrite_header(path, lambda header: header.update(version=99))
    with pytest.raises(tbn.SerializationError, match="format version 99; this tbn_compiler reads up to 1: upgrade it"):
        tbn.load(path, Net())


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.pop("version"),
        lambda header: header["layers"]["conv.weight"].pop("p"),
        lambda header: header["layers"]["conv.weight"].update(p=5),
        lambda header: header["layers"].update({"conv.weight": 3}),
        lambda header: header.update(layers=[1]),
        lambda header: header.update(aliases={"x": "nowhere"}),
    ],
)
def test_damaged_header(packed, tmp_path, change):
    path = tmp_path / "net.safetensors"
    tbn.save(packed, path)
    rewrite_header(path, change)
    with pytest.raises(tbn.SerializationError, match="damaged"):
        tbn.load(path, Net())


def test_other_architecture(packed, tmp_path):
    path = tmp_path / "net.safetensors"
    tbn.save(packed, path)
    with pytest.raises(tbn.SerializationError, match=r"'conv.weight' has shape \(16, 1, 3, 3\) in the file, \(32, 1"):
        tbn.load(path, Net(width=32))
    with pytest.raises(tbn.SerializationError, match=r"has no linear or conv weight 'conv\.weight'"):
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
