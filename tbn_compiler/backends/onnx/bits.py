"""Tiled layers in standard ONNX operators, decoded from packed bits in the graph.

Each ``tbn::`` layer becomes ``tbn::unpack_bits`` and the reference kernel on its result, which multiplies the unique
rows only and replicates the results with the alphas; ``tbn::unpack_bits`` becomes shift, and, cast, ``2b - 1``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from tbn_compiler.graph.calls import InferenceCall, attribute, named_arguments, tiled_call
from tbn_compiler.ops.calls import Operator, TensorCall, make_kernel
from tbn_compiler.ops.reference import compute
from tbn_compiler.ops.schemas import make_layout

_unpack_op = torch.ops.tbn.unpack_bits.default


def tiled_calls(gm: fx.GraphModule) -> Iterator[InferenceCall]:
    """The calls of inference operators in a graph, each with the arguments that its node has when it is reached."""
    for node in list(gm.graph.nodes):
        call = tiled_call(node)
        if call is not None:
            yield call


def unpack_calls(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str, dict[str, Any]]]:
    """The calls of ``tbn::unpack`` on stored tiles in a graph: node, name of the weight, arguments by name."""
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.tbn.unpack.default):
        arguments = named_arguments(node)
        if all(attribute(gm, arguments[name]) is not None for name in ("tile", "alpha")):
            yield node, str(arguments["tile"].target).removesuffix("_tile"), arguments


def use_bits(gm: fx.GraphModule) -> None:
    """Let the tiled layers of a graph decode their tile and then run the reference kernel, in place."""
    for call in tiled_calls(gm):
        call.node.target = _on_decoded_tile(call.operator)
    gm.recompile()


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The decompositions of operators that have no translation: weights that code reads are decoded in the graph."""
    return {torch.ops.tbn.unpack.default: _decoded}


def _decoded(
    tile: Tensor,
    alpha: Tensor,
    shape: Sequence[int],
    p: int,
    *,
    p_in: int = 1,
    shift: int = 0,
    batch: int = 1,
    hadamard: bool = False,
) -> Tensor:
    """``tbn::unpack`` on bits that are decoded in the graph."""
    layout = make_layout(shape, p, p_in, shift, batch, hadamard)
    if tile.dtype == torch.uint8:
        tile = _unpack_op(tile, layout.tile_size, dtype=alpha.dtype)
    return layout.scale(layout.replicate(tile), alpha)


@functools.cache
def _on_decoded_tile(operator: Operator) -> Callable[..., Tensor]:
    def layer(call: TensorCall) -> Tensor:
        if call.tile.dtype == torch.uint8:
            call = call.replaced(tile=_unpack_op(call.tile, call.layout.tile_size, dtype=call.input.dtype))
        return compute(call)

    return make_kernel(operator, layer)


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
