"""Attentions in training on tiles, and lowered."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig
from tbn_compiler.graph.attention import attention_layer
from tbn_compiler.graph.records import get_records, graph_parts
from tests import oracle
from tests.oracle import both_forms
from tests.passes.attention import (
    BATCH,
    CONFIG,
    EMBED,
    LENGTH,
    SOURCE,
    Block,
    Same,
    assert_near,
    assert_same,
    attention,
    block_inputs,
    parameter_gradients,
    sequences,
)


def check_all_tiled(module: nn.Module) -> None:
    records = {record.name: record for record in get_records(module) or ()}
    own = {f"own.in_proj_weight_{i}" for i in range(3)} | {"own.out_proj"}
    cross = {f"cross.{x}_proj_weight" for x in "qkv"} | {"cross.out_proj"}
    assert records.keys() == {"embed"} | own | cross
    assert all(record.spec for record in records.values())


def attention_nodes(module: nn.Module) -> list[fx.Node]:
    parts = [part for _, part in graph_parts(module)]
    return [node for part in parts for node in part.graph.nodes if node.target is attention_layer]


@both_forms
def test_transform_tiles_every_projection(transform: Any) -> None:
    qat, tensors = transform(Block(), CONFIG).eval(), block_inputs()
    check_all_tiled(qat)
    assert not attention_nodes(qat)  # its rows repeat: its linears multiply each once
    assert attention_nodes(transform(Block(), CONFIG.replace(replicate="roll")))
    packed = tbn.lower(qat)
    assert not attention_nodes(packed)
    oracle.assert_close(packed(*tensors), qat(*tensors), rtol=1e-5)
    assert not any(key.endswith("proj_weight") for key in packed.state_dict())


@both_forms
@pytest.mark.parametrize("training", [True, False])
def test_at_strength_0_it_is_the_float_model(training: bool, transform: Any) -> None:
    model = Block(dropout=0.3).train(training)
    qat, tensors = transform(model, TilingConfig(p=4, min_size=0, gradual=True)), block_inputs()
    found = []
    for call in (qat, model):
        torch.manual_seed(5)
        outputs = oracle.flatten(call(*tensors))
        sum(output.square().sum() for output in outputs).backward()
        found.append((outputs, parameter_gradients(model)))
    assert_same(*found)


@both_forms
def test_transformed_again_it_stays(transform: Any) -> None:
    qat, tensors = transform(Block(), CONFIG), block_inputs()
    again = tbn.transform(qat, CONFIG)
    assert get_records(again) == get_records(qat)
    assert [part.code for _, part in graph_parts(again)] == [part.code for _, part in graph_parts(qat)]
    assert_same(again(*tensors), qat(*tensors))


@both_forms
def test_projections_that_were_left_are_tiled_later(transform: Any) -> None:
    model, tensors = Block(), block_inputs()
    some = transform(model, TilingConfig(p=4, min_size=0, float_layers=("own.in_proj*", "cross.k_proj*")))
    assert sum(record.spec is None for record in get_records(some) or ()) == 4
    qat = tbn.transform(some, CONFIG)
    check_all_tiled(qat)
    packed = tbn.lower(qat)
    oracle.assert_close(packed(*tensors), qat.eval()(*tensors), rtol=1e-5)


@both_forms
def test_init_from_float_sets_the_alphas_of_every_projection(transform: Any) -> None:
    model = Block()
    parameters = dict(tbn.init_from_float(transform(model, CONFIG)).named_parameters())
    for i, weight in enumerate(model.own.in_proj_weight.chunk(3)):
        assert torch.equal(parameters[f"own.in_proj_weight_{i}_alpha_source"], weight)
    assert torch.equal(parameters["own.out_proj.alpha_source"], model.own.out_proj.weight)
    assert torch.equal(parameters["cross.k_proj_weight_alpha_source"], model.cross.k_proj_weight)


@both_forms
def test_summary_counts_the_projections(transform: Any) -> None:
    qat, tensors = transform(Block(), CONFIG), block_inputs()
    for example in (None, tensors):
        rows, lowered = (tbn.summary(module, example).layers for module in (qat, tbn.lower(qat)))
        assert [(row.name, row.macs, row.macs_tiled) for row in rows] == [
            (row.name, row.macs, row.macs_tiled) for row in lowered
        ]
    rows = {row.name: row for row in rows}
    assert rows["own.in_proj_weight_1"].macs == 2 * BATCH * LENGTH * EMBED * EMBED  # called twice
    assert rows["own.out_proj"].macs == 2 * BATCH * LENGTH * EMBED * EMBED
    assert rows["cross.k_proj_weight"].macs == 2 * BATCH * SOURCE * 6 * EMBED
    assert rows["cross.out_proj"].macs_tiled * 4 == rows["cross.out_proj"].macs


@pytest.mark.parametrize("name", ["own", "cross"])
def test_weights_can_be_read(name: str) -> None:
    """What other code asks of them, such as a dtype, is there in training and after lowering."""
    model = Block()
    qat = tbn.transform(model, CONFIG)
    module, packed = qat.get_submodule(name), tbn.lower(qat).get_submodule(name)
    float_module = model.get_submodule(name)
    for key in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        weight = getattr(float_module, key)
        assert getattr(module, key) is weight
        other = getattr(packed, key)
        assert (other is None) == (weight is None)
        if weight is not None:
            assert (other.shape, other.dtype) == (weight.shape, weight.dtype)
            assert other.unique().numel() > 1
    assert module.out_proj.weight is float_module.out_proj.weight
    assert packed.out_proj.weight.shape == float_module.out_proj.weight.shape
    with pytest.raises(AttributeError, match="proj_bias_weight"):
        _ = packed.proj_bias_weight


def test_decoded_weights_are_those_in_use() -> None:
    model = Block()
    packed, tensors = tbn.lower(tbn.transform(model, CONFIG)), block_inputs()
    reference = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if name.endswith("weight"):
                owner, _, key = name.rpartition(".")
                parameter.copy_(getattr(packed.get_submodule(owner), key))
    oracle.assert_close(packed(*tensors), reference(*tensors), rtol=1e-5)


class Penalised(nn.Module):
    """Code that multiplies with the weights of an attention, and one that calls its forward by another name."""

    def __init__(self, packed: bool) -> None:
        super().__init__()
        sizes = {} if packed else {"kdim": 6, "vdim": 6}
        self.attention = attention(batch_first=True, **sizes)
        self.name = "in_proj_weight" if packed else "k_proj_weight"
        self.read = packed

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        weight = self.attention.in_proj_weight if self.read else self.attention.k_proj_weight
        return self.attention(x, memory, memory)[0] + nn.functional.linear(memory, weight).sum()


@pytest.mark.parametrize("packed", [True, False])
def test_weights_that_other_code_reads_are_read_tiled(packed: bool) -> None:
    model = Penalised(packed)
    x, memory = sequences(), torch.randn(BATCH, SOURCE, EMBED if packed else 6)
    qat = tbn.transform(model, CONFIG).eval()
    assert type(qat.attention).forward is nn.MultiheadAttention.forward
    assert all(record.spec for record in get_records(qat) or ())
    assert qat.attention.in_proj_weight is None or qat.attention.in_proj_weight.unique().numel() == 2
    lowered = tbn.lower(qat)
    oracle.assert_close(lowered(x, memory), qat(x, memory), rtol=1e-5)
    again = tbn.transform(qat, CONFIG)
    assert get_records(again) == get_records(qat)
    assert_same(again(x, memory), qat(x, memory))
    part = tbn.transform(qat.attention, CONFIG)  # whose readers are not seen
    assert_same(part(x, memory, memory), qat.attention(x, memory, memory))


def test_a_kept_method_reads_tiled_weights() -> None:
    model, x = Same(attention()), torch.randn(LENGTH, BATCH, EMBED)
    model.attend = model.inner.forward
    qat = tbn.transform(model, CONFIG)
    assert_near(qat.attend(x, x, x), qat.inner(x, x, x))
    assert not torch.allclose(qat.attend(x, x, x)[0], model.attend(x, x, x)[0])
