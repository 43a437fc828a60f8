"""The stored form of a tile: the only definition of the bit order.

A packed tile is ``ceil(q / 8)`` bytes (``uint8``), little-endian bits as in
``np.packbits(t > 0, bitorder="little")``: element ``j`` is bit ``j % 8`` of byte ``j // 8``, 1 stands for +1 and
0 for -1, padding bits are zero. Backends may re-lay it out when they load it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed_size(numel: int) -> int:
    """Number of bytes that ``numel`` tile elements take: ``ceil(numel / 8)``."""
    return (numel + 7) // 8


def _bit_values(device: torch.device) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=device)


def pack_bits(tile: Tensor) -> Tensor:
    """Pack a tile: positive elements become 1, all others 0.

    Args:
        tile: tensor of any shape and numeric dtype, taken in row-major order.

    Returns:
        ``uint8`` tensor of shape ``[ceil(numel / 8)]`` on the same device.

    Example:
        >>> pack_bits(torch.tensor([1.0, -1.0, 1.0]))
        tensor([5], dtype=torch.uint8)
    """
    bits = (tile.reshape(-1) > 0).to(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 8)).reshape(-1, 8)
    # At most 255 in sum, so uint8 arithmetic is exact.
    return (bits * _bit_values(tile.device)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Unpack the first ``numel`` elements of a packed tile into +1 and -1.

    Args:
        packed: ``uint8`` tensor of shape ``[ceil(numel / 8)]``.
        numel: number of tile elements.
        dtype: a signed dtype for the result.

    Returns:
        Tensor of shape ``[numel]``.
    """
    bits = (packed[:, None] & _bit_values(packed.device)) != 0
    return bits.reshape(-1)[:numel].to(dtype).mul_(2).sub_(1)
