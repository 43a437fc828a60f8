"""Training a task's networks: float first, then the tiled ones with its help."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from mcu.task import Examples, Network, Recipe, Task, loss, scores


@dataclass(frozen=True)
class Trained:
    """A network in the form that is deployed, and what it scored.

    Attributes:
        model: lowered where it is tiled, in evaluation mode.
        scores: on the examples that it was measured on.
        seconds: training time.
    """

    model: nn.Module
    scores: dict[str, float]
    seconds: float


def train_networks(
    task: Task,
    train: Examples,
    measure: Examples,
    seed: int,
    finished: Container[str] = (),
    teacher: nn.Module | None = None,
) -> Iterator[tuple[str, Trained]]:
    """Train the task's networks one by one.

    Args:
        task: what to train.
        train: examples to train on.
        measure: examples to measure the deployed networks on, after the last epoch.
        seed: of the initial weights, the batches and the augmentation; the same for every network.
        finished: names of networks to leave out.
        teacher: the float network, if that is one of them.
    """
    for name, network in task.networks.items():
        if name in finished:
            continue
        torch.manual_seed(seed)
        start = time.perf_counter()
        model = task.build()
        if network.config is not None:
            model = tile(model, network, teacher)
        fit(model, train, network.recipe, teacher, task.augment)
        seconds = time.perf_counter() - start
        if network.config is None:
            teacher = model
        deployed = model if network.config is None else tbn.lower(model)
        yield name, Trained(deployed, scores(predict(deployed, measure.x), measure.y), seconds)


def tile(model: nn.Module, network: Network, teacher: nn.Module | None) -> nn.Module:
    """The network in training form, with the starting point that its recipe asks for."""
    qat = tbn.transform(model, network.config)
    if network.recipe.from_float and teacher is not None:
        tbn.init_from_float(qat, teacher.state_dict())
    factors = torch.tensor(network.recipe.alpha_start)
    for layer in tbn.summary(qat).layers:
        if layer.alphas == len(factors):
            source = qat.get_parameter(f"{layer.name}.alpha_source")
            source.detach().view(len(factors), -1).mul_(factors[:, None])
    return qat


def fit(
    model: nn.Module,
    examples: Examples,
    recipe: Recipe,
    teacher: nn.Module | None,
    augment: Callable[[Tensor], Tensor] | None,
) -> None:
    """Train in place; norms, biases and alphas do not decay."""
    decayed = [p for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(".alpha_source")]
    others = [p for name, p in model.named_parameters() if p.ndim <= 1 or name.endswith(".alpha_source")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=recipe.lr,
        fused=True,
    )
    batches = max(1, len(examples) // recipe.batch_size)
    steps = recipe.epochs * batches
    warmup = min(200, steps // 10 + 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    model.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(examples))
        for batch in order[: batches * recipe.batch_size].split(recipe.batch_size):
            x = augment(examples.x[batch]) if augment else examples.x[batch]
            with torch.no_grad():
                taught = teacher(x) if teacher is not None and recipe.distill else None
            value = loss(model(x), examples.y[batch], taught, recipe)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, x: Tensor, batch_size: int = 500) -> Tensor:
    """The model's outputs ``[count, ...]``."""
    return torch.cat([model(batch) for batch in x.split(batch_size)])
