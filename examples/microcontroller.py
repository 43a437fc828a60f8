"""Small networks with real data, from PyTorch to C on an emulated microcontroller.

    python examples/microcontroller.py train --data DIR      # float, binary and tiled networks; keeps those of seed 0
    python examples/microcontroller.py measure --data DIR    # exports them and runs the C on the host and emulated
    python examples/microcontroller.py page                  # writes docs/microcontroller_examples.md

DIR has a folder for each data set: ``mnist`` (the four idx files), ``fsdd`` (the ``recordings`` of the Free Spoken
Digit Dataset), ``ett`` (ETTh1.csv) and ``cifar10`` (its Python batches). Every step does only what the result file
lacks, which is written after each network. Without data, ``--made-up`` tries everything on small made-up data instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from example_data import DataError
from mcu import cifar, dscnn, forecast, images, keywords, report
from mcu.target import deploy, run_as_c
from mcu.task import Dataset, Network, Task
from mcu.training import predict, train_networks
from torch import nn

import tbn_compiler as tbn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "mcu_examples.json"
DOCUMENT = ROOT / "docs" / "microcontroller_examples.md"
TASKS = {task.name: task for task in (images.MLP, images.CNN, keywords.TASK, forecast.TASK, dscnn.TASK, cifar.TASK)}


def train(tasks: Sequence[Task], options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Train the networks of each task and seed that ``results`` lacks; the file is written after each network."""
    for task in tasks:
        seeds = [seed for seed in range(options.seeds) if not is_trained(task, seed, results)]
        if not seeds:
            continue
        data = load(task, options.data)
        examples = data.for_choices() if options.validate else data.for_results()
        for seed in seeds:
            entry = results["tasks"].setdefault(task.name, {"networks": {}})
            entry |= {"data": data.name, "split": data.split, "examples": [len(part) for part in examples]}
            finished, teacher = begun(task, seed, results, options.models)
            for name, trained in train_networks(task, *examples, seed, finished, teacher):
                recipe = _recipe(task.networks[name])
                known = entry["networks"].get(name)
                if known is None or known["recipe"] != recipe:
                    known = entry["networks"][name] = {"recipe": recipe, "seconds": {}, "scores": {}}
                known["scores"][str(seed)] = trained.scores
                known["seconds"][str(seed)] = round(trained.seconds, 1)
                if seed == 0:
                    known.pop("target", None)
                    known.pop("int8", None)
                    keep(task.networks[name], trained.model, options.models / f"{task.name}-{name}.safetensors")
                figures = ", ".join(f"{key} {value:.4g}" for key, value in trained.scores.items())
                print(f"{task.name:9} {name:9} seed {seed}  {figures}  ({trained.seconds:.0f} s)", flush=True)
                save(results, options.results)


def begun(task: Task, seed: int, results: dict[str, Any], models: Path) -> tuple[set[str], nn.Module | None]:
    """Networks of a seed that need no training, and the float one, from which the others learn, if it is stored."""
    finished = {name for name in task.networks if has_result(task, name, seed, results)}
    path = models / f"{task.name}-float.safetensors"
    if seed == 0 and "float" in finished and path.is_file():
        return finished, restore(task, task.networks["float"], path)
    return finished - {"float"}, None


