from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import TilingConfig, TransformError
from tbn_compiler.graph.attention import attention_layer
from tbn_compiler.graph.copying import share_tensors_copy
from tbn_compiler.graph.layers import layer_calls
from tbn_compiler.graph.records import get_records, graph_parts
from tbn_compiler.passes.expose_attention import (
    ExposeAttention,
    attention_module,
    disable_fast_paths,
    why_not_decomposed,
)
from tests import oracle
from tests.oracle import both_forms
from tests.passes.attention import (
    BATCH,
    COPIES,
    EMBED,
    HEADS,
    LAYOUTS,
    LENGTH,
    MASKS,
    OPTIONS,
    SOURCE,
    WEIGHTS,
    Block,
    Holder,
    assert_near,
    attention,
    block_inputs,
    causal,
    inputs,
    masks,
    padding,
    results,
    sequences,
    traced,
)

CONFIG = TilingConfig(p=4, min_size=0)


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


@contextmanager
def no_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# The graph module that takes an attention's place.


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS)
def test_is_pytorchs_own(options: str, layout: str, mask: str) -> None:
    reference = attention(batch_first=layout == "batch first", **OPTIONS[options])
    module, tensors = attention_module(reference), inputs(reference, layout)
    for name, weights in WEIGHTS.items():
        arguments = masks(mask, layout, LENGTH, SOURCE, reference.num_heads) | weights
        assert_same(results(module, tensors, arguments), results(reference, tensors, arguments))
        assert (module(*tensors, **arguments)[1] is None) == (name == "no weights")


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


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_dropout_follows_the_mode_and_the_generator(options: dict[str, Any], weights: dict[str, Any]) -> None:
    reference = attention(dropout=0.4, **options)
    module, tensors = attention_module(reference), inputs(reference, "sequence first")
    for training in (True, False, True):
        outputs = []
        for call in (module, reference):
            torch.manual_seed(7)
            outputs.append(results(call.train(training), tensors, weights))
        assert_same(*outputs)
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
    assert_same(attention_module(reference)(*tensors, **arguments), reference(*tensors, **arguments))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_autocast(weights: dict[str, Any]) -> None:
    reference = attention(add_bias_kv=True)
    tensors = inputs(reference, "sequence first")
    arguments = masks("3-D and padding", "sequence first", LENGTH, SOURCE, HEADS) | weights
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(attention_module(reference)(*tensors, **arguments), reference(*tensors, **arguments))


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


# The layers of PyTorch that hold an attention.


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
    with torch.no_grad(), no_fast_path():
        expected = reference(source, target, **arguments)
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


# The pass.


def exposed(model: nn.Module) -> fx.GraphModule:
    gm = traced(model)
    assert ExposeAttention()(gm).modified
    return gm


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("training", [True, False])
def test_pass_keeps_results_gradients_and_keys(training: bool, dropout: float) -> None:
    model = Block(dropout).train(training)
    gm, tensors = exposed(model), block_inputs()
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
    gm = exposed(Block())
    nodes = gm.graph.find_nodes(op="call_function", target=attention_layer)
    assert len(nodes) == 4
    # The weights are views of the packed parameter, in the order query, key, value.
    assert [str(weight.args[0].args[0].target) for weight in nodes[0].args[3:6]] == ["own.in_proj_weight"] * 3
    assert [weight.args[1] for weight in nodes[0].args[3:6]] == [0, 1, 2]
    assert "own" in nodes[0].meta["nn_module_stack"]


def test_each_weight_is_a_call_of_a_linear() -> None:
    calls = [call for call in layer_calls(exposed(Block())) if call.node.op != "call_module"]
    assert len(calls) == 16
    assert {(call.kind, call.form) for call in calls} == {("linear", "float")}
    assert [call.argument for call in calls[:4]] == ["q_weight", "k_weight", "v_weight", "out_weight"]
    assert [call.weight for call in calls[:4]] == ["own.in_proj_weight"] * 3 + ["own.out_proj.weight"]
    assert [call.weight for call in calls[4:8]] == [f"cross.{x}_proj_weight" for x in "qkv"] + ["cross.out_proj.weight"]
    assert [call.view_text for call in calls[:4]] == [".chunk(3)[0]", ".chunk(3)[1]", ".chunk(3)[2]", ""]


def test_training_flag_follows_the_mode() -> None:
    gm, tensors = exposed(Block(dropout=0.5)), block_inputs()
    assert not torch.equal(gm(*tensors)[0], gm(*tensors)[0])
    gm.eval()
    assert torch.equal(gm(*tensors)[0], gm(*tensors)[0])


@pytest.mark.parametrize("copied", COPIES)
def test_copies_of_the_result(copied: str) -> None:
    gm, tensors = exposed(Block(dropout=0.2)), block_inputs()
    other = COPIES[copied](gm).eval()
    assert_near(other(*tensors), gm.eval()(*tensors))
    assert set(other.state_dict()) == set(gm.state_dict())


def test_result_compiles_and_exports() -> None:
    torch.compiler.reset()
    gm, tensors = exposed(Block(dropout=0.2)).eval(), block_inputs()
    expected = gm(*tensors)
    assert_near(torch.compile(gm, backend="aot_eager", fullgraph=True)(*tensors), expected)
    assert_near(torch.export.export(gm, tensors).module()(*tensors), expected)


class Same(Holder):
    def forward(self, x: Tensor) -> Any:
        return self.inner(x, x, x)


@pytest.mark.parametrize("tiled", [False, True])
def test_traced_again_it_stays_one_node(tiled: bool) -> None:
    model, x = Same(attention()), torch.randn(LENGTH, BATCH, EMBED)
    model = tbn.transform(model, CONFIG) if tiled else Same(attention_module(model.inner))
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


# Training on tiles.


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
    assert attention_nodes(qat)
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
