"""What is trained, and what it makes of a layer's weight.

``weight`` is the latent weight ``W`` of the layout's shape, whose aggregated signs are the tile (Eq. 2, 3), or the
aggregated tile ``s`` itself, ``q`` elements in any shape. ``source`` is ``A`` (or ``W``) of the weight's shape, whose
mean magnitudes are the alphas (Eq. 7, 9), or one element for each alpha: then the alpha is its magnitude, and its
gradient is divided by the ``N / k`` weights that each alpha scales. That is what one element of ``A`` gets, so that
gradient descent moves the alpha as it moves the mean of ``A`` (until an element of ``A`` changes its sign).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tbn_compiler.ops.schemas import LIBRARY, TRAINING_PREFIX, make_layout
from tbn_compiler.tiling import TileLayout
from tbn_compiler.torch_private import untraced


def takes_latent_weight(weight: Tensor, layout: TileLayout) -> bool:
    """Whether ``weight`` is ``W``, not the aggregated tile; they are the same if there is one copy."""
    return weight.shape == layout.shape


def alphas_of(source: Tensor, layout: TileLayout, num_alphas: int) -> Tensor:
    """The alphas, ``[num_alphas]``, from ``A`` (Eq. 7, 9) or from one element for each."""
    if source.numel() != num_alphas:
        return layout.alphas(source, num_alphas)
    count = layout.numel // num_alphas
    magnitude = source.reshape(-1).abs()
    return magnitude.detach() + (magnitude - magnitude.detach()) / count  # the second term is 0


def alpha_values(source: Tensor, layout: TileLayout, num_alphas: int) -> Tensor:
    """:func:`alphas_of`, where nobody differentiates them."""
    if source.numel() != num_alphas:
        return layout.alphas(source, num_alphas)
    return source.abs() if source.dim() == 1 else source.reshape(-1).abs()


def source_gradient(source: Tensor, layout: TileLayout, grad_alpha: Tensor) -> Tensor:
    """The gradient of ``A``, or of one element for each alpha, from that of the alphas."""
    k = grad_alpha.numel()
    grad_alpha = (grad_alpha / (layout.numel // k)).to(source.dtype)
    if source.numel() == k:
        return source.sign().mul_(grad_alpha.view(source.shape))
    signs = source.sign().contiguous()
    groups = layout.alpha_groups(signs, k)
    groups.mul_(grad_alpha.view(groups.shape[0], 1, groups.shape[2], 1))  # in place: the source can be large
    return signs


def used_weight(weight: Tensor, source: Tensor, layout: TileLayout, k: int, binary: bool) -> Tensor:
    """The whole weight ``alpha * B`` of ``layout.shape``, differentiable as ``tbn::tile`` and ``tbn::scale`` are."""
    if takes_latent_weight(weight, layout):
        options = {"p_in": layout.p_in, "shift": layout.shift, "batch": layout.batch, "hadamard": layout.hadamard}
        bits = torch.ops.tbn.tile.default(weight, layout.p, **options, binary=binary)
    else:
        tile = torch.ops.tbn.tile.default(weight.reshape(-1), 1, binary=binary)
        bits = layout.replicate(tile)
    if source.numel() != k:
        used: Tensor = torch.ops.tbn.scale.default(bits, source, k, p_in=layout.alphas_in(k))
        return used
    return layout.scale(bits, alphas_of(source, layout, k).to(bits.dtype))


def check_latents(op: str, layout: TileLayout, k: int, weight: Tensor, source: Tensor) -> None:
    """Check that weight and source have the sizes of a layout with ``k`` alphas.

    Raises:
        ValueError: they do not.
    """
    if not takes_latent_weight(weight, layout) and weight.numel() != layout.tile_size:
        raise ValueError(
            f"{op}: weight must have shape {layout.shape}, or the {layout.tile_size} elements of the tile, got shape "
            f"{tuple(weight.shape)}"
        )
    if not layout.allows_alphas(k) or source.numel() not in (layout.numel, k):
        raise ValueError(f"{op}: {k} alphas from a source of shape {tuple(source.shape)} of a weight {layout.shape}")


def train_weight(
    weight: Tensor,
    source: Tensor,
    shape: Sequence[int],
    p: int,
    num_alphas: int,
    *,
    p_in: int = 1,
    shift: int = 0,
    batch: int = 1,
    hadamard: bool = False,
    binary: bool = True,
) -> Tensor:
    """The whole weight ``alpha * B`` of a latent weight or tile, for what multiplies it in its own way."""
    layout = make_layout(shape, p, p_in, shift, batch, hadamard)
    check_latents(f"tbn::{TRAINING_PREFIX}weight", layout, num_alphas, weight, source)
    return used_weight(weight, source, layout, num_alphas, binary)


def register() -> None:
    """Register the weight for every device; it is made of operators that have gradients."""
    LIBRARY.impl(f"{TRAINING_PREFIX}weight", untraced(train_weight), "CompositeImplicitAutograd")
