"""What holds for an attention as one function and as linears: exactly for the first, up to rounding for the second."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from tests.passes.attention import (
    HEADS,
    LAYOUTS,
    LENGTH,
    LINEARS,
    MASKS,
    ONE_FUNCTION,
    OPTIONS,
    SOURCE,
    WEIGHTS,
    Block,
    Form,
    assert_near,
    attention,
    block_inputs,
    inputs,
    masks,
    results,
)

forms = pytest.mark.parametrize("form", [ONE_FUNCTION, LINEARS], ids=["one function", "linears"])
weightings = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


# A module in the place of an attention.


@forms
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_pytorch(options: str, layout: str, mask: str, form: Form) -> None:
    reference = attention(batch_first=layout == "batch first", **OPTIONS[options])
    module, tensors = form.module(reference), inputs(reference, layout)
    for name, weights in WEIGHTS.items():
        arguments = masks(mask, layout, LENGTH, SOURCE, reference.num_heads) | weights
        form.assert_equal(results(module, tensors, arguments), results(reference, tensors, arguments))
        assert (module(*tensors, **arguments)[1] is None) == (name == "no weights")


@forms
@weightings
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_dropout_follows_the_mode_and_the_generator(
    options: dict[str, Any], weights: dict[str, Any], form: Form
) -> None:
    reference = attention(dropout=0.4, **options)
    module, tensors = form.module(reference), inputs(reference, "sequence first")
    for training in (True, False, True):
        outputs = []
        for call in (module, reference):
            torch.manual_seed(7)
            outputs.append(results(call.train(training), tensors, weights))
        form.assert_equal(*outputs)
        again = module(*tensors, **weights)[0]
        assert torch.equal(again, outputs[0][0]) != training


@forms
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("mask", ["padding", "causal", "3-D and padding"])
def test_other_dtypes(mask: str, dtype: torch.dtype, form: Form) -> None:
    reference = attention(dtype=dtype)
    tensors = tuple(tensor.detach().to(dtype) for tensor in inputs(reference, "sequence first"))
    arguments = masks(mask, "sequence first", LENGTH, SOURCE, HEADS)
    actual, expected = form.module(reference)(*tensors, **arguments), reference(*tensors, **arguments)
    form.assert_equal(actual, expected, 1e-12 if dtype == torch.float64 else 0.05)


@forms
@weightings
def test_autocast(weights: dict[str, Any], form: Form) -> None:
    reference = attention(add_bias_kv=True)
    tensors = inputs(reference, "sequence first")
    arguments = masks("3-D and padding", "sequence first", LENGTH, SOURCE, HEADS) | weights
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = form.module(reference)(*tensors, **arguments), reference(*tensors, **arguments)
    form.assert_equal(actual, expected, 0.05)


# A graph that calls attentions.


@forms
def test_training_flag_follows_the_mode(form: Form) -> None:
    gm, tensors = form.graph(Block(dropout=0.5)), block_inputs()
    assert not torch.equal(gm(*tensors)[0], gm(*tensors)[0])
    gm.eval()
    assert torch.equal(gm(*tensors)[0], gm(*tensors)[0])


@forms
def test_result_compiles_and_exports(form: Form) -> None:
    torch.compiler.reset()
    gm, tensors = form.graph(Block(dropout=0.2)).eval(), block_inputs()
    expected = gm(*tensors)
    assert_near(torch.compile(gm, backend="aot_eager", fullgraph=True)(*tensors), expected)
    assert_near(torch.export.export(gm, tensors).module()(*tensors), expected)


@forms
def test_traced_again_calls_stay_one_node(form: Form) -> None:
    model, tensors = Block(), block_inputs()
    again = fx.symbolic_trace(form.graph(model))
    assert [node.target for node in again.graph.nodes].count(form.function) == 4
    form.assert_equal(again(*tensors), model(*tensors))
