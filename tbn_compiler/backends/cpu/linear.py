"""``tbn::linear`` on the CPU by the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tbn_compiler.backends.cpu import library, prepare
from tbn_compiler.backends.cpu.declined import decline
from tbn_compiler.backends.cpu.operands import as_vector, expand_replicas, is_scale, is_vector, reason_against
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import OPERATORS, TensorCall
from tbn_compiler.ops.formats import apply_epilogue
from tbn_compiler.packing import unpack_bits
from tbn_compiler.tiling import TiledProduct

_float32, _get_num_threads = torch.float32, torch.get_num_threads

BATCH = 16
"""Tokens that the batch kernel takes at once (``TBN_BATCH``); its form of the tile is made when it is first needed."""

MIN_BATCH = 12
"""Fewest tokens for which it is used (``TBN_MIN_BATCH``)."""


def linear(
    input: Tensor,
    tile: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    p: int,
    input_alpha: Tensor | None = None,
    input_scale: Tensor | None = None,
    *,
    p_in: int = 1,
    shift: int = 0,
    hadamard: bool = False,
    activation: str = "float",
    epilogue: str = "none",
) -> Tensor:
    """``input [..., n] -> [..., m]``; see :mod:`tbn_compiler.ops.schemas` for the meaning."""
    # The short way is for operands that the kernels take as they are. It repeats no check that finding a plan implies.
    if (
        p_in == 1
        and input_alpha is None
        and (input_scale is None or (activation != "float" and is_scale(input_scale)))
        and input.dtype is _float32
        and input.dim() > 0
        and input.shape[-1] == in_features > 0
        and input.is_contiguous()
        and is_vector(alpha)
        and (bias is None or (is_vector(bias) and bias.shape[0] == out_features))
    ):
        tokens = input.numel() // in_features
        use = (
            library.level(), "linear", in_features, out_features, p, 1, shift, hadamard, alpha.shape[0],
            activation, epilogue, tokens >= MIN_BATCH,
        )  # fmt: skip
        plan = prepare.find(tile, use)
        if plan is not None:
            return _run(plan, input, alpha, bias, input_scale, tokens, out_features, epilogue)
    call = OPERATORS["linear"].bind(
        (input, tile, alpha, bias, in_features, out_features, p, input_alpha, input_scale),
        {"p_in": p_in, "shift": shift, "hadamard": hadamard, "activation": activation, "epilogue": epilogue},
    )
    return _compute(call.checked())


def _run(
    plan: prepare.Plan,
    input: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    tokens: int,
    out_features: int,
    epilogue: str,
) -> Tensor:
    out = input.new_empty((*input.shape[:-1], out_features))
    failed = plan.call(
        plan.address,
        input.data_ptr(),
        out.data_ptr(),
        tokens,
        alpha.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if scale is None else scale.data_ptr(),
        _get_num_threads(),
    )
    if failed:
        raise MemoryError(f"tbn::linear: no memory to work in for an input of shape {tuple(input.shape)}")
    return out if epilogue in ("none", "relu") else apply_epilogue(out, epilogue)


def _compute(call: TensorCall) -> Tensor:
    """The long way: convert what the kernels do not take as it is, and prepare the tile if it is not."""
    reason = reason_against(call)
    if reason is not None:
        decline("linear", reason)
        return reference.compute(call)
    layout, input_alpha = call.layout, call.input_alpha
    x = layout.sum_inputs(expand_replicas(call.input.to(_float32), input_alpha, -1), -1).contiguous()
    alpha = kernel_alphas(call)
    tokens = x.numel() // x.shape[-1]
    plan = find_plan(call, alpha, many=tokens >= MIN_BATCH)
    bias = None if call.bias is None else as_vector(call.bias)
    scale = None if call.input_scale is None else as_vector(call.input_scale)
    return _run(plan, x, as_vector(alpha), bias, scale, tokens, call.outputs, call.epilogue).to(call.input.dtype)


def kernel_alphas(call: TensorCall) -> Tensor:
    """The alphas as the kernels read them: one a layer, a copy of whole rows, or a row."""
    layout = call.layout
    if call.product.alphas == "copy" and not call.product.alpha_per_repeat and not layout.hadamard:
        return layout.row_alphas(call.alpha)
    return call.alpha


def find_plan(call: TensorCall, alpha: Tensor, *, many: bool) -> prepare.Plan:
    """The plan of a layer for few or many tokens, whose input has its replicas side by side and its neighbours summed.

    Args:
        call: the layer; its input is not read.
        alpha: from :func:`kernel_alphas`.
        many: for :data:`MIN_BATCH` tokens and more.
    """
    layout = call.layout
    use = (
        library.level(), "linear", call.inputs, call.outputs, layout.p, layout.p_in, layout.shift,
        layout.hadamard, alpha.shape[0], call.activation, call.epilogue, many,
    )  # fmt: skip
    product = TiledProduct(layout, alpha.shape[0])
    return prepare.find_or_make(call.tile, use, lambda entry: _plan(entry, call, product, many))


def _plan(entry: prepare.Prepared, call: TensorCall, product: TiledProduct, batch: bool) -> prepare.Plan:
    lib, level, kernels = prepare.native()
    layout, mixes, integer = product.layout, product.mixes, call.activation != "float"
    dots = batch and integer and library.has_dots(level)

    def signs() -> Tensor:
        unpacked = unpack_bits(call.tile, layout.tile_size, torch.int8)
        if mixes > 1:
            return layout.column_groups(unpacked).contiguous()
        return layout.unique_weight(unpacked).contiguous()

    def runs() -> Tensor:
        rows = signs().view(mixes, product.rows // mixes, 1, product.columns // mixes)
        return F.pad(rows, (0, -rows.shape[3] % prepare.DOT_BYTES), value=-1)

    if dots:
        memory = [
            entry.part((level, "dots", layout), lambda: prepare.pack_dots(runs())),
            entry.part((level, "corrections", layout), lambda: prepare.dot_corrections(runs(), mixes)),
        ]
    else:
        memory = [entry.part((level, layout, integer), lambda: prepare.pack(signs(), integer=integer))]
        if batch and not integer:
            memory.append(entry.part(("sums", layout), lambda: prepare.pack_sums(signs())))
    # Alphas behind each other, by copy and by row; those of a layer do not move.
    rows, copies = (product.rows // mixes, mixes) if mixes > 1 else (product.rows, product.repeats)
    by_copy, by_row = {"layer": (0, 0), "copy": (1, 0), "row": (rows, 1)}[product.alphas]
    second = memory[1].ctypes.data if len(memory) > 1 else None
    struct = library.LinearPlan(
        kernels=kernels,
        index=memory[0].ctypes.data,
        sums_index=None if dots else second,
        inputs=product.columns,
        rows=rows,
        copies=copies,
        mixes=mixes,
        alpha_copy_stride=by_copy,
        alpha_row_stride=by_row,
        activation=prepare.ACTIVATIONS[call.activation],
        relu=call.epilogue == "relu",
        corrections=second if dots else None,
    )
    return prepare.Plan(lib.tbn_linear_dots if dots else lib.tbn_linear, struct, memory)
