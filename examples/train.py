"""Train a network of the paper by a named recipe, lower it, and write the packed file.

    python examples/train.py --list
    python examples/train.py --recipe resnet18-cifar10 --p 4 --data DIR
    python examples/train.py --recipe resnet8-cifar10 --network float --epochs 3 --data DIR --out runs/float
    python examples/train.py --recipe resnet8-cifar10 --network irnet --epochs 3 --data DIR --out runs/irnet
    python examples/train.py --recipe vit-cifar10 --p 8 --amp bf16 --compile --data DIR --out runs/vit --resume
    torchrun --nproc-per-node 2 examples/train.py --recipe mnist-mlp --data DIR
    python examples/train.py --recipe char-gpt --data synthetic --epochs 1     # a trial on made-up data

A run that was stopped, however, goes on bit for bit with --resume. docs/training_program.md tells more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from documents import fill, markdown
from example_data import DataError
from paper.baselines import METHODS
from paper.devices import RunError, World, joined_world
from paper.recipes import RECIPES, SETTABLE, Recipe, RecipeError
from paper.runs import Record, title
from paper.tasks import Task, read_task, synthetic_task
from paper.training import Files, Options, Trainer, run
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

import tbn_compiler as tbn

DOCUMENT = Path(__file__).parent.parent / "docs" / "training_program.md"
RESULTS = Path(__file__).parent / "results"


def recipe_table() -> str:
    """All recipes as a Markdown table; what is not from the paper's appendix stands in parentheses."""
    rows = []
    for name, recipe in RECIPES.items():

        def cell(text: str, *fields: str, stated: Sequence[str] = recipe.stated) -> str:
            return text if set(fields) <= set(stated) else f"({text})"

        optimizer = f"{recipe.optimizer} {recipe.lr:g}"
        decay = f"{recipe.weight_decay:g}"
        schedule: str = recipe.schedule
        if schedule == "step":
            schedule = f"x {recipe.gamma:g} every {recipe.every}"
        schedule = cell(schedule, "schedule")
        if recipe.warmup_epochs:
            schedule += ", " + cell(f"warm-up {recipe.warmup_epochs}", "warmup_epochs")
        rows.append([
            f"`{name}`",
            cell(str(recipe.epochs), "epochs"),
            cell(str(recipe.batch_size), "batch_size"),
            cell(optimizer, "optimizer", "lr"),
            cell(decay, "weight_decay"),
            schedule,
            f"{recipe.tiling({}).min_size:,}",
            recipe.note,
        ])  # fmt: skip
    titles = ["recipe", "epochs", "batch", "optimiser", "decay", "schedule", "lambda", "remarks"]
    return markdown(titles, rows, ("recipe", "optimiser", "schedule", "remarks"))


def results_table() -> str:
    """The runs in ``examples/results`` as a Markdown table."""
    rows = []
    for path in sorted(RESULTS.glob("train-*.json")):
        document = json.loads(path.read_text())
        header, result = document["header"], document["result"]
        metric, epochs = result["metric"], document["epochs"]
        lowered = result["lowered"]
        rows.append([
            f"`{header['recipe']}`",
            title(header),
            ", ".join(f"{name} {before} -> {now}" for name, (before, now) in header["changes"].items()),
            f"{sum(record['seconds'] for record in epochs) / len(epochs):.1f}",
            f"{metric.replace('_', ' ')} {result['trained'][metric]:.2f}",
            f"{lowered[metric]:.2f}" if lowered else "",
            f"{result['bits_per_weight']:.3f}",
            "not packed" if header["network"] in METHODS else f"{result['tensor_bytes']:,}",
        ])  # fmt: skip
    titles = ["recipe", "network", "changed", "s / epoch", "trained", "lowered", "bits / weight", "bytes"]
    return markdown(titles, rows, ("recipe", "network", "changed", "trained"))


def copies(text: str) -> int | tuple[int, int]:
    """``"4"`` or ``"2x2"``."""
    try:
        numbers = [int(part) for part in text.split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2) or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of copies such as 4 nor a pair such as 2x2")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def setting(text: str) -> tuple[str, str]:
    """``"key=value"``."""
    key, sign, value = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form key=value")
    return key.strip(), value.strip()


