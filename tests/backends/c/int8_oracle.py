"""What a graph of int8 operations computes: the arithmetic that ``tiled_int8`` and ``integers`` define.

Sums are those of PyTorch in float64, which is exact for them; numbers in fixed point follow their definition in
Python's integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tbn_compiler.backends.c import ir
from tbn_compiler.backends.c.tiled_int8 import fixed_point


def run(operations: Sequence[ir.Operation], inputs: Mapping[ir.Value, Tensor]) -> dict[ir.Operand, Tensor]:
    """Every value of a program; int8 ones as ``int64``.

    Args:
        operations: in an order in which they can run.
        inputs: the model's.
    """
    values: dict[ir.Operand, Tensor] = dict(inputs)
    for operation in operations:
        arguments = [values[x] if isinstance(x, ir.Value) else torch.from_numpy(x.array) for x in operation.inputs]
        values[operation.output] = _run(operation, *arguments).reshape(operation.output.shape)
    return values


def _run(operation: ir.Operation, *inputs: Tensor) -> Tensor:
    x = inputs[0]
    match operation:
        case ir.Quantize():
            factor = float(np.float32(1) / np.float32(operation.scale))
            return torch.round(torch.nan_to_num(x * factor, nan=0.0)).clamp(*operation.limits).long()
        case ir.Dequantize():
            return x.float() * float(np.float32(operation.scale))
        case ir.Lookup():
            return _lookup(operation, x)
        case ir.Convert():
            return x.float() if operation.output.dtype == "float32" else x.long()
        case ir.RescaledSum():
            return _sum(operation, x, inputs[1])
        case ir.IntegerProduct():
            products = x.reshape(-1, operation.inner) * inputs[1].reshape(-1, 1)
            return requantized(products, operation.scale / operation.output_scale, 0.0, 127**2, operation.limits)
        case ir.IntegerMean():
            return _mean(operation, x)
        case ir.TiledLinear() | ir.TiledConv():
            return _layer(operation, x)
        case ir.Pool(function="max_pool"):
            window = operation.window
            images = x.double().reshape(1, operation.planes, *window.input)
            bottom = [
                max((n - 1) * s + (k - 1) * d + 1 - i - p, 0)
                for n, s, k, d, i, p in zip(
                    *(window.output, window.stride, window.kernel, window.dilation, window.input, window.padding),
                    strict=True,
                )
            ]
            padding = (window.padding[1], bottom[1], window.padding[0], bottom[0])
            padded = F.pad(images, padding, value=-1000.0)
            found = F.max_pool2d(padded, window.kernel, window.stride, 0, window.dilation)
            return found[..., : window.output[0], : window.output[1]].to(x.dtype)
        case ir.Strided() | ir.Copy():
            access = operation.access if isinstance(operation, ir.Strided) else ir.Access.whole(operation.output.shape)
            return _elements(x, access)
        case ir.Part():
            return x.flatten()[operation.offset : operation.offset + operation.output.size]
        case ir.Pad():
            result = torch.full((operation.output.size,), operation.value).to(x.dtype)
            torch.as_strided(result, operation.result.sizes, operation.result.strides, operation.result.offset).copy_(
                x.reshape(operation.result.sizes)
            )
            return result
        case ir.Concat():
            parts = [part.reshape(operation.outer, -1) for part in inputs]
            return torch.cat(parts, 1)
    raise AssertionError(f"the oracle does not know {operation}")


def _lookup(operation: ir.Lookup, x: Tensor) -> Tensor:
    """Element by element: the place of each in its own table."""
    first = 0 if operation.inputs[0].dtype == "uint8" else 128  # type: ignore[union-attr]
    elements = _elements(x, operation.access).long()
    places = torch.zeros_like(elements)
    if operation.dim is not None:
        places = places.movedim(operation.dim, -1).add(torch.arange(elements.shape[operation.dim]))
        places = places.movedim(-1, operation.dim)
    return torch.from_numpy(operation.table.array.copy()).long()[places, first + elements]


def _elements(x: Tensor, access: ir.Access) -> Tensor:
    """What an access reads; strides may be negative."""
    places = torch.full(access.sizes, access.offset)
    for dim, (size, step) in enumerate(zip(access.sizes, access.strides, strict=True)):
        places += (torch.arange(size) * step).reshape(size, *(1,) * (len(access.sizes) - dim - 1))
    return x.flatten()[places]


def requantized(sums: Tensor, ratio: float, addend: float, largest_sum: int, limits: tuple[int, int]) -> Tensor:
    """Integers that stand for ``ratio * sums + addend``, as C computes them."""
    factor, multipliers, offsets, shift = fixed_point(np.array([ratio]), np.array([addend]), largest_sum)
    multiplier, offset = int(multipliers[0]), int(offsets[0])
    found = [(((int(s) * factor * multiplier) >> 32) + offset) >> shift for s in sums.flatten().tolist()]
    return torch.tensor(found).reshape(sums.shape).clamp(*limits)


def _sum(operation: ir.RescaledSum, a: Tensor, b: Tensor) -> Tensor:
    ratios = [scale / operation.output_scale for scale in operation.scales]
    shift = 30
    while shift > 0 and max(ratios) * 2**shift >= 2**22:
        shift -= 1
    factor_a, factor_b = (min(round(ratio * 2**shift), 2**22) for ratio in ratios)
    return (a.reshape(-1) * factor_a + b.reshape(-1) * factor_b + (2**shift >> 1) >> shift).clamp(*operation.limits)


def _mean(operation: ir.IntegerMean, x: Tensor) -> Tensor:
    axis = operation.axis
    sums = x.reshape(axis.outer, axis.size, axis.inner).sum(1)
    if operation.output_scale is None:
        return sums.float() * float(np.float32(operation.scale / axis.size))
    ratio = operation.scale / (operation.output_scale * axis.size)
    return requantized(sums, ratio, 0.0, 127 * axis.size, operation.limits)


def _layer(operation: ir.TiledLinear | ir.TiledConv, x: Tensor) -> Tensor:
    layout, scale = operation.layout, operation.input_scale
    assert scale is not None
    bits = np.unpackbits(operation.tile.array, count=layout.tile_size, bitorder="little")
    weight = layout.replicate(torch.from_numpy(2.0 * bits - 1))
    rows = layout.rows
    if isinstance(operation, ir.TiledLinear):
        sums = (x.double().reshape(-1, layout.row_size) @ weight.reshape(rows, -1).double().T).T
    else:
        window = operation.window
        images = x.double().reshape(operation.samples, operation.input_channels, *window.input)
        high = [
            max((n - 1) * s + (k - 1) * d + 1 - i - p, 0)
            for n, s, k, d, i, p in zip(
                *(window.output, window.stride, window.kernel, window.dilation, window.input, window.padding),
                strict=True,
            )
        ]
        images = F.pad(images, (window.padding[1], high[1], window.padding[0], high[0]))
        filters = weight.reshape(rows, layout.shape[1], *window.kernel).double()
        sums = F.conv2d(images, filters, None, window.stride, 0, window.dilation, operation.groups)
        sums = sums[..., : window.output[0], : window.output[1]].transpose(0, 1).reshape(rows, -1)
    sums = sums.long()
    alpha = layout.row_alphas(torch.from_numpy(operation.alpha.array.copy())).expand(rows)
    bias = np.zeros(rows) if operation.bias is None else operation.bias.array
    results = []
    for row in range(rows):
        if operation.output_scale is None:
            value = sums[row].float() * (alpha[row] * np.float32(scale)) + float(bias[row])
            results.append(value.clamp(min=0) if operation.relu else value)
        else:
            ratio = float(alpha[row]) * float(np.float32(scale)) / operation.output_scale
            addend = float(bias[row]) / operation.output_scale
            results.append(requantized(sums[row], ratio, addend, 127 * layout.row_size, operation.limits))
    found = torch.stack(results)
    if isinstance(operation, ir.TiledLinear):
        return found.T
    return found.reshape(rows, operation.samples, -1).transpose(0, 1)
