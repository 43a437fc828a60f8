import contextlib
import json
import sys
import zipfile

import numpy as np
import pytest
import torch

import tbn_compiler as tbn
from tbn_compiler.backends.c.host import find_compiler
from tbn_compiler.cli import bench_mcu, main
from tbn_compiler.cli.arrays import load_arrays
from tbn_compiler.verify import compare

FACTORY = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

class Embedder(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(4, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, ids, scale):
        return self.layer(self.embedding(ids)) * scale, scale

class Chooser(Embedder):
    def forward(self, ids, scale):
        scores = super().forward(ids, scale)[0]
        return scores, scores.argmax(-1)
"""
TILING = ("--min-size", 0)


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """A user's module in the current folder, a packed file and another one; its name is returned."""
    name = f"verified_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    model = __import__(name).mlp()
    tbn.save(tbn.lower(tbn.transform(model, tbn.TilingConfig(p=4, min_size=0))), "packed.safetensors")
    torch.manual_seed(1)
    other = tbn.transform(torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)),
                          tbn.TilingConfig(p=4, min_size=0))  # fmt: skip
    tbn.save(tbn.lower(other), "other.safetensors")
    yield name
    sys.modules.pop(name, None)


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_onnx(capsys, factory):
    arguments = (f"{factory}:mlp", "--checkpoint", "packed.safetensors", "--input", "1,16", "-o", "net.onnx")
    status, out, err = run(capsys, "export-onnx", *arguments)
    assert status == 0, err
    assert "wrote net.onnx" in out
    assert "2 tiled layers" in out
    verify = ("verify", "net.onnx", f"{factory}:mlp")
    status, out, err = run(capsys, *verify, "--against", "packed.safetensors")
    assert status == 0, err
    assert "100.00%" in out
    assert "8x4" in out
    status, out, _ = run(capsys, *verify, "--against", "other.safetensors", "--batch", 64)
    assert status == 1
    assert "above 0.0001" in out
    assert run(capsys, *verify, "--against", "other.safetensors", "--tolerance", 100)[0] == 0
    status, out, _ = run(capsys, *verify, "--against", "packed.safetensors", "--tolerance", 0, "--batch", 64, "--json")
    data = json.loads(out)
    assert status == 1
    assert not data["within"]
    (output,) = data["outputs"]
    assert output["shape"] == [64, 4]
    assert 0 < output["relative"] < 1e-4
    assert output["top1"] == 1.0


def test_options_of_export_onnx(capsys, factory):
    arguments = (f"{factory}:mlp", *TILING, "--input", "2,16", "-o", "net.onnx", "--weights", "nbits")
    assert run(capsys, "export-onnx", *arguments, "--bits", 4, "--accuracy-level", 4, "--opset", 20)[0] == 0
    verify = ("verify", "net.onnx", f"{factory}:mlp", *TILING)
    assert run(capsys, *verify)[0] == 1  # inputs are rounded to int8
    assert run(capsys, *verify, "--tolerance", 0.02)[0] == 0
    assert run(capsys, "export-onnx", *arguments, "--fixed-batch", "--no-optimize")[0] == 0
    assert run(capsys, *verify)[0] == 0
    assert run(capsys, *verify, "--input", "3,16")[0] == 1  # the batch is fixed to 2
    status, _, err = run(capsys, "export-onnx", *arguments, "--opset", 99)
    assert status == 1
    assert "too new" in err


def test_stored_inputs(capsys, factory):
    run(capsys, "export-onnx", f"{factory}:mlp", *TILING, "--input", "1,16", "-o", "net.onnx")
    verify = ("verify", "net.onnx", f"{factory}:mlp", *TILING, "--inputs")
    np.save("x.npy", np.ones((3, 16)))  # float64: taken in the file's dtype
    np.savez("x.npz", input=np.ones((5, 16), np.float32))
    np.savez("two.npz", a=np.ones((5, 16)), b=np.ones(3))
    assert "3x4" in run(capsys, *verify, "x.npy")[1]
    assert "5x4" in run(capsys, *verify, "x.npz")[1]
    for name, message in (("two.npz", "stored inputs are named"), ("x.txt", "must be .npy or .npz")):
        status, _, err = run(capsys, *verify, name)
        assert status == 1
        assert message in err


def test_several_inputs_and_outputs(capsys, factory):
    module = sys.modules[factory]
    qat = tbn.transform(module.Embedder(), tbn.TilingConfig(p=4, min_size=0))
    tbn.export_onnx(qat, (torch.tensor([1, 2]), torch.randn(2, 1)), "net.onnx")
    status, out, err = run(capsys, "verify", "net.onnx", f"{factory}:Embedder", *TILING, "--batch", 6)
    assert status == 0, err
    assert "output_0" in out
    assert "output_1" in out
    np.savez("x.npz", scale=np.ones((3, 1)), ids=np.array([3, 0, 2], np.int32))
    verify = ("verify", "net.onnx", f"{factory}:Embedder", *TILING)
    assert run(capsys, *verify, "--inputs", "x.npz")[0] == 0
    assert run(capsys, *verify, "--input", "5", "--input", "5,1")[0] == 0


@pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")
def test_c(capsys, factory):
    for scratch in ("static", "caller"):
        options = ("--name", "net", "--scratch", scratch)
        exported = run(capsys, "export-c", f"{factory}:mlp", *TILING, "--input", "1,16", "-o", "net.c", *options)
        assert exported[0] == 0
        verify = ("verify", "net.c", f"{factory}:mlp", "--input", "6,16", *options)
        status, out, err = run(capsys, *verify, "--against", "packed.safetensors")
        assert status == 0, err
        assert "6x4" in out
        assert run(capsys, *verify, "--against", "other.safetensors")[0] == 1
    status, _, err = run(capsys, "verify", "net.c", f"{factory}:mlp", *TILING)
    assert status == 1
    assert "give --input or --inputs" in err


@pytest.mark.skipif(find_compiler() is None, reason="needs a C compiler")
def test_c_with_integers_several_arrays_and_a_batch(capsys, factory):
    """The header says the names, the types and who owns the scratch memory."""
    module, config = sys.modules[factory], tbn.TilingConfig(p=4, min_size=0)
    inputs = (torch.tensor([1, 2]), torch.randn(2, 1))
    tbn.export_c(tbn.transform(module.Chooser(), config), inputs, "net.c", name="Net", scratch="caller")
    verify = ("verify", "net.c", f"{factory}:Chooser", *TILING)
    status, out, err = run(capsys, *verify, "--input", "6", "--input", "6,1")
    assert status == 0, err
    assert "6x8" in out
    np.savez("x.npz", scale=np.ones((4, 1)), ids=np.array([3, 0, 2, 1]))
    assert run(capsys, *verify, "--inputs", "x.npz")[0] == 0
    np.savez("wrong.npz", scale=np.ones((4, 1)), token=np.array([3, 0, 2, 1]))
    np.savez("long.npz", scale=np.ones((6, 1)), ids=np.array([3, 0, 2, 1]))
    for arguments, message in (
        (("--input", "6"), "the file has 2 inputs, got 1 shapes"),
        (("--input", "3", "--input", "3,1"), "input 'ids' of net.c has 2 elements, which [3] is no multiple of"),
        (("--inputs", "wrong.npz"), "stored inputs are named ['scale', 'token'], the file's are ['ids', 'scale']"),
        (("--inputs", "long.npz"), "are enough for 2, 3 runs"),
        (("--inputs", "x.npz", "--name", "model"), "net.c has the name 'Net', not 'model'"),
        (("--inputs", "x.npz", "--scratch", "static"), "net.c was exported with scratch='caller', not 'static'"),
    ):
        status, out, err = run(capsys, *verify, *arguments)
        assert (status, out) == (1, "")
        assert message in err
        assert err.count("\n") == 1


def damaged(content):
    """Copies of a file with bytes that were cut off or changed."""
    for at in range(0, len(content), 7):
        yield content[:at]
        yield content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def test_damaged_arrays_are_read_or_refused(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", input=np.arange(40), other=np.ones(3))
    np.save(tmp_path / "x.npy", np.arange(10))
    for name in ("x.npz", "x.npy"):
        path = tmp_path / name
        for content in damaged(path.read_bytes()):
            path.write_bytes(content)
            with contextlib.suppress(tbn.ConfigError):
                assert all(isinstance(array, np.ndarray) for array in load_arrays(path).values())
    for array, message in ((np.zeros((0, 16)), "nothing to compare"), (np.array(["a"]), "holds no numbers")):
        np.save(path, array)
        with pytest.raises(tbn.ConfigError, match=message):
            load_arrays(path)


@pytest.mark.parametrize(
    ("file", "message"),
    [("net.bin", "neither an .onnx nor a .c file"), ("absent.onnx", "is no file"), ("broken.onnx", "cannot load")],
)
def test_errors_are_one_line(capsys, factory, file, message):
    with open("broken.onnx", "w") as broken:
        broken.write("broken")
    status, out, err = run(capsys, "verify", file, f"{factory}:mlp", *TILING)
    assert status == 1
    assert not out
    assert message in err


def test_missing_runtime(capsys, factory, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, _, err = run(capsys, "verify", "net.onnx", f"{factory}:mlp")
    assert status == 1
    assert "pip install 'tbn-compiler[onnx]'" in err


def test_compare():
    expected = np.array([[1.0, -4.0], [2.0, 3.0]], np.float32)
    same = compare("y", expected.ravel(), expected)
    assert (same.absolute, same.relative, same.top1) == (0, 0, 1)
    other = compare("y", np.array([[1.0, 2.0], [2.0, 3.0]], np.float32), expected)
    assert (other.absolute, other.relative, other.top1) == (6, 1.5, 0.5)
    assert other.within(1.5)
    assert not other.within(1.4)
    assert not compare("y", np.full((2, 2), np.nan, np.float32), expected).within(1e9)
    assert not compare("y", np.ones(3, np.float32), np.zeros(3, np.float32)).within(1e9)
    with pytest.raises(tbn.ExportError, match="has the shape"):
        compare("y", np.zeros(3), expected)
    with pytest.raises(tbn.ExportError, match="nothing to compare"):
        compare("y", np.zeros((0, 4)), np.zeros((0, 4)))
    assert not compare("y", np.array([40000]), np.array([40001])).within(1)
    assert compare("y", np.array([7]), np.array([7])).within(0)


def test_members_that_are_no_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", input=np.ones(3))
    with zipfile.ZipFile(tmp_path / "x.npz", "a") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(tbn.ConfigError, match=r"'readme.txt' in .* is no array"):
        load_arrays(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", inputs=np.ones((2, 3)), outputs=np.float64(1))
    with pytest.raises(tbn.ConfigError, match=r"'outputs' in .* is a single number"):
        bench_mcu._load(tmp_path / "y.npz", 1)
