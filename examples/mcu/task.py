"""What an example consists of: data in three parts, a model, the networks to compare, and their recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn


@dataclass(frozen=True)
class Examples:
    """Inputs and targets.

    Attributes:
        x: ``float32 [count, ...]``, ready for the model.
        y: classes ``int64 [count]``, or the values to forecast, ``float32 [count, ...]``.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def head(self, count: int) -> Examples:
        """The first ``count`` examples."""
        return Examples(self.x[:count], self.y[:count])

    def spread(self, count: int) -> Examples:
        """``count`` examples, evenly spaced, or all if there are fewer: files may be sorted by class."""
        places = torch.arange(min(count, len(self))) * len(self) // max(1, min(count, len(self)))
        return Examples(self.x[places], self.y[places])

    def __add__(self, other: Examples) -> Examples:
        return Examples(torch.cat([self.x, other.x]), torch.cat([self.y, other.y]))


@dataclass(frozen=True)
class Dataset:
    """Three parts that share no example.

    Attributes:
        name: where the data comes from.
        split: how it is divided, in words.
        train, validation, test: choices are made on ``validation``; ``test`` only measures what was chosen.
        retrain: whether the final networks are trained on ``validation`` too.
    """

    name: str
    split: str
    train: Examples
    validation: Examples
    test: Examples
    retrain: bool

    def for_choices(self) -> tuple[Examples, Examples]:
        """What to train and to measure on while recipes are compared."""
        return self.train, self.validation

    def for_results(self) -> tuple[Examples, Examples]:
        """What to train and to measure on once a recipe is chosen."""
        return self.train + self.validation if self.retrain else self.train, self.test

    def head(self, count: int) -> Dataset:
        """The first ``count`` examples of each part."""
        train, validation, test = (part.head(count) for part in (self.train, self.validation, self.test))
        return Dataset(self.name, self.split, train, validation, test, self.retrain)


@dataclass(frozen=True)
class Recipe:
    """How to train one network: Adam with decoupled weight decay, a short warm-up and a cosine to zero.

    Attributes:
        epochs, batch_size, lr, weight_decay: as usual; the last epoch is taken, whatever it gives.
        distill: share of the float network's outputs in the loss, 0 to 1; 0 for the float network itself.
        temperature: softmax temperature of the float network's classes.
        from_float: start with the weights of the float network.
        alpha_start: factors on the starting alphas of each layer that has as many.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.0
    distill: float = 0.0
    temperature: float = 2.0
    from_float: bool = False
    alpha_start: tuple[float, ...] = ()


@dataclass(frozen=True)
class Network:
    """One way to store the task's model.

    Attributes:
        title: what the table calls it.
        recipe: how it is trained.
        config: how it is tiled; ``None`` for float.
        layout: the tiling in words.
    """

    title: str
    recipe: Recipe
    config: tbn.TilingConfig | None = None
    layout: str = ""


@dataclass(frozen=True)
class Task:
    """One example.

    Attributes:
        name: its name on the command line, in files and as the prefix of the C symbols.
        title: what the table calls it.
        model: the architecture in words.
        build: makes the float model.
        load: reads the data from a folder; raises :class:`example_data.DataError`.
        made_up: makes a small data set of the same form that can be learned, for trials.
        networks: what is compared, ``"float"`` first: it teaches the others.
        run_as_c: how many test examples, from the first on, the C program runs on this computer.
        emulated: how many of these it also runs on the emulated core.
        augment: changes a batch of training inputs.
        calibration: number of training examples, evenly spaced, that scales of int8 activations are taken from where
            the networks are measured with them, too; 0: they are not.
    """

    name: str
    title: str
    model: str
    build: Callable[[], nn.Module]
    load: Callable[[Path], Dataset]
    made_up: Callable[[], Dataset]
    networks: Mapping[str, Network]
    run_as_c: int
    emulated: int
    augment: Callable[[Tensor], Tensor] | None = None
    calibration: int = 0

    def trial(self, epochs: int) -> Task:
        """The same task with few epochs and small batches, so that little data still makes some steps."""
        networks = {
            name: dataclasses.replace(network, recipe=dataclasses.replace(network.recipe, epochs=epochs, batch_size=32))
            for name, network in self.networks.items()
        }
        return dataclasses.replace(self, networks=networks)


def is_classes(targets: Tensor) -> bool:
    """Whether targets are classes rather than values to forecast."""
    return not targets.is_floating_point()


def scores(outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Accuracy in percent for classes, mean squared and absolute error for forecasts.

    Args:
        outputs: ``float32 [count, ...]``; flat outputs of the C program take the targets' shape.
        targets: classes ``int64 [count]``, or values.
    """
    if is_classes(targets):
        return {"accuracy": 100 * (outputs.argmax(1) == targets).double().mean().item()}
    errors = (outputs.reshape(targets.shape) - targets).double()
    return {"mse": errors.square().mean().item(), "mae": errors.abs().mean().item()}


def loss(outputs: Tensor, targets: Tensor, teacher: Tensor | None, recipe: Recipe) -> Tensor:
    """Cross-entropy or squared error, mixed with the distance from the teacher's outputs where there is one."""
    classes = is_classes(targets)
    plain = F.cross_entropy(outputs, targets) if classes else F.mse_loss(outputs, targets)
    if teacher is None or not recipe.distill:
        return plain
    if classes:
        # Divergence from the softened classes (Hinton et al. 2015), scaled so that its gradient keeps its size.
        soft = F.kl_div(
            F.log_softmax(outputs / recipe.temperature, 1),
            F.log_softmax(teacher / recipe.temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
        taught = soft * recipe.temperature**2
    else:
        taught = F.mse_loss(outputs, teacher)
    return (1 - recipe.distill) * plain + recipe.distill * taught
