"""What ``examples/layouts.py`` compares: layouts of tiles, and the networks and data that they are compared on."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from paper.recipes import RECIPES, Recipe
from paper.tasks import NETWORKS, Task, synthetic_task
from paper.training import Options
from torch import nn

import tbn_compiler as tbn


@dataclass(frozen=True)
class Layout:
    """How the copies of a tile fill a weight.

    Attributes:
        p: as in ``TilingConfig``; 0 for a float network.
        replicate: as in ``TilingConfig``.
        shift: as in ``TilingConfig``; 0: each layer rolls by ``1 / p`` of its row, which gives rows that start at
            every multiple of that, as far from each other as they can.
    """

    p: int | tuple[int, int]
    replicate: str = "repeat"
    shift: int = 0

    @property
    def copies(self) -> int:
        """Number of copies: the tiled layers store ``1 / copies`` bits per weight."""
        return self.p if isinstance(self.p, int) else math.prod(self.p)

    @property
    def family(self) -> str:
        """What the figure and the overview take together."""
        if self.copies < 2:
            return ("float", "binary")[self.copies]
        if isinstance(self.p, tuple):
            return "two-axis"
        return {"repeat": "paper", "roll": "rolled", "hadamard": "Hadamard"}[self.replicate]

    @property
    def title(self) -> str:
        """What tables and the result file call it."""
        if isinstance(self.p, tuple):
            return f"two-axis {self.p[0]} x {self.p[1]}"
        return f"{self.family} by {self.shift}" if self.shift else self.family


def _layouts(*more: Layout) -> tuple[Layout, ...]:
    """Float, binary, and four layouts for each number of copies; ``more`` stand behind those with as many copies."""
    rows = [Layout(0), Layout(1)]
    for copies, *pairs in ((4, (2, 2)), (8, (2, 4), (4, 2)), (16, (4, 4)), (32, (4, 8), (8, 4))):
        rows += [Layout(copies), *map(Layout, pairs), Layout(copies, "roll"), Layout(copies, "hadamard")]
        rows += [layout for layout in more if layout.copies == copies]
    return tuple(rows)


@dataclass(frozen=True)
class Study:
    """One network and data set, and the layouts to compare.

    Attributes:
        title: what tables call it.
        recipe: name in ``paper.recipes.RECIPES``.
        changes: settings other than the recipe's, as ``train.py --set`` takes them.
        layouts: what to compare.
        tiling: options of ``TilingConfig`` that all layouts have, beside one scale per copy along the output.
        subset: number of training examples, 0 for all.
        measure: what tables call the measure.
        digits: its decimal places.
        falls: less of it is better.
    """

    title: str
    recipe: str
    changes: Mapping[str, str] = field(hash=False)
    layouts: tuple[Layout, ...] = _layouts()
    tiling: Mapping[str, Any] = field(default_factory=dict, hash=False)
    subset: int = 0
    measure: str = "accuracy %"
    digits: int = 2
    falls: bool = False

    @property
    def settings(self) -> Recipe:
        """The recipe with its changes."""
        return RECIPES[self.recipe].changed(self.changes)

    def options(self, layout: Layout, seed: int = 0) -> Options:
        """What ``paper.training`` trains.

        One scale per copy along the output for every layout: the same number in the layouts with ``p`` along the
        output, and fewer in a two-axis one, which scales on both axes would cost its saving in arithmetic.
        """
        settings = self.settings
        changes = RECIPES[self.recipe].differences(settings)
        if self.subset:
            changes["subset"] = ["all", self.subset]
        if not layout.copies:
            return Options(self.recipe, settings, changes, "float", {}, seed, self.subset)
        tiling = {**self.tiling, "p": layout.p, "replicate": layout.replicate, "alpha": "output"}
        if layout.replicate == "roll":
            tiling["shift"] = layout.shift or 1
        if layout.replicate == "roll" and not layout.shift:
            shifts = {name: {"shift": size // layout.copies} for name, size in row_sizes(self, layout.copies).items()}
            tiling["overrides"] = {**tiling.get("overrides", {}), **shifts}
        return Options(self.recipe, settings, changes, "tbn", tiling, seed, self.subset)


STUDIES = {
    "mnist": Study(
        "MNIST, 784-128-10 without biases",
        "mnist-mlp",
        {"epochs": "12", "batch_size": "512", "lr": "2e-3", "warmup_epochs": "0"},
        layouts=_layouts(Layout(8, "roll", 1), Layout(8, "roll", 1568)),  # by a pixel, and by two rows
    ),
    "text": Study(
        "tinyshakespeare, character transformer of 4 blocks of 64 channels",
        "char-gpt-64",
        {},
        tiling={"float_layers": ("head",)},  # no p divides its rows, one for each of 65 characters
        subset=12_800,  # 400 steps an epoch
        measure="bits per character",
        digits=3,
        falls=True,
    ),
    "series": Study(
        "ETTh1, transformer encoder of 2 layers of 128 channels",
        "series-etth1",
        {"epochs": "2", "batch_size": "32", "length": "24", "warmup_epochs": "0", "min_size": "16000"},
        measure="mean squared error",
        digits=4,
        falls=True,
    ),
    "images": Study(
        "CIFAR-10, ResNet8",
        "resnet8-cifar10",
        {"epochs": "2", "optimizer": "adam", "lr": "4e-3", "weight_decay": "0"},
    ),
}


def quick(study: Study) -> Study:
    """The study with two steps for each run."""
    small = {"epochs": "1", "batch_size": "8", "eval_batch_size": "8"} | (
        {"length": "16"} if study.settings.length else {}
    )
    return replace(study, changes={**study.changes, **small}, subset=16)


def _network(study: Study, layout: Layout, task: Task) -> nn.Module:
    """What a run trains; for a float run the binary network."""
    config = study.options(layout if layout.copies else Layout(1)).config()
    if config is None:
        raise AssertionError("only float networks have no tiling")
    return tbn.transform(NETWORKS[study.settings.network](**task.sizes).eval(), config)


def summary(study: Study, layout: Layout, task: Task) -> tbn.Summary:
    """The layers of a run's network, multiply-adds for one example; of a float network those of the binary one."""
    packed = tbn.lower(_network(study, layout, task))
    example = tuple(part.cpu() for part in task.test_batch(torch.arange(1))[0])  # the task may be on a GPU
    return tbn.summary(packed, example_inputs=example)


@functools.cache
def row_sizes(study: Study, copies: int) -> dict[str, int]:
    """Elements in a row of each layer that takes ``copies`` plain copies, by its name."""
    layers = tbn.summary(_network(study, Layout(copies), synthetic_task(study.settings))).layers
    return {row.name: math.prod(row.shape[1:]) for row in layers if row.p == copies}


@functools.cache
def misfit(study: Study, layout: Layout) -> dict[str, int]:
    """Layers that take another number of copies than asked for, where none takes it: name to the number."""
    if layout.copies < 2:
        return {}
    layers = tbn.summary(_network(study, layout, synthetic_task(study.settings))).layers
    found = {row.name: row.p or 1 for row in layers if row.name in row_sizes(study, layout.copies)}
    return found if layout.copies not in found.values() else {}
