"""Methods to compare with in the training program: what they train, resume, count, and leave behind."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import parametrize

import tbn_compiler as tbn
from tests.examples.test_train import Killed, assert_same_run, small, start
from tests.examples.test_train_devices import META, Crossings, options_for, record_on_the_cpu

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import train as program  # noqa: E402
from paper import devices, tasks, training  # noqa: E402
from paper.baselines import METHODS, IRNet, SubBitKernels  # noqa: E402
from paper.recipes import RECIPES  # noqa: E402

sys.path.remove(str(EXAMPLES))

# Weights of ResNet8 that its recipe tiles, and those under its lambda.
TILED, BINARY = 32 * 32 * 9 + 64 * 32 * 9 + 64 * 64 * 9, 16 * 3 * 9 + 2 * 16 * 16 * 9 + 32 * 16 * 9 + 64 * 10
LAYERS = (432, 2304, 2304, 4608, 9216, 18432, 36864, 640)
RESNET8_BITS = {
    "xnor": TILED + BINARY,
    "irnet": TILED + BINARY,
    "snn": TILED // 9 * 5 + 3 * 32 * 9 + BINARY,
    "ternary-mean": sum(math.ceil(count * math.log2(3)) for count in LAYERS),
    "ternary-median": sum(math.ceil(count * math.log2(3)) for count in LAYERS),
}


def options(name, method, **more):
    return training.Options(name, small(name, **more), network=method, subset=8, test_subset=8)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["resnet8-cifar10", "series-etth1"])
def test_two_steps(name, method, tmp_path):
    document = start(tmp_path, options(name, method), steps=0)
    header, result = document["header"], document["result"]
    assert header["network"] == method
    assert header["tiling"]["min_size"] == header["settings"]["min_size"] or name == "series-etth1"
    assert document["epochs"][-1]["step"] == 2
    assert result["packed"] is False
    assert result["lowered"] is result["output_difference"] is result["failure"] is None
    # Counted on the weights that tiles are counted on.
    recipe = RECIPES[name]
    network = tasks.NETWORKS[recipe.network](**tasks.synthetic_task(small(name)).sizes)
    totals = tbn.summary(tbn.transform(network, recipe.tiling({}))).totals
    assert (result["weights"], result["tiled_layers"]) == (totals["weights"], totals["tiled_layers"])
    assert result["bits_per_weight"] == result["stored_bits"] / result["weights"]
    if name == "resnet8-cifar10":
        assert result["stored_bits"] == RESNET8_BITS[method]
    # The file holds the float network with the quantised weights.
    network.load_state_dict(load_file(tmp_path / "model.safetensors"))
    distinct = {len(layer.weight[0].unique()) for layer in network.modules() if isinstance(layer, torch.nn.Conv2d)}
    assert distinct <= {1, 2, 3}
    trainer = training.Trainer(tasks.synthetic_task(small(name)), options(name, method), training.World())
    trainer.load_state(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["state"])
    assert trainer.evaluate(network) == pytest.approx(result["trained"], rel=1e-4)
    assert trainer.evaluate() == result["trained"]


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_is_the_same_bit_for_bit(method, tmp_path):
    """Killed after some of 4 steps, the last one too."""
    name = "series-etth1" if method == "ternary-median" else "resnet8-cifar10"
    chosen = options(name, method, epochs="2")
    start(tmp_path / "whole", chosen)
    for step in (1, 3, 4):
        with pytest.raises(Killed):
            start(tmp_path / "parts", chosen, kill_at=step, resume=True)
        torch.manual_seed(step)
    start(tmp_path / "parts", chosen, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_run_of_one_method_is_not_resumed_by_another(tmp_path):
    start(tmp_path, options("mnist-mlp", "xnor"))
    with pytest.raises(training.RunError, match="another one: network: 'xnor' there, 'ternary-mean' now"):
        start(tmp_path, options("mnist-mlp", "ternary-mean"), resume=True)


def test_networks_of_a_seed_start_alike():
    task = tasks.synthetic_task(small("resnet8-cifar10"))
    plain, *others = (
        training.Trainer(task, options("resnet8-cifar10", network), training.World()).model
        for network in ("float", *METHODS)
    )
    for model in others:
        for path, module in plain.named_modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
                quantised = model.get_submodule(path)
                assert parametrize.is_parametrized(quantised, "weight")
                assert quantised.parametrizations.weight.original.equal(module.weight)


def test_the_estimator_follows_from_the_step(tmp_path):
    trainer = training.Trainer(
        tasks.synthetic_task(small("mnist-mlp")), options("mnist-mlp", "irnet", epochs="2"), training.World()
    )
    found = []
    for _ in range(4):
        found.append({module.t.item() for module in trainer.model.modules() if isinstance(module, IRNet)})
        trainer.advance()
    assert [len(values) for values in found] == [1, 1, 1, 1]
    assert [values.pop() for values in found] == pytest.approx([0.1 * 10 ** (2 * step / 4) for step in range(4)])
    assert not any(name.endswith(".t") for name in trainer.model.state_dict())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["bf16", "compiled"])
def test_other_ways_to_compute(method, how, tmp_path):
    chosen = options("resnet8-cifar10", method, lr="0.01")
    plain = start(tmp_path / "plain", chosen)
    more = {"amp": "bf16"} if how == "bf16" else {"compile": "aot_eager"}
    document = start(tmp_path / how, dataclasses.replace(chosen, **more))
    assert document["epochs"][0]["loss"] == pytest.approx(plain["epochs"][0]["loss"], rel=0.05)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["resnet8-cifar10", "series-etth1"])
def test_a_step_sends_numbers_for_its_augmentation_only(name, method):
    chosen = options_for(name, network=method)
    trainer = training.Trainer(tasks.synthetic_task(chosen.settings), chosen, training.World(device=META))
    trainer.advance()
    with Crossings() as crossings:
        trainer.advance()
    assert crossings.operators > 10
    assert {operator for operator, _ in crossings.found} <= {"aten._to_copy.default"}
    assert len(crossings.found) <= 1


@pytest.mark.parametrize("method", ["irnet", "snn"])
def test_recorded_steps_are_the_steps(method, monkeypatch):
    """The estimator changes in the memory that a recorded step reads."""
    chosen = options_for("resnet8-cifar10", network=method)
    chosen = dataclasses.replace(chosen, settings=chosen.settings.changed({"lr": "0.01"}))
    task = tasks.synthetic_task(chosen.settings)
    plain, trainer = (training.Trainer(task, chosen, training.World()) for _ in range(2))
    places = [(module.t, module.t.data_ptr()) for module in trainer.model.modules() if isinstance(module, IRNet)]
    recording = record_on_the_cpu(trainer, monkeypatch)
    for _ in range(6):
        plain.advance()
        trainer.advance()
    assert recording.played == 3
    assert all(value.data_ptr() == place and value.item() > 0.1 for value, place in places)
    for value, expected in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--p", "4"], "--p"),
        (["--alpha", "tile"], "--alpha"),
        (["--replicate", "roll", "--latent", "tile"], "--replicate, --latent"),
    ],
)
def test_options_of_tiles_are_refused(arguments, named, method, capsys):
    with pytest.raises(SystemExit) as ended:
        program.main(["--recipe", "mnist-mlp", "--data", "synthetic", "--network", method, *arguments])
    assert ended.value.code == 2
    assert f"--network {method} has no tiles and takes no {named}: use --network tbn" in capsys.readouterr().err


def test_the_program_says_that_nothing_is_packed(tmp_path, capsys):
    arguments = ["--recipe", "resnet8-cifar10", "--data", "synthetic", "--network", "snn", "--set", "batch_size=4"]
    arguments += ["--epochs", "1", "--subset", "8", "--test-subset", "8", "--min-size", "36864", "--quiet"]
    assert program.main([*arguments, "--out", str(tmp_path)]) == 0
    assert "not packed: the bits are counted" in capsys.readouterr().out
    document = json.loads((tmp_path / "result.json").read_text())
    assert document["header"]["tiling"] == {"min_size": 36864, "small": "binary", "index_bits": 5}
    assert document["result"]["stored_bits"] == 64 * 64 * 5 + 32 * 9 + sum(LAYERS) - 36864
    assert program.title(document["header"]) == "snn"
    assert not (tmp_path / "packed.safetensors").exists()


def test_lambda_says_where_kernels_share_a_subset():
    task = tasks.synthetic_task(small("resnet8-cifar10"))
    trainer = training.Trainer(task, options("resnet8-cifar10", "snn"), training.World())
    found = [name for name, module in trainer.model.named_modules() if isinstance(module, SubBitKernels)]
    assert [name.split(".parametrizations")[0] for name in found] == [
        "layer2.0.conv2",
        "layer3.0.conv1",
        "layer3.0.conv2",
    ]


def test_tiled_networks_are_packed(tmp_path):
    assert start(tmp_path / "tbn", options("mnist-mlp", "tbn"))["result"]["packed"] is True
    assert start(tmp_path / "float", options("mnist-mlp", "float"))["result"]["packed"] is False


def test_methods_are_documented(capsys):
    with pytest.raises(SystemExit):
        program.main(["--help"])
    text, document = " ".join(capsys.readouterr().out.split()), program.DOCUMENT.read_text()
    for method in METHODS:
        assert method in text
        assert f"| `{method}` |" in document


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", METHODS)
def test_recorded_steps_on_a_gpu_learn_alike(method):
    chosen = options_for("resnet8-cifar10", network=method)
    chosen = dataclasses.replace(chosen, settings=chosen.settings.changed({"lr": "0.01"}))
    task = tasks.synthetic_task(chosen.settings)
    losses = []
    with devices.joined_world("cuda") as world:
        for graph in (False, True):
            trainer = training.Trainer(task, dataclasses.replace(chosen, graph=graph), world)
            for _ in range(8):
                trainer.advance()
            losses.append(trainer.take_loss())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
