"""What the paper's tables count, by stated rules, from the records of the transformed networks.

The paper gives sizes in millions of bits without saying what is in them. Each figure here has a :class:`Rule`: the one
that comes closest. Alphas and bare parameters (class tokens, position tables) are in none of them.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import tbn_compiler as tbn
from paper.convnets import VGGSmall, resnet18_cifar, resnet34_imagenet, resnet50_cifar
from paper.mixers import ConvMixer, MLPMixer
from paper.pointnet import PointNetClassification, PointNetPartSegmentation, PointNetSemanticSegmentation
from paper.published import SIZES, Sizes
from paper.transformers import Swin, TimeSeriesTransformer, ViT, swin_imagenet

Counted = Literal["weights", "biases", "norms"]
Stored = Literal["float", "binary"] | int
Build = Callable[[], nn.Module]

FLOAT_BITS = 32
OPERATIONS = 64  # that the paper counts for a multiply-add in float: 32 bits times 2


@dataclass(frozen=True)
class Rule:
    """What of a network is counted.

    Attributes:
        counted: weights of linear layers and convolutions alone, with their biases, or with the norms' parameters too.
            Biases and norms count one bit where weights are binary or tiled.
        min_size: the lambda of tiled figures.
        without: name patterns of modules that are not counted.
        whole_in_proj: lambda is compared with the packed ``in_proj`` of an ``nn.MultiheadAttention`` instead of with
            its three parts.
    """

    counted: Counted = "weights"
    min_size: int = 0
    without: tuple[str, ...] = ()
    whole_in_proj: bool = False

    def __str__(self) -> str:
        """The rule without lambda, for a table."""
        parts = {"weights": "w", "biases": "w + b", "norms": "w + b + n"}[self.counted]
        if self.without:
            parts += " without " + ", ".join(f"`{pattern}`" for pattern in self.without)
        return parts + (", `in_proj` whole" if self.whole_in_proj else "")

    def counts(self, name: str) -> bool:
        """Whether a module or weight of this name is counted."""
        return not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.without)


@dataclass(frozen=True)
class Network:
    """A network of the paper with its published sizes in millions of bits, as printed.

    Attributes:
        build: makes the network.
        rule: what the tiled figures count.
        published: the figures.
        dense_rule: what those in float and binary count.
        binary_rule: what the binary figure counts where that is something else.
    """

    build: Build
    rule: Rule
    published: Sizes
    dense_rule: Rule = Rule("norms")
    binary_rule: Rule | None = None

    @property
    def tiled(self) -> Mapping[int, str]:
        """Published figure by ``p``; empty where the paper plots it only."""
        return self.published.tiled

    @property
    def dense(self) -> Mapping[Literal["float", "binary"], str]:
        """Published figures in float and binary."""
        return self.published.dense

    def figures(self) -> Iterator[tuple[Stored, str, Rule]]:
        """What is stored, the published figure and the rule."""
        for stored, published in self.dense.items():
            yield stored, published, (stored == "binary" and self.binary_rule) or self.dense_rule
        for p, published in self.tiled.items():
            yield p, published, self.rule


# Networks are compared with published binary ones, which keep the first and last layer, and often the shortcuts, in
# float and leave them out of their figures.
_BODY = Rule(without=("conv1", "fc", "*.downsample.*"))

NETWORKS: dict[str, Network] = {
    "ResNet18, CIFAR": Network(resnet18_cifar, Rule(min_size=36_864), SIZES["ResNet18, CIFAR"], _BODY),
    "ResNet50, CIFAR": Network(
        resnet50_cifar, Rule(min_size=64_000), SIZES["ResNet50, CIFAR"], Rule(without=("conv1", "fc"))
    ),
    "VGG-small": Network(
        VGGSmall, Rule(min_size=150_000), SIZES["VGG-small"], Rule(without=("features.0", "fc")), Rule()
    ),
    "ResNet34, ImageNet": Network(resnet34_imagenet, Rule(min_size=147_456), SIZES["ResNet34, ImageNet"], _BODY),
    "PointNet, classification": Network(
        PointNetClassification, Rule(min_size=64_000), SIZES["PointNet, classification"]
    ),
    "PointNet, part segmentation": Network(
        PointNetPartSegmentation, Rule("norms", 150_000), SIZES["PointNet, part segmentation"]
    ),
    "PointNet, semantic segmentation": Network(
        PointNetSemanticSegmentation, Rule(min_size=150_000), SIZES["PointNet, semantic segmentation"]
    ),
    "ViT, CIFAR": Network(ViT, Rule("biases", 64_000), SIZES["ViT, CIFAR"]),
    "Swin-t, CIFAR": Network(Swin, Rule("biases", 64_000), SIZES["Swin-t, CIFAR"]),
    "Swin-t, ImageNet": Network(
        swin_imagenet,
        Rule(min_size=150_000, without=("head",)),
        SIZES["Swin-t, ImageNet"],
        Rule("norms", without=("head",)),
    ),
    "Time series, Electricity": Network(
        functools.partial(TimeSeriesTransformer, 321, 512), Rule(min_size=32_000), SIZES["Time series, Electricity"]
    ),
    "Time series, Weather": Network(
        functools.partial(TimeSeriesTransformer, 21, 128),
        Rule("biases", 32_000, whole_in_proj=True),
        SIZES["Time series, Weather"],
        binary_rule=Rule("biases"),
    ),
    "MLPMixer, CIFAR": Network(MLPMixer, Rule(min_size=64_000), SIZES["MLPMixer, CIFAR"]),
    "ConvMixer, CIFAR": Network(ConvMixer, Rule(min_size=64_000), SIZES["ConvMixer, CIFAR"]),
}


def on_meta(build: Build) -> nn.Module:
    """The network without numbers, which counting does not need."""
    with torch.device("meta"):
        return build()


def counted_bits(build: Build, stored: Stored, rule: Rule) -> int:
    """Bits of a network by a rule, its weights stored in float, binary, or as ``p`` copies of a tile."""
    p = stored if isinstance(stored, int) else 1
    model = _model(build)
    bits = sum(bits for name, bits in _weight_bits(build, p, rule.min_size, rule.whole_in_proj) if rule.counts(name))
    if rule.counted != "weights":
        bits += sum(bias.numel() for name, bias in _biases(model) if rule.counts(name))
    if rule.counted == "norms":
        norms = (
            (name, module) for name, module in model.named_modules() if isinstance(module, _BatchNorm | nn.LayerNorm)
        )
        bits += sum(value.numel() for name, norm in norms for value in norm.parameters() if rule.counts(name))
    return FLOAT_BITS * bits if stored == "float" else bits


@functools.lru_cache
def _model(build: Build) -> nn.Module:
    return on_meta(build)


@functools.lru_cache
def _weight_bits(build: Build, p: int, min_size: int, whole_in_proj: bool) -> tuple[tuple[str, int], ...]:
    """Name and stored bits of each linear layer and convolution."""
    config = tbn.TilingConfig.paper(p=p, min_size=min_size, attention="packed" if whole_in_proj else "separate")
    rows = tbn.summary(tbn.transform(_model(build), config)).layers
    return tuple((row.name, row.stored_bits) for row in rows if row.kind.startswith(("linear", "conv")))


def _biases(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for name, module in model.named_modules():
        bias = None
        if isinstance(module, nn.Linear | _ConvNd):
            bias = module.bias
        elif isinstance(module, nn.MultiheadAttention):
            bias = module.in_proj_bias
        if bias is not None:
            yield name, bias


@dataclass(frozen=True)
class Operations:
    """Multiply-adds of one image: of the dense network, and when each row that differs is computed once."""

    dense: int
    tiled: int

    @property
    def saving(self) -> float:
        """How many times fewer."""
        return self.dense / self.tiled

    @property
    def dense_operations(self) -> float:
        """The paper's figure for the float network, in 1e9 bit-operations."""
        return OPERATIONS * self.dense / 1e9


