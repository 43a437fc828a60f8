"""Attentions, masks and models with attentions, for the tests of the passes that rewrite them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from tbn_compiler import TilingConfig
from tbn_compiler.graph.attention import attention_core, attention_layer
from tbn_compiler.graph.copying import share_tensors_copy
from tbn_compiler.graph.layer_graph import adopt
from tbn_compiler.passes.base import GraphPass
from tbn_compiler.passes.decompose_attention import DecomposeAttention
from tbn_compiler.passes.expose_attention import ExposeAttention, attention_module
from tests import oracle

EMBED, HEADS, BATCH, LENGTH, SOURCE = 8, 2, 3, 4, 5
CONFIG = TilingConfig(p=4, min_size=0)

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "one head": {"num_heads": 1},
    "appended keys": {"add_bias_kv": True, "add_zero_attn": True},
    "own key and value sizes": {"kdim": 6, "vdim": 10},
    "own sizes, no bias, zero key": {"kdim": 6, "bias": False, "add_zero_attn": True},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "no weights": {"need_weights": False},
    "averaged": {},
    "per head": {"average_attn_weights": False},
}
MASKS = (
    "none",
    "padding",
    "float padding",
    "2-D",
    "float 3-D and float padding",
    "3-D and padding",
    "causal",
    "causal and padding",
)
LAYOUTS = ("sequence first", "batch first", "unbatched")


def attention(**options: Any) -> nn.MultiheadAttention:
    """An attention with biases that are not zero."""
    module = nn.MultiheadAttention(**{"embed_dim": EMBED, "num_heads": HEADS} | options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def masks(name: str, layout: str, length: int, source: int, heads: int) -> dict[str, Any]:
    """Arguments for one kind of mask. No query has all of its keys masked: its weights would be 0 / 0."""
    batch = 1 if layout == "unbatched" else BATCH
    boolean, causal = torch.rand(length, source) > 0.6, torch.ones(length, source).triu(1).bool()
    boolean[:, 0] = False
    padding = torch.zeros(batch, source, dtype=torch.bool)
    padding[-1, 2:] = True
    padding = padding[0] if layout == "unbatched" else padding
    three = boolean.expand(batch * heads, length, source).clone()
    three[0, :, 1] = True
    arguments: dict[str, dict[str, Any]] = {
        "none": {},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(padding.shape)},
        "2-D": {"attn_mask": boolean},
        "float 3-D and float padding": {
            "attn_mask": torch.randn(three.shape),
            "key_padding_mask": torch.randn(padding.shape),
        },
        "3-D and padding": {"attn_mask": three, "key_padding_mask": padding},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "key_padding_mask": padding, "is_causal": True},
    }
    return arguments[name]


def inputs(module: nn.MultiheadAttention, layout: str) -> tuple[Tensor, Tensor, Tensor]:
    def draw(length: int, size: int) -> Tensor:
        shape = {"unbatched": (length,), "batch first": (BATCH, length), "sequence first": (length, BATCH)}[layout]
        return torch.randn(*shape, size, requires_grad=True)

    return draw(LENGTH, EMBED), draw(SOURCE, module.kdim), draw(SOURCE, module.vdim)


def results(call: Callable[..., Any], tensors: tuple[Tensor, ...], arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs and, where there are any, the gradients of the inputs."""
    outputs = [output for output in call(*tensors, **arguments) if output is not None]
    weighting = [torch.linspace(-1, 2, output.numel()).view(output.shape) for output in outputs]
    total = sum((output * factor).sum() for output, factor in zip(outputs, weighting, strict=True))
    return [*outputs, *torch.autograd.grad(total, [tensor for tensor in tensors if tensor.requires_grad])]


def assert_near(actual: Any, expected: Any) -> None:
    """Equal to 1e-6 of the largest value, or of 1; some gradients are zero up to rounding."""
    largest = max(float(tensor.detach().abs().max()) for tensor in oracle.flatten(expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * max(1.0, largest))


def assert_same(actual: Any, expected: Any) -> None:
    """Equal bit for bit, and laid out in memory alike."""
    actual, expected = oracle.flatten(actual), oracle.flatten(expected)
    assert len(actual) == len(expected) > 0
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
        assert a.stride() == e.stride()


def parameter_gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {key: parameter.grad for key, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad()
    return found


@dataclass(frozen=True)
class Form:
    """How an attention is written in a graph.

    Attributes:
        passes: write a call of an attention so.
        function: that each call of an attention becomes one of.
        exact: the results are PyTorch's bit for bit.
    """

    passes: tuple[type[GraphPass], ...]
    function: Callable[..., Any]
    exact: bool

    def module(self, reference: nn.MultiheadAttention) -> Any:
        """The module that takes an attention's place, in this form."""
        module = attention_module(reference)
        assert all(graph_pass()(module).modified for graph_pass in self.passes[1:])
        return module

    def graph(self, model: nn.Module) -> fx.GraphModule:
        """The graph of a model in this form."""
        gm = traced(model)
        assert all(graph_pass()(gm).modified for graph_pass in self.passes)
        return gm

    def assert_equal(self, actual: Any, expected: Any, tolerance: float | None = None) -> None:
        """Equal bit for bit, or up to ``tolerance``; default: that of :func:`assert_near`."""
        if self.exact:
            assert_same(actual, expected)
        elif tolerance is None:
            assert_near(actual, expected)
        else:
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


ONE_FUNCTION = Form((ExposeAttention,), attention_layer, exact=True)
LINEARS = Form((ExposeAttention, DecomposeAttention), attention_core, exact=False)


def pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "pickle and deepcopy": lambda module: copy.deepcopy(pickled(module)),
    "shared tensors": share_tensors_copy,
}


class Holder(nn.Module):
    """Calls an attention: torch.export takes the keyword arguments of a graph module for positional ones."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *tensors: Tensor, **arguments: Any) -> Any:
        return self.inner(*tensors, **arguments)


def sequences(length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, length, EMBED)


def padding(length: int) -> Tensor:
    mask = torch.zeros(BATCH, length, dtype=torch.bool)
    mask[1, length - 2 :] = True
    return mask


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


class Block(nn.Module):
    """Self- and cross-attention, weights used and unused, one attention called twice."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(EMBED, EMBED)
        self.own = attention(dropout=dropout, batch_first=True)
        self.cross = attention(batch_first=True, kdim=6, vdim=6)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor) -> Any:
        x = self.embed(x)
        x = x + self.own(x, x, x, attn_mask=mask, need_weights=False)[0]
        y, weights = self.cross(query=x, key=memory, value=memory)
        both = self.own(y, x, x, None, True, mask, average_attn_weights=False)
        return x + y + both[0], weights, both[-1], self.cross(x, memory, memory)


def block_inputs() -> tuple[Tensor, Tensor, Tensor]:
    return sequences(), torch.randn(BATCH, SOURCE, 6), causal(LENGTH)


def traced(model: nn.Module) -> fx.GraphModule:
    """The graph of a model, in which an attention is a call of a module."""
    found = fx.symbolic_trace(model)
    gm: fx.GraphModule = adopt(found, found.graph)
    return gm


class Same(Holder):
    def forward(self, x: Tensor) -> Any:
        return self.inner(x, x, x)
