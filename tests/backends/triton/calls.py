"""Calls of the tiled layers with random operands, and what they should give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbn_compiler.ops import reference
from tbn_compiler.packing import pack_bits
from tbn_compiler.tiling import TileLayout

# Of the largest result: one rounding to the dtype of the result, and a little for sums in another order. Triton's
# interpreter cuts digits off where a GPU rounds to bfloat16, which is twice as far.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2.0**-11 * 1.01, torch.bfloat16: 2.0**-7 * 1.01}


@dataclass
class Call:
    """A layer with random operands.

    Attributes:
        shape: shape of the weight, a convolution's with input channels by group.
        p: copies of the tile.
        num_alphas: number of scales.
        dtype: dtype of the input.
        packed: 1-bit tile, or a full-precision one in ``dtype``.
        bias: whether there is one.
        replicas: input alphas, 0 for none.
        groups: groups of a convolution.
        options: keyword arguments of the operator.
    """

    shape: tuple[int, ...]
    p: int
    num_alphas: int = 1
    dtype: torch.dtype = torch.float32
    packed: bool = True
    bias: bool = True
    replicas: int = 0
    groups: int = 1

    def __post_init__(self) -> None:
        self.options: dict[str, Any] = {}

    def __call__(self, function: Any, x: Tensor, exact: bool = False, **options: Any) -> Tensor:
        """Run ``function``; ``exact`` in float64 on the same operands (in float32 for quantised inputs)."""
        generator = torch.Generator().manual_seed(sum(self.shape) + self.p)
        layout = TileLayout(
            self.shape, self.p, options.get("p_in", 1), options.get("shift", 0), hadamard=options.get("hadamard", False)
        )
        values = torch.randn(layout.tile_size, generator=generator)
        tile = pack_bits(values) if self.packed else values.to(self.dtype)
        # Scales of few bits: products with +1 and -1, and sums of some, are exact in every dtype.
        alpha = torch.randint(1, 9, (self.num_alphas,), generator=generator) / 8
        bias = torch.randn(self.shape[0], generator=generator) if self.bias else None
        replicas = torch.randint(1, 9, (self.replicas,), generator=generator) / 8 if self.replicas else None
        inputs = self.shape[1] * self.groups
        sizes: tuple[Any, ...] = (inputs, self.shape[0], *([self.shape[2:]] if len(self.shape) > 2 else []))
        if len(self.shape) > 2:
            options["groups"] = self.groups
        if exact:
            wide = torch.float64 if options.get("activation", "float") == "float" else torch.float32
            x, tile = x.to(wide), tile if self.packed else tile.to(wide)
        return function(x, tile, alpha, bias, *sizes, self.p, replicas, **options)

    def input(self, *sizes: int) -> Tensor:
        """A random input; for a convolution, ``sizes`` are the batch and the image."""
        features = self.shape[1] * self.groups // max(self.replicas, 1)
        size = (*sizes, features) if len(self.shape) == 2 else (sizes[0], features, *sizes[1:])
        return torch.randn(size, generator=torch.Generator().manual_seed(7)).to(self.dtype)

    def check(
        self, function: Any, x: Tensor, memory_format: torch.memory_format = torch.contiguous_format, **options: Any
    ) -> Tensor:
        """Compare ``function`` with the reference, and return its result, which has a memory format."""
        wanted = reference.linear if len(self.shape) == 2 else reference.KERNELS[f"conv{len(self.shape) - 2}d"]
        expected = self(wanted, x, exact=True, **options)
        got = self(function, x, **options)
        assert got.dtype == self.dtype
        assert got.shape == expected.shape
        assert got.is_contiguous(memory_format=memory_format)
        scale = expected.abs().max().item()
        assert scale > 0
        error = (got.double() - expected.double()).abs().max().item()
        assert error <= TOLERANCE[self.dtype] * scale, f"error {error / scale:.2g} of the largest result"
        return got
