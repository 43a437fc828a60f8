"""The two weight forms that need the values of the weights: ``"nbits"`` and ``"dense"``, as rewrites of a graph.

``"nbits"``: the unique rows of a linear layer as ``com.microsoft::MatMulNBits``, 2 or 4 bits an element. Elements are
stored as ``zero point + element`` with the operator's usual zero point ``2 ** (bits - 1)`` and scale 1, so they are
+1 and -1 exactly. ``"dense"``: the whole weight of each layer as an array of floats.

What the rewrites leave alone keeps its ``tbn::`` operator, which :mod:`bits` decodes in the graph.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from tbn_compiler.backends.onnx.bits import tiled_calls, unpack_calls
from tbn_compiler.errors import ExportError
from tbn_compiler.graph.calls import InferenceCall, attribute
from tbn_compiler.graph.records import alpha_key, join_key, split_key, tile_key
from tbn_compiler.graph.tiled_parameters import read_forms, read_tiled
from tbn_compiler.ops.formats import apply_epilogue, in_format
from tbn_compiler.ops.reference import decode, dense_weight, fold_replicas, replicate_features
from tbn_compiler.ops.schemas import make_layout

# ONNX Runtime has fast kernels for these only; of others it decodes the whole weight at every call.
_BLOCK_SIZES = (128, 64, 32)


def tile_name(call: InferenceCall) -> str:
    """Name of the weight behind a call of an inference operator."""
    tile = call.arguments["tile"]
    return str(tile.target if isinstance(tile, fx.Node) and tile.op == "get_attr" else tile).removesuffix("_tile")


# nbits


def use_nbits(gm: fx.GraphModule, bits: int, accuracy_level: int) -> dict[str, str]:
    """Turn the linear layers of a graph into ``MatMulNBits``, in place.

    Returns:
        For each layer that keeps its packed bits, by the name of its weight, why.
    """
    reasons: dict[str, str] = {}
    for call in tiled_calls(gm):
        reason = _why_not_nbits(gm, call)
        if reason is not None:
            reasons[tile_name(call)] = reason
        else:
            _to_nbits(gm, call, bits, accuracy_level)
    gm.recompile()
    return reasons


def _why_not_nbits(gm: fx.GraphModule, call: InferenceCall) -> str | None:
    """Why a layer is no product with rows of +1 and -1; ``None`` if it is."""
    if call.dims:
        return "convolutions take decoded filters"
    if call.activation != "float":
        return f"its input is in the format {call.activation!r}"
    if not call.is_stored(gm):
        return "the graph computes its tile or its alphas"
    tile = call.tensor(gm, "tile")
    assert tile is not None
    if tile.dtype != torch.uint8:
        return "its tile is in full precision"
    if not call.product(gm).scales_results:
        return "its alphas change inside a row"
    if call.layout.kind == "hadamard":
        return "its copies have Hadamard signs: whole rows would take p times the bytes and the arithmetic"
    return None


def _to_nbits(gm: fx.GraphModule, call: InferenceCall, bits: int, accuracy_level: int) -> None:
    layout, arguments, name = call.layout, call.arguments, tile_name(call)
    tile, alpha, input_alpha = (call.tensor(gm, key) for key in ("tile", "alpha", "input_alpha"))
    assert tile is not None
    assert alpha is not None
    rows = layout.unique_weight(decode(tile, layout, torch.float32))
    step = 1.0
    folded = None if input_alpha is None else _folded(rows, input_alpha, bits)
    if folded is not None:
        rows, step = folded
    repeats = call.product(gm).repeats
    scales = torch.full((len(rows), 1), step)
    if repeats == 1:  # one result for each row: the scales take the alphas
        scales = scales * layout.row_alphas(alpha.detach().cpu().float())[:, None]
    block_size = _block_size(rows.shape[1], bits)
    packed = pack_nbits(rows.detach().cpu(), bits, block_size)
    options = {
        "repeats": repeats,
        "neighbours": layout.p_in,
        "bits": bits,
        "block_size": block_size,
        "accuracy_level": accuracy_level,
        "epilogue": arguments["epilogue"],
    }
    with gm.graph.inserting_before(call.node):
        operands = (
            arguments["input"],
            _stored(gm, f"{name}_{bits}bit", packed),
            _stored(gm, f"{name}_{bits}bit_scales", scales.repeat(1, packed.shape[1])),
            arguments["alpha"] if repeats > 1 else None,
            arguments["bias"],
            arguments["input_alpha"] if folded is None else None,
        )
        _replace(call.node, gm.graph.call_function(nbits_linear, operands, options))


def _folded(rows: Tensor, input_alpha: Tensor, bits: int) -> tuple[Tensor, float] | None:
    """The sum of the column blocks, for equal copies of the input, as ``(integers, step)``; ``None`` if too large.

    A sum of ``k`` signs has the parity of ``k``: even ones are stored as halves.
    """
    copies = input_alpha.numel()
    factor = float(input_alpha[0])
    if not bool((input_alpha == factor).all()) or rows.shape[1] % copies:
        return None
    sums = fold_replicas(rows, torch.ones_like(input_alpha))
    parity = 1 if copies % 2 else 2
    integers = sums / parity
    limit = 2 ** (bits - 1)
    if float(integers.min()) < -limit or float(integers.max()) > limit - 1:
        return None
    return integers, factor * parity


def _block_size(columns: int, bits: int) -> int:
    """The block size that stores a row in the fewest bytes, padding and scales included; the largest of equal ones."""
    return min(_BLOCK_SIZES, key=lambda size: -(-columns // size) * (size * bits // 8 + 4))


def pack_nbits(rows: Tensor, bits: int, block_size: int) -> Tensor:
    """Pack small integers as ``MatMulNBits`` reads them.

    Args:
        rows: integers ``[N, K]`` in any dtype, from ``-2 ** (bits - 1)`` to ``2 ** (bits - 1) - 1``.
        bits: bits of an element; divides 8.
        block_size: elements that share a scale.

    Returns:
        ``uint8 [N, ceil(K / block_size), block_size * bits / 8]``, first element in the lowest bits; padding is zero.
    """
    values = (rows + 2 ** (bits - 1)).to(torch.uint8)
    pad = 2 ** (bits - 1)  # the zero point
    values = F.pad(values, (0, -values.shape[1] % block_size), value=pad)
    values = values.reshape(len(values), -1, block_size * bits // 8, 8 // bits)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return (values << shifts).sum(-1, dtype=torch.uint8)


def nbits_linear(
    input: Tensor,
    weight: Tensor,
    scales: Tensor,
    alpha: Tensor | None,
    bias: Tensor | None,
    input_alpha: Tensor | None,
    *,
    repeats: int,
    neighbours: int,
    bits: int,
    block_size: int,
    accuracy_level: int,
    epilogue: str,
) -> Tensor:
    """A tiled linear layer around ``MatMulNBits``; only to be traced for ONNX, it computes nothing.

    Args:
        input: ``[..., n]``, or ``[..., n / k]`` with ``input_alpha``.
        weight: unique rows as :func:`pack_nbits` packs them.
        scales: ``[R, blocks]``.
        alpha: alphas of the layer; ``None`` if the scales hold them.
        bias: ``[m]`` or ``None``.
        input_alpha: factors ``[k]`` of the copies that the input stands for, or ``None``.
        repeats: ``m / R``.
        neighbours: inputs side by side that share a weight.
        bits: bits of a stored element.
        block_size: elements that share a scale.
        accuracy_level: of the operator: 0 computes in float32, 4 rounds the input to int8.
        epilogue: function behind the layer.
    """
    if input_alpha is not None:
        input = (input.unsqueeze(-2) * input_alpha[:, None]).flatten(-2)
    if neighbours > 1:
        input = input.unflatten(-1, (-1, neighbours)).sum(-1)
    out = torch.onnx.ops.symbolic(
        "com.microsoft::MatMulNBits",
        (input, weight, scales),
        {
            "K": input.shape[-1],
            "N": weight.shape[0],
            "bits": bits,
            "block_size": block_size,
            "accuracy_level": accuracy_level,
        },
        dtype=input.dtype,
        shape=(*input.shape[:-1], weight.shape[0]),
        version=1,
    )
    if alpha is not None:
        out = replicate_features(out, alpha, repeats)
    return apply_epilogue(out if bias is None else out + bias, epilogue)


# dense


def use_dense(gm: fx.GraphModule) -> None:
    """Turn the tiled layers of a graph into ordinary ones on float weights, and store what is decoded, in place.

    Raises:
        ExportError: the graph computes a layer's tile or alphas.
    """
    for call in tiled_calls(gm):
        name = tile_name(call)
        if not call.is_stored(gm):
            raise ExportError(f"layer {name!r}: the graph computes its tile or its alphas; export weights='bits'")
        tile, alpha, input_alpha = (call.tensor(gm, key) for key in ("tile", "alpha", "input_alpha"))
        assert tile is not None
        assert alpha is not None
        weight = dense_weight(tile, alpha, call.layout, torch.float32)
        if input_alpha is not None:
            weight = fold_replicas(weight, input_alpha)
        with gm.graph.inserting_before(call.node):
            stored = _stored(gm, f"{name}_dense", weight.detach())
            operands = (call.arguments["input"], stored, call.arguments["bias"], call.kind, call.geometry)
            options: dict[str, Any] = {"activation": call.activation, "epilogue": call.epilogue}
            if call.arguments.get("input_scale") is not None:
                options["input_scale"] = call.arguments["input_scale"]
            _replace(call.node, gm.graph.call_function(dense_layer, operands, options))
    for node, name, arguments in unpack_calls(gm):
        tile, alpha = (attribute(gm, arguments[key]) for key in ("tile", "alpha"))
        assert tile is not None
        assert alpha is not None
        layout = make_layout(*(arguments[key] for key in ("shape", "p", "p_in", "shift", "batch", "hadamard")))
        with gm.graph.inserting_before(node):
            weight = dense_weight(tile, alpha, layout, torch.float32)
            _replace(node, _stored(gm, f"{name}_decoded", weight.detach()))
    gm.recompile()


def store_dense_parameters(module: nn.Module) -> None:
    """Put float weights in place of the parameters that code outside of graphs reads decoded, in place."""
    for owner in module.modules():
        found = [form.record for form in read_forms(owner)]
        weights = {record.parameter: getattr(owner, record.parameter).detach() for record in found}
        read_tiled(owner, ())
        for record in found:
            owner.register_parameter(record.parameter, nn.Parameter(weights[record.parameter]))
            for key in (tile_key(record.weight), alpha_key(record.weight)):
                del owner._buffers[key]


def dense_layer(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kind: str,
    geometry: list[Any],
    *,
    activation: str = "float",
    input_scale: Tensor | None = None,
    epilogue: str = "none",
) -> Tensor:
    """A linear layer or convolution on a float weight; ``geometry`` holds the function's arguments after ``bias``."""
    out = in_format(
        lambda input, bias: getattr(F, kind)(input, weight, bias, *geometry),
        input,
        bias,
        activation,
        token_dims=tuple(range(1 - weight.dim(), 0)) if geometry else (-1,),
        terms=weight[0].numel(),
        input_scale=input_scale,
    )
    return apply_epilogue(out, epilogue)


# Both


def _stored(gm: fx.GraphModule, key: str, value: Tensor) -> fx.Node:
    """A node that reads ``value`` from a buffer; calls of one layer share it if they need the same values."""
    path, name = split_key(key)
    owner = gm.get_submodule(path)
    candidates = [name, *(f"{name}_{count}" for count in range(1, len(owner._buffers) + 1))]
    for candidate in candidates:
        present = owner._buffers.get(candidate)
        if present is None:
            owner.register_buffer(candidate, value)
        elif present.shape != value.shape or not torch.equal(present, value):
            continue
        return gm.graph.get_attr(join_key(path, candidate))
    raise AssertionError(f"no free name for {key}")


def _replace(node: fx.Node, new: fx.Node) -> None:
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
