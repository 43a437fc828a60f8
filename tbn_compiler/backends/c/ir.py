"""The small typed graph between ``torch.export`` and the planner.

Values are row-major arrays of static shape. An operation reads values and constants and writes one value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

from tbn_compiler.backends.c.places import Access as Access
from tbn_compiler.backends.c.places import Axis as Axis
from tbn_compiler.backends.c.places import Window as Window
from tbn_compiler.backends.c.places import row_major as row_major
from tbn_compiler.backends.c.values import BYTES as BYTES
from tbn_compiler.backends.c.values import Constant as Constant
from tbn_compiler.backends.c.values import DType as DType
from tbn_compiler.backends.c.values import Operand as Operand
from tbn_compiler.backends.c.values import Operation as Operation
from tbn_compiler.backends.c.values import Value as Value
from tbn_compiler.tiling import TiledProduct, TileLayout


@dataclass(frozen=True)
class Alias(Operation):
    """The same elements in the same order under another shape: view, flatten, clone, ..."""


@dataclass(frozen=True)
class Copy(Operation):
    """The input's elements at another place; only the planner makes one."""


@dataclass(frozen=True)
class Convert(Operation):
    """The same numbers in another type: from ``uint8`` or ``int8`` to ``int32``, and from these to ``float32``."""


@dataclass(frozen=True)
class Part(Operation):
    """``output.size`` elements of the input from ``offset`` on; no copy, the output lies inside the input."""

    offset: int


@dataclass(frozen=True)
class Unary(Operation):
    """A function of each element, which may give another type.

    Attributes:
        function: name of the kernel; that for elements of another type than float32 has it behind the name.
        parameters: further arguments of the function.
    """

    in_place: ClassVar[bool] = True

    function: str
    parameters: tuple[float, ...] = ()


@dataclass(frozen=True)
class Strided(Operation):
    """A copy of the elements that ``access`` names: permute, slice, flip, expand, ..."""

    access: Access


@dataclass(frozen=True)
class Elementwise(Operation):
    """Something of elements of several arrays, with broadcasting.

    Attributes:
        accesses: the operands with the sizes of the result, broadcast.
    """

    accesses: tuple[Access, ...]

    @property
    def overwritable(self) -> tuple[Operand, ...]:
        """Operands that are read in the order in which results are written, wherever they are read."""
        size = self.output.size
        whole = [a.in_order and not a.offset and math.prod(a.sizes) == size for a in self.accesses]
        otherwise = {x for x, ok in zip(self.inputs, whole, strict=True) if not ok}
        return tuple(x for x, ok in zip(self.inputs, whole, strict=True) if ok and x not in otherwise)


@dataclass(frozen=True)
class Binary(Elementwise):
    """A function of two elements, which may give another type; ``function`` is the kernel, as in :class:`Unary`."""

    function: str


@dataclass(frozen=True)
class Select(Elementwise):
    """An element of the second operand where the first one, of bool, is true, and of the third one where it is not."""


@dataclass(frozen=True)
class ChannelAffine(Operation):
    """``x [samples, channels, inner] * scale [channels] + shift [channels]``: batch-norm in evaluation."""

    in_place: ClassVar[bool] = True

    scale: Constant
    shift: Constant
    inner: int


@dataclass(frozen=True)
class Softmax(Operation):
    """Softmax along an axis; its logarithm if ``log``."""

    in_place: ClassVar[bool] = True

    axis: Axis
    log: bool = False


@dataclass(frozen=True)
class Reduce(Operation):
    """``[outer, size, inner] -> [outer, inner]``.

    Attributes:
        function: the kernel: mean, sum, maximum, argmax, ...
        axis: what is reduced.
        parameters: further arguments of the function.
    """

    function: str
    axis: Axis
    parameters: tuple[float, ...] = ()


@dataclass(frozen=True)
class Scan(Operation):
    """The sums, or products, of each element and all before it along an axis; ``function`` is the kernel."""

    in_place: ClassVar[bool] = True

    function: str
    axis: Axis


