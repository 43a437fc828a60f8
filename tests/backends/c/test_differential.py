"""Random small networks: the compiled C, under sanitizers, against PyTorch.

Hypothesis draws lists of layers with their options. To keep the compiler's starts few, one example is a batch of
networks in one program; every network is checked by itself.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tbn_compiler as tbn
from tests.backends.c.programs import Network, check
from tests.backends.c.test_operators import with_statistics
from tests.backends.c.toolchain import needs_cc

pytestmark = needs_cc

BATCHES, BATCH_SIZE = 4, 24  # 96 networks a run


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Attention(nn.Module):
    """Self-attention of tokens ``[N, tokens, features]``."""

    def __init__(self, features: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, features = x.shape
        q, k, v = self.project(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(n, tokens, features))


class Apply(nn.Module):
    """A function of one tensor as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


ACTIVATIONS: list[Callable[[], nn.Module]] = [
    *(nn.ReLU, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.ELU),
    *(nn.Identity, lambda: nn.Softmax(-1), nn.PReLU),
]


@st.composite
def _image_layers(draw: st.DrawFn, shape: tuple[int, ...]) -> list[nn.Module]:
    """Layers for ``[N, C, ...]`` with one or two spatial dimensions."""
    dims = len(shape) - 1
    conv, norm, transpose = (
        (nn.Conv1d, nn.BatchNorm1d, nn.ConvTranspose1d),
        (nn.Conv2d, nn.BatchNorm2d, nn.ConvTranspose2d),
    )[dims - 1]
    layers: list[nn.Module] = []
    channels, smallest = shape[0], min(shape[1:])
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "depthwise", "transpose", "pool", "residual"]))
        bias = draw(st.booleans())
        if kind == "residual":
            layers.append(Residual(conv(channels, channels, 3, padding=1, bias=bias)))
        elif kind == "pool":
            if smallest >= 2:
                pool = draw(st.sampled_from(["max", "avg", "adaptive"]))
                smallest = (smallest - 1) // 2 + 1 if pool != "adaptive" else 2
                name = {"max": f"MaxPool{dims}d", "avg": f"AvgPool{dims}d", "adaptive": f"AdaptiveAvgPool{dims}d"}[pool]
                layers.append(getattr(nn, name)(*((2,) if pool == "adaptive" else (3, 2, 1))))
        elif kind == "transpose" and smallest <= 5:
            outputs = draw(st.sampled_from([4, 6]))
            layers.append(transpose(channels, outputs, 2, draw(st.sampled_from([1, 2])), bias=bias))
            channels = outputs
        else:
            groups = channels if kind == "depthwise" else draw(st.sampled_from([1, 1, 2 - channels % 2]))
            outputs = channels if kind == "depthwise" else draw(st.sampled_from([4, 8, 12]))
            kernel, stride = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 1, 2]))
            dilation = draw(st.sampled_from([1, 1, 2])) if smallest >= 3 else 1
            padding = draw(st.integers(dilation * (kernel - 1) // 2, kernel))
            layers.append(conv(channels, outputs, kernel, stride, padding, dilation, groups, bias))
            smallest = (smallest + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
            channels = outputs
        if draw(st.booleans()):
            layers.append(norm(channels))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
    end = draw(st.sampled_from(["linear", "mean", "none"]))
    if end == "mean":
        layers.append(Apply(lambda x: x.flatten(2).mean(2)))
    if end == "linear":
        layers += [nn.Flatten(), nn.LazyLinear(draw(st.sampled_from([3, 8])), bias=draw(st.booleans()))]
    return layers


@st.composite
def _feature_layers(draw: st.DrawFn, shape: tuple[int, ...]) -> list[nn.Module]:
    """Layers for ``[N, ..., features]``."""
    layers: list[nn.Module] = []
    features = shape[-1]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["linear", "linear", "linear", "norm", "residual", "attention"]))
        bias = draw(st.booleans())
        if kind == "norm":
            layers.append(nn.LayerNorm(features))
        elif kind == "residual":
            inner = nn.Sequential(nn.Linear(features, 8, bias=bias), nn.ReLU(), nn.Linear(8, features))
            layers.append(Residual(inner))
        elif kind == "attention" and len(shape) == 2 and features % 2 == 0:
            layers.append(Residual(Attention(features, 2)))
        else:
            outputs = draw(st.sampled_from([8, 10, 13, 16, 24]))
            layers += [nn.Linear(features, outputs, bias=bias), draw(st.sampled_from(ACTIVATIONS))()]
            features = outputs
    return layers


_SHAPES = [(8,), (13,), (5, 8), (3, 12), (4, 9), (2, 7, 6), (3, 5, 8), (4, 6, 6)]

_tilings = st.one_of(
    st.fixed_dictionaries({"p": st.sampled_from([1, 2, 3, 4, 8])}),
    st.fixed_dictionaries({"p": st.sampled_from([(1, 2), (2, 2), (4, 2), (2, 1)])}),
    st.fixed_dictionaries({"p": st.sampled_from([2, 4]), "replicate": st.just("roll"), "shift": st.integers(1, 9)}),
    st.fixed_dictionaries({"p": st.sampled_from([2, 4, 8]), "replicate": st.just("hadamard")}),
)


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A network with random weights; mostly tiled, in which case some layers stay in float."""
    shape = draw(st.sampled_from(_SHAPES))
    images = len(shape) == 3 or (len(shape) == 2 and draw(st.booleans()))
    layers = draw((_image_layers if images else _feature_layers)(shape))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch = draw(st.sampled_from([1, 1, 1, 2]))
    samples = [(torch.randn(batch, *shape),) for _ in range(2)]
    module: nn.Module = nn.Sequential(*layers).eval()
    with torch.no_grad():
        module(*samples[0])  # gives lazy layers their shapes
    with_statistics(module)
    options: dict[str, Any] = {
        "scratch": draw(st.sampled_from(["static", "caller"])),
        "optimize": draw(st.sampled_from(["balanced", "speed", "size"])),
        "target": draw(st.sampled_from(["generic", "cortex-m4"])),
    }
    tiling = draw(st.one_of(st.none(), _tilings, _tilings, _tilings))
    if tiling is not None:
        config = tbn.TilingConfig(
            **tiling,
            alpha=draw(st.sampled_from(["layer", "tile", "output"])),
            tile_dtype=draw(st.sampled_from(["binary", "binary", "binary", "float"])),
            min_size=draw(st.sampled_from([0, 0, 60])),
            small=draw(st.sampled_from(["binary", "float"])),
        )
        with contextlib.suppress(tbn.TransformError):  # nothing to tile: a float network
            module = tbn.transform(module, config)
    return Network(module, samples, options)


class Batch:
    """Networks without the long text that hypothesis would print."""

    def __init__(self, networks: list[Network]) -> None:
        self.networks = networks

    def __repr__(self) -> str:
        return f"{len(self.networks)} networks"


# Not shrunk: a failure names its network, and a batch takes long.
@settings(max_examples=BATCHES, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@pytest.mark.filterwarnings("ignore:the tiled layers keep")  # a min_size above all layers is one of the cases
@given(st.lists(networks(), min_size=BATCH_SIZE, max_size=BATCH_SIZE).map(Batch))
def test_random_networks(batch: Batch) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check(batch.networks, Path(folder))
