"""The paper's microcontroller model on MNIST: a 784-128-10 MLP in float, binary (BWNN) and tiled by 4 (TBN4).

    python examples/mnist_mlp.py --data DIR     # DIR holds the four idx files of MNIST, gzipped or not
    python examples/mnist_mlp.py                # downloads MNIST, or falls back to scikit-learn's digits

Prints test accuracy after the last epoch and stored bytes, beside the storage in Table 6 of the paper (Gorbett,
Shirazi, Ray, CIKM 2024). docs/mnist.md tells how the recipe was chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from example_data import DataError, ImageData, load_images
from paper.published import MICROCONTROLLER
from torch import Tensor, nn

import tbn_compiler as tbn


@dataclass(frozen=True)
class Recipe:
    """How to train one network. The float reference takes the same epochs, batches, schedule and inputs.

    Attributes:
        epochs: passes over the training images; the learning rates warm up for 200 steps and fall along a cosine.
        batch_size: images per step.
        lr: Adam's learning rate of the weights.
        lr_small: Adam's learning rate of biases and alpha sources.
        mean, std: the inputs become ``(x - mean) / std``: two constants that cost no storage.
        distill: weight of the float network's soft labels in the loss, 0 to 1.
        temperature: softmax temperature of the soft labels.
        alpha_start: factors on the first layer's four alphas at the start.
        bias_start: standard deviation of the first layer's biases at the start, where a tiled network has them.
        center: train on images minus the mean image; what that shifts is folded into the first layer's biases.
    """

    epochs: int = 20
    batch_size: int = 128
    lr: float = 1e-3
    lr_small: float = 1e-3
    mean: float = 0.1307
    std: float = 0.3081
    distill: float = 0.0
    temperature: float = 2.0
    alpha_start: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)
    bias_start: float = 0.0
    center: bool = False


@dataclass(frozen=True)
class Network:
    """One row of the result.

    Attributes:
        title: what the tables call it.
        p: copies of the tile in the first layer; ``None`` for a float network.
        bias: whether both layers have biases.
        pair_inputs: add each two neighbouring pixels before the first layer, which is then 392-128. As a 784-128
            weight that is a tile with two more copies along the input, so ``p=2`` stores what ``p=4`` stores.
        paper: storage in Table 6 of the paper.
    """

    title: str
    p: int | None
    bias: bool = False
    pair_inputs: bool = False
    paper: str = ""


NETWORKS = {
    "float": Network("float", None),
    "float+bias": Network("float, biases", None, bias=True),
    "bwnn": Network("BWNN (p=1)", 1, paper=f"{MICROCONTROLLER['binary'].storage} KB"),
    "tbn4": Network("TBN4, as in the paper", 4, paper=f"{MICROCONTROLLER['p = 4'].storage} KB"),
    "tbn4+bias": Network("TBN4, biases", 4, bias=True),
    "tbn2x2": Network("TBN 2 x 2", 2, pair_inputs=True),
    "tbn2x2+bias": Network("TBN 2 x 2, biases", 2, bias=True, pair_inputs=True),
}

_EPOCHS = 40
_PLAIN = Recipe(epochs=_EPOCHS)
_TUNED = Recipe(epochs=_EPOCHS, distill=0.7, alpha_start=(0.5, 1.0, 2.0, 4.0))
_TUNED_BIAS = Recipe(epochs=_EPOCHS, distill=0.7, lr_small=1e-2, bias_start=2.0, center=True)

RECIPES: dict[str, dict[str, Recipe]] = {
    "plain": dict.fromkeys(NETWORKS, _PLAIN),
    "tuned": {
        "float": _PLAIN,
        "float+bias": dataclasses.replace(_PLAIN, center=True),
        "bwnn": _TUNED,
        "tbn4": _TUNED,
        "tbn4+bias": _TUNED_BIAS,
        "tbn2x2": dataclasses.replace(_TUNED, alpha_start=(0.5, 1.0)),
        "tbn2x2+bias": _TUNED_BIAS,
    },
}


class PairInputs(nn.Module):
    """Adds neighbouring inputs: ``[..., 784] -> [..., 392]``, divided by sqrt(2) to keep their size."""

    def forward(self, x: Tensor) -> Tensor:
        """Add each two neighbours."""
        pairs: Tensor = x.unflatten(-1, (-1, 2))
        return pairs.sum(-1) * math.sqrt(0.5)


def build(network: Network, recipe: Recipe) -> nn.Sequential:
    """The float model, 784-128-10."""
    inputs = 392 if network.pair_inputs else 784
    first = nn.Linear(inputs, 128, bias=network.bias)
    if network.bias and network.p:
        # Units that share a tile row are relu(alpha_i z + b): biases that start apart make them different units.
        nn.init.normal_(first.bias, std=recipe.bias_start)
    layers: dict[str, nn.Module] = {"pairs": PairInputs()} if network.pair_inputs else {}
    layers |= {"first": first, "relu": nn.ReLU(), "last": nn.Linear(128, 10, bias=network.bias)}
    return nn.Sequential(OrderedDict(layers))


def tile(model: nn.Module, p: int, recipe: Recipe) -> nn.Module:
    """Tile the first layer (one alpha per tile) and make the last one binary, as the paper does with small layers."""
    qat = tbn.transform(model, tbn.TilingConfig.paper(alpha="tile", overrides={"first": {"p": p}}))
    if p == len(recipe.alpha_start):
        source = qat.get_parameter("first.alpha_source").detach()
        source.view(p, -1).mul_(torch.tensor(recipe.alpha_start)[:, None])
    return qat


@torch.no_grad()
def fold_center(model: nn.Module, network: Network, center: Tensor) -> None:
    """Make a network that was trained on ``x - center`` take ``x``: ``W (x - c) + b = W x + (b - W c)``."""
    weight: Tensor = model.get_parameter("first.weight")
    if network.p is not None:
        bits = torch.ops.tbn.tile(weight, network.p)
        weight = torch.ops.tbn.scale(bits, model.get_parameter("first.alpha_source"), network.p)
    if network.pair_inputs:
        center = PairInputs()(center)
    model.get_parameter("first.bias").sub_(weight @ center)


def train(model: nn.Module, data: ImageData, recipe: Recipe, soft_labels: Tensor | None = None) -> None:
    """Train in place with Adam. ``data`` is standardised; ``soft_labels [count, 10]`` are another network's logits."""
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "small": []}
    for name, parameter in model.named_parameters():
        groups["weights" if name.endswith(".weight") else "small"].append(parameter)
    rates = {"weights": recipe.lr, "small": recipe.lr_small}
    optimizer = torch.optim.Adam(
        [{"params": groups[key], "lr": rates[key]} for key in rates if groups[key]], fused=True
    )
    steps_per_epoch = max(1, len(data.train_x) // recipe.batch_size)
    steps = recipe.epochs * steps_per_epoch
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    model.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(data.train_x))
        for batch in order[: steps_per_epoch * recipe.batch_size].split(recipe.batch_size):
            logits = model(data.train_x[batch])
            if soft_labels is None:
                loss = F.cross_entropy(logits, data.train_y[batch])
            else:
                loss = tbn.distillation_loss(
                    logits,
                    soft_labels[batch],
                    data.train_y[batch],
                    weight=recipe.distill,
                    temperature=recipe.temperature,
                )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percentage of images that are classified right."""
    right: Tensor = model(x).argmax(1) == y
    return 100 * right.float().mean().item()


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the tensors that a module stores."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


@dataclass(frozen=True)
class Result:
    """One trained network: accuracies in percent after the last epoch, and what it is made of."""

    test: float
    train: float
    stored_bytes: int
    seconds: float
    trained: nn.Module
    deployed: nn.Module


def run(data: ImageData, network: Network, recipe: Recipe, seed: int, soft_labels: Tensor | None = None) -> Result:
    """Train one network; a tiled one is lowered first and then measured, as it would be deployed.

    Args:
        data: standardised images.
        network: what to train.
        recipe: how.
        seed: of the initial weights and the order of the images.
        soft_labels: ``[count, 10]`` logits of the float network for the training images, for recipes that distill.
    """
    torch.manual_seed(seed)
    start = time.perf_counter()
    center = data.train_x.mean(0) if recipe.center else torch.zeros(784)
    trained: nn.Module = build(network, recipe)
    if network.p is not None:
        trained = tile(trained, network.p, recipe)
    centered = dataclasses.replace(data, train_x=data.train_x - center)
    train(trained, centered, recipe, soft_labels if recipe.distill else None)
    if recipe.center:
        fold_center(trained, network, center)
    deployed = trained if network.p is None else tbn.lower(trained)
    return Result(
        accuracy(deployed, data.test_x, data.test_y),
        accuracy(deployed, data.train_x, data.train_y),
        stored_bytes(deployed),
        time.perf_counter() - start,
        trained,
        deployed,
    )


def standardise(data: ImageData, recipe: Recipe) -> ImageData:
    """Images as ``(x - mean) / std``."""
    train_x, test_x = ((x - recipe.mean) / recipe.std for x in (data.train_x, data.test_x))
    return dataclasses.replace(data, train_x=train_x, test_x=test_x)


def run_all(
    data: ImageData, recipes: Mapping[str, Recipe], seed: int, known: Mapping[str, Result] | None = None
) -> dict[str, Result]:
    """Train every network of ``recipes`` (names of :data:`NETWORKS`), the float ones first: they teach the others.

    ``known`` holds float networks that were trained before, to teach the others too.
    """
    results: dict[str, Result] = {}
    for name, recipe in recipes.items():
        inputs = standardise(data, recipe)
        teachers = {**(known or {}), **results}
        teacher = teachers.get("float+bias" if NETWORKS[name].bias else "float")
        with torch.no_grad():
            soft_labels = teacher.deployed(inputs.train_x) if teacher else None
        results[name] = run(inputs, NETWORKS[name], recipe, seed, soft_labels)
        print(f"  seed {seed}  {NETWORKS[name].title:22} {results[name].test:6.2f} %  {results[name].seconds:5.1f} s")
    return results


def print_table(results: Sequence[Mapping[str, Result]]) -> None:
    """Mean and range over the seeds, stored bytes, and the storage that the paper reports."""
    print(f"\n{'network':22} {'accuracy %':>10} {'range':>15} {'stored bytes':>13}   paper, Table 6")
    for name in results[0]:
        scores = [result[name].test for result in results]
        spread = f"{min(scores):.2f} to {max(scores):.2f}"
        size = results[0][name].stored_bytes
        print(
            f"{NETWORKS[name].title:22} {mean(scores):10.2f} {spread:>15} {size:13,}   {NETWORKS[name].paper}".rstrip()
        )


def to_json(data: ImageData, recipes: Mapping[str, Recipe], results: Sequence[Mapping[str, Result]]) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    return {
        "data": data.name,
        "images": [len(data.train_y), len(data.test_y)],
        "networks": {
            name: {
                "title": NETWORKS[name].title,
                "recipe": dataclasses.asdict(recipe),
                "stored_bytes": results[0][name].stored_bytes,
                "accuracy": [round(result[name].test, 2) for result in results],
                "train_accuracy": [round(result[name].train, 2) for result in results],
            }
            for name, recipe in recipes.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder with the idx files of MNIST")
    parser.add_argument("--recipe", choices=RECIPES, default="tuned", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, help="default: what the recipe says")
    parser.add_argument("--seeds", type=int, default=1, help="number of runs to average (default: %(default)s)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the results there as JSON")
    parser.add_argument("--quick", action="store_true", help="a trial: 1 epoch on 600 images")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or (options.epochs is not None and options.epochs < 1):
        parser.error("--seeds and --epochs must be at least 1")
    try:
        data = load_images(options.data, cache=Path.home() / ".cache" / "tbn-examples" / "mnist")
    except DataError as error:
        print(f"mnist_mlp: {error}", file=sys.stderr)
        return 1
    epochs = options.epochs
    if options.quick:
        data, epochs = data.head(600, 300), epochs or 1
    recipes = RECIPES[options.recipe]
    if epochs:
        recipes = {name: dataclasses.replace(recipe, epochs=epochs) for name, recipe in recipes.items()}
    print(f"{data.name}: {len(data.train_y)} training and {len(data.test_y)} test images, recipe {options.recipe}")
    results = [run_all(data, recipes, seed) for seed in range(options.seeds)]
    print_table(results)
    print(f"\n{NETWORKS['tbn4'].title}:\n{tbn.summary(results[0]['tbn4'].trained)}")
    if options.out:
        options.out.write_text(json.dumps(to_json(data, recipes, results), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other
    sys.exit(main())
