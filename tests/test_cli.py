import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import tbn_compiler as tbn
from tbn_compiler.backends.c import host
from tbn_compiler.cli import main

FACTORY = """
import torch
from torch import nn
import tbn_compiler as tbn

def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))

def plain():
    return nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 4, bias=False))

def tiled():
    return tbn.transform(mlp(), tbn.TilingConfig(p=8, min_size=0))

def number():
    return 3

def deep():
    name = "a_long_name_of_a_layer_that_folds_in_eighty_columns"
    model = nn.Sequential()
    model.add_module(f"{name}_{name}", nn.Linear(16, 8))
    return model

class Cumulative(nn.Module):
    def forward(self, x):
        return x.cummax(1).values

class Smoothed(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.GRUCell(16, 8), nn.Linear(8, 4)

    def forward(self, x, before):
        after = self.cell(x, before)
        return after, self.out(after)

def smoothed():
    torch.manual_seed(0)
    return Smoothed()

def curved():
    return nn.Sequential(nn.Linear(16, 32), Cumulative())
"""


@pytest.fixture
def factory(tmp_path, monkeypatch):
    """A user's module in the current folder; its name is returned."""
    name = f"models_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield name
    sys.modules.pop(name, None)


def run(capsys, *arguments):
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tbn-compiler {tbn.__version__}\n"


