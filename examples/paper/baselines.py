"""Networks with few bits a weight to compare with: XNOR-Net, IR-Net, ternary weights, sub-bit kernels.

Each is a parametrization (``torch.nn.utils.parametrize``) of the float model's weights: the layer's own forward uses
the quantised weight, and its gradient reaches the float weight straight through, or as the method says. The papers
leave the first and the last layer in float; here the layers are those that a :class:`tbn_compiler.TilingConfig` tiles
or makes binary, so that methods are compared on the same weights.

==================  ========================================================================  ================
``"xnor"``          ``alpha_c sign(W)``, ``alpha_c = mean|W_c|`` of a filter: the weights of    1 bit
                    XNOR-Net (Rastegari et al., arXiv 1603.05279, section 3.1)
``"irnet"``         weights of each filter centred and of unit deviation, ``sign`` times a      1 bit
                    power of two, gradient by the error-decay estimator: IR-Net (Qin et al.,
                    arXiv 1909.10788)
``"ternary-mean"``  ``s clip(round(W / s))`` with ``s = mean|W|``: BitNet b1.58 (Ma et al.,     1.58 bits
                    arXiv 2402.17764)
``"ternary-median"``  with ``s = median|W|``: BitNet b1.58 Reloaded (Nielsen and                1.58 bits
                    Schneider-Kamp, arXiv 2407.09527)
``"snn"``           3 x 3 kernels, each the nearest of ``2**bits`` learned sign patterns        bits / 9
                    times a scale of its filter: Sub-bit Neural Networks (Wang et al., arXiv
                    2110.09195); ``"xnor"`` in layers with other kernels, and in those that
                    the tiling makes binary only
==================  ========================================================================  ================
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import tbn_compiler as tbn

Method = Literal["xnor", "irnet", "ternary-mean", "ternary-median", "snn"]
METHODS: tuple[Method, ...] = get_args(Method)
# Of a kernel's place in the subset of "snn": 32 kernels, 0.56 bits a weight, the middle one of its paper's three sizes.
INDEX_BITS = 5


def straight_through(value: Tensor, weight: Tensor) -> Tensor:
    """``value``, exactly, with the gradient of ``weight``."""
    return value.detach() + (weight - weight.detach())


def _sign(x: Tensor) -> Tensor:
    """+1 where ``x > 0``, else -1 (as the tiles' Eq. 3)."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def _per_filter(weight: Tensor) -> tuple[int, ...]:
    return tuple(range(1, weight.dim()))


class Quantiser(nn.Module):
    """Makes the quantised weight of a layer from the float one, in ``forward``."""

    def stored(self, weight: Tensor) -> tuple[int, int]:
        """Bits to store for a weight without its scales, and the number of scales: a bit each, one for each filter."""
        return weight.numel(), weight.shape[0]


class XNOR(Quantiser):
    """A sign and one scale for each filter."""

    def forward(self, weight: Tensor) -> Tensor:
        """The quantised weight."""
        alpha = weight.abs().mean(_per_filter(weight), keepdim=True)
        return alpha * straight_through(_sign(weight), weight)


def error_decay(x: Tensor, t: Tensor) -> Tensor:
    """``sign`` with the gradient ``k t (1 - tanh(t x)**2)``, ``k = max(1 / t, 1)`` (IR-Net, Eq. 11 and 12)."""
    return straight_through(_sign(x), (1 / t).clamp(min=1) * torch.tanh(t * x))


class IRNet(Quantiser):
    """Balanced, standardised weights, a power of two for each filter, and the error-decay estimator.

    ``t`` of the estimator is a tensor, which a recorded step reads anew. It is no part of the state: it follows from
    how much of the training is done.
    """

    first, last = 0.1, 10.0  # values of t
    t: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("t", torch.tensor(self.first), persistent=False)

    def set_progress(self, progress: float) -> None:
        """Choose ``t`` for a part of the training that is done, 0 to 1."""
        self.t.fill_(self.first * (self.last / self.first) ** progress)

    def forward(self, weight: Tensor) -> Tensor:
        """The quantised weight."""
        axes = _per_filter(weight)
        centred = weight - weight.mean(axes, keepdim=True)
        standard = centred / centred.std(axes, keepdim=True)
        shift = standard.abs().mean(axes, keepdim=True).log2().round().exp2().detach()
        return error_decay(standard, self.t) * shift


class Ternary(Quantiser):
    """-1, 0 and 1 times one scale of the layer."""

    def __init__(self, median: bool) -> None:
        super().__init__()
        self.median = median

    def stored(self, weight: Tensor) -> tuple[int, int]:
        """The bits of as many digits to base 3; one scale."""
        return math.ceil(weight.numel() * math.log2(3)), 1

    def forward(self, weight: Tensor) -> Tensor:
        """The quantised weight."""
        magnitudes = weight.detach().abs()
        scale = (magnitudes.median() if self.median else magnitudes.mean()).clamp(min=1e-5)
        return straight_through((weight / scale).round().clamp(-1, 1) * scale, weight)


class SubBitKernels(Quantiser):
    """Kernels of 3 x 3 from a learned subset of the 512 sign patterns, and one scale for each filter.

    The subset's float patterns are trained: a kernel's gradient reaches the pattern that it uses, and, straight
    through, the float kernel whose choice it is.
    """

    def __init__(self, weight: Tensor, index_bits: int = INDEX_BITS) -> None:
        super().__init__()
        kernel = math.prod(weight.shape[2:])
        chosen = torch.randperm(2**kernel, device=weight.device)[: 2**index_bits]
        signs = 1 - 2 * ((chosen[:, None] >> torch.arange(kernel, device=weight.device)) & 1)
        # Patterns that start near a change of sign are learned faster than ones at +1 and -1.
        self.patterns = nn.Parameter(signs.to(weight.dtype) * weight.detach().abs().mean())
        self.index_bits = index_bits

    def stored(self, weight: Tensor) -> tuple[int, int]:
        """A place in the subset for each kernel, and the subset's signs; one scale for each filter."""
        kernels = weight.shape[0] * weight.shape[1]
        return kernels * self.index_bits + self.patterns.numel(), weight.shape[0]

    def forward(self, weight: Tensor) -> Tensor:
        """The quantised weight."""
        kernels = weight.flatten(2)
        patterns = straight_through(_sign(self.patterns), self.patterns)
        # In double: neither autocast nor tf32 changes the choice.
        chosen = (kernels.detach().double() @ _sign(self.patterns.detach()).double().t()).argmax(-1)
        used = patterns[chosen]
        alpha = weight.abs().mean(_per_filter(weight), keepdim=True)
        return alpha * (used + (kernels - kernels.detach())).view_as(weight)


class Parts(nn.Module):
    """Equal parts of a parameter along its first axis, each quantised by itself."""

    def __init__(self, *parts: Quantiser) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, weight: Tensor) -> Tensor:
        """The quantised parameter."""
        chunks = weight.chunk(len(self.parts))
        return torch.cat([part(chunk) for part, chunk in zip(self.parts, chunks, strict=True)])


