"""Named configurations of ``examples/train.py``: a network, a data set, and how the one is trained on the other.

A recipe is data. Values from the paper's appendix are named in :attr:`Recipe.stated`; the others are chosen here, and
:attr:`Recipe.note` says after what.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import tbn_compiler as tbn

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "cosine", "step"]
Augmentation = Literal["none", "crop-flip", "scale-shift"]
Preset = Literal["paper", "cifar", "imagenet", "time_series"]


class RecipeError(ValueError):
    """A recipe, or a change to one, that cannot be trained."""


@dataclass(frozen=True)
class Recipe:
    """How one network is trained on one data set.

    Attributes:
        network: name in ``paper.tasks.NETWORKS``.
        data: name in ``paper.tasks.READERS``.
        epochs: passes over the training data.
        batch_size: examples of a step, over all processes; the rest of an epoch that fills no batch is left out.
        optimizer: ``"sgd"``, ``"adam"`` (decay added to the gradient) or ``"adamw"``.
        lr: learning rate at its highest.
        momentum: of ``"sgd"``.
        weight_decay: of all parameters, alpha sources, norms and biases included.
        schedule: ``"cosine"`` falls to 0 at the end, ``"step"`` multiplies by ``gamma`` after each ``every`` epochs.
        gamma: see ``schedule``.
        every: see ``schedule``.
        warmup_epochs: the rate rises linearly for so long.
        label_smoothing: of the cross-entropy.
        augment: ``"crop-flip"``: images padded by 4 and cropped, or a random part of a larger image, and flipped;
            ``"scale-shift"``: clouds scaled by 0.8 to 1.25 and moved by up to 0.1.
        length: points of a cloud, look-back of a forecast, or characters of a context; 0 where there is none.
        eval_batch_size: examples measured at once.
        preset: of :class:`tbn_compiler.TilingConfig`.
        min_size: the paper's lambda; 0 or more in place of the preset's, -1 for the preset's.
        stated: fields with the values of the paper's appendix.
        note: where the other values come from, and what differs from the paper.
    """

    network: str
    data: str
    epochs: int
    batch_size: int
    optimizer: Optimizer
    lr: float
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: Schedule = "cosine"
    gamma: float = 1.0
    every: int = 1
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    augment: Augmentation = "none"
    length: int = 0
    eval_batch_size: int = 250
    preset: Preset = "paper"
    min_size: int = -1
    stated: tuple[str, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            RecipeError: one is out of range.
        """
        for name, kind in _CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                raise RecipeError(f"{name}={value!r} is not one of {', '.join(map(repr, get_args(kind)))}")
        for name, lowest in _LOWEST.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= lowest):
                raise RecipeError(f"{name}={value!r} is less than {lowest} or not finite")
        if self.lr == 0:
            raise RecipeError("lr=0 trains nothing")

    def changed(self, changes: Mapping[str, str]) -> Recipe:
        """The recipe with fields set from text, as ``--set`` gives them.

        Raises:
            RecipeError: a field is unknown or a value is not of its type or range.
        """
        types = typing.get_type_hints(Recipe)
        values: dict[str, Any] = {}
        for name, text in changes.items():
            if name not in SETTABLE:
                raise RecipeError(f"a recipe has no setting {name!r}, only {', '.join(SETTABLE)}")
            values[name] = _parse(name, text, types[name])
        return dataclasses.replace(self, **values)

    def differences(self, other: Recipe) -> dict[str, list[Any]]:
        """The settings in which ``other`` differs: name to the value here and there."""
        pairs = {name: [getattr(self, name), getattr(other, name)] for name in SETTABLE}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The factor on ``lr`` at a step, counted from 0."""
        warmup, total = self.warmup_epochs * steps_per_epoch, self.epochs * steps_per_epoch
        if step < warmup:
            return (step + 1) / warmup
        if self.schedule == "cosine":
            return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, total - warmup)))) / 2
        if self.schedule == "step":
            return float(self.gamma ** (step // (self.every * steps_per_epoch)))
        return 1.0

    def tiling(self, options: Mapping[str, Any]) -> tbn.TilingConfig:
        """The preset with the recipe's lambda, and ``options`` over both.

        A pair ``p`` takes one alpha for each copy along the output where the preset has one for each copy: alphas that
        differ along the input would give up the saving in arithmetic.

        Raises:
            ConfigError: an option is out of range.
        """
        options = dict(options)
        preset = {
            "paper": tbn.TilingConfig.paper,
            "cifar": tbn.TilingConfig.cifar,
            "imagenet": tbn.TilingConfig.imagenet,
            "time_series": tbn.TilingConfig.time_series,
        }[self.preset]
        if self.min_size >= 0:
            options.setdefault("min_size", self.min_size)
        if isinstance(options.get("p"), tuple) and preset().alpha == "tile":
            options.setdefault("alpha", "output")
        if options.get("latent") == "tile":
            options.setdefault("alpha_source", "A")  # a tile keeps no weight to take alphas from
        return preset(**options)


_CHOICES = {"optimizer": Optimizer, "schedule": Schedule, "augment": Augmentation, "preset": Preset}
_LOWEST: dict[str, float] = {
    "epochs": 1, "batch_size": 1, "lr": 0, "momentum": 0, "weight_decay": 0, "gamma": 0, "every": 1,
    "warmup_epochs": 0, "label_smoothing": 0, "length": 0, "eval_batch_size": 1, "min_size": -1,
}  # fmt: skip
# What `--set` takes. Another network or data set is another recipe.
SETTABLE = tuple(
    field.name for field in dataclasses.fields(Recipe) if field.name not in ("network", "data", "stated", "note")
)


def _parse(name: str, text: str, kind: Any) -> Any:
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        raise RecipeError(f"{name}={text!r} is no {kind.__name__}") from None


_CONVNET = Recipe(
    network="resnet18",
    data="cifar10",
    epochs=200,
    batch_size=128,
    optimizer="sgd",
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="cosine",
    augment="crop-flip",
    preset="cifar",
    stated=("batch_size", "optimizer", "lr", "momentum", "weight_decay", "schedule"),
    note="kaiming normal initialisation as stated; epochs chosen here",
)
# The widest layer of these has 36,864 weights: under the paper's lambda nothing would be tiled.
_SMALL_CONVNET = dataclasses.replace(
    _CONVNET, min_size=9_216, note="not in the paper, trained as its CNNs; epochs and lambda chosen here"
)
_TOKENS = Recipe(
    network="vit",
    data="cifar10",
    epochs=500,
    batch_size=128,
    optimizer="adam",
    lr=1e-3,
    schedule="cosine",
    augment="crop-flip",
    preset="cifar",
    stated=("epochs", "batch_size", "optimizer", "lr", "augment"),
    note="cosine after the public collection that the ViT is from",
)
_CLOUDS = Recipe(
    network="pointnet",
    data="modelnet40",
    epochs=500,
    batch_size=24,
    optimizer="adam",
    lr=1e-3,
    weight_decay=1e-4,
    schedule="step",
    gamma=0.7,
    every=20,
    augment="scale-shift",
    length=1024,
    eval_batch_size=24,
    stated=("epochs", "batch_size", "optimizer", "lr", "weight_decay"),
    note="x 0.7 every 20 epochs, 1,024 points and augmentation after the public version; no points are dropped",
)
_SERIES = Recipe(
    network="series-128",
    data="weather",
    epochs=10,
    batch_size=128,
    optimizer="adam",
    lr=1e-3,
    schedule="cosine",
    warmup_epochs=1,
    length=96,
    eval_batch_size=500,
    preset="time_series",
    note="one step ahead from a look-back of 96, as is usual; the rest chosen here",
)

RECIPES: dict[str, Recipe] = {
    "resnet18-cifar10": _CONVNET,
    "resnet50-cifar10": dataclasses.replace(_CONVNET, network="resnet50"),
    "vgg-small-cifar10": dataclasses.replace(_CONVNET, network="vgg-small"),
    "resnet8-cifar10": dataclasses.replace(_SMALL_CONVNET, network="resnet8"),
    "resnet20-cifar10": dataclasses.replace(_SMALL_CONVNET, network="resnet20"),
    "vit-cifar10": _TOKENS,
    "swin-cifar10": dataclasses.replace(_TOKENS, network="swin"),
    "mlpmixer-cifar10": dataclasses.replace(_TOKENS, network="mlpmixer"),
    "convmixer-cifar10": dataclasses.replace(_TOKENS, network="convmixer"),
    "resnet34-imagenet": Recipe(
        network="resnet34",
        data="imagenet",
        epochs=600,
        batch_size=256,
        optimizer="sgd",
        lr=0.256,
        momentum=0.875,
        weight_decay=3.05e-5,
        schedule="cosine",
        warmup_epochs=5,
        label_smoothing=0.1,
        augment="crop-flip",
        eval_batch_size=100,
        preset="imagenet",
        stated=("epochs", "optimizer", "lr", "momentum", "weight_decay", "warmup_epochs", "label_smoothing"),
        note="batch and cosine as in the public recipe with these rates",
    ),
    "swin-imagenet": Recipe(
        network="swin-imagenet",
        data="imagenet",
        epochs=600,
        batch_size=350,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.05,
        schedule="cosine",
        warmup_epochs=20,
        augment="crop-flip",
        eval_batch_size=50,
        preset="imagenet",
        stated=("epochs", "batch_size", "optimizer", "lr", "weight_decay", "warmup_epochs"),
        note="cosine and augmentation chosen here: no mixing of images",
    ),
    "pointnet-modelnet40": _CLOUDS,
    "pointnet-modelnet10": dataclasses.replace(
        _CLOUDS, data="modelnet10", note=f"{_CLOUDS.note}; ModelNet10 from voxels in place of ModelNet40"
    ),
    "pointnet-parts": dataclasses.replace(
        _CLOUDS,
        network="pointnet-parts",
        data="parts",
        epochs=250,
        batch_size=16,
        gamma=0.5,
        length=2048,
        eval_batch_size=16,
        stated=("epochs", "batch_size", "schedule", "gamma", "every", "length"),
        note="Adam, decay and augmentation as in classification",
    ),
    "pointnet-rooms": dataclasses.replace(
        _CLOUDS,
        network="pointnet-rooms",
        data="rooms",
        epochs=32,
        batch_size=16,
        every=10,
        augment="none",
        length=4096,
        eval_batch_size=16,
        stated=("epochs", "batch_size", "schedule", "gamma", "every", "length"),
        note="Adam and decay as in classification; rooms are not rotated",
    ),
    "series-etth1": dataclasses.replace(_SERIES, data="ETTh1", note=f"{_SERIES.note}; the network is that of Weather"),
    "series-weather": _SERIES,
    "series-electricity": dataclasses.replace(_SERIES, network="series-512", data="electricity", batch_size=64),
    "mnist-mlp": Recipe(
        network="mlp",
        data="mnist",
        epochs=20,
        batch_size=128,
        optimizer="adam",
        lr=1e-3,
        schedule="cosine",
        warmup_epochs=1,
        eval_batch_size=1000,
        preset="cifar",  # one alpha for each copy, as examples/mnist_mlp.py
        note="the plain recipe of docs/mnist.md",
    ),
    "char-gpt": Recipe(
        network="gpt",
        data="tinyshakespeare",
        epochs=10,
        batch_size=64,
        optimizer="adamw",
        lr=1e-3,
        weight_decay=0.01,
        schedule="cosine",
        warmup_epochs=1,
        length=128,
        eval_batch_size=64,
        min_size=16_000,
        note="not in the paper; all chosen here",
    ),
    "char-gpt-64": Recipe(
        network="gpt-64",
        data="tinyshakespeare",
        epochs=2,
        batch_size=32,
        optimizer="adamw",
        lr=1e-2,
        weight_decay=0.01,
        schedule="cosine",
        length=64,
        eval_batch_size=64,
        min_size=4_096,
        note="half the channels and a short schedule, for comparisons; not in the paper, all chosen here",
    ),
}
