"""Graph modules in the place of layers: still the layer to everybody who looks, and nothing is lost by a copy."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounter

import tbn_compiler as tbn
from tbn_compiler.graph import layer_graph
from tbn_compiler.graph.calls import training_call
from tbn_compiler.graph.layer_graph import LayerGraph, TiledGraph, adopt, become, layer_class, layer_graph_class
from tbn_compiler.graph.records import EXTRA_STATE, get_records
from tbn_compiler.graph.tiled_parameters import plain_class, read_forms

ALL = tbn.TilingConfig(p=4, min_size=0)
# torch's own modules warn while they compile; nothing of it comes from this package.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear": (lambda: nn.Linear(16, 16), (3, 16)),
    "Conv1d": (lambda: nn.Conv1d(4, 8, 3, padding="same"), (3, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect", groups=2), (3, 4, 9, 9)),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 2, bias=False), (3, 4, 3, 3, 3)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 8, 3, stride=2), (3, 4, 9)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 8, 3, dilation=2), (3, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 8, 2), (3, 4, 2, 2, 2)),
}
layers = pytest.mark.parametrize("name", LAYERS)


class Scaled(nn.Linear):
    """A layer with an attribute, a method and a non-persistent buffer, which its forward does not use."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.notes = ["kept"]
        self.table: Tensor
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.register_buffer("count", torch.tensor(3))
        self.spare = nn.Linear(2, 2)

    def describe(self) -> str:
        return f"{self.in_features} to {self.out_features}, {self.notes[0]}"


def by_pickle(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def by_torch(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": by_pickle, "torch.save": by_torch}
copies = pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES.keys())
lowered = pytest.mark.parametrize("lower", [False, True], ids=["trained", "lowered"])


# A layer is what it was


@layers
@lowered
def test_a_tiled_layer_is_an_instance_of_its_class(name: str, lower: bool) -> None:
    build, shape = LAYERS[name]
    model = nn.Sequential(build(), nn.Identity())
    qat = tbn.transform(model, ALL)
    tiled = (tbn.lower(qat) if lower else qat)[0]
    cls = getattr(nn, name)
    assert isinstance(tiled, LayerGraph)
    assert isinstance(tiled, cls)
    assert isinstance(tiled, fx.GraphModule)
    assert issubclass(type(tiled), cls)
    assert type(tiled).__name__ == name
    assert layer_class(type(tiled)) is cls
    assert repr(tiled) == repr(model[0])
    assert str(tbn.lower(qat)) == str(qat) == str(model)
    for attribute in cls.__constants__:
        assert getattr(tiled, attribute) == getattr(model[0], attribute), attribute
    assert tiled(torch.randn(shape)).shape == model(torch.randn(shape)).shape


def test_subclasses_keep_attributes_and_methods() -> None:
    model = nn.Sequential(Scaled(16, 16))
    layer = tbn.transform(model, ALL)[0]
    assert isinstance(layer, Scaled)
    assert isinstance(layer, LayerGraph)
    assert layer.describe() == "16 to 16, kept"
    layer.notes[0] = "changed"
    assert model[0].notes == ["kept"]
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    layer.weight = nn.Parameter(torch.ones(16, 16))
    assert dict(layer.named_parameters())["weight"] is layer.weight


def test_a_class_that_makes_another_layer_of_its_kind() -> None:
    """The constructor of a tiled layer's class is the one of graph modules; the layer's own makes float layers."""
    layer = tbn.transform(nn.Sequential(Scaled(16, 16)), ALL)[0]
    fresh = layer_class(type(layer))(8, 4)
    assert type(fresh) is Scaled
    assert fresh.weight.shape == (4, 8)


def test_the_layer_is_the_same_object_in_every_place() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU())
    model.alias, model.hidden = model[0], [model[0]]
    qat = tbn.transform(model, ALL)
    assert qat.alias is qat[0] is qat.hidden[0]
    assert isinstance(qat[0], LayerGraph)
    assert len(qat) == len(model)
    assert qat[0].graph.owning_module is qat[0]
    alone = tbn.transform(nn.Linear(16, 16), ALL)
    assert isinstance(alone, nn.Linear)
    assert list(alone.state_dict()) == ["weight", "bias", "alpha_source", "_extra_state"]


