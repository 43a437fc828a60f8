"""What is prepared of an operator's calls, once for all that have the same form.

Plan, candidates and choice of a call depend on shapes, strides, alignments and options alone. :func:`prepared` keeps
what was made of them for further calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tbn_compiler.backends.triton import decline
from tbn_compiler.backends.triton.plan import UnsupportedError
from tbn_compiler.ops import reference
from tbn_compiler.ops.calls import Operator, TensorCall, with_signature

KEPT_LAYERS = 4096

# What is prepared of a call, given the tensors of another one like it in this order.
Prepared = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], Tensor]
_TENSORS = ("input", "tile", "alpha", "bias", "input_alpha", "input_scale")


_prepared: list[dict[Any, Prepared | str]] = []


def forget() -> None:
    """Drop what was prepared of all calls."""
    for known in _prepared:
        known.clear()


def prepared(operator: Operator, prepare: Callable[[TensorCall], Prepared]) -> Callable[..., Tensor]:
    """A kernel with the arguments of an operator that prepares each kind of call once.

    Args:
        operator: the operator.
        prepare: makes what calls have in common from a checked one; ``UnsupportedError`` leaves them to the reference.
    """
    known: dict[Any, Prepared | str] = {}
    _prepared.append(known)
    places = {name: operator.names.index(name) for name in _TENSORS}

    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        key = _key(args, kwargs)
        found = known.get(key)
        if found is None:
            call = operator.bind(args, kwargs).checked()
            try:
                found = prepare(call)
            except UnsupportedError as reason:
                found = f"tbn::{operator.name}: {reason}"
            if len(known) >= KEPT_LAYERS:
                known.clear()
            known[key] = found
        if isinstance(found, str):
            decline(found)
            call = operator.bind(args, kwargs)
            return reference.compute(call).contiguous(memory_format=call.output_format())
        count = len(args)
        tensors: list[Any] = [args[at] if at < count else kwargs.get(name) for name, at in places.items()]
        with on_device(tensors[0]):
            return found(*tensors)

    return with_signature(operator, kernel)


def _key(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What a prepared call may depend on: everything but the values of tensors and where they lie.

    One flat tuple is not ambiguous: where it has a dtype, five parts belong to a tensor, and names stand before values.
    """
    parts: list[Any] = []
    for value in (*args, *kwargs, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            parts += (value.dtype, value.shape, value.stride(), value.device, value.data_ptr() % 16)
        else:
            parts.append(tuple(value) if type(value) is list else value)
    if kwargs or parts[0] == torch.float32:  # of the input
        parts.append(torch.backends.cuda.matmul.fp32_precision)
    return tuple(parts)


_nothing = contextlib.nullcontext()


def on_device(tensor: Tensor) -> Any:
    """Make a tensor's GPU the current one, if it is not: that is where Triton launches."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _nothing
    return torch.cuda.device_of(tensor)
