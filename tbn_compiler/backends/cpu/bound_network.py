"""A network of layers bound to their operands: the operator ``tbn_cpu::network``, and the plans that it takes.

A plan is a tensor of bytes (``struct tbn_network``), as those of :mod:`~tbn_compiler.backends.cpu.bound` are. What a
network makes of the sizes of its input is known by a number, so that tracing can ask for it.
"""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tbn_compiler.backends.cpu import bound, library, prepare
from tbn_compiler.ops.calls import TensorCall, conv_sizes

KINDS = {"conv": 0, "linear": 1, "max_pool": 2, "mean": 3, "planes": 4}
"""``enum tbn_step_kind``."""

_NONE = 2 ** (8 * ctypes.sizeof(ctypes.c_size_t)) - 1  # TBN_NONE

bound.define("network(Tensor input, Tensor plan, int number) -> Tensor")


@dataclass
class Value:
    """What steps read and write (``struct tbn_value``).

    Attributes:
        channels: channels, or features.
        floats: whether it is kept as floats.
        scale: that of its bytes; 0: it is not kept as bytes.
        border: of its bytes, for the padding of those that read them.
        last: the last step that reads it.
    """

    channels: int
    floats: bool = False
    scale: float = 0.0
    border: int = 0
    last: int = 0


@dataclass
class Step:
    """What is computed (``struct tbn_step``).

    Attributes:
        kind: one of :data:`KINDS`.
        input: the value that it reads.
        output: the value that it writes.
        scale: that of the bytes that it reads; 0: it reads floats.
        layer: of a convolution or linear layer.
        tokens: how many a linear layer will get, if that is known.
        rounded: scale by which a convolution's results are brought into int8 and back, or 0.
        added: what is added to a convolution's results then.
        added_scale: that of its bytes; 0: floats are added.
        relu: whether a ReLU is behind that.
        factors, offsets: of a batch norm behind a pooling, for each channel.
        kernel, stride, padding: of a pooling.
    """

    kind: str
    input: int
    output: int
    scale: float = 0.0
    layer: TensorCall | None = None
    tokens: int | None = None
    rounded: float = 0.0
    added: int | None = None
    added_scale: float = 0.0
    relu: bool = False
    factors: Tensor | None = None
    offsets: Tensor | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)

    def windows(self) -> list[tuple[int, int]] | None:
        """Kernel, stride, padding and dilation of what looks at windows of an image."""
        if self.kind == "max_pool":
            return [self.kernel, self.stride, self.padding, (1, 1)]
        if self.kind == "conv":
            assert self.layer is not None
            names = ("stride", "padding", "dilation")
            pairs = [self.layer.kernel_size, *(self.layer.arguments[name] for name in names)]
            return [(int(height), int(width)) for height, width in pairs]
        return None


Geometry = tuple[tuple[str, int, int, tuple[tuple[int, int], ...]], ...]
_results: dict[int, tuple[Geometry, int, int]] = {}  # by number: steps, channels and dimensions of the result


def bind(steps: Sequence[Step], values: Sequence[Value], dims: int, out_dims: int) -> tuple[library.Network, int]:
    """The plan of a network, and its number, which the operator takes, too."""
    layers = [None if step.layer is None else bound.bind(step.layer, step.tokens) for step in steps]
    lib, _, kernels = prepare.native()
    packed_steps = (library.NetworkStep * len(steps))(
        *(
            _step(step, None if plan is None else ctypes.addressof(plan))
            for step, plan in zip(steps, layers, strict=True)
        )
    )
    packed_values = (library.NetworkValue * len(values))(
        *(
            library.NetworkValue(value.channels, value.border, value.scale, value.floats, max(value.last, 0))
            for value in values
        )
    )
    network = library.Network(
        steps=ctypes.addressof(packed_steps),
        step_count=len(steps),
        values=ctypes.addressof(packed_values),
        value_count=len(values),
        dots=lib.tbn_dots_of(kernels),
        dims=dims,
        out_dims=out_dims,
    )
    network.self = ctypes.addressof(network)
    network.operands = (layers, list(steps), packed_steps, packed_values)  # what it points to
    return network, _number(steps, values, out_dims)


def _step(step: Step, plan: int | None) -> Any:
    return library.NetworkStep(
        kind=KINDS[step.kind],
        relu=step.relu,
        on_bytes=step.scale != 0,
        rounded=step.rounded,
        added_scale=step.added_scale,
        input=step.input,
        output=step.output,
        added=_NONE if step.added is None else step.added,
        layer=plan,
        factors=None if step.factors is None else step.factors.data_ptr(),
        offsets=None if step.offsets is None else step.offsets.data_ptr(),
        kernel=step.kernel,
        stride=step.stride,
        padding=step.padding,
    )


def _number(steps: Sequence[Step], values: Sequence[Value], out_dims: int) -> int:
    """A number that stands for what a network makes of sizes: the same in every process, for compiled code is kept."""
    geometry = tuple((step.kind, step.input, step.output, tuple(step.windows() or ())) for step in steps)
    result = geometry, values[steps[-1].output].channels, out_dims
    number = int.from_bytes(hashlib.sha256(repr(result).encode()).digest()[:7], "little")
    _results[number] = result
    return number


def _network(input: Tensor, plan: Tensor, number: int) -> Tensor:
    if number not in _results:
        raise RuntimeError(
            "tbn_cpu::network: this process has not bound this network, and cannot trace it: bind it again"
        )
    geometry, channels, out_dims = _results[number]
    images: dict[int, Sequence[Any]] = {0: input.shape[2:] if input.dim() == 4 else (1, 1)}
    for kind, source, output, windows in geometry:
        if windows:
            images[output] = conv_sizes(images[source], *windows)
        else:
            images[output] = images[source] if kind == "planes" else (1, 1)
    height, width = images[geometry[-1][2]]
    if out_dims == 2:
        return input.new_empty((input.shape[0], channels * height * width))
    last = not input.is_contiguous() and input.dim() == 4 and input.is_contiguous(memory_format=torch.channels_last)
    form = torch.channels_last if last else torch.contiguous_format
    shape = (input.shape[0], channels, height, width)
    return torch.empty(shape, dtype=input.dtype, device=input.device, memory_format=form)


bound.define_fake("network", _network)
