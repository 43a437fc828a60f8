from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from tbn_compiler import TilingConfig, TransformError
from tbn_compiler.graph.layers import get_records
from tbn_compiler.graph.tracing import share_tensors_copy, trace
from tbn_compiler.passes import LowerTiles, TileWeights
from tbn_compiler.passes.decompose_attention import (
    DecomposeAttention,
    attention_core,
    attention_module,
    disable_fast_paths,
    why_not_decomposed,
)
from tests import oracle

EMBED, HEADS, BATCH, LENGTH, SOURCE = 8, 2, 3, 4, 5

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "one head": {"num_heads": 1},
    "appended keys": {"add_bias_kv": True, "add_zero_attn": True},
    "own key and value sizes": {"kdim": 6, "vdim": 10},
    "own sizes, no bias, zero key": {"kdim": 6, "bias": False, "add_zero_attn": True},
}
WEIGHTS = [{"need_weights": False}, {}, {"average_attn_weights": False}]


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


def parameter_gradients(module: nn.Module) -> dict[str, Tensor]:
    found = {key: parameter.grad for key, parameter in module.named_parameters() if parameter.grad is not None}
    module.zero_grad()
    return found


def assert_equal(actual: Any, expected: Any) -> None:
    """Equal to 1e-6 of the largest value, or of 1; some gradients are zero up to rounding."""
    largest = max(float(tensor.detach().abs().max()) for tensor in oracle.flatten(expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-6 * max(1.0, largest))


@contextmanager
def no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["no weights", "averaged", "per head"])
@pytest.mark.parametrize(
    "mask",
    [
        "none",
        "padding",
        "float padding",
        "2-D",
        "float 3-D and float padding",
        "3-D and padding",
        "causal",
        "causal and padding",
    ],
)
@pytest.mark.parametrize("layout", ["sequence first", "batch first", "unbatched"])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_pytorch(options: str, layout: str, mask: str, weights: dict[str, Any]) -> None:
    reference = attention(batch_first=layout == "batch first", **OPTIONS[options])
    module, tensors = attention_module(reference), inputs(reference, layout)
    arguments = masks(mask, layout, LENGTH, SOURCE, reference.num_heads) | weights
    assert_equal(results(module, tensors, arguments), results(reference, tensors, arguments))
    assert (module(*tensors, **arguments)[1] is None) == (weights == WEIGHTS[0])