def quantise(
    model: nn.Module, method: Method, config: tbn.TilingConfig, *, index_bits: int = INDEX_BITS
) -> dict[str, Any]:
    """Parametrize the weights that ``config`` would tile or make binary, in place.

    Args:
        model: the float model.
        method: one of :data:`METHODS`.
        config: chooses the layers. Where it leaves ``p = 1``, ``"snn"`` keeps one bit.
        index_bits: bits of a kernel's place in the subset of ``"snn"``.

    Returns:
        What is to be stored, under the names of ``tbn.summary(...).totals``: the weights of all its layers, their bits
        (32 for each weight that stays in float; scales are not counted), the scales, and the number of quantised
        layers.

    Raises:
        ValueError: an unknown method, or a weight that the methods do not know.
        TransformError: no layer of the model can be tiled.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    found: dict[tuple[str, str], list[Quantiser]] = {}
    weights = bits = alphas = layers = 0
    for row in tbn.summary(tbn.transform(model, config)).layers:
        weights += row.weights
        if row.p is None:
            bits += row.stored_bits
            continue
        if row.kind not in ("linear", "conv1d", "conv2d", "conv3d"):
            raise ValueError(f"{row.name} is a {row.kind}: the methods are for linear layers and convolutions")
        path, name = _parameter(model, row.name)
        place = len(found.setdefault((path, name), []))  # of a part; all parts are tiled, or none
        weight = model.get_submodule(path).get_parameter(name).detach()[place * row.shape[0] :][: row.shape[0]]
        quantiser = _quantiser(method, weight, index_bits, tiled=row.p > 1)
        found[path, name].append(quantiser)
        stored, scales = quantiser.stored(weight)
        bits, alphas, layers = bits + stored, alphas + scales, layers + 1
    for (path, name), parts in found.items():
        one = parts[0] if len(parts) == 1 else Parts(*parts)
        parametrize.register_parametrization(model.get_submodule(path), name, one)
    return {
        "weights": weights,
        "stored_bits": bits,
        "bits_per_weight": bits / weights,
        "alphas": alphas,
        "tiled_layers": layers,
    }


_PARTS = ("in_proj_weight_0", "in_proj_weight_1", "in_proj_weight_2")  # how a packed projection's parts are listed


def _parameter(model: nn.Module, layer: str) -> tuple[str, str]:
    """The module and the name of the parameter behind a row of a summary."""
    path, _, name = layer.rpartition(".")
    if name in _PARTS:
        return path, name[:-2]
    modules = dict(model.named_modules())
    if layer in modules:
        return layer, "weight"
    if path in modules and name in modules[path]._parameters:
        return path, name
    raise ValueError(f"{layer} is no parameter of {type(model).__name__}: the methods cannot change it")


def _quantiser(method: Method, weight: Tensor, index_bits: int, *, tiled: bool) -> Quantiser:
    if method == "irnet":
        return IRNet()
    if method in ("ternary-mean", "ternary-median"):
        return Ternary(median=method == "ternary-median")
    if method == "snn" and tiled and weight.shape[2:] == (3, 3):
        return SubBitKernels(weight, index_bits)
    return XNOR()


def estimators(model: nn.Module) -> list[IRNet]:
    """The quantisers that are told how much of the training is done."""
    return [module for module in model.modules() if isinstance(module, IRNet)]


def constants(method: Method) -> dict[str, Any]:
    """What a method is run with here, for logs."""
    if method == "irnet":
        return {"t": [IRNet.first, IRNet.last]}
    return {"index_bits": INDEX_BITS} if method == "snn" else {}


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The ``state_dict`` of the float model, with the quantised weights as its weights; float models' own as it is."""
    state = {name: value for name, value in model.state_dict().items() if ".parametrizations." not in f".{name}"}
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module):
            for name in module.parametrizations:
                state[f"{path}.{name}".lstrip(".")] = getattr(module, name).detach()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