def at_least(lowest: int) -> Any:
    """A whole number not below ``lowest``."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
        return value

    number.__name__ = "number"  # what argparse calls it in messages
    return number


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--recipe", choices=RECIPES, metavar="NAME", help="what to train; --list shows all")
    result.add_argument("--data", metavar="DIR", help="folder with the data set's files, or 'synthetic'")
    result.add_argument("--out", type=Path, metavar="RUN_DIR", help="folder of the run (default: runs/ and its name)")
    result.add_argument("--resume", action="store_true", help="go on from the checkpoint in RUN_DIR, if there is one")
    result.add_argument("--list", action="store_true", help="print the recipes and end")
    result.add_argument("--docs", action="store_true", help="write the tables of docs/training_program.md and end")

    network = result.add_argument_group("network")
    network.add_argument(
        "--network", choices=["float", "bwnn", "tbn", *METHODS], default="tbn",
        help="in float, tiled (bwnn is p=1), or by a method to compare with (default: %(default)s)",
    )  # fmt: skip
    network.add_argument("--p", type=copies, metavar="P", help="copies of the tile: 4, 8, 16, 32 or 2x2 (default: 4)")
    network.add_argument("--alpha", help="layer, output or tile (default: the recipe's preset; output for a pair p)")
    network.add_argument("--replicate", help="how copies differ, as in TilingConfig (default: repeat)")
    network.add_argument("--latent", help="what is trained: weight or tile (default: weight)")
    network.add_argument("--min-size", type=at_least(0), metavar="N", help="the paper's lambda (default: the recipe's)")

    shorter = result.add_argument_group("changes to the recipe, which the log names")
    shorter.add_argument("--epochs", type=at_least(1), metavar="N", help="short for --set epochs=N")
    shorter.add_argument("--subset", type=at_least(1), default=0, metavar="N", help="train on N examples")
    shorter.add_argument("--test-subset", type=at_least(1), default=0, metavar="N", help="test on N examples")
    shorter.add_argument(
        "--set", type=setting, action="append", default=[], metavar="KEY=VALUE",
        help=f"set one of {', '.join(SETTABLE)}",
    )  # fmt: skip

    how = result.add_argument_group("how to run")
    how.add_argument("--seed", type=at_least(0), default=0, help="default: %(default)s")
    how.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: %(default)s")
    how.add_argument("--amp", choices=["off", "bf16", "fp16"], default="off", help="default: %(default)s")
    how.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="torch.compile the training step's module"
    )
    how.add_argument(
        "--fast", action="store_true", help="on a GPU search for fast kernels and use tf32: not repeated bit for bit"
    )
    how.add_argument("--graph", action="store_true", help="on a GPU record a step as a CUDA graph, and repeat that")
    how.add_argument(
        "--checkpoint-epochs", type=at_least(0), default=1, metavar="N",
        help="checkpoint after every N epochs, 0 for none of these (default: %(default)s); there is one at the end",
    )  # fmt: skip
    how.add_argument("--checkpoint-steps", type=at_least(0), default=0, metavar="N", help="checkpoint every N steps")
    how.add_argument(
        "--checkpoint-seconds", type=float, default=120.0, metavar="S",
        help="and after S seconds (default: %(default)s)",
    )  # fmt: skip
    how.add_argument("--curves", action="store_true", help="draw curves.png (needs matplotlib)")
    how.add_argument("--quiet", action="store_true", help="no progress bar, no lines for epochs")
    return result


def options_of(arguments: argparse.Namespace) -> Options:
    """What the arguments ask for.

    Raises:
        RecipeError: a setting is unknown or out of range.
        ConfigError: an option of the tiling is.
    """
    base: Recipe = RECIPES[arguments.recipe]
    settings = dict(arguments.set)
    if arguments.epochs is not None:
        settings["epochs"] = str(arguments.epochs)
    if arguments.min_size is not None:
        settings["min_size"] = str(arguments.min_size)
    recipe = base.changed(settings)
    tiling = {name: getattr(arguments, name) for name in ("p", "alpha", "replicate", "latent")}
    tiling = {name: value for name, value in tiling.items() if value is not None}
    unused = [*tiling, *(["min-size"] if arguments.min_size is not None else [])]
    if unused and arguments.network == "float":
        raise RecipeError(f"a float network takes no {', '.join(f'--{name}' for name in unused)}")
    if tiling and arguments.network in METHODS:
        given = ", ".join(f"--{name}" for name in tiling)
        raise RecipeError(f"--network {arguments.network} has no tiles and takes no {given}: use --network tbn")
    if "p" in tiling and arguments.network == "bwnn":
        raise RecipeError("--network bwnn is p=1: leave --p out, or use --network tbn")
    changes: dict[str, Any] = base.differences(recipe)
    for name in ("subset", "test_subset"):
        if getattr(arguments, name):
            changes[name] = ["all", getattr(arguments, name)]
    options = Options(
        arguments.recipe, recipe, changes, arguments.network, tiling, arguments.seed, arguments.subset,
        arguments.test_subset, arguments.amp, arguments.compile, arguments.fast, arguments.graph,
    )  # fmt: skip
    options.config()
    return options


def run_name(options: Options) -> str:
    """A folder's name that tells the run from others."""
    parts = [options.recipe, options.network]
    for name, value in options.tiling.items():
        parts.append(f"p{'x'.join(map(str, value))}" if isinstance(value, tuple) else f"{name[:1]}{value}")
    return "-".join([*parts, f"seed{options.seed}"])


