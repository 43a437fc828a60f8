from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from tbn_compiler import TBNError, TilingConfig
from tbn_compiler.graph.attention import attention_core, attention_layer
from tbn_compiler.graph.records import get_records
from tbn_compiler.passes import ExposeAttention, LowerTiles, Scope, TileWeights
from tbn_compiler.passes.decompose_attention import DecomposeAttention
from tbn_compiler.passes.expose_attention import attention_module
from tests import oracle
from tests.passes.attention import (
    BATCH,
    EMBED,
    HEADS,
    LAYOUTS,
    LENGTH,
    MASKS,
    OPTIONS,
    SOURCE,
    WEIGHTS,
    Block,
    assert_near,
    attention,
    block_inputs,
    inputs,
    masks,
    results,
    traced,
)


def decomposed(reference: nn.MultiheadAttention) -> Any:
    module = attention_module(reference)
    assert DecomposeAttention()(module).modified
    return module


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_pytorch(options: str, layout: str, mask: str) -> None:
    reference = attention(batch_first=layout == "batch first", **OPTIONS[options])
    module, tensors = decomposed(reference), inputs(reference, layout)
    for name, weights in WEIGHTS.items():
        arguments = masks(mask, layout, LENGTH, SOURCE, reference.num_heads) | weights
        assert_near(results(module, tensors, arguments), results(reference, tensors, arguments))
        assert (module(*tensors, **arguments)[1] is None) == (name == "no weights")


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_dropout_follows_the_mode_and_the_generator(options: dict[str, Any], weights: dict[str, Any]) -> None:
    reference = attention(dropout=0.4, **options)
    module, tensors = decomposed(reference), inputs(reference, "sequence first")
    for training in (True, False, True):
        outputs = []
        for call in (module, reference):
            torch.manual_seed(7)
            outputs.append(results(call.train(training), tensors, weights))
        assert_near(*outputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", ["padding", "causal", "3-D and padding"])
def test_other_dtypes(mask: str, dtype: torch.dtype) -> None:
    reference = attention(dtype=dtype)
    tensors = tuple(tensor.detach().to(dtype) for tensor in inputs(reference, "sequence first"))
    arguments = masks(mask, "sequence first", LENGTH, SOURCE, HEADS)
    actual, expected = decomposed(reference)(*tensors, **arguments), reference(*tensors, **arguments)
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_autocast(weights: dict[str, Any]) -> None:
    reference = attention(add_bias_kv=True)
    tensors = inputs(reference, "sequence first")
    arguments = masks("3-D and padding", "sequence first", LENGTH, SOURCE, HEADS) | weights
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = decomposed(reference)(*tensors, **arguments), reference(*tensors, **arguments)
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def test_bad_arguments() -> None:
    q, k = torch.randn(LENGTH, BATCH, EMBED), torch.randn(SOURCE, BATCH, EMBED)
    reference = attention()
    module = decomposed(reference)
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


# The pass.


def decomposed_block(dropout: float = 0.0) -> tuple[nn.Module, fx.GraphModule]:
    model = Block(dropout)
    gm = traced(model)
    assert ExposeAttention()(gm).modified
    assert DecomposeAttention()(gm).modified
    return model, gm


def test_pass_keeps_results_and_keys() -> None:
    (model, gm), tensors = decomposed_block(), block_inputs()
    outputs = [call(*tensors) for call in (gm, model)]
    assert_near(*outputs)
    assert {key for key, _ in gm.named_parameters()} == {key for key, _ in model.named_parameters()}
    assert isinstance(outputs[0][3], tuple)
    assert not DecomposeAttention()(gm).modified


def test_pass_emits_one_linear_for_each_projection() -> None:
    _, gm = decomposed_block()
    functions = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert functions.count(attention_core) == 4
    assert functions.count(nn.functional.linear) == 16
    assert attention_layer not in functions
    # The weights are views of the packed parameter, in the order query, key, value.
    linear = next(node for node in gm.graph.nodes if node.target is nn.functional.linear)
    assert str(linear.args[1].args[0].args[0].target) == "own.in_proj_weight"
    assert "own" in linear.meta["nn_module_stack"]


def test_training_flag_follows_the_mode() -> None:
    (_, gm), tensors = decomposed_block(dropout=0.5), block_inputs()
    assert not torch.equal(gm(*tensors)[0], gm(*tensors)[0])
    gm.eval()
    assert torch.equal(gm(*tensors)[0], gm(*tensors)[0])


def test_result_compiles_and_exports() -> None:
    torch.compiler.reset()
    (_, gm), tensors = decomposed_block(dropout=0.2), block_inputs()
    expected = gm.eval()(*tensors)
    assert_near(torch.compile(gm, backend="aot_eager", fullgraph=True)(*tensors), expected)
    assert_near(torch.export.export(gm, tensors).module()(*tensors), expected)


def test_traced_again_it_stays_one_node() -> None:
    (model, gm), tensors = decomposed_block(), block_inputs()
    again = fx.symbolic_trace(gm)
    assert [node.target for node in again.graph.nodes].count(attention_core) == 4
    assert_near(again(*tensors), model(*tensors))


def test_tiled_projections_are_lowered() -> None:
    gm, tensors = traced(Block()), block_inputs()
    ExposeAttention()(gm)
    TileWeights(Scope(TilingConfig(p=4, min_size=0)))(gm)
    assert all(record.spec for record in get_records(gm) or ())
    expected = gm.eval()(*tensors)
    with pytest.raises(
        TBNError, match="LowerTiles requires that every attention is decomposed into linears: node atten"
    ):
        LowerTiles()(gm)
    assert DecomposeAttention()(gm).modified
    assert LowerTiles()(gm).modified
    oracle.assert_close(gm(*tensors), expected, rtol=1e-5)
    assert not any(key.endswith("proj_weight") for key in gm.state_dict())