@layers
def test_what_is_computed_is_in_the_graph(name: str) -> None:
    build, _ = LAYERS[name]
    layer = tbn.transform(nn.Sequential(build()), ALL)[0]
    targets = [node.target for node in layer.graph.nodes if node.op == "call_function"]
    trained = any(training_call(node) for node in layer.graph.nodes)
    assert trained or {torch.ops.tbn.tile.default, torch.ops.tbn.scale.default} <= {*targets}
    assert ("torch.ops.tbn.train_" if trained else "torch.ops.tbn.tile") in layer.code


# Classes


def test_equal_layers_share_one_class() -> None:
    def blocks(config: tbn.TilingConfig) -> Any:
        return tbn.transform(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16, bias=False)), config)

    first, second = blocks(ALL), blocks(ALL)
    assert type(first[0]) is type(first[1]) is type(second[0])
    assert first[0].graph is not first[1].graph
    assert type(first[0]) is not type(first[2])
    assert type(first[0]) is not type(blocks(ALL.replace(p=8))[0])
    packed = tbn.lower(first)
    assert type(packed[0]) is type(packed[1]) is type(tbn.lower(second)[0])
    assert type(packed[0]) is not type(first[0])
    for duplicate in COPIES.values():
        for model in (first, packed):
            copied = duplicate(model)
            assert type(copied[0]) is type(copied[1])  # reading a file may give values other names
            assert duplicate is not copy.deepcopy or type(copied[0]) is type(model[0])
    twins = tbn.transform(nn.Sequential(Scaled(16, 16), nn.Linear(16, 16)), ALL)
    assert type(twins[0]) is not type(twins[1])  # equal code, but classes of their own
    assert layer_graph_class(nn.Linear) is layer_graph_class(nn.Linear)


def test_equal_modules_with_read_weights_share_one_class() -> None:
    class Block(nn.Module):
        def __init__(self, size: int = 16) -> None:
            super().__init__()
            self.w, self.fc = nn.Parameter(torch.randn(size, 16)), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.fc(x), self.w)

    qat = tbn.transform(nn.Sequential(Block(), Block(), Block(32)), ALL)
    assert type(qat[0]) is type(qat[1]) is not type(qat[2])
    assert plain_class(type(qat[0])) is Block
    assert type(qat[0]).__qualname__ == Block.__qualname__
    assert [form.record.parameter for form in read_forms(qat[0])] == ["w"]
    assert type(copy.deepcopy(qat)[1]) is type(qat[0])
    packed = tbn.lower(qat)
    assert type(packed[0]) is type(packed[1])
    assert repr(qat[0]).startswith("Block(\n  (fc): Linear(in_features=16")


def test_changing_a_graph_changes_no_other_layer() -> None:
    qat, x = tbn.transform(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)), ALL), torch.randn(3, 16)
    first, second = qat[0], qat[1]
    expected, other = first(x), second(x)
    shared = type(second)
    output = first.graph.output_node()
    with first.graph.inserting_before(output):
        doubled = first.graph.call_function(torch.mul, (output.args[0], 2))
    output.args = (doubled,)
    first.recompile()
    assert torch.equal(first(x), 2 * expected)
    assert torch.equal(second(x), other)
    assert type(second) is shared is not type(first)
    assert isinstance(first, nn.Linear)
    assert torch.equal(copy.deepcopy(first)(x), 2 * expected)


def test_classes_live_as_long_as_their_modules() -> None:
    gc.collect()
    before = len(layer_graph._classes)
    qat = tbn.transform(nn.Sequential(nn.Linear(24, 16), nn.Conv2d(4, 8, 5)), ALL.replace(p=2))
    packed = tbn.lower(qat)
    assert len(layer_graph._classes) > before
    del qat, packed
    gc.collect()
    assert len(layer_graph._classes) <= before


