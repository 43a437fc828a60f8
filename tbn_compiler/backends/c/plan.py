"""The plan: a frozen description of the C program, in which everything is decided and nothing is text yet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tbn_compiler.backends.c import ir

SCRATCH_CHOICES = ("static", "caller")

# Every kernel is a template of this name and a C function of this name behind the model's prefix.
KERNELS = (
    "copy",
    "relu",
    "add",
    "add_scalar",
    "softmax",
    "sum_neighbours",
    "linear",
    "tiled_linear_bytes",
    "tiled_linear_bits",
    "tiled_linear_float",
)

# The kernels that follow a row through any layout of the tile, run by run.
RUN_KERNELS = ("tiled_linear_bits", "tiled_linear_float")


@dataclass(frozen=True)
class PlannedConstant:
    """A ``static const`` array.

    Attributes:
        symbol: C name without the model's prefix.
        constant: contents and ``state_dict`` key.
    """

    symbol: str
    constant: ir.Constant


@dataclass(frozen=True)
class PlannedBuffer:
    """A buffer in the scratch block; ``first`` and ``last`` are the steps between which it is in use."""

    name: str
    nbytes: int
    offset: int
    first: int
    last: int


@dataclass(frozen=True)
class Step:
    """One kernel call.

    Attributes:
        kernel: which of :data:`KERNELS`.
        node: the node of the exported graph whose value it computes.
        layer: qualified name of the layer.
        inputs, output: ``"input"``, ``"output"`` or the name of a buffer.
        shape: shape of the result.
    """

    form: ClassVar[str]  # how the templates print it

    kernel: str
    node: str
    layer: str
    inputs: tuple[str, ...]
    output: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ElementwiseStep(Step):
    """``size`` elements, one by one."""

    form: ClassVar[str] = "elementwise"

    size: int
    scalar: float | None = None


@dataclass(frozen=True)
class SoftmaxStep(Step):
    """Softmax of each of ``rows`` rows."""

    form: ClassVar[str] = "softmax"

    rows: int
    columns: int


@dataclass(frozen=True)
class SumNeighboursStep(Step):
    """Each of ``size`` results is the sum of ``count`` neighbours."""

    form: ClassVar[str] = "sum_neighbours"

    size: int
    count: int


@dataclass(frozen=True)
class LinearStep(Step):
    """A float weight ``[out_features, in_features]`` times each of ``vectors`` inputs; names without the prefix."""

    form: ClassVar[str] = "linear"

    vectors: int
    in_features: int
    out_features: int
    weight: str
    bias: str | None
    relu: bool


@dataclass(frozen=True)
class TiledLayer:
    """The constant description of a tiled linear layer that its kernel reads.

    Attributes:
        symbol: C name of the description.
        name: qualified name of the layer.
        in_features, out_features: ``n`` and ``m``.
        p: copies of the tile.
        p_in: neighbouring inputs that share a tile element, where they are not summed by a step of their own.
        shift: elements by which each further copy is rolled, below ``tile_size``.
        unique_rows: rows whose products are computed; row ``r`` repeats row ``r % unique_rows``.
        tile_size: elements of the tile.
        num_alphas: number of scales.
        rows_per_alpha: row ``r`` is scaled by ``alpha[r // rows_per_alpha]``; 0 where the scales change inside rows:
            copy ``i`` of the tile at neighbour ``j`` is scaled by ``alpha[i * p_in + j]``.
        replicas: scaled copies of the input that the layer reads; ``in_features`` counts them all.
        tile, alpha, bias, input_alpha: C names of the arrays.
        relu: whether a ReLU follows.
    """

    symbol: str
    name: str
    in_features: int
    out_features: int
    p: int
    p_in: int
    shift: int
    unique_rows: int
    tile_size: int
    num_alphas: int
    rows_per_alpha: int
    replicas: int
    tile: str
    alpha: str
    bias: str | None
    input_alpha: str | None
    relu: bool

    @property
    def input_size(self) -> int:
        """Elements of the input for each vector."""
        return self.in_features // self.replicas


@dataclass(frozen=True)
class TiledLinearStep(Step):
    """A tiled layer applied to each of ``vectors`` inputs."""

    form: ClassVar[str] = "tiled_linear"

    vectors: int
    parameters: TiledLayer


@dataclass(frozen=True)
class Plan:
    """What the C file will be: steps, constants and memory.

    Attributes:
        name: prefix of every symbol.
        scratch: ``"static"``, one block in the file, or ``"caller"``, handed to the run function.
        input, output: names and shapes.
        steps: kernel calls in order.
        constants: arrays in the order in which they are stored.
        buffers: contents of the scratch block, in order of first use.
        scratch_bytes: size of the scratch block.
        weight_bytes: bytes of all constants: packed tiles, alphas, biases and float weights.
        live_bytes: scratch bytes in use at each step; the block cannot be smaller than the largest of these.
        peak_step: node of the first step with the most scratch in use; ``None`` without scratch.
    """

    name: str
    scratch: str
    input: ir.Value
    output: ir.Value
    steps: tuple[Step, ...]
    constants: tuple[PlannedConstant, ...]
    buffers: tuple[PlannedBuffer, ...]
    scratch_bytes: int
    weight_bytes: int
    live_bytes: tuple[int, ...]
    peak_step: str | None

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernels in use, in the order of :data:`KERNELS`."""
        used = {step.kernel for step in self.steps}
        return tuple(kernel for kernel in KERNELS if kernel in used)

    @property
    def uses_runs(self) -> bool:
        """Whether one of :data:`RUN_KERNELS` is in use."""
        return any(kernel in RUN_KERNELS for kernel in self.kernels)

    @property
    def tiled_layers(self) -> tuple[TiledLayer, ...]:
        """The tiled layers in order of first use; a layer that runs twice appears once."""
        return tuple(dict.fromkeys(s.parameters for s in self.steps if isinstance(s, TiledLinearStep)))
