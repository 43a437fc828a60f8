"""``tbn::conv1d`` and ``tbn::conv2d`` on the CPU by the native kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tbn_compiler.backends.cpu import library, operands, prepare
from tbn_compiler.backends.cpu.declined import decline
from tbn_compiler.backends.cpu.operands import as_vector, expand_replicas, is_scale, is_vector
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import OPERATORS, TensorCall, conv_sizes
from tbn_compiler.ops.formats import apply_epilogue
from tbn_compiler.ops.schemas import CONV_OPS
from tbn_compiler.packing import unpack_bits

_float32, _get_num_threads, _last = torch.float32, torch.get_num_threads, torch.channels_last

MIN_FILTERS = {"avx512amx": 32, "avx512vnni": 32, "avx512": 32, "avx2": 64}
"""Fewest different filters of a group for which looking up beats PyTorch's convolution with these filters, measured on
3x3 kernels of 64 to 512 channels. Tables serve all filters, and with fewer they cost too much; levels that are not
named have none."""

MIN_MIXED_FILTERS = 32
"""The same where copies have Hadamard signs, at each of these levels, for 128 channels and more: PyTorch's convolution
then has a group for each column group."""

MIN_DOT_GROUP = 8
"""Fewest channels and filters of a group for products of bytes, which take 64 bytes and 16 filters at once."""

MIN_FLOAT_FILTERS = 16
"""Fewest different filters of a group for which tables of floats in memory beat PyTorch's convolution with these
filters at each size that was measured, on 3x3 kernels of 64 to 512 channels."""

MAX_LIMB_WEIGHTS = {"avx512vnni": 512}
"""Most weights of an input channel, filters times places in the kernel, for which products of the three bytes of floats
beat lookups, measured on 1x1 and 3x3 kernels of 32 to 1024 filters: tables cost the same for any number of them, and a
look-up less than three products. Levels that are not named have no such limit."""

MAX_LIMB_INPUTS = 2**31 // 255
"""Most inputs of an output for products of the bytes of floats, so that sums of bytes up to 255 fit 32 bits."""

FOLDING = 1.5
"""Least factor by which there are fewer steps of bytes where all rows of a kernel are put into one."""

MIN_CHANNELS = 4
"""Fewest input channels of a group: tables are made of several channels."""

MAX_WIDTH = 16384
"""Widest padded row: all tables of a row are in memory at once."""


def make_conv(d: int) -> Callable[..., Tensor]:
    """The kernel of ``tbn::conv1d`` (``d`` 1) or ``tbn::conv2d`` (2)."""
    op = CONV_OPS[d]
    operator = OPERATORS[op]

    def conv(
        input: Tensor,
        tile: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        p: int,
        input_alpha: Tensor | None = None,
        input_scale: Tensor | None = None,
        *,
        p_in: int = 1,
        shift: int = 0,
        hadamard: bool = False,
        stride: Sequence[int] = (1,) * d,
        padding: Sequence[int] = (0,) * d,
        dilation: Sequence[int] = (1,) * d,
        groups: int = 1,
        activation: str = "float",
        epilogue: str = "none",
    ) -> Tensor:
        # The short way is for operands that the kernels take as they are. It repeats no check that finding a plan, or
        # the sizes of the output, imply.
        use = (  # as find_plan has it
            library.level(), op, in_channels, out_channels, *kernel_size, p, p_in, shift, hadamard, *stride,
            *padding, *dilation, groups, alpha.shape[0] if alpha.dim() == 1 else None, activation, epilogue,
        )  # fmt: skip
        last = _is_last(input, d)
        if (
            p_in == 1
            and input_alpha is None
            and (input_scale is None or (activation != "float" and is_scale(input_scale)))
            and input.dtype is _float32
            and input.dim() == d + 2
            and input.shape[1] == in_channels
            and (last or input.is_contiguous())
            and is_vector(alpha)
            and (bias is None or (is_vector(bias) and bias.shape[0] == out_channels))
        ):
            plan = prepare.find(tile, (*use, last))
            if plan is not None:
                sizes = conv_sizes(input.shape[-d:], kernel_size, stride, padding, dilation)
                if min(sizes) >= 1 and 0 not in input.shape[-d:] and input.shape[-1] + 2 * padding[-1] <= MAX_WIDTH:
                    return _run(op, plan, input, alpha, bias, input_scale, sizes, out_channels, epilogue, last=last)
        call = operator.bind(
            (input, tile, alpha, bias, in_channels, out_channels, kernel_size, p, input_alpha, input_scale),
            {
                "p_in": p_in, "shift": shift, "hadamard": hadamard, "stride": stride, "padding": padding,
                "dilation": dilation, "groups": groups, "activation": activation, "epilogue": epilogue,
            },
        )  # fmt: skip
        return _compute(call.checked())

    conv.__name__ = op
    conv.__doc__ = f"``input [N, C, *{d} sizes]``; see :mod:`tbn_compiler.ops.schemas` for the meaning."
    return conv


def _compute(call: TensorCall) -> Tensor:
    """The long way: convert what the kernels do not take as it is, and prepare the tile if it is not."""
    sizes, image = call.output_sizes(), call.input.shape[-call.dims :]
    reason = operands.reason_against(call) or reason_against_image(call, image) or reason_against_layer(call)
    form = call.output_format()
    if reason is not None:
        decline(call.kind, reason)
        return reference.compute(call).contiguous(memory_format=form)
    x = expand_replicas(call.input.to(_float32), call.input_alpha, call.channel_axis)
    x = call.layout.sum_inputs(x, call.channel_axis)
    last = _is_last(x, call.dims) and multiplies_bytes(call)
    x = x if last else x.contiguous()
    plan = find_plan(call, last=last)
    bias = None if call.bias is None else as_vector(call.bias)
    scale = None if call.input_scale is None else as_vector(call.input_scale)
    out = _run(call.kind, plan, x, as_vector(call.alpha), bias, scale, sizes, call.outputs, call.epilogue, last=last)
    return out.to(call.input.dtype).contiguous(memory_format=form)


def _is_last(input: Tensor, d: int) -> bool:
    """Whether an input is in the ``channels_last`` format, and not contiguous as well."""
    return d == 2 and input.dim() == 4 and not input.is_contiguous() and input.is_contiguous(memory_format=_last)


def multiplies_bytes(call: TensorCall) -> bool:
    """Whether a layer is computed as products of bytes: groups must be worth their blocks of rows and bytes."""
    level, layout, product = library.level(), call.layout, call.product
    channels, places = layout.shape[1] // product.neighbours, math.prod(call.kernel_size)
    if not library.has_dots(level) or (product.groups > 1 and min(channels, product.rows) < MIN_DOT_GROUP):
        return False
    if call.activation != "float":
        return True
    if library.keeps_floats(level):
        return product.rows // product.mixes >= MIN_FLOAT_FILTERS
    if not library.has_limbs(level):
        return False
    if product.groups > 1:
        return False  # groups share no input, but would share the power of two of their sample
    few = product.rows // product.mixes * places <= MAX_LIMB_WEIGHTS.get(level or "", math.inf)
    return channels * places <= MAX_LIMB_INPUTS and (few or _reason_against_lookups(call) is not None)


def reason_against_image(call: TensorCall, image: Sequence[int | None]) -> str | None:
    """Why PyTorch computes a convolution of images of these sizes, of which ``None`` is not known."""
    values = zip(image, *(call.arguments[name] for name in call.operator.sizes), strict=True)
    if any(size is not None and (size == 0 or conv_sizes([size], *([v] for v in of))[0] < 1) for size, *of in values):
        return "the kernel does not fit the input"  # PyTorch raises the error
    if image[-1] is not None and image[-1] + 2 * call.arguments["padding"][-1] > MAX_WIDTH:
        return f"rows wider than {MAX_WIDTH}"
    return None


def reason_against_layer(call: TensorCall) -> str | None:
    """Why PyTorch computes a convolution that the kernels could otherwise take."""
    return None if multiplies_bytes(call) else _reason_against_lookups(call)


def _reason_against_lookups(call: TensorCall) -> str | None:
    if call.layout.shape[1] // call.product.neighbours // call.product.mixes < MIN_CHANNELS:
        return f"fewer than {MIN_CHANNELS} input channels in a group"
    filters = MIN_FILTERS.get(library.level() or "")
    if filters is None:
        return "PyTorch convolves with the different filters faster than this level"
    mixes = call.product.mixes
    if mixes > 1:  # tables serve the filters of one column group only
        filters = MIN_MIXED_FILTERS
    if call.product.rows // mixes < filters:
        return f"fewer than {filters} different filters in a {'column ' if mixes > 1 else ''}group"
    return None


def _run(
    op: str,
    plan: prepare.Plan,
    input: Tensor,
    alpha: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    sizes: Sequence[int],
    out_channels: int,
    epilogue: str,
    *,
    last: bool,
) -> Tensor:
    d = len(sizes)
    shape = (*input.shape[: -d - 1], out_channels, *sizes)
    out = (
        torch.empty(shape, dtype=_float32, device=input.device, memory_format=_last) if last else input.new_empty(shape)
    )
    failed = plan.call(
        plan.address,
        input.data_ptr(),
        out.data_ptr(),
        input.shape[0] if input.dim() == d + 2 else 1,
        input.shape[-2] if d == 2 else 1,
        input.shape[-1],
        alpha.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if scale is None else scale.data_ptr(),
        _get_num_threads(),
    )
    if failed:
        raise MemoryError(f"tbn::{op}: no memory to work in for an input of shape {tuple(input.shape)}")
    return out if epilogue in ("none", "relu") else apply_epilogue(out, epilogue)


def _filters(call: TensorCall) -> Tensor:
    """Signs of the filters to compute in each group and column group, ``[groups, filters, channels, taps]``."""
    layout, product = call.layout, call.product
    signs = unpack_bits(call.tile, layout.tile_size, torch.int8)
    if product.mixes > 1:
        return layout.column_groups(signs).flatten(3)
    filters = layout.unique_weight(signs)[product.computed_rows().reshape(-1)]
    return filters.reshape(product.groups, product.rows, layout.shape[1] // product.neighbours, -1)


def _pack(call: TensorCall, *, integer: bool) -> np.ndarray:
    """Prepare the filters of each group with columns in the order ``[channel group][tap][channel]``."""
    lib, _, kernels = prepare.native()
    size = lib.tbn_group(kernels, integer)
    filters = _filters(call)
    padded = F.pad(filters, (0, 0, 0, -filters.shape[2] % size))
    columns = padded.unflatten(2, (-1, size)).transpose(3, 4).flatten(2).contiguous()
    return prepare.pack(columns, integer=integer)


def _runs(call: TensorCall) -> Tensor:
    """The filters of each group as products of bytes read them: ``[groups, filters, runs, bytes]``."""
    filters = _filters(call)
    filters = F.pad(filters, (0, 0, 0, -filters.shape[2] % 4), value=-1).transpose(2, 3)
    follow = call.arguments["dilation"][-1] == 1  # places in a row of the kernel follow each other
    by_rows: Tensor = filters.unflatten(2, (-1, call.kernel_size[-1]))
    if is_folded(call):
        columns = by_rows.transpose(2, 3).flatten(3)
        return columns.flatten(2).unsqueeze(2) if follow else columns
    return by_rows.flatten(3) if follow else filters


def is_folded(call: TensorCall) -> bool:
    """Whether all rows of the kernel are put into one: with few channels a row would fill little of a step.

    AMX multiplies whole steps; VNNI takes four bytes at a time.
    """
    if library.level() != "avx512amx":
        return False
    *rows, columns = call.kernel_size
    product = call.product
    channels = call.layout.shape[1] // product.neighbours // product.mixes
    run = -(-channels // 4) * 4 * (columns if call.arguments["dilation"][-1] == 1 else 1)
    height = rows[0] if rows else 1
    apart, folded = height * -(-run // prepare.DOT_BYTES), -(-height * run // prepare.DOT_BYTES)
    return apart >= FOLDING * folded


def find_plan(call: TensorCall, *, last: bool) -> prepare.Plan:
    """The plan of a layer whose input has its replicas side by side and its neighbours summed.

    Args:
        call: the layer; its input is not read.
        last: for images with their channels innermost, not in planes.
    """
    values = call.arguments
    use = (
        library.level(), call.kind, call.inputs, call.outputs, *values["kernel_size"], values["p"], values["p_in"],
        values["shift"], values["hadamard"], *values["stride"], *values["padding"], *values["dilation"], call.groups,
        call.alpha.shape[0], call.activation, call.epilogue, last,
    )  # fmt: skip
    return prepare.find_or_make(call.tile, use, lambda entry: _plan(entry, call, last=last))


def _plan(entry: prepare.Prepared, call: TensorCall, *, last: bool) -> prepare.Plan:
    lib, level, kernels = prepare.native()
    layout, product, integer = call.layout, call.product, call.activation != "float"
    key = (level, layout, product.groups, product.rows, product.mixes)
    dots = multiplies_bytes(call)
    memory = []
    if dots:
        runs = (*key, "dots", call.arguments["dilation"][-1] == 1)
        memory = [
            entry.part(runs, lambda: prepare.pack_dots(_runs(call))),
            entry.part((*key, "corrections"), lambda: prepare.dot_corrections(_runs(call), product.mixes)),
        ]
    if not dots or not integer:
        memory.append(entry.part((*key, integer), lambda: _pack(call, integer=integer)))

    def axes(values: Sequence[int], fill: int) -> Any:
        """Height and width; a convolution of one dimension has a height of 1."""
        return (fill, *values)[-2:]

    struct = library.ConvPlan(
        kernels=kernels,
        index=memory[0].ctypes.data,
        groups=product.groups,
        channels=layout.shape[1] // product.neighbours // product.mixes,
        channels_out=product.group_rows,
        rows=product.rows // product.mixes,
        mixes=product.mixes,
        alpha_rows=product.rows_per_alpha,
        kernel=axes(call.kernel_size, 1),
        stride=axes(call.arguments["stride"], 1),
        padding=axes(call.arguments["padding"], 0),
        dilation=axes(call.arguments["dilation"], 1),
        activation=prepare.ACTIVATIONS[call.activation],
        relu=call.epilogue == "relu",
        corrections=memory[1].ctypes.data if dots else None,
        channels_last=last,
        folded=dots and is_folded(call),
    )
    if dots and not integer:
        lookups = library.ConvPlan.from_buffer_copy(struct)
        lookups.index = memory[2].ctypes.data
        struct.lookups = ctypes.addressof(lookups)
        struct.looked_up = lookups  # what it points to
    return prepare.Plan(lib.tbn_conv_dots if dots else lib.tbn_conv, struct, memory)