@pytest.mark.parametrize("layout", ["batch first", "unbatched"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_the_parameters(options: str, layout: str) -> None:
    reference = attention(batch_first=True, **OPTIONS[options])
    module, tensors = attention_module(reference), inputs(reference, layout)
    for arguments in WEIGHTS:
        found = []
        for call in (module, reference):
            sum((output * output).sum() for output in call(*tensors, **arguments) if output is not None).backward()
            found.append(parameter_gradients(reference))  # the very same parameters
        assert found[0].keys() == found[1].keys() == dict(reference.named_parameters()).keys()
        assert_equal(found[0], found[1])


@pytest.mark.parametrize("mask", ["none", "padding", "causal", "3-D and padding"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["no weights", "averaged", "per head"])
def test_self_attention_equals_the_fast_path(mask: str, weights: dict[str, Any]) -> None:
    reference = attention(batch_first=True).eval()
    module, x = attention_module(reference), torch.randn(BATCH, LENGTH, EMBED)
    arguments = masks(mask, "batch first", LENGTH, LENGTH, HEADS) | weights
    with torch.no_grad():
        assert_equal(module(x, x, x, **arguments), reference(x, x, x, **arguments))


@pytest.mark.parametrize("weights", WEIGHTS, ids=["no weights", "averaged", "per head"])
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_dropout_follows_the_mode_and_the_generator(options: dict[str, Any], weights: dict[str, Any]) -> None:
    reference = attention(dropout=0.4, **options)
    module, tensors = attention_module(reference), inputs(reference, "sequence first")
    for training in (True, False, True):
        outputs = []
        for call in (module, reference):
            torch.manual_seed(7)
            outputs.append(results(call.train(training), tensors, weights))
        assert_equal(*outputs)
        again = module(*tensors, **weights)[0]
        assert torch.equal(again, outputs[0][0]) != training


def test_dropout_starts_in_the_mode_of_the_attention() -> None:
    assert not attention_module(attention(dropout=0.5).eval()).tbn_training_flag()
    assert attention_module(attention(dropout=0.5)).tbn_training_flag()
    assert not hasattr(attention_module(attention()), "tbn_training_flag")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", ["padding", "causal", "3-D and padding"])
def test_other_dtypes(mask: str, dtype: torch.dtype) -> None:
    reference = attention(dtype=dtype)
    tensors = tuple(tensor.detach().to(dtype) for tensor in inputs(reference, "sequence first"))
    arguments = masks(mask, "sequence first", LENGTH, SOURCE, HEADS)
    actual, expected = attention_module(reference)(*tensors, **arguments), reference(*tensors, **arguments)
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["no weights", "averaged", "per head"])
def test_autocast(weights: dict[str, Any]) -> None:
    reference = attention(add_bias_kv=True)
    tensors = inputs(reference, "sequence first")
    arguments = masks("3-D and padding", "sequence first", LENGTH, SOURCE, HEADS) | weights
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = attention_module(reference)(*tensors, **arguments), reference(*tensors, **arguments)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_bad_arguments() -> None:
    q, k = torch.randn(LENGTH, BATCH, EMBED), torch.randn(SOURCE, BATCH, EMBED)
    reference = attention()
    module = attention_module(reference)
    for call in (module, reference):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            call(q, k, k, is_causal=True)
    with pytest.raises(RuntimeError, match=r"all be 2-D or all 3-D, got \[4, 3, 8\], \[5, 8\], \[5, 8\]"):
        module(q, k[:, 0], k[:, 0])
    with pytest.raises(RuntimeError, match=r"must agree: \[3, 4, 8\], \[3, 5, 8\], \[3, 4, 8\]"):
        module(q, k, k[1:])
    with pytest.raises(RuntimeError, match="must agree"):
        module(q, k[:, :1], k[:, :1])
    with pytest.raises(RuntimeError, match=r"attn_mask has shape \[5, 4\], but should have \[4, 5\]"):
        module(q, k, k, attn_mask=torch.zeros(SOURCE, LENGTH))
    with pytest.raises(RuntimeError, match=r"attn_mask has shape \[3, 4, 5\], but should have \[6, 4, 5\]"):
        module(q, k, k, attn_mask=torch.zeros(BATCH, LENGTH, SOURCE))
    with pytest.raises(RuntimeError, match=r"key_padding_mask has shape \[5, 3\], but should have \[3, 5\]"):
        module(q, k, k, key_padding_mask=torch.zeros(SOURCE, BATCH))
    with pytest.raises(RuntimeError, match=r"must be boolean or floating-point, not torch\.int64"):
        module(q, k, k, key_padding_mask=torch.zeros(BATCH, SOURCE, dtype=torch.long))


# The graph module that takes an attention's place.


@pytest.mark.parametrize("options", OPTIONS)
def test_module_has_the_tensors_and_attributes_of_the_attention(options: str) -> None:
    reference = attention(dropout=0.1, **OPTIONS[options])
    before = list(reference.named_modules())
    module = attention_module(reference)
    assert list(module.state_dict()) == list(reference.state_dict())
    assert all(a is b for a, b in zip(module.parameters(), reference.parameters(), strict=True))
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
        assert getattr(module, name) == getattr(reference, name)
    for name in ("in_proj_weight", "q_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
        assert getattr(module, name) is getattr(reference, name)
    assert module._qkv_same_embed_dim is False
    assert list(reference.named_modules()) == before


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


@pytest.mark.parametrize("copied", COPIES)
@pytest.mark.parametrize("options", OPTIONS)
def test_copies(options: str, copied: str) -> None:
    module = attention_module(attention(dropout=0.3, **OPTIONS[options]))
    tensors, arguments = inputs(module, "sequence first"), masks("padding", "sequence first", LENGTH, SOURCE, HEADS)
    other = COPIES[copied](module)
    assert list(other.state_dict()) == list(module.state_dict())
    assert other.num_heads == module.num_heads
    assert other._qkv_same_embed_dim is False
    assert (other.in_proj_bias is None) == (module.in_proj_bias is None)
    for training in (False, True):
        outputs = []
        for call in (module, other):
            torch.manual_seed(0)
            outputs.append(call.train(training)(*tensors, **arguments))
        assert_equal(*outputs)


@pytest.mark.parametrize("mask", ["none", "causal", "3-D and padding"])
@pytest.mark.parametrize("weights", WEIGHTS, ids=["no weights", "averaged", "per head"])
def test_compile_and_export(mask: str, weights: dict[str, Any]) -> None:
    torch.compiler.reset()
    module = attention_module(attention(dropout=0.2)).eval()
    tensors = tuple(tensor.detach() for tensor in inputs(module, "sequence first"))
    arguments = masks(mask, "sequence first", LENGTH, SOURCE, HEADS) | weights
    expected = module(*tensors, **arguments)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_equal(compiled(*tensors, **arguments), expected)
    exported = torch.export.export(Holder(module), tensors, arguments)
    assert_equal(exported.module()(*tensors, **arguments), expected)


class Holder(nn.Module):
    """Calls an attention: torch.export takes the keyword arguments of a graph module for positional ones."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *tensors: Tensor, **arguments: Any) -> Any:
        return self.inner(*tensors, **arguments)


# The layers of PyTorch that hold an attention.


def replaced(model: nn.Module) -> nn.Module:
    """A copy of a model on the same tensors with every attention decomposed."""
    model = share_tensors_copy(model)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(parent, name, attention_module(child))
    disable_fast_paths(model)
    return model


def count_calls(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the attentions of a model as they are called. Hooks would do, but they turn the fast path off."""
    calls: list[str] = []

    def counted(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: calls.append(name) or forward(*args, **kwargs)

    for name, module in model.named_modules():
        if hasattr(module, "num_heads"):
            monkeypatch.setattr(module, "forward", counted(name, module.forward))
    return calls


def sequences(length: int = LENGTH) -> Tensor:
    return torch.randn(BATCH, length, EMBED)


def padding(length: int) -> Tensor:
    mask = torch.zeros(BATCH, length, dtype=torch.bool)
    mask[1, length - 2 :] = True
    return mask


def causal(length: int) -> Tensor:
    return nn.Transformer.generate_square_subsequent_mask(length)


ENCODER_MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "padding": {"src_key_padding_mask": padding(LENGTH)},
    "causal": {"src_mask": causal(LENGTH), "is_causal": True},
    "causal, no hint": {"src_mask": causal(LENGTH) == -torch.inf, "src_key_padding_mask": padding(LENGTH)},
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mask", ENCODER_MASKS)
@pytest.mark.parametrize(
    "options", [{"batch_first": True}, {"norm_first": True, "activation": "gelu"}, {"bias": False}]
)
def test_encoder_layer(options: dict[str, Any], mask: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = nn.TransformerEncoderLayer(EMBED, HEADS, 16, dropout=0.0, **options).train(training)
    layer, x, arguments = replaced(reference), sequences(), ENCODER_MASKS[mask]
    x = x if options.get("batch_first") else x.transpose(0, 1)
    expected_calls, calls = (count_calls(model, monkeypatch) for model in (reference, layer))
    with torch.no_grad():
        assert_equal(layer(x, **arguments), reference(x, **arguments))
    assert calls == ["self_attn"]
    # The first options let PyTorch's own layer take the fast path in evaluation mode: what must not happen to ours.
    fast = not training and options.get("batch_first", False)
    assert expected_calls == ([] if fast else ["self_attn"])


def test_export_with_any_batch_and_length() -> None:
    layer = replaced(nn.TransformerEncoderLayer(EMBED, HEADS, 16, batch_first=True)).eval()
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2)}
    arguments = {"src_key_padding_mask": padding(LENGTH)}
    shapes = {"src": sizes, "src_key_padding_mask": sizes}
    exported = torch.export.export(layer, (sequences(),), arguments, dynamic_shapes=shapes).module()
    x, arguments = torch.randn(5, 7, EMBED), {"src_key_padding_mask": torch.rand(5, 7) > 0.8}
    assert_equal(exported(x, **arguments), layer(x, **arguments))


def test_decoder_layer() -> None:
    reference = nn.TransformerDecoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)
    layer, x, memory = replaced(reference), sequences(), sequences(SOURCE)
    arguments = {"tgt_mask": causal(LENGTH), "tgt_is_causal": True, "memory_key_padding_mask": padding(SOURCE)}
    for training in (True, False):
        with torch.no_grad():
            actual = layer.train(training)(x, memory, **arguments)
            assert_equal(actual, reference.train(training)(x, memory, **arguments))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_transformer(masked: bool, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = nn.Transformer(EMBED, HEADS, 2, 2, 16, dropout=0.0, batch_first=True).train(training)
    model = copy.deepcopy(replaced(reference))  # the copy, too, reads batch_first
    assert list(model.state_dict()) == list(reference.state_dict())
    source, target, arguments = sequences(SOURCE), sequences(), {}
    if masked:
        hidden = padding(SOURCE)
        arguments = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
        arguments["tgt_mask"] = causal(LENGTH) == -torch.inf
    calls = count_calls(model, monkeypatch)
    with torch.no_grad(), no_fast_path():
        expected = reference(source, target, **arguments)
    with torch.no_grad():
        assert_equal(model(source, target, **arguments), expected)
    assert len(calls) == 6
    assert len(set(calls)) == 6


def test_transformer_gradients() -> None:
    reference = nn.Transformer(EMBED, HEADS, 1, 1, 16, dropout=0.0, batch_first=True)
    source, target = sequences(SOURCE), sequences()
    found = []
    for model in (replaced(reference), reference):
        model(source, target).square().sum().backward()
        found.append(parameter_gradients(reference))
    assert found[0].keys() == dict(reference.named_parameters()).keys()
    assert_equal(found[0], found[1])


# The pass.


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


def decomposed(model: nn.Module) -> fx.GraphModule:
    gm = trace(model)
    assert DecomposeAttention()(gm).modified
    return gm


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_pass_keeps_results_and_keys(training: bool, dropout: float) -> None:
    model = Block(dropout).train(training)
    gm, tensors = decomposed(model), block_inputs()
    outputs = []
    for call in (gm, model):
        torch.manual_seed(3)
        outputs.append(call(*tensors))
    assert_equal(*outputs)
    assert {key for key, _ in gm.named_parameters()} == {key for key, _ in model.named_parameters()}
    assert not any(isinstance(module, nn.MultiheadAttention) for module in gm.modules())
    assert isinstance(outputs[0][3], tuple)
    assert not DecomposeAttention()(gm).modified


def test_pass_emits_one_linear_for_each_projection() -> None:
    gm = decomposed(Block())
    functions = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert functions.count(attention_core) == 4
    assert functions.count(nn.functional.linear) == 16
    # The weights are views of the packed parameter, in the order query, key, value.
    linear = next(node for node in gm.graph.nodes if node.target is nn.functional.linear)
    assert str(linear.args[1].args[0].args[0].target) == "own.in_proj_weight"
    assert "own" in linear.meta["nn_module_stack"]


def test_training_flag_follows_the_mode() -> None:
    gm, tensors = decomposed(Block(dropout=0.5)), block_inputs()
    assert not torch.equal(gm(*tensors)[0], gm(*tensors)[0])
    gm.eval()
    assert torch.equal(gm(*tensors)[0], gm(*tensors)[0])


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_the_result(copied: str) -> None:
    gm, tensors = decomposed(Block(dropout=0.2)), block_inputs()
    other = COPIES[copied](gm).eval()
    assert_equal(other(*tensors), gm.eval()(*tensors))
    assert set(other.state_dict()) == set(gm.state_dict())


def test_result_compiles_and_exports() -> None:
    torch.compiler.reset()
    gm, tensors = decomposed(Block(dropout=0.2)).eval(), block_inputs()
    expected = gm(*tensors)
    assert_equal(torch.compile(gm, backend="aot_eager", fullgraph=True)(*tensors), expected)
    assert_equal(torch.export.export(gm, tensors).module()(*tensors), expected)


class Same(Holder):
    def forward(self, x: Tensor) -> Any:
        return self.inner(x, x, x)


def test_traced_again_it_stays_one_node() -> None:
    model, x = Same(attention_module(attention())), torch.randn(LENGTH, BATCH, EMBED)
    gm = fx.symbolic_trace(model)
    assert [node.target for node in gm.graph.nodes].count(attention_core) == 1
    assert_equal(gm(x), model(x))


def test_tied_attention_is_replaced_in_every_place() -> None:
    model = nn.Module()
    model.first = model.second = attention()
    graph = fx.Graph()
    x = graph.placeholder("x")
    x = graph.call_function(lambda pair: pair[0], (graph.call_module("first", (x, x, x)),))
    graph.output(graph.call_module("second", (x, x, x)))
    gm, x = fx.GraphModule(model, graph), torch.randn(LENGTH, BATCH, EMBED)
    expected = gm(x)
    assert DecomposeAttention()(gm).modified
    assert gm.first is gm.second
    assert_equal(gm(x), expected)


class Scaled(nn.MultiheadAttention):
    """Another computation in the same class hierarchy."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out * 2, weights


class Unchanged(nn.MultiheadAttention):
    """A subclass that computes the same."""


def hooked() -> nn.MultiheadAttention:
    module = attention()
    module.register_forward_hook(lambda *_: None)
    return module


def parametrized() -> nn.MultiheadAttention:
    module = attention()
    nn.utils.parametrize.register_parametrization(module, "in_proj_weight", nn.Identity())
    return module


ALONE: dict[str, tuple[Callable[[], nn.MultiheadAttention], str]] = {
    "own forward": (lambda: Scaled(EMBED, HEADS), "it has a forward of its own"),
    "hooks": (hooked, "it has hooks"),
    "parametrized": (parametrized, "computed by a parametrization"),
}


@pytest.mark.parametrize("kind", ALONE)
def test_left_alone(kind: str) -> None:
    build, reason = ALONE[kind]
    module = build()
    assert reason in (why_not_decomposed(module) or "")
    with pytest.raises(TransformError, match=reason):
        attention_module(module)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("attention", (x, x, x)))
    gm = fx.GraphModule({"attention": module}, graph)
    assert not DecomposeAttention()(gm).modified
    assert gm.attention is module


def test_attention_of_a_module_that_is_called_as_a_whole_stays() -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, batch_first=True)
    gm = fx.symbolic_trace(nn.Sequential(layer))
    assert not DecomposeAttention()(gm).modified
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("attention", (graph.call_module("layer", (x,)),) * 3))
    gm = fx.GraphModule({"layer": layer, "attention": layer.self_attn}, graph)
    assert not DecomposeAttention()(gm).modified


def test_subclass_that_computes_the_same_is_decomposed() -> None:
    reference, x = Unchanged(EMBED, HEADS), torch.randn(LENGTH, BATCH, EMBED)
    assert_equal(attention_module(reference)(x, x, x), reference(x, x, x))


def test_parametrized_output_projection_stays_parametrized() -> None:
    reference, x = attention(), torch.randn(LENGTH, BATCH, EMBED)
    nn.utils.parametrizations.weight_norm(reference.out_proj)
    module = attention_module(reference)
    with torch.no_grad():
        reference.out_proj.parametrizations.weight.original0.mul_(3)
    for other in (module, copy.deepcopy(module)):
        assert_equal(other(x, x, x), reference(x, x, x))
        assert list(other.state_dict()) == list(reference.state_dict())


def test_every_projection_is_tiled() -> None:
    gm, tensors = decomposed(Block()), block_inputs()
    config = TilingConfig(p=4, min_size=0)
    TileWeights(config)(gm)
    records = {record.name: record for record in get_records(gm) or ()}
    own = {f"own.in_proj_weight_{i}" for i in range(3)} | {"own.out_proj"}
    cross = {f"cross.{x}_proj_weight" for x in "qkv"} | {"cross.out_proj"}
    assert records.keys() == {"embed"} | own | cross
    assert all(record.spec for record in records.values())
    expected = gm.eval()(*tensors)
    assert LowerTiles()(gm).modified
    oracle.assert_close(gm(*tensors), expected, rtol=1e-5)
    assert not any(key.endswith("proj_weight") for key in gm.state_dict())