@dataclass(frozen=True)
class Norm(Operation):
    """Normalisation of each row: ``(x - mean) / sqrt(variance + eps)``, then times ``weight`` plus ``bias``.

    Attributes:
        columns: elements of a row, and of ``weight`` and ``bias``.
        eps: added to the variance.
        weight, bias: factors and addends, or ``None``.
    """

    in_place: ClassVar[bool] = True

    columns: int
    eps: float
    weight: Constant | None
    bias: Constant | None


@dataclass(frozen=True)
class MatMul(Operation):
    """``a [..., m, k] @ b [..., k, n]``; the accesses have equal sizes but the last two.

    Attributes:
        accesses: both operands, leading sizes broadcast.
        result: where the elements of the result ``[..., m, n]`` are written.
    """

    accesses: tuple[Access, Access]
    result: Access


@dataclass(frozen=True)
class Attention(Operation):
    """``softmax(scale * q @ k.T + mask) @ v``, all of it row by row.

    Attributes:
        accesses: q ``[B, H, L, D]``, k ``[B, H, S, D]``, v ``[B, H, S, E]`` and, if there is a mask, ``[B, H, L, S]``.
        result: where the elements of the result ``[B, H, L, E]`` are written.
        scale: factor of the scores.
        causal: query ``i`` sees keys 0 to ``i`` only.
    """

    accesses: tuple[Access, ...]
    result: Access
    scale: float
    causal: bool


@dataclass(frozen=True)
class Concat(Operation):
    """Inputs one behind the other along an axis: ``blocks[i]`` elements of input ``i`` in each of ``outer`` rows."""

    outer: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Pad(Operation):
    """``value`` everywhere but at the elements that ``result`` names, which are those of the input in order."""

    value: float
    result: Access


@dataclass(frozen=True)
class Pool(Operation):
    """Pooling of ``planes`` images.

    Attributes:
        function: name of the kernel: ``max_pool`` or ``avg_pool``.
        planes: samples times channels.
        window: the geometry.
        include_padding: an average counts the padding as zeros.
        divisor: what an average divides by instead of the number of elements; 0 if nothing.
    """

    function: str
    planes: int
    window: Window
    include_padding: bool = True
    divisor: int = 0


@dataclass(frozen=True)
class Resample(Operation):
    """``planes`` images of another size: adaptive pooling, nearest neighbour, linear interpolation.

    Attributes:
        function: name of the kernel.
        planes: samples times channels.
        input_size, output_size: (height, width) of the images.
        parameters: further arguments of the function.
    """

    function: str
    planes: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    parameters: tuple[float, ...] = ()


@dataclass(frozen=True)
class Gather(Operation):
    """Rows of tables ``[outer, rows, columns]`` by index, the same ones of each of them.

    ``inputs`` are the indices (``int32``; negative ones count from the end) and the tables.
    """

    outer: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Pick(Operation):
    """Elements along an axis of an array, each by an index of its own.

    ``inputs`` are the indices (``int32``; negative ones count from the end), one for each result, and the array.

    Attributes:
        access: the elements that index 0 names.
        rows: size of the axis.
        stride: from an element of the axis to the next one.
    """

    access: Access
    rows: int
    stride: int


@dataclass(frozen=True)
class Scatter(Operation):
    """An array in which elements along an axis are written, each by an index of its own, or added to what is there.

    ``inputs`` are the array, the indices (``int32``; negative ones count from the end), and what is written.

    Attributes:
        access: what is written, for each index.
        result: the elements that index 0 names.
        rows: size of the axis.
        stride: from an element of the axis to the next one.
        add: whether elements are added.
    """

    access: Access
    result: Access
    rows: int
    stride: int
    add: bool = False


@dataclass(frozen=True)
class Rank(Operation):
    """``[outer, size, inner] -> [outer, ranks, inner]``: where the first ones in order stand, as ``int32``.

    Attributes:
        axis: what is put in order.
        ranks: how many.
        largest: whether the largest comes first.
    """

    axis: Axis
    ranks: int
    largest: bool


