from __future__ import annotations

import pytest
import torch
from torch import nn

from tbn_compiler import TBNError, TilingConfig
from tbn_compiler.graph.attention import attention_core, attention_layer
from tbn_compiler.graph.records import get_records
from tbn_compiler.passes import ExposeAttention, LowerTiles, Scope, TileWeights
from tbn_compiler.passes.decompose_attention import DecomposeAttention
from tests import oracle
from tests.passes.attention import (
    BATCH,
    EMBED,
    LENGTH,
    LINEARS,
    SOURCE,
    Block,
    assert_near,
    attention,
    block_inputs,
    traced,
)


def test_bad_arguments() -> None:
    q, k = torch.randn(LENGTH, BATCH, EMBED), torch.randn(SOURCE, BATCH, EMBED)
    reference = attention()
    module = LINEARS.module(reference)
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


def test_pass_keeps_results_and_keys() -> None:
    model, tensors = Block(), block_inputs()
    gm = LINEARS.graph(model)
    outputs = [call(*tensors) for call in (gm, model)]
    assert_near(*outputs)
    assert {key for key, _ in gm.named_parameters()} == {key for key, _ in model.named_parameters()}
    assert isinstance(outputs[0][3], tuple)
    assert not DecomposeAttention()(gm).modified


def test_pass_emits_one_linear_for_each_projection() -> None:
    gm = LINEARS.graph(Block())
    functions = [node.target for node in gm.graph.nodes if node.op == "call_function"]
    assert functions.count(attention_core) == 4
    assert functions.count(nn.functional.linear) == 16
    assert attention_layer not in functions
    # The weights are views of the packed parameter, in the order query, key, value.
    linear = next(node for node in gm.graph.nodes if node.target is nn.functional.linear)
    assert str(linear.args[1].args[0].args[0].target) == "own.in_proj_weight"
    assert "own" in linear.meta["nn_module_stack"]


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