def measure(tasks: Sequence[Task], options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Export and run the networks of seed 0 that ``results`` has no measurement of.

    Raises:
        DataError: a network was not trained, or its file is missing.
        ExportError: it cannot be exported, or a tool is missing.
    """
    for task in tasks:
        networks = results["tasks"].get(task.name, {"networks": {}})["networks"]
        data = load(task, options.data)
        known, test = data.for_results()
        calibration = known.spread(task.calibration).x
        for name, network in task.networks.items():
            path = options.models / f"{task.name}-{name}.safetensors"
            if name not in networks or not path.is_file():
                raise DataError(f"{path} or its result is missing: train first")
            entry, symbols = networks[name], f"{task.name}_{name}"
            model = restore(task, network, path)
            if "target" not in entry or options.again:
                deployed = deploy(network, model, test.x[:1])
                # What is optimised of some networks takes one example at a time.
                outputs = predict(model, test.x)
                entry["target"] = run_as_c(deployed, outputs, test, task, options.emulate, symbols)
                _report(results, options.results, task, name, entry["target"])
            if task.calibration and ("int8" not in entry or options.again):
                if network.config is None:
                    from mcu import int8  # nothing else needs ONNX Runtime

                    entry["int8"] = int8.peer(model, calibration, test)
                    save(results, options.results)
                    continue
                deployed = deploy(network, model, test.x[:1], calibration)
                outputs = predict(deployed, test.x)
                entry["int8"] = run_as_c(deployed, outputs, test, task, options.emulate, f"{symbols}_int8")
                _report(results, options.results, task, f"{name}, int8", entry["int8"])


def _report(results: dict[str, Any], path: Path, task: Task, name: str, target: dict[str, Any]) -> None:
    """Write a measurement into the result file, and what it found to standard output."""
    results["tools"] = {tool: _version(tool) for tool in ("arm-none-eabi-gcc", "qemu-system-arm")}
    save(results, path)
    emulated = target["emulated"]
    print(
        f"{task.name:9} {name:15} {emulated['instructions']:12,} instructions, "
        f"{emulated['flash_bytes']:7,} B flash, error at most {emulated['max_error']:.1e}",
        flush=True,
    )


def load(task: Task, folder: Path | None) -> Dataset:
    """The task's data from a folder, or made up."""
    if folder is None:
        torch.manual_seed(0)
        return task.made_up()
    return task.load(folder)


def keep(network: Network, model: nn.Module, path: Path) -> None:
    """Store a trained network; tiled ones as packed tiles."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if network.config is None:
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        tbn.save(model, path)


def restore(task: Task, network: Network, path: Path) -> nn.Module:
    """The network that :func:`keep` stored."""
    model = task.build()
    if network.config is not None:
        packed: nn.Module = tbn.load(path, model)
        return packed
    model.load_state_dict(safetensors.torch.load_file(path))
    return model.eval()


def _recipe(network: Network) -> dict[str, Any]:
    """The recipe as the result file holds it."""
    config = network.config
    tiling = {"p": config.p, "alpha": config.alpha, "min_size": config.min_size} if config else {}
    recipe: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(network.recipe) | tiling))
    return recipe


def has_result(task: Task, name: str, seed: int, results: dict[str, Any]) -> bool:
    """Whether a network was trained with this seed and its present recipe."""
    known = results["tasks"].get(task.name, {"networks": {}})["networks"].get(name)
    return known is not None and known["recipe"] == _recipe(task.networks[name]) and str(seed) in known["scores"]


def is_trained(task: Task, seed: int, results: dict[str, Any]) -> bool:
    """Whether every network of the task was trained with this seed and its present recipe."""
    return all(has_result(task, name, seed, results) for name in task.networks)


def _version(tool: str) -> str:
    """The first line that a tool prints about itself."""
    return subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def read_results(path: Path) -> dict[str, Any]:
    """Read the result file, or begin one."""
    if path.exists():
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return results
    versions = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    return {"versions": versions, "tasks": {}}


def save(results: dict[str, Any], path: Path) -> None:
    """Write the result file at once, so that a stopped run leaves a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    options = _parse(arguments)
    results = read_results(options.results)
    if options.command == "page":
        document = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(report.fill(document, results, TASKS), encoding="utf-8")
        return 0
    tasks = [TASKS[name] for name in options.task or TASKS]
    if options.epochs:
        tasks = [task.trial(options.epochs) for task in tasks]
    try:
        {"train": train, "measure": measure}[options.command](tasks, options, results)
    except (DataError, tbn.TBNError) as error:
        print(f"microcontroller: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for command, what in (("train", "train the networks"), ("measure", "run their C"), ("page", "write the tables")):
        sub = commands.add_parser(command, help=what, description=what)
        sub.add_argument("--results", type=Path, metavar="FILE", default=RESULTS, help="result file to extend")
        if command == "page":
            continue
        source = sub.add_mutually_exclusive_group(required=True)
        source.add_argument("--data", type=Path, metavar="DIR", help="folder with mnist, fsdd and ett")
        source.add_argument("--made-up", action="store_true", help="a trial on small made-up data")
        sub.add_argument("--task", action="append", choices=TASKS, help="only this one; can be repeated")
        sub.add_argument("--models", type=Path, metavar="DIR", default=ROOT / "build" / "microcontroller")
        sub.add_argument("--epochs", type=int, metavar="N", help="a trial: N epochs in batches of 32")
        if command == "train":
            sub.add_argument("--seeds", type=int, default=3, help="number of runs (default: %(default)s)")
            sub.add_argument("--validate", action="store_true", help="hold out the validation part and measure on it")
        else:
            sub.add_argument("--emulate", type=int, metavar="N", help="number of examples to run on the emulator")
            sub.add_argument("--again", action="store_true", help="measure what was measured before, too")
    options = parser.parse_args(arguments)
    if options.command != "page":
        for name in ("seeds", "epochs", "emulate"):
            value = getattr(options, name, None)
            if value is not None and value < 1:
                parser.error(f"--{name} must be at least 1")
        trial = options.made_up or options.epochs or getattr(options, "validate", False)
        if trial and options.results == RESULTS:
            parser.error("a trial needs --results and --models of its own: its figures do not belong among the others")
    return options


if __name__ == "__main__":
    torch.set_num_threads(1)  # the networks are small: more threads only wait for each other
    sys.exit(main())
