"""``tbn::linear`` on the CPU by the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from tbn_compiler.backends.cpu import library, prepare
from tbn_compiler.backends.cpu.declined import decline
from tbn_compiler.backends.cpu.operands import as_vector, expand_replicas, is_vector, reason_against
from tbn_compiler.ops import reference
from tbn_compiler.ops.formats import apply_epilogue
from tbn_compiler.ops.schemas import check_formats, check_tile_operands, linear_layout
from tbn_compiler.packing import unpack_bits
from tbn_compiler.tiling import TileLayout

_float32, _get_num_threads = torch.float32, torch.get_num_threads

BATCH = 16
"""Tokens that the batch kernel takes at once (``TBN_BATCH``); its form of the tile is made when it is first needed."""

MIN_BATCH = 12
"""Fewest tokens for which it is used (``MIN_SUMS_TOKENS``)."""


def linear(
    input: Tensor,
    tile: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    p: int,
    input_alpha: Tensor | None = None,
    *,
    p_in: int = 1,
    shift: int = 0,
    activation: str = "float",
    epilogue: str = "none",
) -> Tensor:
    """``input [..., n] -> [..., m]``; see :func:`tbn_compiler.ops.reference.linear` for the meaning."""
    # The short way is for operands that the kernels take as they are. It repeats no check that finding a plan implies.
    if (
        p_in == 1
        and input_alpha is None
        and input.dtype is _float32
        and input.dim() > 0
        and input.shape[-1] == in_features > 0
        and input.is_contiguous()
        and is_vector(alpha)
        and (bias is None or (is_vector(bias) and bias.shape[0] == out_features))
    ):
        tokens = input.numel() // in_features
        use = (
            library.level(), "linear", in_features, out_features, p, 1, shift, alpha.shape[0], activation, epilogue,
            tokens >= MIN_BATCH,
        )  # fmt: skip
        plan = prepare.find(tile, use)
        if plan is not None:
            return _run(plan, input, alpha, bias, tokens, out_features, epilogue)
    return _checked(
        input, tile, alpha, bias, in_features, out_features, p, input_alpha, p_in, shift, activation, epilogue
    )


def _run(
    plan: prepare.Plan,
    input: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
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
        _get_num_threads(),
    )
    if failed:
        raise MemoryError(f"tbn::linear: no memory to work in for an input of shape {tuple(input.shape)}")
    return out if epilogue in ("none", "relu") else apply_epilogue(out, epilogue)


def _checked(
    input: Tensor,
    tile: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    in_features: int,
    out_features: int,
    p: int,
    input_alpha: Tensor | None,
    p_in: int,
    shift: int,
    activation: str,
    epilogue: str,
) -> Tensor:
    layout = linear_layout(input, in_features, out_features, p, input_alpha, p_in, shift)
    check_formats("linear", activation, epilogue)
    check_tile_operands("linear", input, tile, alpha, bias, layout)
    reason = reason_against(input, tile, layout, alpha.numel(), activation, input_alpha)
    if reason is not None:
        decline("linear", reason)
        return reference.linear(
            input, tile, alpha, bias, in_features, out_features, p, input_alpha,
            p_in=p_in, shift=shift, activation=activation, epilogue=epilogue,
        )  # fmt: skip
    x = layout.sum_inputs(expand_replicas(input.to(_float32), input_alpha, -1), -1).contiguous()
    copies = layout.rows // layout.unique_rows
    if alpha.numel() not in (1, copies, layout.rows):
        alpha = layout.row_alphas(alpha)
    alpha, bias = as_vector(alpha), None if bias is None else as_vector(bias)
    tokens = x.numel() // x.shape[-1]
    batch = tokens >= MIN_BATCH
    use = (
        library.level(), "linear", in_features, out_features, p, p_in, shift, alpha.shape[0], activation, epilogue, batch,
    )  # fmt: skip
    plan = prepare.find_or_make(
        tile, use, lambda entry: _plan(entry, tile, layout, alpha.shape[0], activation, epilogue, batch)
    )
    return _run(plan, x, alpha, bias, tokens, out_features, epilogue).to(input.dtype)


def _plan(
    entry: prepare.Prepared,
    tile: Tensor,
    layout: TileLayout,
    num_alphas: int,
    activation: str,
    epilogue: str,
    batch: bool,
) -> prepare.Plan:
    lib, level, kernels = prepare.native()
    rows, columns = layout.unique_rows, layout.row_size // layout.p_in
    integer = activation != "float"

    def signs() -> Tensor:
        unpacked = unpack_bits(tile, layout.tile_size, torch.int8)
        return layout.unique_weight(unpacked).contiguous()

    memory = [entry.part((level, layout, integer), lambda: prepare.pack(signs(), integer=integer))]
    if batch and not integer:
        memory.append(entry.part(("sums", layout), lambda: prepare.pack_sums(signs())))
    struct = library.LinearPlan(
        kernels=kernels,
        index=memory[0].ctypes.data,
        sums_index=memory[1].ctypes.data if len(memory) > 1 else None,
        inputs=columns,
        rows=rows,
        copies=layout.rows // rows,
        alpha_copy_stride=0 if num_alphas == 1 else (rows if num_alphas == layout.rows else 1),
        alpha_row_stride=int(num_alphas == layout.rows),
        activation=prepare.ACTIVATIONS[activation],
        relu=epilogue == "relu",
    )
    return prepare.Plan(lib.tbn_linear, struct, memory)