@dataclass(frozen=True)
class SumNeighbours(Operation):
    """``y[i, s] = x[i * count, s] + ... + x[i * count + count - 1, s]``; only the planner makes one.

    Attributes:
        count: neighbours in each sum.
        inner: elements behind each of them: 1 for features, the image's size for channels.
    """

    count: int
    inner: int = 1


@dataclass(frozen=True)
class SumCopies(Operation):
    """Channels ``[N, C, *]`` of a transpose convolution, scaled, with equal signs summed; only the planner makes one.

    ``y[g, u, s]`` is the sum of ``alpha x[g, c, s]`` over the channels ``c`` of a group with ``c mod different = u``.

    Attributes:
        alpha: scales, each of equally many channels one behind the other, in a sample; ``None``: not scaled.
        channels: channels of a group.
        different: those that are left.
        inner: elements of a channel.
    """

    alpha: Constant | None
    channels: int
    different: int
    inner: int


@dataclass(frozen=True)
class Linear(Operation):
    """``x [..., n] -> x @ weight.T + bias [..., m]`` with a float weight ``[m, n]``, and a ReLU if ``relu``."""

    weight: Constant
    bias: Constant | None
    relu: bool = False


# What int8 activations hold: -128 is left out, so that every value has its negative.
INT8_LIMIT = 127


@dataclass(frozen=True)
class Quantize(Operation):
    """``float32 -> int8``: ``round(x * (1 / scale))``, halves to even, brought into ``limits``. NaN counts as 0.

    Attributes:
        scale: what the integer 1 stands for.
        limits: the smallest and the largest result.
    """

    scale: float
    limits: tuple[int, int] = (-INT8_LIMIT, INT8_LIMIT)


@dataclass(frozen=True)
class Dequantize(Operation):
    """``int8 -> float32``: ``x * scale``."""

    scale: float


@dataclass(frozen=True)
class Lookup(Operation):
    """``int8`` or ``uint8`` to ``int8``: element ``x`` becomes ``table[x + 128]``, or ``table[x]`` if it is unsigned.

    Attributes:
        table: ``[places, 256]``.
        title: what it computes, in a few words.
        access: the elements, in the order of the result.
        dim: the dimension of ``access`` along which each place has a table of its own; ``None``: there is one table.
    """

    table: Constant
    title: str
    access: Access
    dim: int | None = None

    @property
    def whole(self) -> bool:
        """Whether the elements are those of the input, in order."""
        return self.access.in_order and not self.access.offset and self.output.size == self.inputs[0].size

    @property
    def overwritable(self) -> tuple[Operand, ...]:
        """The input, if it is read in order."""
        return self.inputs if self.whole else ()


@dataclass(frozen=True)
class RescaledSum(Operation):
    """The sum of two ``int8`` arrays of equal sizes with different scales, as ``int8`` with a scale of its own.

    Attributes:
        scales: of the inputs.
        output_scale: of the result.
        limits: the smallest and the largest result.
    """

    scales: tuple[float, float]
    output_scale: float
    limits: tuple[int, int] = (-INT8_LIMIT, INT8_LIMIT)

    @property
    def overwritable(self) -> tuple[Operand, ...]:
        """Both."""
        return self.inputs


@dataclass(frozen=True)
class IntegerProduct(Operation):
    """``int8 [outer, inner]`` times ``int8 [outer]``, or two of equal sizes (``inner`` is 1), as ``int8``.

    Attributes:
        inner: elements of the first input that one of the second serves.
        scale: what the product of the integers 1 stands for.
        output_scale: of the result.
        limits: the smallest and the largest result.
    """

    in_place: ClassVar[bool] = True

    inner: int
    scale: float
    output_scale: float
    limits: tuple[int, int] = (-INT8_LIMIT, INT8_LIMIT)


@dataclass(frozen=True)
class IntegerMean(Operation):
    """``int8 [outer, size, inner] -> [outer, inner]``: the mean, as ``float32`` or with a scale as ``int8``.

    Attributes:
        axis: what is averaged.
        scale: of the input.
        output_scale: of the result; ``None``: it is ``float32``.
        limits: the smallest and the largest result, if that is ``int8``.
    """

    axis: Axis
    scale: float
    output_scale: float | None = None
    limits: tuple[int, int] = (-INT8_LIMIT, INT8_LIMIT)