@pytest.mark.parametrize(
    "arguments", [[], ["demo"], ["summary"], ["plan"], ["sweep"], ["export-c"], ["export-onnx"], ["verify"]]
)
def test_help_names_every_option(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    assert "usage: tbn-compiler" in capsys.readouterr().out


def test_runs_as_a_module():
    result = subprocess.run([sys.executable, "-m", "tbn_compiler.cli", "--version"], capture_output=True, text=True)
    assert result.returncode == 0
    assert result.stdout.startswith("tbn-compiler ")


def test_summary_formats(capsys, factory):
    arguments = ("summary", f"{factory}:mlp", "--min-size", 0, "--p", 4)
    status, out, _ = run(capsys, *arguments, "--json", "--input", "2,16")
    data = json.loads(out)
    assert status == 0
    assert [layer["p"] for layer in data["layers"]] == [4, 4]
    assert data["totals"]["macs"] == 2 * (16 * 32 + 32 * 4)
    assert run(capsys, *arguments, "--markdown")[1].startswith("| layer | kind |")
    assert "2 layers tiled, 0 left alone" in run(capsys, *arguments)[1]
    with pytest.raises(SystemExit):
        main(["summary", f"{factory}:mlp", "--json", "--markdown"])


def test_tiling_options(capsys, factory):
    status, out, _ = run(
        capsys, "summary", f"{factory}:mlp", "--preset", "imagenet", "--min-size", 0, "--p", 2, "--alpha", "tile",
        "--keep-float", "2", "--json",
    )  # fmt: skip
    first, last = json.loads(out)["layers"]
    assert status == 0
    assert (first["p"], first["alphas"]) == (2, 2)
    assert last["p"] is None


def test_layouts(capsys, factory):
    arguments = ("summary", f"{factory}:mlp", "--min-size", 0, "--json")
    rows = json.loads(run(capsys, *arguments, "--p", "2x4", "--alpha", "output")[1])["layers"]
    assert [(row["p"], row["p_in"], row["alphas"]) for row in rows] == [(8, 4, 2), (8, 4, 2)]
    rows = json.loads(run(capsys, *arguments, "--p", 4, "--replicate", "roll", "--shift", 3)[1])["layers"]
    assert all("rolled by 3" in row["note"] for row in rows)


def test_optimize(capsys, factory, tmp_path):
    arguments = (f"{factory}:plain", "--min-size", 0, "--input", "1,16")
    rows = json.loads(run(capsys, "summary", *arguments, "--optimize", "--json")[1])["layers"]
    assert rows[1]["macs_tiled"] * 16 == rows[1]["macs"]
    assert run(capsys, "export-c", *arguments, "-o", "net.c")[0] == 0
    text = (tmp_path / "net.c").read_text()
    assert re.search(r"layer_0_out = model_scratch.*; /\* 32 bytes \*/", text)  # 8 unique values, not 32


def test_export_c_packages_and_reports(capsys, factory, tmp_path):
    arguments = ("export-c", f"{factory}:plain", "--min-size", 0, "--input", "1,16", "--name", "net")
    status, out, _ = run(
        capsys, *arguments, "--package", "cmake", "-o", "project", "--plan", "--draw", "plan.png",
        "--optimize", "size", "--target", "cortex-m4", "--scratch", "caller", "--layer-hook",
    )  # fmt: skip
    assert status == 0
    assert "wrote project: " in out
    assert "net: 44 bytes of constants, 48 of scratch" in out
    assert "NET_LAYER_HOOK(0, " in (tmp_path / "project" / "src" / "net.c").read_text()
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_export_c_says_what_a_package_is(capsys, factory, tmp_path):
    arguments = (
        "export-c",
        f"{factory}:plain",
        "--min-size",
        0,
        "--input",
        "1,16",
        "--package",
        "cmsis-pack",
        "-o",
        "p",
    )
    status, _, err = run(capsys, *arguments, "--package-version", "3.1.4", "--package-vendor", "Works")
    assert status == 0, err
    assert 'release version="3.1.4"' in (tmp_path / "p" / "Works.model.pdsc").read_text()
    status, _, err = run(capsys, *arguments, "--package-version", "three")
    assert status == 1
    assert "package_version='three' is not of the form 1.2.3" in err


def test_exports_as_json(capsys, factory):
    arguments = (f"{factory}:plain", "--min-size", 0, "--input", "1,16", "--json")
    status, out, _ = run(capsys, "export-c", *arguments, "-o", "net.c", "--plan")
    data = json.loads(out)
    assert status == 0
    assert (data["output"], data["weight_bytes"], data["options"]["optimize"]) == ("net.c", 44, "balanced")
    assert sum(step["estimated_instructions"] for step in data["steps"]) == data["estimated_instructions"] > 0
    assert max(step["live_bytes"] for step in data["steps"]) <= data["scratch_bytes"]
    data = json.loads(run(capsys, "export-onnx", *arguments, "-o", "net.onnx")[1])
    assert data["path"] == "net.onnx"
    assert data["forms"] == {"0.weight": "bits", "2.weight": "bits"}


def test_piped_tables_are_as_wide_as_they_need(capsys, factory):
    """No name is folded or cut, however narrow a terminal would be."""
    name = "a_long_name_of_a_layer_that_folds_in_eighty_columns"
    status, out, err = run(
        capsys, "export-c", f"{factory}:deep", "--min-size", 0, "--input", "1,16", "-o", "net.c", "--plan"
    )
    assert status == 0, err
    row = next(line for line in out.splitlines() if f" {name}_{name}: " in line)
    assert "\N{HORIZONTAL ELLIPSIS}" not in out
    assert len(row) > 120


def test_progress_is_for_terminals(capsys, factory):
    """On standard error, so that what is piped is the result alone; a file or a pipe there sees none of it."""
    command = ("summary", f"{factory}:mlp", "--min-size", 0, "--json")
    _, out, err = run(capsys, *command)
    assert err == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")  # for rich, a terminal
        _, again, err = run(capsys, *command)
    assert again == out
    assert "model" in err
    assert "0/2" in err


def test_a_tiled_model_keeps_its_tiling(capsys, factory):
    status, _, err = run(capsys, "summary", f"{factory}:tiled", "--p", 2)
    assert status == 1
    assert "the model is tiled already: leave the tiling options out" in err
    _, out, _ = run(capsys, "summary", f"{factory}:tiled", "--json")
    assert [layer["p"] for layer in json.loads(out)["layers"]] == [8, 8]


def test_export_c_from_every_kind_of_checkpoint(capsys, factory, tmp_path):
    sys.path.insert(0, str(tmp_path))
    models = __import__(factory)
    # Not the defaults of the command line: the checkpoints have to tell.
    qat = tbn.transform(models.mlp(), tbn.TilingConfig(p=8, alpha="tile", min_size=0, float_layers=("2",)))
    with torch.no_grad():
        for parameter in qat.parameters():
            parameter.normal_()
    tbn.save(tbn.lower(qat), "packed.safetensors")
    torch.save(qat.state_dict(), "qat.pt")
    safetensors.torch.save_file(qat.state_dict(), "qat.safetensors")
    torch.save(tbn.lower(qat).state_dict(), "lowered.pt")
    written = []
    for checkpoint in ("packed.safetensors", "qat.pt", "qat.safetensors", "lowered.pt"):
        source = (f"{factory}:mlp", "--checkpoint", checkpoint)
        status, out, err = run(capsys, "export-c", *source, "--input", "1,16", "-o", "net.c", "--name", "net")
        assert status == 0, err
        assert "bytes of constants" in out
        assert (tmp_path / "net.h").is_file()
        written.append((tmp_path / "net.c").read_text())
        status, _, err = run(capsys, "summary", *source, "--p", 4)
        assert status == 1
        assert "leave the tiling options out" in err
    assert len(set(written)) == 1
    assert "net_run" in written[0]


def test_checkpoint_of_version_0_1_needs_its_options(capsys, factory, tmp_path):
    """It does not say how it is tiled; taken for p=4 it would export another network."""
    sys.path.insert(0, str(tmp_path))
    qat = tbn.transform(__import__(factory).mlp(), tbn.TilingConfig(p=8, min_size=0))
    torch.save({key: value for key, value in qat.state_dict().items() if not key.endswith("_extra_state")}, "old.pt")
    command = ("summary", f"{factory}:mlp", "--checkpoint", "old.pt")
    status, _, err = run(capsys, *command)
    assert status == 1
    assert "was trained with tiles (0.alpha_source), but does not say how: it is of version 0.1" in err
    with pytest.warns(UserWarning, match="does not say how they are tiled"):
        status, out, err = run(capsys, *command, "--p", 8, "--min-size", 0, "--json")
    assert [layer["p"] for layer in json.loads(out)["layers"]] == [8, 8]
    with pytest.warns(UserWarning, match="does not say how they are tiled"):
        status, _, err = run(capsys, *command, "--p", 8, "--min-size", 0, "--keep-float", "2")
    assert status == 1
    assert "2.alpha_source" in err
    # It knew no size that is derived from the model: 64,000 was the default.
    with (
        pytest.warns(UserWarning, match="does not say how they are tiled"),
        pytest.warns(UserWarning, match="under min_size=64000"),
    ):
        status, out, err = run(capsys, *command, "--p", 8, "--json")
    assert [layer["p"] for layer in json.loads(out)["layers"]] == [1, 1]


def test_float_checkpoint_is_taken_with_a_note(capsys, factory, tmp_path):
    sys.path.insert(0, str(tmp_path))
    torch.save(__import__(factory).mlp().state_dict(), "float.pt")
    arguments = ("summary", f"{factory}:mlp", "--min-size", 0, "--checkpoint", "float.pt")
    status, _, err = run(capsys, *arguments)
    assert status == 0
    assert "float.pt is a float checkpoint: alphas are the mean magnitudes of its weights" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}"], "the model '.*' is not of the form module:name"),
        (["nowhere_to_be_found:mlp"], "cannot import 'nowhere_to_be_found'"),
        (["{}:absent"], "has no 'absent'"),
        (["broken_syntax:mlp"], "cannot import 'broken_syntax': SyntaxError: invalid syntax"),
        (["raises_at_import:mlp"], "cannot import 'raises_at_import': ZeroDivisionError: division by zero"),
        (["{}:number"], "returned a int, not an nn.Module"),
        (["{}:mlp", "--min-size", "-1"], "min_size must be at least 0"),
        (["{}:mlp", "--checkpoint", "absent.pt"], "absent.pt"),
        (["{}:mlp", "--checkpoint", "other.pt"], "is not one of the float model"),
        (["{}:mlp", "--checkpoint", "broken.safetensors"], "is truncated or no safetensors file"),
        (["{}:mlp", "--keep-float", "*"], "nothing to tile"),
    ],
)
def test_errors_are_one_line_and_status_1(capsys, factory, arguments, message):
    torch.save({"other": torch.zeros(1)}, "other.pt")
    with open("broken.safetensors", "wb") as file:
        file.write(b"broken")
    Path("broken_syntax.py").write_text("def mlp(:\n")
    Path("raises_at_import.py").write_text("mlp = 1 / 0\n")
    status, out, err = run(capsys, "summary", *(argument.format(factory) for argument in arguments))
    assert status == 1
    assert not out
    assert err.startswith("tbn-compiler: error: ")
    assert "Traceback" not in err
    assert re.search(message, err)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--p", "0"],
        ["--p", "x"],
        ["--p", "2x2x2"],
        ["--p", "2x0"],
        ["--shift", "0"],
        ["--input", "1,,3"],
        ["--input", "0"],
    ],
)
def test_bad_options_are_usage_errors(capsys, factory, arguments):
    with pytest.raises(SystemExit) as stop:
        main(["summary", f"{factory}:mlp", *arguments])
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_a_model_with_a_state_is_exported_and_verified_step_by_step(capsys, factory, tmp_path):
    model = (f"{factory}:smoothed", "--min-size", 0)
    arguments = ("export-c", *model, "--input", "1,16", "--input", "1,8", "-o", "net.c", "--name", "net", "--self-test")
    status, out, err = run(capsys, *arguments, "--state", "before=0")
    assert status == 0, err
    assert out.endswith("of scratch, 32 of state\n")
    assert "void net_run(net_state *state, const float *input, float *output);" in Path("net.h").read_text()
    for text in ("before", "before=x", "=0"):
        with pytest.raises(SystemExit):
            main([str(argument) for argument in (*arguments, "--state", text)])
    assert "must be the name of an input, = and the index of an output" in capsys.readouterr().err
    status, _, err = run(capsys, *arguments, "--state", "before=0", "--state", "before=1")
    assert (status, "--state names an input twice: before=0, before=1" in err) == (1, True)
    Path("net.toml").write_text('[export-c]\nstate = ["before=0"]\n')
    text = Path("net.c").read_text()
    assert run(capsys, *arguments, "--config", "net.toml")[0] == 0
    assert len(Path("net.c").read_text()) == len(text)
    if host.find_compiler() is None:
        return
    status, out, err = run(capsys, "verify", "net.c", *model, "--input", "6,1,16")
    assert (status, "6x1x4" in out) == (0, True), err
    changed = text.replace("state[i] - fresh", "state[i] + fresh")
    assert changed != text
    Path("net.c").write_text(changed)
    assert run(capsys, "verify", "net.c", *model, "--input", "6,1,16")[0] == 1