@quiet
def test_equal_layers_are_compiled_once() -> None:
    qat = tbn.transform(nn.Sequential(*(nn.Linear(16, 16) for _ in range(4))), ALL)
    counter = CompileCounter()

    def run(layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = layer(x)
        return y

    torch.compiler.reset()
    compiled = torch.compile(run, backend=counter, fullgraph=True)
    x = torch.randn(3, 16)
    for layer in qat:
        assert torch.equal(compiled(layer, x), layer(x))
    assert counter.frame_count == 1


# Copies


@copies
@lowered
def test_copies_keep_everything(duplicate: Any, lower: bool) -> None:
    qat = tbn.transform(nn.Sequential(Scaled(16, 16), nn.Linear(16, 16)), ALL)
    model = tbn.lower(qat) if lower else qat
    layer, x = model[0], torch.randn(3, 16)
    layer.extra, layer.mark = torch.ones(2), "marked"
    layer.register_buffer("late", torch.ones(3), persistent=False)
    layer.register_module("later", nn.Linear(2, 2))
    layer.register_forward_hook(double)
    layer.register_forward_pre_hook(keep)
    layer.eval() if not lower else layer.train()
    copied = duplicate(model)
    other = copied[0]
    assert type(other).__mro__[1:] == type(layer).__mro__[1:]
    assert torch.equal(copied(x), model(x))
    assert list(copied.state_dict()) == list(model.state_dict())
    assert "0.table" not in copied.state_dict()
    assert [name for name, _ in copied.named_buffers()] == [name for name, _ in model.named_buffers()]
    assert [name for name, _ in copied.named_modules()] == [name for name, _ in model.named_modules()]
    assert torch.equal(other.table, layer.table)
    assert torch.equal(other.late, layer.late)
    assert (other.mark, other.notes, other.training) == ("marked", ["kept"], lower)
    assert torch.equal(other.extra, layer.extra)
    assert other.describe() == layer.describe()
    assert get_records(copied) == get_records(model)
    assert list(other._forward_hooks.values()) == [double]
    assert list(other._forward_pre_hooks.values()) == [keep]
    assert other.graph.owning_module is other
    assert not {x.data_ptr() for x in copied.parameters()} & {x.data_ptr() for x in model.parameters()}
    assert str(copied) == str(model)
    torch.testing.assert_close(tbn.lower(copied)(x), tbn.lower(model)(x))


def double(module: nn.Module, x: Any, y: Tensor) -> Tensor:
    return 2 * y


def keep(module: nn.Module, x: Any) -> None:
    return None


class Reads(nn.Module):
    """A weight that its forward reads, beside a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.notes = nn.Parameter(torch.randn(16, 16)), ["kept"]
        self.register_buffer("table", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


@copies
@lowered
def test_copies_of_modules_with_read_weights(duplicate: Any, lower: bool) -> None:
    qat = tbn.transform(nn.Sequential(Reads()), ALL)
    model = tbn.lower(qat) if lower else qat
    model[0].register_forward_hook(double)
    copied, x = duplicate(model), torch.randn(3, 16)
    assert type(copied[0]) is type(model[0])
    assert isinstance(copied[0], Reads)
    assert torch.equal(copied(x), model(x))
    assert torch.equal(copied[0].w, model[0].w)
    assert list(copied.state_dict()) == list(model.state_dict())
    assert torch.equal(copied[0].table, model[0].table)
    assert copied[0].notes == ["kept"]
    assert copied[0].notes is not model[0].notes
    assert get_records(copied) == get_records(model)


@copies
@lowered
def test_copies_of_whole_graphs(duplicate: Any, lower: bool) -> None:
    gm = tbn.transform(fx.symbolic_trace(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Dropout(0.5))), ALL)
    model = tbn.lower(gm) if lower else gm
    model.mark = "marked"
    model.register_buffer("late", torch.ones(3), persistent=False)
    copied, x = duplicate(model), torch.randn(3, 16)
    assert isinstance(copied, TiledGraph)
    assert torch.equal(copied.eval()(x), model.eval()(x))
    assert copied.code == model.code
    assert list(copied.state_dict()) == list(model.state_dict())
    assert (copied.mark, copied.late.tolist()) == ("marked", [1, 1, 1])
    assert get_records(copied) == get_records(model)


# Lowered


@layers
def test_a_lowered_layer_decodes_its_weight(name: str) -> None:
    build, _ = LAYERS[name]
    qat = tbn.transform(nn.Sequential(build()), ALL)
    packed = tbn.lower(qat)[0]
    used = torch.ops.tbn.scale(torch.ops.tbn.tile(qat[0].weight, 4), qat[0].alpha_source, 1)
    assert torch.equal(packed.weight, used)
    assert not packed._parameters.get("weight")
    assert "weight" not in packed.state_dict()
    assert not packed.weight.requires_grad


def test_a_layer_without_a_weight_says_so() -> None:
    layer = tbn.transform(nn.Sequential(nn.Linear(16, 16)), ALL)[0]
    del layer.weight
    with pytest.raises(AttributeError, match="weight"):
        _ = layer.weight
    assert not hasattr(layer, "nothing")


# Read weights


def test_a_read_weight_can_be_replaced_and_deleted() -> None:
    module = tbn.transform(nn.Sequential(Reads()), ALL)[0]
    tiled = module.w
    assert not tiled.is_leaf
    new = nn.Parameter(torch.ones(16, 16))
    module.w = new
    assert dict(module.named_parameters())["w"] is new
    assert module.w.sign().eq(1).all()
    module.register_parameter("w", None)
    assert module.w is None
    del module.w
    assert not hasattr(module, "w")
    with pytest.raises(AttributeError, match="'Reads' object has no attribute 'w'"):
        _ = module.w


# The parts that others use


def test_adopt_takes_over_and_makes_no_keys() -> None:
    root = nn.Linear(4, 4)
    root.note, root.table = "kept", torch.arange(4.0)
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.type = "Tensor"  # an annotation that was not evaluated
    scaled = graph.call_function(torch.mul, (x, graph.get_attr("table")))
    graph.output(graph.call_function(F.linear, (scaled, graph.get_attr("weight"), graph.get_attr("bias"))))
    keys, weight, hooks = list(root.state_dict()), root.weight, root._forward_hooks
    gm = adopt(root, graph)
    assert type(gm).__name__ == "Linear"
    assert list(gm.state_dict()) == [*keys, EXTRA_STATE]
    assert gm.weight is weight
    assert gm._forward_hooks is hooks
    assert gm.note == "kept"
    assert gm.double()(torch.ones(1, 4, dtype=torch.float64)).dtype == torch.float64  # the table moved too
    pickle.dumps(gm)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch's own copy
def test_what_is_decoded_from_a_tile_is_not_stored_in_a_pickle() -> None:
    """Unpickling traces the code again: what it computes from buffers alone is no constant."""
    packed = tbn.lower(tbn.transform(nn.GRUCell(16, 32), ALL))
    inputs = torch.randn(2, 16), torch.randn(2, 32)
    optimized = tbn.optimize(packed, inputs)
    again = by_pickle(by_pickle(optimized))
    assert torch.equal(again(*inputs), optimized(*inputs))
    assert sorted(again.state_dict()) == sorted(optimized.state_dict())


def test_a_module_that_hooks_have_wrapped_says_why_it_is_not_pickled() -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    gm = tbn.transform(nn.Sequential(nn.Linear(16, 16)), ALL)
    hooks.add_hook_to_module(gm[0], hooks.ModelHook())
    with pytest.raises(pickle.PicklingError, match=r"cannot pickle Linear: its attribute '_old_forward'.*remove_hook"):
        pickle.dumps(gm)
    hooks.remove_hook_from_module(gm[0])
    x = torch.randn(2, 16)
    assert torch.equal(by_pickle(gm)(x), gm(x))


def test_become_is_in_place() -> None:
    holder = nn.Sequential(nn.Linear(4, 4))
    layer = holder[0]
    gm = tbn.transform(nn.Linear(16, 16), ALL)
    become(layer, gm)
    assert holder[0] is layer
    assert isinstance(layer, LayerGraph)
    assert layer.in_features == 16
    x = torch.randn(2, 16)
    assert torch.equal(holder(x), gm(x))
