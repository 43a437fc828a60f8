from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import TransformError
from tbn_compiler.graph.attention import attention_layer
from tbn_compiler.graph.layers import layer_calls
from tbn_compiler.passes.expose_attention import (
    ExposeAttention,
    attention_module,
    why_not_decomposed,
)
from tests import oracle
from tests.passes.attention import (
    BATCH,
    CONFIG,
    COPIES,
    EMBED,
    HEADS,
    LENGTH,
    ONE_FUNCTION,
    OPTIONS,
    SOURCE,
    WEIGHTS,
    Block,
    Holder,
    Same,
    assert_near,
    assert_same,
    attention,
    block_inputs,
    inputs,
    masks,
    parameter_gradients,
    sequences,
)

# The graph module that takes an attention's place.


@pytest.mark.parametrize("same", ["query, key and value", "key and value", "query and key", "none"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_saves_what_pytorch_saves(batch_first: bool, training: bool, same: str) -> None:
    """Inputs that are one tensor are projected together: gradients round so, and it is saved once."""
    reference = attention(batch_first=batch_first, dropout=0.3).train(training)
    module, (x, y, z) = attention_module(reference), (sequences().requires_grad_() for _ in range(3))
    tensors = {
        "query, key and value": (x, x, x),
        "key and value": (x, y, y),
        "query and key": (x, x, y),
        "none": (x, y, z),
    }[same]
    found, saved = [], []
    for call in (module, reference):
        shapes: list[torch.Size] = []
        torch.manual_seed(7)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, shapes=shapes: shapes.append(t.shape) or t, lambda t: t
        ):
            output = call(*tensors)[0]
        output.square().sum().backward()
        gradients = [tensor.grad for tensor in (x, y, z)]
        for tensor in (x, y, z):
            tensor.grad = None
        found.append([output, gradients, parameter_gradients(reference)])  # the very same parameters
        saved.append(sorted(shape for shape in shapes if shape.numel() % BATCH == 0))
    assert_same(*found)
    assert saved[0] == saved[1]


@pytest.mark.parametrize("layout", ["batch first", "unbatched"])
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_the_parameters(options: str, layout: str) -> None:
    reference = attention(batch_first=True, **OPTIONS[options])
    module, tensors = attention_module(reference), inputs(reference, layout)
    for arguments in WEIGHTS.values():
        found = []
        for call in (module, reference):
            sum((output * output).sum() for output in call(*tensors, **arguments) if output is not None).backward()
            found.append(parameter_gradients(reference))
        assert found[0].keys() == found[1].keys() == dict(reference.named_parameters()).keys()
        assert_same(*found)


@pytest.mark.parametrize("mask", ["none", "padding", "causal", "3-D and padding"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_self_attention_equals_the_fast_path(mask: str, weights: dict[str, Any]) -> None:
    reference = attention(batch_first=True).eval()
    module, x = attention_module(reference), torch.randn(BATCH, LENGTH, EMBED)
    arguments = masks(mask, "batch first", LENGTH, LENGTH, HEADS) | weights
    with torch.no_grad():
        assert_near(module(x, x, x, **arguments), reference(x, x, x, **arguments))


def test_dropout_starts_in_the_mode_of_the_attention() -> None:
    assert not attention_module(attention(dropout=0.5).eval()).tbn_training_flag()
    assert attention_module(attention(dropout=0.5)).tbn_training_flag()
    assert not hasattr(attention_module(attention()), "tbn_training_flag")


class Noted(Tensor):
    """Notes the functions that are called with it."""

    functions: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.functions.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def test_tensor_subclasses_see_what_they_see_of_the_float_layer() -> None:
    reference = attention()
    tensors, found = [tensor.detach().as_subclass(Noted) for tensor in inputs(reference, "sequence first")], []
    for call in (attention_module(reference), reference):
        Noted.functions.clear()
        assert all(type(output) is Noted for output in call(*tensors))
        found.append([function.__name__ for function in Noted.functions if "attention" in function.__name__])
    assert found[0] == found[1] == ["multi_head_attention_forward"]


def test_bad_arguments() -> None:
    q, k = torch.randn(LENGTH, BATCH, EMBED), torch.randn(SOURCE, BATCH, EMBED)
    reference = attention()
    for call in (attention_module(reference), reference):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            call(q, k, k, is_causal=True)
        with pytest.raises(AssertionError, match=r"expected `key` and `value` to be 3-D"):
            call(q, k[:, 0], k[:, 0])
        with pytest.raises(AssertionError, match=r"was expecting embedding dimension of 8, but got 6"):
            call(q[..., :6], k, k)
        with pytest.raises(RuntimeError, match=r"2D attn_mask is .*\[5, 4\].*but should be \(4, 5\)"):
            call(q, k, k, attn_mask=torch.zeros(SOURCE, LENGTH))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_refused() -> None:
    x = torch.nested.nested_tensor([torch.randn(2, EMBED), torch.randn(3, EMBED)])
    with pytest.raises(RuntimeError, match="attention on tiled weights takes no nested tensors"):
        attention_module(attention(batch_first=True)).eval()(x, x, x)


@pytest.mark.parametrize("options", OPTIONS)
def test_module_has_the_tensors_and_attributes_of_the_attention(options: str) -> None:
    reference = attention(dropout=0.1, **OPTIONS[options])
    before = list(reference.named_modules())
    module = attention_module(reference)
    assert list(oracle.tensors(module)) == list(reference.state_dict())
    assert all(a is b for a, b in zip(module.parameters(), reference.parameters(), strict=True))
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
        assert getattr(module, name) == getattr(reference, name)
    for name in ("in_proj_weight", "q_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
        assert getattr(module, name) is getattr(reference, name)
    assert module._qkv_same_embed_dim is False
    assert list(reference.named_modules()) == before


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
        assert_same(*outputs)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "3-D and padding"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_compile_and_export(mask: str, weights: dict[str, Any], gradients: bool) -> None:
    torch.compiler.reset()
    module = attention_module(attention(dropout=0.2)).eval()
    tensors = tuple(tensor.detach() for tensor in inputs(module, "sequence first"))
    arguments = masks(mask, "sequence first", LENGTH, SOURCE, HEADS) | weights
    expected = module(*tensors, **arguments)
    with torch.set_grad_enabled(gradients):
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        assert_near(compiled(*tensors, **arguments), expected)
        exported = torch.export.export(Holder(module), tensors, arguments)
        assert_near(exported.module()(*tensors, **arguments), expected)


def compiled_functions(module: nn.Module, *tensors: Tensor) -> list[Any]:
    """The functions in the graph that Dynamo makes of a module."""
    graphs: list[fx.GraphModule] = []
    torch.compiler.reset()
    compiled = torch.compile(module, backend=lambda gm, _: graphs.append(gm) or gm, fullgraph=True)
    assert_near(compiled(*tensors), module(*tensors))
    assert len(graphs) == 1
    return [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]


def test_compiled_for_inference_it_is_linears() -> None:
    module, x = attention_module(attention()), torch.randn(LENGTH, BATCH, EMBED)
    own, linear = nn.functional.multi_head_attention_forward, nn.functional.linear
    assert own in compiled_functions(module, x, x, x)
    with torch.no_grad():
        functions = compiled_functions(module, x, x, x)
    assert own not in functions
    assert functions.count(linear) == 4
    module.requires_grad_(False)
    assert compiled_functions(module, x, x, x).count(linear) == 4
    assert own in compiled_functions(module, x.requires_grad_(), x, x)


# The pass.


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_pass_keeps_results_gradients_and_keys(training: bool, dropout: float) -> None:
    model = Block(dropout).train(training)
    gm, tensors = ONE_FUNCTION.graph(model), block_inputs()
    outputs, gradients = [], []
    for call in (gm, model):
        torch.manual_seed(3)
        outputs.append(call(*tensors))
        sum(output.square().sum() for output in oracle.flatten(outputs[-1])).backward()
        gradients.append(parameter_gradients(model))
    assert_same(*outputs)
    assert_same(*gradients)
    assert {key for key, _ in gm.named_parameters()} == {key for key, _ in model.named_parameters()}
    assert not any(isinstance(module, nn.MultiheadAttention) for module in gm.modules())
    assert isinstance(outputs[0][3], tuple)
    assert not ExposeAttention()(gm).modified


def test_pass_emits_one_function_for_each_call() -> None:
    gm = ONE_FUNCTION.graph(Block())
    nodes = gm.graph.find_nodes(op="call_function", target=attention_layer)
    assert len(nodes) == 4
    # The weights are views of the packed parameter, in the order query, key, value.
    assert [str(weight.args[0].args[0].target) for weight in nodes[0].args[3:6]] == ["own.in_proj_weight"] * 3
    assert [weight.args[1] for weight in nodes[0].args[3:6]] == [0, 1, 2]
    assert "own" in nodes[0].meta["nn_module_stack"]


def test_each_weight_is_a_call_of_a_linear() -> None:
    calls = [call for call in layer_calls(ONE_FUNCTION.graph(Block())) if call.node.op != "call_module"]
    assert len(calls) == 16
    assert {(call.kind, call.form) for call in calls} == {("linear", "float")}
    assert [call.argument for call in calls[:4]] == ["q_weight", "k_weight", "v_weight", "out_weight"]
    assert [call.weight for call in calls[:4]] == ["own.in_proj_weight"] * 3 + ["own.out_proj.weight"]
    assert [call.weight for call in calls[4:8]] == [f"cross.{x}_proj_weight" for x in "qkv"] + ["cross.out_proj.weight"]
    assert [call.view_text for call in calls[:4]] == [".chunk(3)[0]", ".chunk(3)[1]", ".chunk(3)[2]", ""]


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_the_result(copied: str) -> None:
    gm, tensors = ONE_FUNCTION.graph(Block(dropout=0.2)), block_inputs()
    other = COPIES[copied](gm).eval()
    assert_near(other(*tensors), gm.eval()(*tensors))
    assert set(other.state_dict()) == set(gm.state_dict())


@pytest.mark.parametrize("tiled", [False, True])
def test_traced_again_it_stays_one_node(tiled: bool) -> None:
    model, x = Same(attention()), torch.randn(LENGTH, BATCH, EMBED)
    model = tbn.transform(model, CONFIG.replace(p=1)) if tiled else Same(attention_module(model.inner))
    gm = fx.symbolic_trace(model)
    assert [node.target for node in gm.graph.nodes].count(attention_layer) == 1
    assert {key for key, _ in gm.named_parameters()} == {key for key, _ in model.named_parameters()}
    assert_same(gm(x), model(x))


def test_tied_attention_is_replaced_in_every_place() -> None:
    model = nn.Module()
    model.first = model.second = attention()
    graph = fx.Graph()
    x = graph.placeholder("x")
    x = graph.call_function(lambda pair: pair[0], (graph.call_module("first", (x, x, x)),))
    graph.output(graph.call_module("second", (x, x, x)))
    gm, x = fx.GraphModule(model, graph), torch.randn(LENGTH, BATCH, EMBED)
    expected = gm(x)
    assert ExposeAttention()(gm).modified
    assert gm.first is gm.second
    assert_near(gm(x), expected)


class Scaled(nn.MultiheadAttention):
    """Another computation in the same class hierarchy."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out, weights = super().forward(*args, **kwargs)
        return out * 2, weights


class Unchanged(nn.MultiheadAttention):
    """A subclass that computes the same."""


def parametrized() -> nn.MultiheadAttention:
    module = attention()
    nn.utils.parametrize.register_parametrization(module, "in_proj_weight", nn.Identity())
    return module


ALONE: dict[str, tuple[Callable[[], nn.MultiheadAttention], str]] = {
    "own forward": (lambda: Scaled(EMBED, HEADS), "it has a forward of its own"),
    "parametrized": (parametrized, "computed by a parametrization"),
}


@pytest.mark.parametrize("kind", ALONE)
def test_left_alone(kind: str) -> None:
    build, reason = ALONE[kind]
    module = build()
    assert reason in (why_not_decomposed(module) or "")
    with pytest.raises(TransformError, match=reason):
        attention_module(module)
    gm = calling(module)
    assert not ExposeAttention()(gm).modified
    assert gm.attention is module


def calling(module: nn.MultiheadAttention) -> fx.GraphModule:
    """A graph that calls an attention."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("attention", (x, x, x)))
    return fx.GraphModule({"attention": module}, graph)


def test_hooks_are_called() -> None:
    """The module that takes an attention's place has its hooks; in a graph its parts would skip them."""
    reference, x = attention(), torch.randn(LENGTH, BATCH, EMBED)
    reference.register_forward_hook(lambda module, args, output: (output[0] * 3, output[1]))
    assert_near(attention_module(reference)(x, x, x), reference(x, x, x))
    gm = calling(reference)
    assert not ExposeAttention()(gm).modified
    assert gm.attention is reference


def test_attention_of_a_module_that_is_called_as_a_whole_stays() -> None:
    layer = nn.TransformerEncoderLayer(EMBED, HEADS, 16, batch_first=True)
    gm = fx.symbolic_trace(nn.Sequential(layer))
    assert not ExposeAttention()(gm).modified
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_module("attention", (graph.call_module("layer", (x,)),) * 3))
    gm = fx.GraphModule({"layer": layer, "attention": layer.self_attn}, graph)
    assert not ExposeAttention()(gm).modified


def test_subclass_that_computes_the_same_is_decomposed() -> None:
    reference, x = Unchanged(EMBED, HEADS), torch.randn(LENGTH, BATCH, EMBED)
    assert_near(attention_module(reference)(x, x, x), reference(x, x, x))


def test_parametrized_output_projection_stays_parametrized() -> None:
    reference, x = attention(), torch.randn(LENGTH, BATCH, EMBED)
    nn.utils.parametrizations.weight_norm(reference.out_proj)
    module = attention_module(reference)
    with torch.no_grad():
        reference.out_proj.parametrizations.weight.original0.mul_(3)
    for other in (module, copy.deepcopy(module)):
        assert_near(other(x, x, x), reference(x, x, x))
        assert list(oracle.tensors(other)) == list(reference.state_dict())
