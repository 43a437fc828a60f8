"""The layers of PyTorch that hold an attention, with a graph module in its place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tbn_compiler.graph.copying import share_tensors_copy
from tbn_compiler.passes.expose_attention import attention_module, disable_fast_paths
from tests import oracle
from tests.passes.attention import (
    EMBED,
    HEADS,
    LENGTH,
    SOURCE,
    assert_near,
    causal,
    padding,
    parameter_gradients,
    sequences,
)


def replaced(model: nn.Module) -> nn.Module:
    """A copy of a model on the same tensors with a graph in the place of every attention."""
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
        assert_near(layer(x, **arguments), reference(x, **arguments))
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
    assert_near(exported(x, **arguments), layer(x, **arguments))


def test_decoder_layer() -> None:
    reference = nn.TransformerDecoderLayer(EMBED, HEADS, 16, dropout=0.0, batch_first=True)
    layer, x, memory = replaced(reference), sequences(), sequences(SOURCE)
    arguments = {"tgt_mask": causal(LENGTH), "tgt_is_causal": True, "memory_key_padding_mask": padding(SOURCE)}
    for training in (True, False):
        with torch.no_grad():
            actual = layer.train(training)(x, memory, **arguments)
            assert_near(actual, reference.train(training)(x, memory, **arguments))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_transformer(masked: bool, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = nn.Transformer(EMBED, HEADS, 2, 2, 16, dropout=0.0, batch_first=True).train(training)
    model = copy.deepcopy(replaced(reference))  # the copy, too, reads batch_first
    assert list(oracle.tensors(model)) == list(reference.state_dict())
    source, target, arguments = sequences(SOURCE), sequences(), {}
    if masked:
        hidden = padding(SOURCE)
        arguments = {"src_key_padding_mask": hidden, "memory_key_padding_mask": hidden}
        arguments["tgt_mask"] = causal(LENGTH) == -torch.inf
    calls = count_calls(model, monkeypatch)
    expected = reference(source, target, **arguments)  # with gradients, for which there is no fast path
    with torch.no_grad():
        assert_near(model(source, target, **arguments), expected)
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
    assert_near(found[0], found[1])
