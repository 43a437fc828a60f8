"""Tiled layers in standard ONNX operators, decoded from packed bits in the graph.

Each ``tbn::`` layer becomes ``tbn::unpack`` and the reference kernel on its result, which multiplies the unique rows
only and replicates the results with the alphas; ``tbn::unpack`` becomes shift, and, cast, ``2b - 1``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from tbn_compiler.graph.layers import INFERENCE_OPS
from tbn_compiler.ops.reference import KERNELS

_unpack_op = torch.ops.tbn.unpack.default


def op_arguments(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of an operator's call by their name in the schema, defaults included."""
    arguments = {argument.name: argument.default_value for argument in op._schema.arguments}
    return arguments | dict(zip(arguments, args, strict=False)) | kwargs


def weight_shape(arguments: dict[str, Any], *, transposed: bool = False) -> tuple[int, ...]:
    """Shape of the weight behind a call of an inference operator."""
    if "kernel_size" not in arguments:
        return (arguments["out_features"], arguments["in_features"])
    inputs, outputs = arguments["in_channels"], arguments["out_channels"]
    rows, columns = (inputs, outputs) if transposed else (outputs, inputs)
    return (rows, columns // arguments["groups"], *arguments["kernel_size"])


def tiled_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of inference operators in a graph."""
    ops = set(INFERENCE_OPS.values())
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target in ops]


def use_bits(gm: fx.GraphModule) -> None:
    """Let the tiled layers of a graph decode their tile and then run the reference kernel, in place."""
    for node in tiled_nodes(gm):
        assert isinstance(node.target, torch._ops.OpOverload)
        node.target = _on_decoded_tile(node.target)
    gm.recompile()


@functools.cache
def _on_decoded_tile(op: torch._ops.OpOverload) -> Callable[..., Tensor]:
    kernel = KERNELS[op._schema.name.removeprefix("tbn::")]

    def layer(input: Tensor, tile: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if tile.dtype == torch.uint8:
            arguments = op_arguments(op, (input, tile, *args), kwargs)
            tile_size = math.prod(weight_shape(arguments)) // arguments["p"]
            tile = _unpack_op(tile, tile_size, dtype=input.dtype)
        return kernel(input, tile, *args, **kwargs)

    return layer


def translations() -> dict[Any, Callable[..., Any]]:
    """The ``custom_translation_table`` of ``torch.onnx.export``."""
    return {_unpack_op: _unpack}


def _unpack(packed: Any, numel: int, dtype: int) -> Any:
    """``uint8 [ceil(q / 8)] -> [q]``: element ``j`` is bit ``j % 8`` of byte ``j // 8``, 1 for +1 and 0 for -1."""
    import onnx_ir as ir
    from onnxscript import opset18

    op: Any = opset18  # its annotations are narrower than what it takes
    shifts = op.Constant(value=ir.tensor(list(range(8)), ir.DataType.UINT8))
    one = op.Constant(value=ir.tensor([1], ir.DataType.UINT8))
    bytes_as_rows = op.Unsqueeze(packed, op.Constant(value_ints=[1]))
    bits = op.BitwiseAnd(op.BitShift(bytes_as_rows, shifts, direction="RIGHT"), one)
    values = op.Cast(bits, to=dtype)
    two, minus = (op.Constant(value=ir.tensor(number, ir.DataType(dtype))) for number in (2.0, 1.0))
    flat = op.Reshape(op.Sub(op.Mul(values, two), minus), op.Constant(value_ints=[-1]))
    if numel % 8 == 0:
        return flat
    return op.Slice(flat, op.Constant(value_ints=[0]), op.Constant(value_ints=[numel]), op.Constant(value_ints=[0]))
