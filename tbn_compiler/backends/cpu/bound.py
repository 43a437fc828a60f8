"""Layers bound to their operands: operators that PyTorch's dispatcher calls in C, without Python.

``tbn_cpu::linear`` and ``tbn_cpu::conv`` take an input and a *plan*, a tensor of bytes (``struct tbn_bound``) that
points to everything else: the prepared tile, alphas, bias, geometry. They compute what ``tbn::linear`` and
``tbn::conv1d`` and ``2d`` compute, by the same kernels. A graph can use them where it
knows the operands (:mod:`tbn_compiler.backends.cpu.bind_layers`); they have no gradients.

The kernels are registered through C functions that libtorch exports (``src/torch_calls.c``). Where one is missing,
:func:`unavailable` gives the reason, and the ``tbn::`` operators stay.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tbn_compiler.backends.cpu import conv, library, linear, prepare
from tbn_compiler.backends.cpu.operands import as_vector, reason_against
from tbn_compiler.ops.calls import TensorCall, channels_last, conv_sizes
from tbn_compiler.ops.schemas import CONV_OPS
from tbn_compiler.torch_private import exported_functions

# Sizes stand one by one, height first: the C interface passes numbers at the least cost. Only fakes read them.
_SIZES = ("kernel", "stride", "padding", "dilation")
_ARGUMENTS = ", ".join(f"int {name}_{axis}" for name in _SIZES for axis in ("height", "width"))

_LIBRARY = torch.library.Library("tbn_cpu", "DEF")
_LIBRARY.define("linear(Tensor input, Tensor plan, int out_features) -> Tensor")
_LIBRARY.define(f"conv(Tensor input, Tensor plan, int out_channels, int dims, {_ARGUMENTS}) -> Tensor")

# A copy in memory of its own, which Inductor does not make part of another loop (backends/dynamo/dense_norms.py).
_LIBRARY.define("dense(Tensor input) -> Tensor")


def define(schema: str) -> None:
    """Define another operator whose kernel is in the library."""
    _LIBRARY.define(schema)


def define_fake(name: str, function: Callable[..., Tensor]) -> None:
    """Say what an operator gives where nothing is computed."""
    torch.library.register_fake(f"tbn_cpu::{name}", function, lib=_LIBRARY)


_FUNCTIONS = {
    "library_init_impl": "aoti_torch_library_init_impl",
    "library_impl": "aoti_torch_library_impl",
    "check": "aoti_torch_check",
    "get_num_threads": "torch_get_num_threads",
    "get_data_ptr": "aoti_torch_get_data_ptr",
    "get_dim": "aoti_torch_get_dim",
    "get_numel": "aoti_torch_get_numel",
    "get_sizes": "aoti_torch_get_sizes",
    "get_strides": "aoti_torch_get_strides",
    "get_dtype": "aoti_torch_get_dtype",
    "is_contiguous": "aoti_torch_is_contiguous",
    "empty_strided": "aoti_torch_empty_strided",
    "copy": "aoti_torch_copy_",
    "delete_tensor": "aoti_torch_delete_tensor_object",
}
"""Fields of ``struct tbn_torch``, in their order, and what libtorch calls them."""


class _Torch(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in _FUNCTIONS)


def unavailable() -> str | None:
    """Why the operators cannot be used, or ``None``; registers their kernels."""
    with _lock:
        return _registered()


_lock = threading.Lock()


@functools.cache
def _registered() -> str | None:
    lib, reason = library.load()
    if lib is None:
        return reason
    found = exported_functions(_FUNCTIONS.values())
    missing = [name for name, address in found.items() if address is None]
    if missing:
        return f"torch {torch.__version__} does not export {missing[0]}"
    functions = _Torch(*(found[name] for name in _FUNCTIONS.values()))
    if lib.tbn_register(ctypes.addressof(functions)):
        return f"torch {torch.__version__} does not take kernels in C"
    return None


def why_not(call: TensorCall, image: Sequence[int | None]) -> str | None:
    """Why a layer stays with its ``tbn::`` operator, or ``None``.

    Args:
        call: of its input only the dtype is read.
        image: spatial sizes of the input of a convolution, ``None`` where they are not known.
    """
    if call.kind not in ("linear", *(CONV_OPS[d] for d in (1, 2))):
        return "no native kernel computes it"
    reason = unavailable() or _misfit(call) or reason_against(call)
    if reason is None and call.dims:
        reason = conv.reason_against_image(call, image) or conv.reason_against_layer(call)
    return reason


def _misfit(call: TensorCall) -> str | None:
    """What is wrong with the stored operands: the operator raises it as an error."""
    try:
        call.check_operands()
    except (TypeError, ValueError) as error:
        return str(error)
    if not all(value.is_cpu for value in (call.tile, call.alpha, call.bias, call.input_scale) if value is not None):
        return "its operands are on different devices"
    return None


def bind(call: TensorCall, tokens: int | None = None) -> library.BoundLayer:
    """The plan of a layer.

    It has the values that the operands have now. The input that it is used with is that of the call in float32, with
    its replicas side by side and its neighbours summed.

    Args:
        call: a call that :func:`why_not` gives no reason against; its input is not read.
        tokens: how many a linear layer will get; ``None`` if that is not known.
    """
    if call.dims:
        forms = _conv_forms(call)
        alpha = as_vector(call.alpha).detach().clone()  # of its own: a parameter's memory goes when its dtype changes
    else:
        alpha = as_vector(linear.kernel_alphas(call)).detach().clone()
        forms = _linear_forms(call, alpha, tokens)
    bias, scale = (
        None if value is None else as_vector(value).detach().clone() for value in (call.bias, call.input_scale)
    )
    bound = library.BoundLayer(
        forms=(library.Form * 2)(*(library.Form(*_form(plan)) for plan in forms)),
        alpha=alpha.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        scale=None if scale is None else scale.data_ptr(),
        inputs=call.inputs // call.product.neighbours,
        outputs=call.outputs,
        dims=call.dims,
    )
    bound.self = ctypes.addressof(bound)
    bound.operands = (forms, alpha, bias, scale)  # what it points to
    return bound


PlanForm = Callable[["library.BoundLayer | library.Network"], Tensor]
"""What makes the tensor of a plan that the operators get."""


def as_tensor(plan: library.BoundLayer | library.Network) -> Tensor:
    """A plan as the operators take it in this process, ``uint8``; it keeps alive what it points to."""
    return torch.frombuffer(plan, dtype=torch.uint8)


def _form(plan: prepare.Plan | None) -> tuple[Any, Any]:
    return (None, None) if plan is None else (plan.address, plan.function)


def _linear_forms(call: TensorCall, alpha: Tensor, tokens: int | None) -> list[prepare.Plan | None]:
    """Plans for few and for many tokens: one for both if their number is known."""
    if tokens is not None:
        return [linear.find_plan(call, alpha, many=tokens >= linear.MIN_BATCH)] * 2
    return [linear.find_plan(call, alpha, many=many) for many in (False, True)]


def _conv_forms(call: TensorCall) -> list[prepare.Plan | None]:
    """Plans for images in planes and with channels innermost; the second only where kernels read them so."""
    return [
        conv.find_plan(call, last=False),
        conv.find_plan(call, last=True) if call.dims == 2 and conv.multiplies_bytes(call) else None,
    ]


def sizes(call: TensorCall) -> tuple[int, ...]:
    """The operators' arguments behind the plan."""
    if not call.dims:
        return (call.outputs,)
    pairs = ((0, *call.arguments[name])[-2:] if name == "padding" else (1, *call.arguments[name])[-2:]
             for name in ("kernel_size", *_SIZES[1:]))  # fmt: skip
    return (call.outputs, call.dims, *(int(size) for pair in pairs for size in pair))


def operator(call: TensorCall) -> Callable[..., Tensor]:
    """The operator that a call becomes."""
    found: Callable[..., Tensor] = (torch.ops.tbn_cpu.conv if call.dims else torch.ops.tbn_cpu.linear).default
    return found


def _linear(input: Tensor, plan: Tensor, out_features: int) -> Tensor:
    return input.new_empty((*input.shape[:-1], out_features))


def _conv(input: Tensor, plan: Tensor, out_channels: int, dims: int, *values: int) -> Tensor:
    pairs: Sequence[Sequence[int]] = [values[start : start + 2][-dims:] for start in range(0, len(values), 2)]
    image = conv_sizes(input.shape[-dims:], *pairs)
    shape = (*input.shape[: input.dim() - dims - 1], out_channels, *image)
    form = channels_last(dims)
    apart = input.dim() == dims + 2 and not input.is_contiguous()
    if form is not None and apart and input.is_contiguous(memory_format=form):
        return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=form)
    return input.new_empty(shape)


def _dense(input: Tensor) -> Tensor:
    return torch.empty(input.shape, dtype=input.dtype, device=input.device)


define_fake("dense", _dense)
define_fake("linear", _linear)
define_fake("conv", _conv)