def test_export_of_an_unsupported_model_writes_nothing(capsys, factory, tmp_path):
    before = set(tmp_path.iterdir())
    status, _, err = run(capsys, "export-c", f"{factory}:curved", "--input", "1,16", "-o", "net.c")
    assert status == 1
    assert "cannot export node" in err
    assert {path.name for path in set(tmp_path.iterdir()) - before} <= {"__pycache__"}


def test_an_interrupt_and_a_closed_pipe(factory, tmp_path):
    """Through the shell, as users see it: no traceback, and the status of each."""
    # Where the tests run in the background of a shell, interrupts are ignored.
    stop = "    signal.signal(signal.SIGINT, signal.default_int_handler)\n    os.kill(os.getpid(), signal.SIGINT)\n"
    Path("slow.py").write_text(f"import os, signal\ndef mlp():\n{stop}")
    command = [sys.executable, "-m", "tbn_compiler.cli", "summary"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent.parent), "."])}
    stopped = subprocess.run([*command, "slow:mlp"], env=environment, capture_output=True, text=True)
    assert (stopped.returncode, stopped.stdout, stopped.stderr) == (130, "", "tbn-compiler: interrupted\n")
    # A pipe that breaks in what the user's code does is an error as any other.
    Path("pipes.py").write_text("def mlp():\n    raise BrokenPipeError('the server went away')\n")
    broken = subprocess.run([*command, "pipes:mlp"], env=environment, capture_output=True, text=True)
    assert (broken.returncode, broken.stdout) == (1, "")
    assert broken.stderr == "tbn-compiler: error: the server went away\n"
    shell = f"{sys.executable} -m tbn_compiler.cli summary {factory}:mlp --min-size 0 | true; echo ${{PIPESTATUS[0]}}"
    closed = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True)
    assert closed.stdout in ("0\n", "1\n")  # it may not come to writing
    assert not closed.stderr
    table = subprocess.run(
        [*command, f"{factory}:mlp", "--min-size", "0"],
        env={**environment, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (table.returncode, table.stderr) == (0, "")
    assert "2 layers tiled" in table.stdout


def test_demo(capsys, tmp_path):
    pytest.importorskip("sklearn")
    status, out, err = run(capsys, "demo", "--out", tmp_path / "demo", "--epochs", 8, "--json")
    assert status == 0, err
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert results["TBN (p = 4)"]["bits_per_weight"] < results["binary (p = 1)"]["bits_per_weight"] == 1.0
    # Far above chance (10 %): the networks have learned, in PyTorch and in C alike.
    assert min(results[name]["accuracy"] for name in ("float", "binary (p = 1)", "TBN (p = 4)")) > 85
    if results["c"]["compiler"]:
        assert results["c"]["same_class"] == 1.0
        assert results["c"]["relative_error"] < 1e-5
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"digits.c", "digits.h", "digits.safetensors", "results.json"}
    assert json.loads(out) == results
    assert "written to" in err


def test_the_command_line_derives_min_size(capsys, factory):
    """With options or without; a preset has its own."""
    for arguments in ((), ("--p", 4)):
        rows = json.loads(run(capsys, "summary", f"{factory}:mlp", *arguments, "--json")[1])["layers"]
        assert [row["p"] for row in rows] == [4, 1]
        assert rows[1]["note"] == "under min_size=512, derived from the model: binary, p=1"
    with pytest.warns(UserWarning, match="under min_size=64000"):
        rows = json.loads(run(capsys, "summary", f"{factory}:mlp", "--preset", "paper", "--json")[1])["layers"]
    assert [row["p"] for row in rows] == [1, 1]