# Networks of Table 2, without what published binary networks leave in float.
OPERATION_CASES: tuple[tuple[str, int, int, int], ...] = (  # network, image size, p, lambda
    ("ResNet18, CIFAR", 32, 4, 64_000),
    ("ResNet18, CIFAR", 32, 4, 0),
    ("VGG-small", 32, 4, 64_000),
    ("ResNet34, ImageNet", 224, 2, 150_000),
)


@functools.lru_cache
def operations(name: str, size: int, p: int, min_size: int) -> Operations:
    """Multiply-adds of a network for one image of ``size x size``, by its rule for dense figures."""
    return operations_of(NETWORKS[name].build, NETWORKS[name].dense_rule, size, p, min_size)


@functools.lru_cache
def operations_of(build: Callable[[], nn.Module], rule: Rule, size: int, p: int, min_size: int) -> Operations:
    """The same of any network, of the layers that a rule counts."""
    model = on_meta(build).to_empty(device="cpu").eval()  # numbers are never looked at
    config = tbn.TilingConfig(p=p, min_size=min_size, alpha_source="W")
    rows = tbn.summary(tbn.transform(model, config), torch.empty(1, 3, size, size)).layers
    counted = [row for row in rows if rule.counts(row.name)]
    return Operations(sum(row.macs or 0 for row in counted), sum(row.macs_tiled or 0 for row in counted))
