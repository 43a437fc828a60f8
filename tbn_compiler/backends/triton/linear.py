"""``tbn::linear`` with Triton: what a call needs, decided once, and the operands of each call."""

from __future__ import annotations

import dataclasses
import functools
from contextlib import nullcontext

import torch
from torch import Tensor

from tbn_compiler.backends.triton import hadamard, tuning
from tbn_compiler.backends.triton.counts import measured
from tbn_compiler.backends.triton.launches import Operands, launch
from tbn_compiler.backends.triton.plan import INDEX_LIMIT, UnsupportedError, WeightPlan, plan_weight
from tbn_compiler.backends.triton.prepared import prepared
from tbn_compiler.backends.triton.quantize import quantize
from tbn_compiler.backends.triton.replay import Repeats
from tbn_compiler.backends.triton.search import POPCOUNT_TOKENS, Config, Gpu, bucket, linear_candidates
from tbn_compiler.ops.calls import OPERATORS, TensorCall

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def word_aligned(tile: Tensor) -> bool:
    """Whether a packed tile can be read as 32-bit words."""
    return tile.data_ptr() % 4 == 0 and tile.is_contiguous()


def plan_call(call: TensorCall) -> WeightPlan:
    """How the kernels read the weight of a call.

    Raises:
        UnsupportedError: they do not cover it.
    """
    input, tile = call.input, call.tile
    for name, tensor in (("input", input), ("tile", tile)):
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise UnsupportedError(f"{name} of dtype {tensor.dtype}")
    if input.numel() // max(input.shape[-1], 1) > INDEX_LIMIT:
        raise UnsupportedError(f"{tuple(input.shape[:-1])} tokens exceed 32-bit indices")
    packed = tile.dtype == torch.uint8
    integer = call.activation != "float"
    plan = plan_weight(call.product, packed=packed, word_aligned=packed and word_aligned(tile), integer=integer)
    if not integer and precision(input.dtype, input.device) == "split" and not plan.signs:
        raise UnsupportedError("weights that are not +1 or -1 would be rounded to tf32 on this GPU")
    return plan


def tf32_allowed() -> bool:
    """Whether the user allows tf32 in float32 products; PyTorch's default does not."""
    precision: str = torch.backends.cuda.matmul.fp32_precision
    return precision == "tf32"


@functools.cache
def compute_capability(device: torch.device) -> int:
    """90 for an H100; 0 where there is none (AMD, the interpreter)."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """Arithmetic of the products: true float32 for float32, unless the user allows tf32.

    From compute capability 10 on, Triton 3.7 multiplies in tf32 even where "ieee" is asked for.
    """
    if dtype != torch.float32 or compute_capability(device) < 100:
        return "tf32" if dtype == torch.float32 and tf32_allowed() else "ieee"
    return "tf32" if tf32_allowed() else "split"


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """What bounds configurations on a device; an H200 for the interpreter."""
    if device.type != "cuda":
        return Gpu()
    properties = torch.cuda.get_device_properties(device)
    # The larger limit that a kernel has to ask for, as Triton does; AMD has the one.
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or properties.shared_memory_per_block
    return Gpu(properties.multi_processor_count, shared, compute_capability(device))


@dataclasses.dataclass
class Layer:
    """What all calls with equal shapes, strides and options have in common.

    Attributes:
        plan: how the weight is read.
        outputs: output features.
        activation: number format of the input in the product.
        epilogue: function behind the layer.
        arithmetic: of float32 products, see :func:`precision`.
        config: how it is run, once that is chosen for good.
        repeats: what such calls have left to further ones.
    """

    plan: WeightPlan
    outputs: int
    activation: str
    epilogue: str
    arithmetic: str
    config: Config | None = None
    repeats: Repeats = dataclasses.field(default_factory=Repeats)

    def __call__(
        self,
        input: Tensor,
        tile: Tensor,
        alpha: Tensor,
        bias: Tensor | None,
        input_alpha: Tensor | None,
        input_scale: Tensor | None,
    ) -> Tensor:
        """``input [..., n] -> [..., m]``, contiguous."""
        tensors = (input, tile, alpha, bias, input_alpha, input_scale)
        if self.repeats.replay is not None:
            return self.repeats.replay(*tensors)
        out = input.new_empty((*input.shape[:-1], self.outputs))
        if out.numel() == 0:
            return out
        plan, activation = self.plan, self.activation
        x = input.reshape(-1, input.shape[-1])
        if plan.sum_inputs > 1:
            x = x.unflatten(-1, (-1, plan.sum_inputs)).sum(-1)
        if x.stride(-1) != 1:
            x = x.contiguous()
        tokens = x.shape[0]
        token_scale = None
        signs = activation == "binary" and plan.whole_words and plan.mixes == 1 and tokens <= POPCOUNT_TOKENS
        kept = self.repeats.begin(tensors, out) if signs or self.config is not None else None
        if activation != "float":
            x, token_scale = quantize(x, "signs" if signs else activation, input_scale, kept)
        operands = Operands(
            x=x,
            tile=tile.view(torch.int32) if plan.kind == "words" else tile.contiguous(),
            alpha=alpha.contiguous(),
            bias=None if bias is None else bias.contiguous(),
            input_alpha=None if input_alpha is None else input_alpha.contiguous(),
            token_scale=token_scale,
            out=out.view(tokens, -1),
            epilogue=self.epilogue,
            precision=self.arithmetic,
            kept=kept,
        )
        self._launch(Config("popcount") if signs else self.config or self._choose(operands), operands)
        if kept is not None:
            self.repeats.end(kept)
        return out

    def _launch(self, config: Config, operands: Operands) -> None:
        (launch if self.plan.mixes == 1 else hadamard.launch)(config, self.plan, operands)

    def _choose(self, operands: Operands) -> Config:
        x, plan = operands.x, self.plan
        tokens = bucket(x.shape[0])
        candidates = linear_candidates(plan, tokens, x.dtype, gpu_of(x.device), self.epilogue, aligned=_aligned(x))
        # The names are those of the files that are kept.
        copies = "copies" if plan.mixes == 1 else "signed"
        key = (
            f"linear {str(x.dtype)[6:]} {plan.kind} {plan.rows}x{plan.columns} {copies}={plan.repeats} "
            f"blocks={plan.replicas} interleaved={plan.interleaved} tokens={tokens} aligned={int(_aligned(x))} "
            f"function={self.epilogue} precision={self.arithmetic}"
        )
        with measured(x.device) if tuning.would_measure(x.device, key, candidates) else nullcontext():
            config = tuning.choose(x.device, key, candidates, lambda config: self._launch(config, operands))
        if tuning.settled(x.device, key, candidates):
            self.config = config
        return config


def _aligned(x: Tensor) -> bool:
    """Whether rows are apart and begin at multiples of 16 bytes, as bulk copies need."""
    apart = x.shape[0] == 1 or x.stride(0) >= x.shape[1]
    return apart and x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0


def prepare(call: TensorCall) -> Layer:
    """What a checked call of ``tbn::linear`` has in common with others like it.

    Raises:
        UnsupportedError: no kernel covers it.
    """
    arithmetic = precision(call.input.dtype, call.input.device)
    return Layer(plan_call(call), call.outputs, call.activation, call.epilogue, arithmetic)


linear = prepared(OPERATORS["linear"], prepare)
