"""The training program on accelerators: what a step asks of one, on PyTorch's meta device where there is no other."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import tbn_compiler as tbn

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))
import train as program  # noqa: E402
from paper import devices, graphs, tasks, training  # noqa: E402
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


# Recorded steps


class Recording:
    """``torch.cuda.graph`` without a GPU: what is computed while it records is undone, and done when it is played."""

    def __init__(self, trainer):
        self.trainer, self.played = trainer, 0

    def tensors(self):
        states = [value for state in self.trainer.optimizer.state.values() for value in state.values()]
        return [*self.trainer.model.parameters(), *self.trainer.model.buffers(), *states, self.trainer._loss]

    @contextlib.contextmanager
    def graph(self, graph, stream):
        before = [value.detach().clone() for value in self.tensors()]
        yield
        with torch.no_grad():
            for value, old in zip(self.tensors(), before, strict=True):
                value.copy_(old)

    def replay(self):
        self.played += 1
        step = self.trainer._recorded
        with step._settings():
            step._learn(step._inputs, step._target)


def record_on_the_cpu(trainer, monkeypatch):
    """Have the trainer record its steps as it would on a GPU; returns what counts them."""
    recording = Recording(trainer)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in (
        ("Stream", lambda device: stream),
        ("current_stream", lambda: stream),
        ("stream", lambda other: contextlib.nullcontext()),
        ("CUDAGraph", lambda: recording),
        ("graph", recording.graph),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    trainer._recorded = graphs.RecordedStep(trainer._learn, trainer.optimizer, torch.device("cpu"))
    return recording


def test_recorded_steps_are_the_steps(monkeypatch):
    """The order of what is done around a graph: warm-up, recording, batches, rates; with a schedule that matters."""
    options = options_for("resnet8-cifar10", amp="bf16")
    options = dataclasses.replace(options, settings=options.settings.changed({"warmup_epochs": "1", "lr": "0.01"}))
    task = tasks.synthetic_task(options.settings)
    plain, trainer = (training.Trainer(task, options, training.World()) for _ in range(2))
    recording = record_on_the_cpu(trainer, monkeypatch)
    for _ in range(9):
        plain.advance()
        trainer.advance()
    assert recording.played == 9 - graphs.RecordedStep.FIRST
    assert trainer.optimizer.param_groups[0]["lr"] == plain.optimizer.param_groups[0]["lr"]
    assert isinstance(trainer.optimizer.param_groups[0]["lr"], float)
    assert trainer.take_loss() == pytest.approx(plain.take_loss(), rel=1e-3)
    for value, expected in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)  # the rates are rounded to float32


def test_steps_are_recorded_on_a_gpu_only():
    options = options_for("mnist-mlp", graph=True)
    with pytest.raises(training.RunError, match="--graph records steps of one process on a GPU"):
        training.Trainer(tasks.synthetic_task(options.settings), options, training.World())


# On a GPU, where there is one

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_a_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["resnet8-cifar10", "vit-cifar10"])
def test_a_step_does_not_wait(name, layout):
    options = options_for(name, tiling=LAYOUTS[layout], amp="bf16")
    with devices.joined_world("cuda") as world:
        trainer = training.Trainer(tasks.synthetic_task(options.settings), options, world)
        trainer.advance()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.advance()
        finally:
            torch.cuda.set_sync_debug_mode(before)
        assert trainer.take_loss() > 0


@on_a_gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", ["resnet8-cifar10", "char-gpt"])
def test_a_run_on_a_gpu_is_resumed(name, graph, tmp_path):
    """Killed in its second epoch, in a recorded step."""

    class Kill:
        def on_step(self, trainer):
            if trainer.step == 14:
                raise KeyboardInterrupt

        def on_epoch(self, trainer, record):
            pass

    options = options_for(name, amp="bf16", graph=graph, subset=40)
    options = dataclasses.replace(options, settings=options.settings.changed({"epochs": "2"}))
    task = tasks.synthetic_task(options.settings)
    with devices.joined_world("cuda") as world:
        whole = training.run(task, options, world, training.Files(tmp_path / "whole"))
        files = training.Files(tmp_path / "parts", steps=1)
        with pytest.raises(KeyboardInterrupt):
            training.run(task, options, world, files, observer=Kill())
        parts = training.run(task, options, world, files, resume=True)
    assert parts["result"]["parameters_sha256"] == whole["result"]["parameters_sha256"]
    assert parts["result"]["lowered"] == whole["result"]["lowered"]
    assert whole["result"]["failure"] is None
    assert whole["result"]["output_difference"] < 1e-3


@on_a_gpu
def test_recorded_steps_learn_alike():
    options = options_for("resnet8-cifar10")
    task = tasks.synthetic_task(options.settings)
    losses = []
    with devices.joined_world("cuda") as world:
        for graph in (False, True):
            trainer = training.Trainer(task, dataclasses.replace(options, graph=graph), world)
            for _ in range(8):
                trainer.advance()
            losses.append(trainer.take_loss())
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


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