@dataclass(frozen=True)
class Tiled(Operation):
    """A layer on a stored tile.

    Attributes:
        tile: packed bits ``[ceil(q / 8)]``, or float32 ``[q]`` for a full-precision tile.
        alpha: scales, as many as ``layout.allows_alphas``.
        bias: one number for each output feature or channel, or ``None``.
        input_alpha: ``[k]``, the input's features or channels stand for ``k`` copies of them, one behind the other,
            with these scales; or ``None``.
        layout: shape of the weight and the way the tile fills it.
        relu: whether a ReLU follows.
        input_scale: the input is ``int8`` with this scale; ``None``: it is ``float32``.
        output_scale: the result is ``int8`` with this scale; ``None``: it is ``float32``.
        limits: the smallest and the largest result, if that is ``int8``.
    """

    tile: Constant
    alpha: Constant
    bias: Constant | None
    input_alpha: Constant | None
    layout: TileLayout
    relu: bool = field(default=False, kw_only=True)
    input_scale: float | None = field(default=None, kw_only=True)
    output_scale: float | None = field(default=None, kw_only=True)
    limits: tuple[int, int] = field(default=(-INT8_LIMIT, INT8_LIMIT), kw_only=True)

    @property
    def replicas(self) -> int:
        """``k``: the input holds ``n / k`` elements for each row of ``n`` weights."""
        return 1 if self.input_alpha is None else self.input_alpha.size

    @property
    def product(self) -> TiledProduct:
        """What the layer multiplies."""
        return TiledProduct(self.layout, self.alpha.size, replicas=self.replicas)


@dataclass(frozen=True)
class TiledLinear(Tiled):
    """A linear layer on a stored tile (``tbn::linear``)."""


@dataclass(frozen=True)
class TiledConv(Tiled):
    """A convolution ``[N, C, H, W] -> [N, m, H', W']`` on a stored tile (``tbn::conv1d``, ``tbn::conv2d``).

    The weight is ``[m, C / groups, *kernel]`` (OIHW): rows are filters, and in a row the window's elements follow one
    another for each input channel.

    Attributes:
        window: the geometry.
        groups: the ``m / groups`` filters of group ``g`` read the channels from ``g * C / groups``; 1 with
            ``input_alpha``.
    """

    window: Window
    groups: int = 1

    @property
    def product(self) -> TiledProduct:
        """What the layer multiplies."""
        return TiledProduct(self.layout, self.alpha.size, self.groups, self.replicas)

    @property
    def samples(self) -> int:
        """``N``."""
        return self.output.size // (self.layout.rows * self.window.output_size)

    @property
    def input_channels(self) -> int:
        """Channels of the input as it is stored, without copies."""
        return self.layout.shape[1] * self.groups // self.replicas


@dataclass(frozen=True)
class Conv(Operation):
    """A convolution ``[N, C, H, W] -> [N, m, H', W']`` with a float weight ``[m, C / groups, *kernel]``."""

    weight: Constant
    bias: Constant | None
    window: Window
    groups: int = 1
    relu: bool = False


@dataclass(frozen=True)
class ConvTranspose(Operation):
    """A transpose convolution with a float weight ``[C, m / groups, *kernel]``.

    The window slides over the *output*: input pixel ``i`` adds to the output pixels under the window at ``i``.
    """

    weight: Constant
    bias: Constant | None
    window: Window
    groups: int = 1


@dataclass(frozen=True)
class TiledConvTranspose(Tiled):
    """A transpose convolution on a stored tile (``tbn::conv_transpose1d``, ``tbn::conv_transpose2d``).

    The rows of the layout are *input* channels: its shape is ``[C, m / groups, *kernel]``. ``input_alpha`` is
    ``None``, and ``relu`` is false.
    """

    window: Window
    groups: int = 1


@dataclass(frozen=True)
class Graph:
    """A model: operations in an order in which they can run."""

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operations: tuple[Operation, ...]