class Reporter:
    """Prints a line for each epoch and shows a bar on terminals."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self._progress, self._console = progress, console
        self._bar = progress.add_task("", total=None)

    def on_step(self, trainer: Trainer) -> None:
        """Move the bar."""
        epochs = trainer.options.settings.epochs
        self._progress.update(
            self._bar,
            completed=trainer.step,
            total=epochs * trainer.steps_per_epoch,
            description=f"epoch {min(trainer.epoch + 1, epochs)} of {epochs}",
        )

    def on_epoch(self, trainer: Trainer, record: Record) -> None:
        """Print the epoch's line."""
        measures = "  ".join(f"{name} {value:.4g}" for name, value in record["test"].items())
        self._console.print(
            f"epoch {record['epoch']:4} of {trainer.options.settings.epochs}  loss {record['loss']:.4f}  {measures}"
            f"  lr {record['lr']:.3g}  {record['seconds']:.1f} s + {record['test_seconds']:.1f} s",
            highlight=False,
        )


@contextlib.contextmanager
def reporter(world: World, *, quiet: bool) -> Iterator[Reporter | None]:
    """A reporter for the process that prints."""
    if quiet or world.rank:
        yield None
        return
    console = Console(width=None if sys.stdout.isatty() else 160, soft_wrap=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield Reporter(progress, console)


def show(document: Record, folder: Path) -> None:
    """Print what came out."""
    header, result = document["header"], document["result"]
    metric = result["metric"]
    print(f"{header['recipe']}, {header['network']}, {header['data']['name']}: {result['epochs']} epochs")
    for name, (before, now) in header["changes"].items():
        print(f"  changed: {name} {before} -> {now}")
    print(f"  {metric.replace('_', ' ')}: {result['trained'][metric]:.4f}", end="")
    if result["lowered"] is not None:
        print(
            f", lowered {result['lowered'][metric]:.4f} (outputs differ by {result['output_difference']:.1e} at most)",
            end="",
        )
    print(
        f"\n  stored: {result['tensor_bytes']:,} bytes of tensors, {result['file_bytes']:,} in the file; "
        f"{result['bits_per_weight']:.3f} bits a weight, {result['alphas']} alphas"
    )
    if header["network"] in METHODS:
        print("  not packed: the bits are counted, and model.safetensors holds the quantised weights in float")
    print(f"  files in {folder}")


def load_task(data: str, recipe: Recipe) -> Task:
    """The recipe's data, from a folder or made up."""
    return synthetic_task(recipe) if data == "synthetic" else read_task(Path(data), recipe)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns the exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    if arguments.list:
        print(recipe_table())
        return 0
    if arguments.docs:
        tables = {"recipes": recipe_table(), "results": results_table()}
        DOCUMENT.write_text(fill(DOCUMENT.read_text(), tables))
        return 0
    if not arguments.recipe or not arguments.data:
        command.error("--recipe and --data are needed; --list shows the recipes")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        command.error("--device cuda: torch finds no CUDA device")
    try:
        options = options_of(arguments)
    except (RecipeError, tbn.ConfigError) as error:
        command.error(str(error))
    folder = arguments.out or Path("runs") / run_name(options)
    files = Files(
        folder, arguments.checkpoint_steps, arguments.checkpoint_seconds, arguments.checkpoint_epochs, arguments.curves
    )
    try:
        task = load_task(arguments.data, options.settings)
        joined = joined_world(arguments.device, fast=arguments.fast)
        with joined as world, reporter(world, quiet=arguments.quiet) as observer:
            document = run(task, options, world, files, resume=arguments.resume, observer=observer)
            if world.rank == 0:
                show(document, folder)
            if document["result"]["failure"]:
                raise RunError(f"lowering failed: {document['result']['failure']}; --resume tries it again")
    except (DataError, RunError, tbn.TBNError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
