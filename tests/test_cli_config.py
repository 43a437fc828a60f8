"""``--config``: options of the commands in a TOML file."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import host
from tbn_compiler.cli import main

FACTORY = """
import torch
from torch import nn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))

def is_first(layer):
    return layer.name == "0"

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(4, 16), nn.Linear(16, 8)

    def forward(self, ids, scale):
        return self.layer(self.embedding(ids)) * scale
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A user's module in the current folder; its name."""
    name = f"configured_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def run(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def layers(capsys: pytest.CaptureFixture[str], *arguments: Any) -> list[dict[str, Any]]:
    status, out, err = run(capsys, "summary", *arguments, "--json")
    assert status == 0, err
    rows: list[dict[str, Any]] = json.loads(out)["layers"]
    return rows


def test_every_field_of_the_tiling(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    Path("net.toml").write_text(
        '[tiling]\npreset = "cifar"\nmin_size = 0\np = [2, 2]\nlatent = "tile"\nfloat_layers = []\ngradual = false\n'
        '[tiling.overrides."2"]\np = 8\nalpha = "layer"\n'
    )
    first, last = layers(capsys, f"{factory}:mlp", "--config", "net.toml")
    assert (first["p"], first["p_in"], first["alphas"]) == (4, 2, 4)  # one for each copy: the preset's
    assert (last["p"], last["p_in"], last["alphas"]) == (8, 1, 1)
    Path("net.toml").write_text(f'[tiling]\nmin_size = 0\nfilter = "{factory}:is_first"\n')
    first, last = layers(capsys, f"{factory}:mlp", "--config", "net.toml")
    assert first["p"] == 4
    assert "the filter function" in last["note"]


def test_the_command_line_wins(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    Path("net.toml").write_text(
        '[tiling]\npreset = "imagenet"\np = 8\nmin_size = 0\nfloat_layers = ["0"]\n'
        "[model]\ninput = [[4, 16]]\n[summary]\noptimize = true\n"
    )
    arguments = (f"{factory}:mlp", "--config", "net.toml")
    first, last = layers(capsys, *arguments)
    assert first["p"] is None
    assert (last["p"], last["macs"]) == (8, 4 * 32 * 8)
    first, last = layers(capsys, *arguments, "--p", 2, "--keep-float", 2, "--input", "3,16", "--no-optimize")
    assert (first["p"], first["macs"]) == (2, 3 * 16 * 32)  # lists are replaced, not added to
    assert last["p"] is None
    np.save("x.npy", np.ones((5, 16)))
    assert layers(capsys, *arguments, "--inputs", "x.npy")[0]["macs"] == 5 * 16 * 32


def test_stored_inputs_are_what_the_self_test_runs(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    ids, scale = np.array([3, 1], np.int32), np.full((2, 1), 0.5)
    np.savez("x.npz", scale=scale, ids=ids)
    Path("net.toml").write_text(
        '[tiling]\nmin_size = 0\n[model]\ninputs = "x.npz"\n'
        '[export-c]\noutput = "net.c"\nname = "net"\nself_test = true\n'
        '[export-onnx]\noutput = "net.onnx"\ninput_name = ["tokens", "factor"]\nbatched_input = ["ids"]\n'
    )
    arguments = (f"{factory}:Scaled", "--config", "net.toml")
    status, _, err = run(capsys, "export-c", *arguments)
    assert status == 0, err
    assert re.search(r"\b3, 1\b", Path("net.c").read_text())
    model = tbn.transform(sys.modules[factory].Scaled(), tbn.TilingConfig(min_size=0, alpha="layer"))
    if host.find_compiler() is not None:
        (actual,) = host.run_arrays("net.c", [ids, scale]).values()
        with torch.no_grad():
            wanted = model(torch.from_numpy(ids).long(), torch.from_numpy(scale).float())
        assert actual.reshape(2, 8) == pytest.approx(wanted.numpy(), rel=1e-4, abs=1e-5)
    # Several inputs of these sizes, behind one another.
    np.savez("more.npz", ids=np.array([3, 1, 0, 2, 1, 1], np.int32), scale=np.ones((6, 1)))
    status, _, err = run(capsys, "export-c", *arguments, "--self-test-inputs", "more.npz")
    assert status == 0, err
    assert "on 3 stored inputs" in Path("net.h").read_text()
    assert re.search(r"3, 1\s+},\s+{\s+0, 2\s+},\s+{\s+1, 1\s+}", Path("net.c").read_text())
    for wrong, message in (
        ({"ids": np.ones(4, np.int32), "scale": np.ones((6, 1))}, "not the same number of inputs [2], [2, 1]"),
        ({"ids": np.ones(3, np.int32), "scale": np.ones((3, 1))}, "not the same number of inputs"),
        ({"ids": np.ones(4, np.int32), "scale": np.ones((4, 2))}, "not inputs [2], [2, 1] one behind the other"),
        ({"scale": np.ones((4, 1))}, "not inputs [2], [2, 1] one behind the other"),
    ):
        np.savez("wrong.npz", **wrong)
        status, _, err = run(capsys, "export-c", *arguments, "--self-test-inputs", "wrong.npz")
        assert status == 1
        assert message in err
    assert run(capsys, "export-c", *arguments, "--no-self-test")[0] == 0
    assert "self_test" not in Path("net.c").read_text()
    onnxruntime = pytest.importorskip("onnxruntime")
    assert run(capsys, "export-onnx", *arguments)[0] == 1  # the first sizes are multiplied: not one alone can be free
    status, _, err = run(capsys, "export-onnx", *arguments, "--batched-input", "ids", "--batched-input", "scale")
    assert status == 0, err
    names = [value.name for value in onnxruntime.InferenceSession("net.onnx").get_inputs()]
    assert names == ["tokens", "factor"]


def test_a_tiled_checkpoint_keeps_its_tiling_with_a_note(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    Path("net.toml").write_text('[tiling]\np = 2\n[model]\ncheckpoint = "packed.safetensors"\n')
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    tbn.save(tbn.lower(tbn.transform(model, tbn.TilingConfig(p=8, min_size=0))), "packed.safetensors")
    arguments = ("summary", f"{factory}:mlp", "--config", "net.toml", "--json")
    status, out, err = run(capsys, *arguments)
    assert status == 0
    assert [row["p"] for row in json.loads(out)["layers"]] == [8, 8]
    assert err == "note: packed.safetensors is a packed file: [tiling] in net.toml is not used\n"
    status, _, err = run(capsys, *arguments, "--p", 4)
    assert status == 1
    assert "leave the tiling options out" in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[tilling]", "has no use for the table 'tilling'; did you mean 'tiling'? Known: tiling, model, summary"),
        ("p = 4", "no use for the table 'p'. Known: tiling"),
        ("tiling = 4", "tiling is no table: write [tiling]"),
        ("[tiling", "net.toml is no TOML"),
        ("[tiling]\nmin_sise = 0", "[tiling]: TilingConfig has no field 'min_sise'; did you mean 'min_size'?"),
        ("[tiling]\nmin_size = -1", "[tiling]: min_size must be at least 0"),
        ('[tiling]\npreset = "cifar10"', "preset='cifar10' is not one of 'paper', 'cifar'"),
        ("[tiling]\nfilter = 3", "[tiling] filter must be a string module:function"),
        ('[tiling]\nfilter = "absent_module:f"', "[tiling] filter 'absent_module:f': cannot import 'absent_module'"),
        ('[tiling.overrides."0"]\nq = 3', "overrides['0'] has no field 'q'"),
        ('[model]\ncheckpiont = "x"', "[model] has no option 'checkpiont'; did you mean 'checkpoint'?"),
        ("[model]\ninput = [1, 16]", "[model] input must be a list such as [[1, 784]], got [1, 16]"),
        ("[model]\ninput = [[0, 16]]", "'0,16' is not a shape"),
        ("[plan]\nbudget = 500", "[plan] budget must be a list such as [500], got 500"),
        ('[model]\ninput = [[1, 16]]\n[summary]\ninputs = "x.npy"', "give input or inputs, not both"),
        # The tables of other commands are checked, too.
        ('[export-c]\nself-test = true', "[export-c] has no option 'self-test'; did you mean 'self_test'?"),
        ('[export-c]\nself_test = "x.npz"', "[export-c] self_test must be true or false, got 'x.npz'"),
        ('[export-c]\ntarget = "cortex-m5"', "[export-c] target='cortex-m5' is not one of 'generic', 'cortex-m0plus'"),
        ("[export-c]\nname = 3", "[export-c] name must be a string, got 3"),
        ('[export-c]\nname = ["a", "b"]', "[export-c] name must be a string, got ['a', 'b']"),
        ("[export-onnx]\nopset = [18]", "[export-onnx] opset must be a string or a number, got [18]"),
        ("[export-onnx]\nopset = true", "[export-onnx] opset must be a string or a number, got True"),
        ("[verify]\np = 4", "[verify] has no option 'p'"),
    ],
)  # fmt: skip
def test_errors(capsys: pytest.CaptureFixture[str], factory: str, text: str, message: str) -> None:
    Path("net.toml").write_text(text)
    status, out, err = run(capsys, "summary", f"{factory}:mlp", "--config", "net.toml")
    assert status == 1
    assert not out
    assert err.startswith("tbn-compiler: error: net.toml")
    assert message in err


def test_missing_file_and_missing_inputs(capsys: pytest.CaptureFixture[str], factory: str) -> None:
    assert "cannot read absent.toml" in run(capsys, "summary", f"{factory}:mlp", "--config", "absent.toml")[2]
    for command in ("export-c", "export-onnx"):
        status, _, err = run(capsys, command, f"{factory}:mlp")
        assert status == 1
        assert "give the shape of each input with --input" in err
    np.savez("x.npz", ids=np.zeros(2, np.int64), scales=np.zeros(2))
    _, _, err = run(capsys, "export-c", f"{factory}:Scaled", "--min-size", 0, "--inputs", "x.npz")
    assert "x.npz holds 'scales', which is no parameter of forward of Scaled" in err
