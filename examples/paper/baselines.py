"""Networks with few bits a weight to compare with: XNOR-Net, IR-Net, ternary weights, sub-bit kernels.

Each is a parametrization (``torch.nn.utils.parametrize``) of the float model's weights: the layer's own forward uses
the quantised weight, and its gradient reaches the float weight straight through, or as the method says. First and last
layers stay in float unless ``everything`` asks for them, as in these papers.

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
                    2110.09195), 1 bit elsewhere
==================  ========================================================================  ================
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Method = Literal["xnor", "irnet", "ternary-mean", "ternary-median", "snn"]
METHODS: tuple[Method, ...] = ("xnor", "irnet", "ternary-mean", "ternary-median", "snn")
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def straight_through(value: Tensor, weight: Tensor) -> Tensor:
    """``value``, with the gradient of ``weight``."""
    return weight + (value - weight).detach()


def _sign(x: Tensor) -> Tensor:
    """+1 where ``x > 0``, else -1 (as the tiles' Eq. 3)."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def _per_filter(weight: Tensor) -> tuple[int, ...]:
    return tuple(range(1, weight.dim()))


class XNOR(nn.Module):
    """A sign and one scale for each filter."""

    bits = 1.0

    def forward(self, weight: Tensor) -> Tensor:
        """The quantised weight."""
        alpha = weight.abs().mean(_per_filter(weight), keepdim=True)
        return alpha * straight_through(_sign(weight), weight)


class _ErrorDecay(torch.autograd.Function):
    """``sign`` with the gradient ``k t (1 - tanh(t x)**2)``, ``k = max(1 / t, 1)`` (IR-Net, Eq. 11 and 12)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.t = t
        return _sign(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * max(1 / ctx.t, 1) * ctx.t * (1 - torch.tanh(ctx.t * x).square()), None


class IRNet(nn.Module):
    """Balanced, standardised weights, a power of two for each filter, and the error-decay estimator."""

    bits = 1.0
    first, last = 0.1, 10.0

    def __init__(self) -> None:
        super().__init__()
        self.progress = 0.0  # of training, from 0 to 1: set by set_progress

    def forward(self, weight: Tensor) -> Tensor:
        """The quantised weight."""
        axes = _per_filter(weight)
        centred = weight - weight.mean(axes, keepdim=True)
        standard = centred / centred.std(axes, keepdim=True)
        shift = standard.abs().mean(axes, keepdim=True).log2().round().exp2().detach()
        t = self.first * 10 ** (self.progress * math.log10(self.last / self.first))
        signs: Tensor = _ErrorDecay.apply(standard, t)  # type: ignore[no-untyped-call]
        return signs * shift


class Ternary(nn.Module):
    """-1, 0 and 1 times one scale of the layer."""

    bits = math.log2(3)

    def __init__(self, median: bool) -> None:
        super().__init__()
        self.median = median

    def forward(self, weight: Tensor) -> Tensor:
        """The quantised weight."""
        magnitudes = weight.detach().abs()
        scale = (magnitudes.median() if self.median else magnitudes.mean()).clamp(min=1e-5)
        return straight_through((weight / scale).round().clamp(-1, 1) * scale, weight)


class SubBitKernels(nn.Module):
    """Kernels of 3 x 3 from a learned subset of the 512 sign patterns, and one scale for each filter.

    The subset's float patterns are trained: a kernel's gradient reaches the pattern that it uses, and, straight
    through, the float kernel whose choice it is.
    """

    def __init__(self, weight: Tensor, index_bits: int = 5) -> None:
        super().__init__()
        kernel = math.prod(weight.shape[2:])
        chosen = torch.randperm(2**kernel, device=weight.device)[: 2**index_bits]
        signs = 1 - 2 * ((chosen[:, None] >> torch.arange(kernel, device=weight.device)) & 1)
        # Patterns that start near a change of sign are learned faster than ones at +1 and -1.
        self.patterns = nn.Parameter(signs.to(weight.dtype) * weight.detach().abs().mean())
        self.bits = index_bits / kernel

    def forward(self, weight: Tensor) -> Tensor:
        """The quantised weight."""
        kernels = weight.flatten(2)
        patterns = straight_through(_sign(self.patterns), self.patterns)
        chosen = (kernels.detach() @ _sign(self.patterns.detach()).t()).argmax(-1)
        used = patterns[chosen]
        alpha = weight.abs().mean(_per_filter(weight), keepdim=True)
        return alpha * (used + (kernels - kernels.detach())).view_as(weight)


def quantise(model: nn.Module, method: Method, *, everything: bool = False, index_bits: int = 5) -> nn.Module:
    """Parametrize the weights of a model's linear layers and convolutions, in place.

    Args:
        model: the float model.
        method: one of :data:`METHODS`.
        everything: the first and the last layer, too.
        index_bits: bits of a kernel's place in the subset of ``"snn"``.

    Returns:
        ``model``.

    Raises:
        ValueError: an unknown method, or a model without such layers.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of {', '.join(METHODS)}")
    layers = [module for module in model.modules() if isinstance(module, _LAYERS)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layers and convolutions")
    for layer in layers if everything else layers[1:-1]:
        parametrize.register_parametrization(layer, "weight", _parametrization(method, layer.weight, index_bits))
    return model


def _parametrization(method: Method, weight: Tensor, index_bits: int) -> nn.Module:
    if method == "snn":
        return SubBitKernels(weight, index_bits) if weight.dim() == 4 and weight[0, 0].numel() == 9 else XNOR()
    if method == "irnet":
        return IRNet()
    return XNOR() if method == "xnor" else Ternary(median=method == "ternary-median")


def set_progress(model: nn.Module, progress: float) -> None:
    """Tell the error-decay estimator how much of the training is done, 0 to 1."""
    for module in model.modules():
        if isinstance(module, IRNet):
            module.progress = progress


def weight_bits(model: nn.Module) -> float:
    """Bits for each weight of the quantised layers, scales and the subsets of kernels not counted."""
    bits = weights = 0.0
    for module in model.modules():
        if isinstance(module, _LAYERS) and parametrize.is_parametrized(module, "weight"):
            parametrizations: Any = module.parametrizations
            original = parametrizations["weight"]
            bits += original[0].bits * original.original.numel()
            weights += original.original.numel()
    return bits / weights if weights else 32.0
