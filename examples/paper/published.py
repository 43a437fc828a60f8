"""What the paper (arXiv 2407.12075) and the papers it compares with print, as far as it is at hand.

The paper's text was not at hand: these are the figures that its models were rebuilt and its memory was counted against.
Accuracies and errors are not among them. A figure that is not here is not known, and none is estimated.
Table 7 stands in ``benchmarks/memory.py``, which counts it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Sizes:
    """Sizes of one network in millions of bits, as printed.

    Attributes:
        tiled: by ``p``; empty texts where the paper plots it only.
        dense: in ``"float"`` and ``"binary"``.
    """

    tiled: Mapping[int, str]
    dense: Mapping[Literal["float", "binary"], str] = field(default_factory=dict)


_PLOTTED = Sizes(dict.fromkeys((4, 8, 16, 32), ""))

# Source: the columns of sizes of the paper's Table 1 (convolutional networks), 3 (PointNet), 4 (transformers) and 5
# (time series), and Figure 6 (mixers). Of these numbers only that of the figure is certain: the tables stand in the
# order of the networks around Table 2, 6 and 7, whose contents are known.
SIZES: dict[str, Sizes] = {
    "ResNet18, CIFAR": Sizes({4: "2.85", 8: "1.46", 16: "0.77"}, {"float": "351.54", "binary": "10.99"}),
    "ResNet50, CIFAR": Sizes({4: "6.10", 8: "3.21", 16: "1.76"}, {"float": "750.26", "binary": "23.45"}),
    "VGG-small": Sizes({4: "1.340", 8: "0.722", 16: "0.520"}, {"float": "146.24", "binary": "4.656"}),
    "ResNet34, ImageNet": Sizes({2: "11.13"}, {"float": "674.88", "binary": "21.09"}),
    "PointNet, classification": Sizes({4: "0.90", 8: "0.47"}, {"float": "111.28", "binary": "3.48"}),
    "PointNet, part segmentation": Sizes({4: "2.68", 8: "1.73"}, {"float": "266.96", "binary": "8.34"}),
    "PointNet, semantic segmentation": Sizes({4: "1.52", 8: "1.19"}, {"float": "112.96", "binary": "3.53"}),
    "ViT, CIFAR": Sizes({4: "2.40", 8: "1.22"}, {"float": "303.68", "binary": "9.50"}),
    "Swin-t, CIFAR": Sizes({4: "6.88", 8: "3.61"}, {"float": "851.14", "binary": "26.60"}),
    "Swin-t, ImageNet": Sizes({2: "14.7"}, {"float": "873.60"}),
    "Time series, Electricity": Sizes({4: "1.1"}, {"float": "145.2", "binary": "4.5"}),
    "Time series, Weather": Sizes({4: "0.197"}, {"float": "11.8", "binary": "0.368"}),
    "MLPMixer, CIFAR": _PLOTTED,
    "ConvMixer, CIFAR": _PLOTTED,
}

# Accuracies in percent: by network and what its weights are. Source: IR-Net (Qin et al., arXiv 1909.10788), ResNet20 on
# CIFAR-10 with binary weights and float activations. It is beside the paper's tables, not in them.
ACCURACIES: dict[tuple[str, str], str] = {("ResNet20, CIFAR", "IR-Net, 1 bit"): "90.8"}

# Source: the paper's text; points of accuracy on CIFAR-10 that p = 4 is below float at most.
RESNET18_GAP = "0.5"

# Source: Table 2 of the paper, by network and p. The three savings are known, and that the last is at p = 2; the other
# two are given to the networks in their order.
OPERATION_SAVINGS: dict[tuple[str, int], str] = {
    ("ResNet18, CIFAR", 4): "6.7x",
    ("VGG-small", 4): "7.9x",
    ("ResNet34, ImageNet", 2): "6.1x",
}


@dataclass(frozen=True)
class Microcontroller:
    """One network of Table 6, in KB (1,000 bytes): what is stored, and the most memory of a layer."""

    storage: str
    memory: str


# Source: Table 6 of the paper, 784-128-10 on MNIST. Its accuracies and what it measures on its board are not at hand.
MICROCONTROLLER: dict[str, Microcontroller] = {
    "binary": Microcontroller("12.70", "16.20"),
    "p = 4": Microcontroller("3.32", "6.80"),
}
