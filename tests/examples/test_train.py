"""The training program: recipes, arguments, resuming bit for bit, several processes, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import tbn_compiler as tbn

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
# At import, so that cases can be the recipes; the path is left as it was.
sys.path.insert(0, str(EXAMPLES))
import train as program  # noqa: E402
from paper import devices, runs, tasks, training  # noqa: E402
from paper.recipes import RECIPES, SETTABLE, Recipe, RecipeError  # noqa: E402

sys.path.remove(str(EXAMPLES))

SMALL = {"batch_size": "4", "eval_batch_size": "4", "length": "16"}


def small(name, **changes):
    recipe = RECIPES[name]
    settings = SMALL if recipe.length else {key: value for key, value in SMALL.items() if key != "length"}
    return recipe.changed({**settings, "epochs": "1", **changes})


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing of the program's own handles it."""


@dataclasses.dataclass
class KillAt:
    """Ends the run after a step."""

    step: int

    def on_step(self, trainer):
        if trainer.step == self.step:
            raise Killed

    def on_epoch(self, trainer, record):
        pass


def start(folder, options, *, kill_at=None, resume=False, steps=1, task=None):
    task = task or tasks.synthetic_task(options.settings)
    files = training.Files(folder, steps=steps, seconds=1e9)
    observer = None if kill_at is None else KillAt(kill_at)
    return training.run(task, options, training.World(), files, resume=resume, observer=observer)


def without_times(record):
    return {name: value for name, value in record.items() if name not in ("seconds", "test_seconds", "train_seconds",
                                                                          "started", "restarts")}  # fmt: skip


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal_states(one, other):
    """Everything of two checkpoints' states, bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_equal_states(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for value, another in zip(one, other, strict=True):
            assert_equal_states(value, another)
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    else:
        assert one == other


def assert_same_run(one, other):
    """Two finished runs agree in parameters, the optimiser's state, and what they logged."""
    states = [torch.load(folder / "checkpoint.pt", weights_only=True)["state"] for folder in (one, other)]
    assert_equal_states(*states)
    logs = [[without_times(record) for record in read_log(folder)] for folder in (one, other)]
    assert logs[0] == logs[1]


# Recipes


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_two_steps_and_is_lowered(name, tmp_path):
    recipe = small(name, batch_size="2", eval_batch_size="2")
    options = training.Options(name, recipe, subset=4, test_subset=4, changes={"subset": ["all", 4]})
    document = start(tmp_path, options, steps=0)
    result = document["result"]
    assert [record["step"] for record in document["epochs"]] == [2]
    assert result["tiled_layers"] > 0
    assert result["output_difference"] < 1e-4
    assert result["lowered"][result["metric"]] == pytest.approx(result["trained"][result["metric"]], rel=1e-4)
    assert result["stored_bits"] < 32 * result["weights"]
    model = tasks.NETWORKS[recipe.network](**tasks.synthetic_task(recipe).sizes)
    loaded = tbn.load(tmp_path / "packed.safetensors", model)
    assert tbn.summary(loaded).totals["stored_bits"] == result["stored_bits"]


def test_recipes_are_those_of_the_appendix():
    """What the paper's appendix states, written down a second time."""
    for name in ("resnet18-cifar10", "resnet50-cifar10", "vgg-small-cifar10", "resnet8-cifar10", "resnet20-cifar10"):
        recipe = RECIPES[name]
        assert (recipe.optimizer, recipe.lr, recipe.momentum, recipe.weight_decay) == ("sgd", 0.1, 0.9, 1e-4)
        assert (recipe.batch_size, recipe.schedule) == (128, "cosine")
    for name in ("vit-cifar10", "swin-cifar10", "mlpmixer-cifar10", "convmixer-cifar10"):
        recipe = RECIPES[name]
        found = (recipe.optimizer, recipe.lr, recipe.batch_size, recipe.augment, recipe.epochs)
        assert found == ("adam", 1e-3, 128, "crop-flip", 500)
    recipe = RECIPES["resnet34-imagenet"]
    found = (recipe.epochs, recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.momentum)
    assert found == (600, "sgd", 0.256, 3.05e-5, 0.875)
    assert (recipe.label_smoothing, recipe.warmup_epochs) == (0.1, 5)
    recipe = RECIPES["swin-imagenet"]
    found = (recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.batch_size, recipe.epochs, recipe.warmup_epochs)
    assert found == ("adamw", 1e-3, 0.05, 350, 600, 20)
    recipe = RECIPES["pointnet-modelnet40"]
    found = (recipe.batch_size, recipe.optimizer, recipe.lr, recipe.weight_decay, recipe.epochs)
    assert found == (24, "adam", 1e-3, 1e-4, 500)
    recipe = RECIPES["pointnet-parts"]
    found = (recipe.batch_size, recipe.epochs, recipe.gamma, recipe.every, recipe.length)
    assert found == (16, 250, 0.5, 20, 2048)
    recipe = RECIPES["pointnet-rooms"]
    found = (recipe.batch_size, recipe.epochs, recipe.gamma, recipe.every, recipe.length)
    assert found == (16, 32, 0.7, 10, 4096)


