"""Inputs in another number format, as :mod:`tbn_compiler.ops.formats` defines them."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from tbn_compiler.backends.triton.kernels import convert
from tbn_compiler.backends.triton.replay import Kept, room, start
from tbn_compiler.backends.triton.search import power_of_two
from tbn_compiler.ops.schemas import INT8_TINY

# A program reads larger tokens (images) too slowly. Their size alone decides: an int8 result does not depend on the
# batch.
ONE_PROGRAM = 16384
PART = 4096
MAX_PARTS = 256  # each program of the second kernel reads what the first has found in all parts


def quantize(
    x: Tensor, number_format: str, given: Tensor | None = None, kept: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """An input in another number format, and the scale of each token.

    Args:
        x: ``[tokens, size]``, the last axis contiguous.
        number_format: "int8"; "binary", +1 and -1; "signs", the same as packed bits.
        given: one scale for all tokens; ``None``: each has its own.
        kept: what earlier calls of the same layer have left.

    Returns:
        ``int8 [tokens, size]`` (``uint8 [tokens, size / 8]`` for "signs") and float32 ``[tokens]``.
    """
    tokens, size = x.shape
    signs = number_format == "signs"
    packed, device = torch.uint8 if signs else torch.int8, x.device
    values = room(kept, (tokens, size // 8 if signs else size), packed, device)
    scale = room(kept, (tokens,), torch.float32, device)
    if signs or size <= ONE_PROGRAM:
        # Fused, a product would be rounded together with what follows: not as the formats say.
        start(
            kept, convert.quantize_tokens, (tokens, 1, 1),
            x, values, scale, given, size, x.stride(0),
            TINY=INT8_TINY, FORMAT=number_format, GIVEN=given is not None, BLOCK=min(2048, max(32, power_of_two(size))),
            enable_fp_fusion=False,
        )  # fmt: skip
        return values, scale
    part_size = PART * triton.cdiv(triton.cdiv(size, MAX_PARTS), PART)
    parts = triton.cdiv(size, part_size)
    partial = room(kept, (tokens, parts), torch.float32, device)
    start(
        kept, convert.measure_parts, (tokens * parts, 1, 1),
        x, partial, size, x.stride(0), parts, part_size,
        FORMAT=number_format, GIVEN=given is not None, BLOCK=PART, num_warps=8,
    )  # fmt: skip
    start(
        kept, convert.quantize_parts, (tokens * parts, 1, 1),
        x, values, scale, given, partial, size, x.stride(0), parts, part_size,
        TINY=INT8_TINY, FORMAT=number_format, GIVEN=given is not None, PARTS=power_of_two(parts), BLOCK=PART,
        num_warps=8, enable_fp_fusion=False,
    )  # fmt: skip
    return values, scale
