"""The training program on accelerators: what a step asks of one, on PyTorch's meta device where there is no other."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tbn_compiler as tbn

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import train as program  # noqa: E402
from paper import devices, tasks, training  # noqa: E402
from paper.recipes import RECIPES  # noqa: E402

sys.path.remove(str(EXAMPLES))

META = torch.device("meta")
LAYOUTS = {
    "4": {"p": 4},
    "8": {"p": 8},
    "pair": {"p": (2, 2)},
    "hadamard": {"p": 4, "replicate": "hadamard"},
    "tile": {"p": 4, "latent": "tile"},
    "hadamard tile": {"p": 4, "replicate": "hadamard", "latent": "tile"},
}


class Crossings(TorchDispatchMode):
    """Collects the operators that have to do with the CPU and another device, each with its largest CPU tensor.

    A value that is read on the way (``item``) is an error of the meta device itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int]] = []
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        sizes = [value.numel() for value in tensors if value.device.type == "cpu"]
        self.operators += len(sizes) < len(tensors)
        if 0 < len(sizes) < len(tensors):
            self.found.append((str(func), max(sizes)))
        return result


def options_for(name, batch=4, **more):
    recipe = RECIPES[name]
    length = {"length": "16"} if recipe.length else {}
    changes = {"epochs": "1", "batch_size": str(batch), "eval_batch_size": str(batch), **length}
    return training.Options(name, recipe.changed(changes), **more)


def started(folder, options, **files):
    task = tasks.synthetic_task(options.settings)
    return training.run(task, options, training.World(), training.Files(folder, **files))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["resnet8-cifar10", "vit-cifar10", "mnist-mlp", "char-gpt", "series-etth1"])
def test_a_step_sends_numbers_for_its_augmentation_only(name, layout):
    """Nothing that a step computes with is made on the CPU, and nothing is read there."""
    options = options_for(name, tiling=LAYOUTS[layout])
    task = tasks.synthetic_task(options.settings)
    trainer = training.Trainer(task, options, training.World(device=META))
    trainer.advance()
    with Crossings() as crossings:
        trainer.advance()
    assert crossings.operators > 10
    assert {operator for operator, _ in crossings.found} <= {"aten._to_copy.default"}
    assert all(size <= 3 * 4 for _, size in crossings.found)  # where to crop, twice, and what to flip
    assert len(crossings.found) <= 1


def test_point_clouds_are_chosen_on_the_device():
    options = options_for("pointnet-modelnet10")
    task = tasks.synthetic_task(options.settings)
    trainer = training.Trainer(task, options, training.World(device=META))
    with Crossings() as crossings:
        trainer.advance()
    assert {operator for operator, _ in crossings.found} <= {"aten._to_copy.default"}


@pytest.mark.parametrize("name", ["mnist-mlp", "char-gpt", "series-etth1", "pointnet-parts", "resnet8-cifar10"])
def test_data_are_placed_whole(name):
    task = tasks.synthetic_task(options_for(name).settings)
    task.place(META)
    inputs, target = task.train_batch(torch.arange(2, device=META), torch.Generator().manual_seed(0))
    assert {part.device.type for part in (*inputs, target)} == {"meta"}
    inputs, target = task.test_batch(torch.arange(2, device=META))
    assert {part.device.type for part in (*inputs, target)} == {"meta"}


def test_batches_are_those_of_every_version():
    """Crops and flips of a seed, written down: committed results were trained with them."""
    images = torch.arange(5 * 4 * 4, dtype=torch.uint8).reshape(5, 1, 4, 4)
    generator = torch.Generator().manual_seed(3)
    top, left = torch.randint(3, (2, 5), generator=generator)
    flip = torch.rand(5, generator=generator) < 0.5
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1))
    expected = [padded[i, :, top[i] : top[i] + 4, left[i] : left[i] + 4] for i in range(5)]
    expected = [crop.flip(2) if flip[i] else crop for i, crop in enumerate(expected)]
    found = tasks.crop_and_flip(images, torch.Generator().manual_seed(3), padding=1)
    assert found.equal(torch.stack(expected))


# The end of a run


def test_a_network_that_cannot_be_lowered_is_kept(tmp_path, monkeypatch, capsys):
    """The measures of training are written with the reason, and the run is finished once it can be."""
    options = options_for("mnist-mlp", subset=8)
    with monkeypatch.context() as patch:
        patch.setattr(tbn, "lower", lambda model: (_ for _ in ()).throw(RuntimeError("no kernel runs")))
        failed = started(tmp_path / "parts", options)["result"]
    assert failed["failure"] == "RuntimeError: no kernel runs"
    assert failed["lowered"] is None
    assert failed["file_bytes"] == 0
    assert failed["stored_bits"] < 32 * failed["weights"]
    written = json.loads((tmp_path / "parts" / "result.json").read_text())["result"]
    assert {"kind": "result", **written} == failed
    assert "no kernel runs" in capsys.readouterr().err  # with where it happened
    task = tasks.synthetic_task(options.settings)
    files = training.Files(tmp_path / "parts")
    finished = training.run(task, options, training.World(), files, resume=True)["result"]
    whole = started(tmp_path / "whole", options)["result"]
    for name in ("trained", "lowered", "parameters_sha256", "stored_bits", "file_bytes"):
        assert finished[name] == whole[name]
    assert finished["failure"] is None
    assert failed["trained"] == whole["trained"]


def test_a_failure_behind_the_file_keeps_the_file(tmp_path, monkeypatch, capsys):
    """A kernel that fails while the lowered network is measured."""
    monkeypatch.setattr(training.Trainer, "difference", lambda trainer, other: 1 / 0)
    arguments = ["--recipe", "mnist-mlp", "--data", "synthetic", "--set", "batch_size=4", "--epochs", "1", "--quiet"]
    assert program.main([*arguments, "--out", str(tmp_path)]) == 1
    assert "train.py: lowering failed: ZeroDivisionError" in capsys.readouterr().err
    result = json.loads((tmp_path / "result.json").read_text())["result"]
    assert result["lowered"] is None
    assert result["file_bytes"] == (tmp_path / "packed.safetensors").stat().st_size


@pytest.mark.parametrize(("epochs", "written"), [(1, 5), (2, 3), (0, 1)])
def test_checkpoints_of_epochs(epochs, written, tmp_path, monkeypatch):
    """Of 4 epochs, and the one at the end."""
    count = 0

    def write(path, content):
        nonlocal count
        count += path.name == "checkpoint.pt"
        write_atomically(path, content)

    write_atomically = training.write_atomically
    monkeypatch.setattr(training, "write_atomically", write)
    options = options_for("mnist-mlp", subset=8)
    options = dataclasses.replace(options, settings=options.settings.changed({"epochs": "4"}))
    started(tmp_path, options, epochs=epochs, seconds=1e9)
    assert count == written


def test_fast_runs_say_so(tmp_path):
    options = options_for("mnist-mlp", subset=8, fast=True)
    document = started(tmp_path, options)
    assert document["header"]["fast"] is True
    task, slow = tasks.synthetic_task(options.settings), dataclasses.replace(options, fast=False)
    with pytest.raises(training.RunError, match="another one: fast: True there, False now"):
        training.run(task, slow, training.World(), training.Files(tmp_path), resume=True)


def test_true_float32_leaves_settings_as_they_were():
    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    try:
        for allowed in (True, False):
            devices._allow_tf32(allowed)
            with devices.true_float32():
                assert [setting.allow_tf32 for setting in settings] == [False, False]
            assert [setting.allow_tf32 for setting in settings] == [allowed, allowed]
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value