def test_every_recipe_names_what_exists():
    for name, recipe in RECIPES.items():
        assert recipe.network in tasks.NETWORKS, name
        assert recipe.data in tasks.READERS, name
        assert set(recipe.stated) <= set(SETTABLE), name
        assert recipe.note, name


def test_scales_of_inputs_do_not_decay():
    options = training.Options("resnet18-cifar10", small("resnet18-cifar10"))
    for tiling, groups in (({}, 1), ({"activation": "int8", "input_scale": "layer"}, 2)):
        tiled = dataclasses.replace(options, tiling=tiling)
        trainer = training.Trainer(tasks.synthetic_task(options.settings), tiled, training.World())
        found = trainer.optimizer.param_groups
        assert len(found) == groups
        assert found[0]["weight_decay"] == options.settings.weight_decay > 0
        assert sum(len(group["params"]) for group in found) == len(list(trainer.model.parameters()))
        if groups == 2:
            scales = [value for name, value in trainer.model.named_parameters() if name.endswith("input_log_scale")]
            assert found[1]["weight_decay"] == 0
            assert [id(value) for value in found[1]["params"]] == [id(value) for value in scales]


def test_rates():
    cosine = RECIPES["resnet18-cifar10"].changed({"epochs": "4", "warmup_epochs": "1"})
    rates = [cosine.rate(step, 10) for step in range(40)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1
    assert rates[25] == pytest.approx(0.5)
    assert 0 < rates[39] < 0.01
    assert cosine.rate(40, 10) == pytest.approx(0, abs=1e-12)
    steps = RECIPES["pointnet-parts"]
    assert [steps.rate(epoch * 7, 7) for epoch in (0, 19, 20, 40)] == pytest.approx([1, 1, 0.5, 0.25])
    assert RECIPES["vit-cifar10"].changed({"schedule": "constant"}).rate(5, 1) == 1


def test_weather_compares_lambda_with_the_whole_projection():
    series = RECIPES["series-weather"].tiling({})
    assert series.for_layer("layers.0.attention.attention.in_proj_weight_0").attention == "packed"


def test_pairs_keep_the_saving_in_arithmetic():
    recipe = RECIPES["resnet8-cifar10"]
    assert recipe.tiling({"p": 4}).alpha == "tile"
    assert recipe.tiling({"p": (2, 2)}).alpha == "output"
    assert recipe.tiling({"p": (2, 2), "alpha": "tile"}).alpha == "tile"
    assert recipe.tiling({"min_size": 0}).min_size == 0


def test_network_layers_start_alike():
    """Float and tiled networks of one seed begin at the same float weights."""
    task = tasks.synthetic_task(small("mnist-mlp"))
    models = [
        training.Trainer(task, training.Options("mnist-mlp", small("mnist-mlp"), network=network), training.World())
        for network in ("float", "bwnn", "tbn")
    ]
    weights = [trainer.model.get_parameter("1.weight") for trainer in models]
    assert weights[0].equal(weights[1])
    assert weights[0].equal(weights[2])


# Resuming

CASES = {
    "dropout and AdamW": ("char-gpt", {}),
    "batch-norm and SGD": ("resnet8-cifar10", {}),
    "bf16": ("resnet8-cifar10", {"amp": "bf16"}),
    "tile": ("mnist-mlp", {"tiling": {"p": 4, "latent": "tile"}}),
    "float": ("mnist-mlp", {"network": "float"}),
    "bwnn": ("series-etth1", {"network": "bwnn"}),
    "clouds": ("pointnet-modelnet10", {}),
    "compiled": ("mnist-mlp", {"compile": "aot_eager"}),
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_run_is_the_same_bit_for_bit(case, tmp_path):
    """Killed after each step in turn, 2 epochs of 3 steps."""
    name, more = CASES[case]
    options = training.Options(name, small(name, epochs="2"), subset=12, test_subset=8, **more)
    whole = tmp_path / "whole"
    start(whole, options)
    parts = tmp_path / "parts"
    for step in range(1, 7):
        with pytest.raises(Killed):
            start(parts, options, kill_at=step, resume=True)
        random.seed(step), np.random.seed(step), torch.manual_seed(step)  # as another process would have them
    document = start(parts, options, resume=True)
    assert document["result"]["restarts"] == 6
    assert_same_run(whole, parts)


@pytest.mark.parametrize("kill_at", [1, 4, 5])
def test_steps_behind_the_checkpoint_are_done_again(kill_at, tmp_path):
    """Checkpoints after each second step and each epoch (of 3): what was logged behind one is logged once."""
    options = training.Options("resnet8-cifar10", small("resnet8-cifar10", epochs="2"), subset=12, test_subset=8)
    start(tmp_path / "whole", options)
    with pytest.raises(Killed):
        start(tmp_path / "parts", options, kill_at=kill_at, steps=2)
    start(tmp_path / "parts", options, resume=True, steps=2)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_killed_while_it_is_lowered_is_finished(tmp_path, monkeypatch):
    options = training.Options("mnist-mlp", small("mnist-mlp"), subset=8)
    start(tmp_path / "whole", options)
    with monkeypatch.context() as patch:
        patch.setattr(tbn, "lower", lambda model: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            start(tmp_path / "parts", options)
    start(tmp_path / "parts", options, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    again = start(tmp_path / "parts", options, resume=True)
    assert len(read_log(tmp_path / "parts")) == 3
    assert again["result"]["restarts"] == 1


def test_a_checkpoint_is_whole_or_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "file"
    runs.write_atomically(path, "before")

    def fail(descriptor):
        raise Killed

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Killed):
        runs.write_atomically(path, "after")
    assert path.read_text() == "before"


def test_other_runs_are_not_resumed(tmp_path, monkeypatch):
    recipe = small("mnist-mlp")
    options = training.Options("mnist-mlp", recipe, subset=8)
    start(tmp_path, options)
    with pytest.raises(training.RunError, match=r"holds a run: resume it with --resume"):
        start(tmp_path, options)
    with pytest.raises(training.RunError, match=r"another one: seed: 0 there, 1 now"):
        start(tmp_path, dataclasses.replace(options, seed=1), resume=True)
    monkeypatch.setattr(training, "versions", lambda: {"torch": "1.0"})
    with pytest.raises(training.RunError, match=r"another one: versions: .* there, {'torch': '1.0'} now"):
        start(tmp_path, options, resume=True)
    monkeypatch.undo()
    with pytest.raises(training.RunError, match=r"another one: tiling: .*'p': 4.* there, .*'p': 8"):
        start(tmp_path, dataclasses.replace(options, tiling={"p": 8}), resume=True)


def run_command(*arguments, launcher=(), check=True, **more):
    command = [sys.executable, *launcher, "examples/train.py", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, **more)
    if check:
        assert result.returncode == 0, result.stderr
    return result


MLP = ["--recipe", "mnist-mlp", "--data", "synthetic", "--set", "batch_size=4", "--checkpoint-steps", "5"]


def test_a_killed_process_is_resumed(tmp_path):
    """SIGKILL, whenever it comes."""
    command = [*MLP, "--epochs", "10"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "examples/train.py", *command, "--out", str(parts)],
        cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 200
        while not (parts / "checkpoint.pt").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL
    run_command(*command, "--out", parts, "--resume")
    assert program.main([*command, "--out", str(whole), "--quiet"]) == 0
    assert_same_run(whole, parts)


# Several processes


def test_processes_end_with_the_same_parameters(tmp_path):
    """The program compares them itself; one process gets nearly the same."""
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    # float64 is no choice of the program: one epoch keeps rounding small.
    run_command(*MLP, "--epochs", "1", "--out", tmp_path / "two", launcher=launcher)
    assert program.main([*MLP, "--epochs", "1", "--out", str(tmp_path / "one"), "--quiet"]) == 0
    two, one = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("two", "one"))
    assert two["header"]["processes"] == 2
    assert two["epochs"][0]["loss"] == pytest.approx(one["epochs"][0]["loss"], rel=1e-4)
    states = [
        torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["state"]["model"] for name in ("two", "one")
    ]
    for name, value in states[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)


def _rank(folder):
    """As `torchrun` would: trains twice, and leaves no thread of the group behind."""
    torch.set_num_threads(1)
    with devices.joined_world("cpu") as world:
        _train_and_resume(world, folder)
    assert not [path for path in Path("/proc/self/task").glob("*/comm") if "gloo" in path.read_text()]


def _train_and_resume(world, folder):
    """Trains a network with batch-norm and dropout, killed after 3 steps, then resumed; writes what each rank has."""
    recipe = small("pointnet-modelnet10", epochs="2")
    options = training.Options("pointnet-modelnet10", recipe, subset=8, test_subset=8)
    task = tasks.synthetic_task(recipe)
    digests = []

    class Look(KillAt):
        def on_step(self, trainer):
            digests.append(training.parameters_digest(torch.nn.ParameterList(trainer.model.parameters())))
            super().on_step(trainer)

    go = functools.partial(training.run, task, options, world)
    go(training.Files(Path(folder) / "whole"), observer=Look(0))
    try:
        go(training.Files(Path(folder) / "parts", steps=1), observer=Look(3))
    except Killed:
        torch.distributed.barrier()
        go(training.Files(Path(folder) / "parts", steps=1), observer=Look(0), resume=True)
    Path(f"{folder}/digests{world.rank}.json").write_text(json.dumps(digests))


def test_ranks_agree_at_every_step_and_resume(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from tests.examples.test_train import _rank; " \
           f"_rank({str(tmp_path)!r})"  # fmt: skip
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | world | {"RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    zero, one = (json.loads((tmp_path / f"digests{rank}.json").read_text()) for rank in range(2))
    assert len(zero) == 4 + 3 + 1
    assert zero == one
    assert zero[3] == zero[7]
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


# Results


def test_log_and_result(tmp_path, capsys):
    arguments = ["--recipe", "resnet8-cifar10", "--data", "synthetic", "--epochs", "2", "--subset", "32"]
    arguments += ["--set", "batch_size=16", "--set", "lr=0.01", "--seed", "3", "--curves", "--out", str(tmp_path)]
    assert program.main(arguments) == 0
    printed = capsys.readouterr().out
    records = read_log(tmp_path)
    assert [record["kind"] for record in records] == ["header", "epoch", "epoch", "result"]
    for record in records:
        runs.check_record(record)
    document = json.loads((tmp_path / "result.json").read_text())
    assert document == runs.document(records)
    header, result = document["header"], document["result"]
    assert header["changes"] == {
        "epochs": [200, 2],
        "batch_size": [128, 16],
        "lr": [0.1, 0.01],
        "subset": ["all", 32],
    }
    assert header["seed"] == 3
    assert header["data"]["train"] == 32
    assert "changed: lr 0.1 -> 0.01" in printed
    assert f"lowered {result['lowered']['accuracy']:.4f}" in printed
    assert result["file_bytes"] == (tmp_path / "packed.safetensors").stat().st_size
    assert str(tmp_path) not in (tmp_path / "result.json").read_text()
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 500


def test_float_networks_are_written_whole(tmp_path):
    from safetensors.torch import load_file

    recipe = small("mnist-mlp")
    result = start(tmp_path, training.Options("mnist-mlp", recipe, network="float", subset=8))["result"]
    assert result["lowered"] is None
    assert result["bits_per_weight"] == 32
    assert result["tensor_bytes"] == 4 * result["weights"] == 4 * (784 + 10) * 128
    model = tasks.NETWORKS["mlp"]()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert training.parameters_digest(model) == result["parameters_sha256"]


def test_something_is_learned(tmp_path):
    """A text that repeats seven letters is predicted once the network has seen it."""
    recipe = small("char-gpt", epochs="3", lr="0.003", warmup_epochs="0")
    document = start(tmp_path, training.Options("char-gpt", recipe))
    assert document["epochs"][-1]["loss"] < 0.2 * document["epochs"][0]["loss"]
    assert document["result"]["lowered"]["bits_per_character"] < 0.5


def test_records_are_checked():
    epoch = {"kind": "epoch", "epoch": 1, "step": 2, "loss": 0.5, "lr": 0.1, "seconds": 1.0, "test_seconds": 0.1}
    runs.check_record({**epoch, "test": {"accuracy": 1.0}})
    with pytest.raises(ValueError, match="'epoch' differs in the fields test"):
        runs.check_record(epoch)
    with pytest.raises(ValueError, match="'loss' of a record of kind 'epoch' is 'low'"):
        runs.check_record({**epoch, "test": {}, "loss": "low"})
    with pytest.raises(ValueError, match="a record is of kind 'other', not header, epoch, result"):
        runs.check_record({"kind": "other"})


def test_an_exploding_loss_ends_the_run(tmp_path):
    recipe = small("series-etth1", lr="1e30", warmup_epochs="0", epochs="2")
    with pytest.raises(training.RunError, match=r"the loss of epoch \d is (nan|inf): lower the learning rate"):
        start(tmp_path, training.Options("series-etth1", recipe, network="float", subset=32))


def test_committed_results_are_results():
    """Logs of real runs, as the program writes them."""
    for path in sorted((EXAMPLES / "results").glob("train-*.json")):
        document = json.loads(path.read_text())
        runs.check_record({"kind": "header", **document["header"]})
        runs.check_record({"kind": "result", **document["result"]})
        for record in document["epochs"]:
            runs.check_record({"kind": "epoch", **record})
        assert len(document["epochs"]) == document["header"]["settings"]["epochs"]
        assert document["header"]["data"]["name"] != "synthetic"


# Arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--recipe and --data are needed"),
        (["--recipe", "none"], "invalid choice: 'none'"),
        (["--p", "2x2x2"], "'2x2x2' is neither a number of copies such as 4 nor a pair such as 2x2"),
        (["--p", "0"], "'0' is neither a number"),
        (["--p", "x"], "'x' is neither a number"),
        (["--set", "lr"], "'lr' is not of the form key=value"),
        (["--set", "rate=1"], "a recipe has no setting 'rate', only epochs, batch_size, optimizer, lr"),
        (["--set", "lr=fast"], "lr='fast' is no float"),
        (["--set", "lr=nan"], "lr=nan is less than 0 or not finite"),
        (["--set", "lr=0"], "lr=0 trains nothing"),
        (["--set", "epochs=0"], "epochs=0 is less than 1"),
        (["--set", "length=long"], "length='long' is no int"),
        (["--set", "optimizer=lion"], "optimizer='lion' is not one of 'sgd', 'adam', 'adamw'"),
        (["--set", "network=vit"], "a recipe has no setting 'network'"),
        (["--epochs", "0"], "0 is less than 1"),
        (["--alpha", "row"], "alpha='row' is not one of"),
        (["--latent", "none"], "latent='none' is not one of"),
        (["--network", "float", "--p", "4"], "a float network takes no --p"),
        (["--network", "float", "--min-size", "0"], "a float network takes no --min-size"),
        (["--network", "bwnn", "--p", "4"], "--network bwnn is p=1"),
        (["--p", "2x2", "--replicate", "roll"], "replicate='roll' takes an integer p"),
    ],
)
def test_arguments_are_checked(arguments, message, capsys):
    given = ["--recipe", "mnist-mlp", "--data", "synthetic", *arguments] if arguments else []
    with pytest.raises(SystemExit) as ended:
        program.main(given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_data_that_are_missing_are_named(tmp_path, capsys):
    assert program.main(["--recipe", "resnet8-cifar10", "--data", str(tmp_path), "--out", str(tmp_path / "run")]) == 1
    assert "train.py: no cifar-10-python.tar.gz" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_batches_that_cannot_be_filled_or_shared(tmp_path):
    options = training.Options("mnist-mlp", small("mnist-mlp"), subset=3)
    with pytest.raises(training.RunError, match="3 training examples fill no batch of 4"):
        start(tmp_path, options)
    task = tasks.synthetic_task(options.settings)
    with pytest.raises(training.RunError, match="a batch of 4 cannot be shared equally by 3 processes"):
        training.Trainer(task, dataclasses.replace(options, subset=0), training.World(0, 3))
    with pytest.raises(training.RunError, match="fp16 is for accelerators"):
        training.Trainer(task, dataclasses.replace(options, subset=0, amp="fp16"), training.World())


def test_help_names_everything(capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in ("--recipe", "--network", "--p", "--latent", "--resume", "--amp", "--compile", *SETTABLE):
        assert name in text


def test_the_list_is_the_documented_one(capsys):
    assert program.main(["--list"]) == 0
    table = capsys.readouterr().out.strip()
    assert all(f"`{name}`" in table for name in RECIPES)
    assert table in program.DOCUMENT.read_text()
    assert program.results_table() in program.DOCUMENT.read_text()


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (["--network", "bwnn"], "bwnn"),
        (["--p", "8"], "tbn 8"),
        (["--p", "2x4", "--latent", "tile"], "tbn 2x4, tile trained"),
        (["--replicate", "roll"], "tbn 4, roll"),
    ],
)
def test_titles(arguments, found):
    given = ["--recipe", "mnist-mlp", "--data", "synthetic", "--set", "batch_size=4", *arguments]
    options = program.options_of(program.parser().parse_args(given))
    trainer = training.Trainer(tasks.synthetic_task(options.settings), options, training.World())
    assert program.title(training._header(trainer)) == found


def test_settings_are_kept_by_name():
    changed = Recipe("vit", "cifar10", 1, 1, "sgd", 0.1).changed({"warmup_epochs": "3", "gamma": "0.5"})
    assert changed.warmup_epochs == 3
    assert changed.gamma == 0.5
    with pytest.raises(RecipeError, match="no setting 'stated'"):
        changed.changed({"stated": "epochs"})
