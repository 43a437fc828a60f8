"""Copies that share tensors: what a model keeps is bound to the copy, and the original sees nothing of it."""

from __future__ import annotations

import collections
import copy
import functools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler import TransformError
from tbn_compiler.graph.copying import share_tensors_copy


def scale_weights(model: Any) -> None:
    """Make the layers of a copy tell: a layer that is called doubles its result."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda m, x, y: 2 * y)


def test_tensors_are_shared_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.extra = torch.ones(3)
    clone = share_tensors_copy(model)
    assert clone is not model
    assert clone[0] is not model[0]
    originals, copies = (m.state_dict(keep_vars=True) for m in (model, clone))
    assert list(originals) == list(copies)
    assert all(copies[name] is tensor for name, tensor in originals.items())
    assert clone.extra is model.extra
    clone[0].register_parameter("new", nn.Parameter(torch.ones(1)))
    assert not hasattr(model[0], "new")


def test_shared_modules_and_parameters_stay_shared() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model.again = model[0]
    clone = share_tensors_copy(model)
    assert clone.again is clone[0]
    assert clone[1].weight is clone[0].weight is model[0].weight


def test_a_graph_module_is_copied_with_its_graph() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    before = gm.code
    copied = share_tensors_copy(gm)
    assert copied is not gm
    assert copied.graph is not gm.graph
    assert copied.get_parameter("0.weight") is gm.get_parameter("0.weight")
    copied.graph.erase_node(next(node for node in copied.graph.nodes if node.op == "output"))
    assert gm.code == before


def test_a_graph_module_keeps_what_its_graph_does_not_name() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused, self.spare = nn.Linear(4, 4), nn.Linear(4, 2), nn.Parameter(torch.ones(2))
            self.temporary: Tensor
            self.register_buffer("temporary", torch.ones(4), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + self.temporary

    model = Spare()
    gm = fx.GraphModule(model, fx.Tracer().trace(model), "Spare")
    gm.unused, gm.spare, gm.note = model.unused, model.spare, ["kept"]
    gm.register_buffer("temporary", model.temporary, persistent=False)
    for copied in (share_tensors_copy(gm), share_tensors_copy(nn.Sequential(gm))[0]):
        assert set(copied.state_dict()) == {*gm.state_dict()}
        assert "temporary" not in copied.state_dict()
        assert copied.temporary is model.temporary
        assert copied.note == ["kept"]
        assert copied.note is not gm.note
        x = torch.randn(2, 4)
        assert torch.equal(copied(x), gm(x))


def test_a_model_that_cannot_be_copied() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    model.stream = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(TransformError, match="cannot copy the structure of Sequential: cannot pickle 'generator'"):
        tbn.transform(model)


# Functions that lead to a model


class Keeps(nn.Module):
    """Keeps something that calls its layer."""

    def __init__(self, keep: Callable[[Any], Any]) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.kept = keep(self)

    def double(self, x: Tensor, factor: float = 1.0) -> Tensor:
        y: Tensor = self.fc(x)
        return y * factor

    def forward(self, x: Tensor) -> Tensor:
        kept: Any = self.kept
        while not callable(kept):
            kept = next(iter(kept.values())) if isinstance(kept, dict) else kept[0]
        y: Tensor = kept(x)
        return y


def closure(model: Any) -> Any:
    return lambda x: model.fc(x)


def nested_closure(model: Any) -> Any:
    def inner(x: Tensor) -> Tensor:
        y: Tensor = model.fc(x)
        return y

    return lambda x: inner(x)


def mutual_closures(model: Any) -> Any:
    def first(x: Tensor, depth: int = 2) -> Tensor:
        return second(x, depth - 1) if depth else model.fc(x)

    def second(x: Tensor, depth: int) -> Tensor:
        return first(x, depth - 1) if depth else model.fc(x)

    return first


def default(model: Any) -> Any:
    return lambda x, layer=model.fc: layer(x)


def keyword_default(model: Any) -> Any:
    def call(x: Tensor, *, layer: nn.Module = model.fc) -> Tensor:
        y: Tensor = layer(x)
        return y

    return call


def partial_of_function(model: Any) -> Any:
    return functools.partial(torch.nn.Module.__call__, model.fc)


def partial_of_method(model: Any) -> Any:
    return functools.partial(model.double, factor=1.0)


def decorated(model: Any) -> Any:
    @functools.wraps(model.double)
    def wrapper(*args: Any) -> Any:
        return model.double(*args)

    return wrapper


class Caller:
    """An object that is no module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


class Slots:
    __slots__ = ("module",)

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self.module(x)
        return y


KEPT: dict[str, Callable[[Any], Any]] = {
    "closure": closure,
    "nested closure": nested_closure,
    "closures over each other": mutual_closures,
    "default": default,
    "keyword default": keyword_default,
    "method": lambda model: model.double,
    "method of a layer": lambda model: model.fc.__call__,
    "partial of a function": partial_of_function,
    "partial of a method": partial_of_method,
    "decorated": decorated,
    "in a list": lambda model: [closure(model)],
    "in a dictionary of tuples": lambda model: {"a": (closure(model), 3)},
    "in a deque": lambda model: collections.deque([closure(model)]),
    "a hidden module": lambda model: [model.fc],
    "an object": lambda model: Caller(model.fc),
    "an object with slots": lambda model: Slots(model.fc),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_calls_the_copy(kind: str) -> None:
    model, x = Keeps(KEPT[kind]), torch.randn(3, 4)
    clone = share_tensors_copy(model)
    expected = model(x)
    assert torch.equal(clone(x), expected)
    scale_weights(clone)
    assert torch.equal(clone(x), 2 * expected)
    assert torch.equal(model(x), expected)
    scale_weights(model)
    assert torch.equal(model(x), 2 * expected)
    assert torch.equal(clone(x), 2 * expected)
    assert [name for name, _ in clone.named_modules()] == [name for name, _ in model.named_modules()]


@pytest.mark.parametrize("kind", KEPT)
def test_what_is_kept_calls_the_tiled_layer(kind: str) -> None:
    model, x = Keeps(KEPT[kind]), torch.randn(3, 4)
    expected = model(x)
    qat = tbn.transform(model, tbn.TilingConfig(p=2, min_size=0))
    assert not torch.equal(qat(x), expected)
    assert torch.equal(qat(x), qat.fc(x))
    assert torch.equal(model(x), expected)
    assert torch.allclose(tbn.lower(qat)(x), qat(x), atol=1e-6)


def test_a_function_that_leads_to_no_module_is_kept() -> None:
    """What it counts goes on being counted for both."""
    count = [0]

    def counting(x: Tensor) -> Tensor:
        count[0] += 1
        return x

    model = nn.Sequential(nn.Linear(4, 4))
    model.f = counting
    clone = share_tensors_copy(model)
    assert clone.f is counting
    clone.f(torch.ones(1))
    model.f(torch.ones(1))
    assert count == [2]


def test_cells_that_are_shared_stay_shared() -> None:
    """Two functions over one variable, one of which leads to the model."""

    def make(model: nn.Module) -> tuple[Any, Any]:
        total = 0.0

        def add(x: Tensor) -> Tensor:
            nonlocal total
            total += 1
            return model.fc(x)  # type: ignore[no-any-return,operator]

        return add, lambda: total

    model = nn.Module()
    model.fc = nn.Linear(4, 4)
    model.add, model.total = make(model)
    clone = share_tensors_copy(model)
    clone.add(torch.ones(4))
    assert clone.total() == 1


def test_function_attributes_and_names_are_kept() -> None:
    model = nn.Module()
    model.fc = nn.Linear(4, 4)

    def f(x: Tensor, factor: float = 3.0) -> Tensor:
        """Says what it does."""
        y: Tensor = model.fc(x) * factor
        return y

    f.note, f.owner = ["kept"], model  # type: ignore[attr-defined]
    model.f = f
    clone = share_tensors_copy(model)
    assert clone.f is not f
    assert (clone.f.__name__, clone.f.__doc__, clone.f.note) == ("f", "Says what it does.", ["kept"])
    assert (clone.f.__qualname__, clone.f.__module__, clone.f.__defaults__) == (f.__qualname__, __name__, (3.0,))
    assert clone.f.__annotations__ == f.__annotations__
    assert clone.f.owner is clone


def test_a_cell_that_is_not_filled_yet() -> None:
    model = nn.Module()
    model.fc = nn.Linear(4, 4)

    def outer() -> Any:
        def f(x: Tensor) -> Tensor:
            return later(model.fc(x))

        if model is None:
            later = torch.relu
        return f

    model.f = outer()
    assert share_tensors_copy(model).f is not model.f


def test_a_forward_that_was_replaced() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    original = model.forward
    model.forward = types.MethodType(lambda self, x: original(x) * 4, model)
    expected = model(x)
    clone = share_tensors_copy(model)
    assert torch.equal(clone(x), expected)
    scale_weights(clone)
    assert torch.equal(clone(x), 2 * expected)
    assert torch.equal(model(x), expected)


# Hooks


def test_hooks_are_bound_to_the_copy() -> None:
    class Hooked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.gain, self.seen = nn.Linear(4, 4), nn.Linear(4, 4), []
            self.fc.register_forward_hook(self.note)
            self.fc.register_forward_hook(lambda m, x, y: self.gain(y))
            self.fc.register_forward_pre_hook(lambda m, x, k: (x, k), with_kwargs=True)
            self.register_full_backward_hook(self.note_gradient)

        def note(self, module: nn.Module, x: Any, y: Tensor) -> None:
            self.seen.append(module is self.fc)

        def note_gradient(self, module: nn.Module, x: Any, y: Any) -> None:
            self.seen.append(module is self)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(x)
            return y

    model = Hooked()
    clone = share_tensors_copy(model)
    x = torch.randn(3, 4, requires_grad=True)
    clone(x).sum().backward()
    assert clone.seen == [True, True]
    assert model.seen == []
    expected = model(x)
    assert torch.equal(clone(x), expected)
    clone.gain.register_forward_hook(lambda m, x, y: 2 * y)
    assert torch.equal(clone(x), 2 * expected)
    assert torch.equal(model(x), expected)
    for module, other in zip((model, model.fc), (clone, clone.fc), strict=True):
        assert list(module._forward_hooks) == list(other._forward_hooks)
        assert list(module._forward_pre_hooks) == list(other._forward_pre_hooks)
        assert list(module._backward_hooks) == list(other._backward_hooks)
        assert module._forward_hooks is not other._forward_hooks


def test_a_handle_removes_the_hook_of_the_original_only() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    handle = model[0].register_forward_hook(lambda m, x, y: 2 * y)
    clone, x = share_tensors_copy(model), torch.randn(3, 4)
    expected = clone(x)
    handle.remove()
    assert torch.equal(clone(x), expected)
    assert torch.equal(2 * model(x), expected)


# Other things that models hold


def test_weak_references() -> None:
    class Child(nn.Module):
        def __init__(self, parent: nn.Module) -> None:
            super().__init__()
            self.parent = weakref.ref(parent)

    parent = nn.Module()
    parent.child = Child(parent)
    clone = share_tensors_copy(parent)
    assert clone.child.parent() is clone
    assert parent.child.parent() is parent
    outside = nn.Linear(2, 2)
    parent.child.outside = weakref.ref(outside)
    assert share_tensors_copy(parent).child.outside() is outside


def test_activations_that_a_training_step_left() -> None:
    """They are no leaves, which deepcopy refuses."""

    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.maps, self.last = nn.Linear(4, 4), [], {}

        def forward(self, x: Tensor) -> Tensor:
            self.maps.append(self.fc(x))
            self.last["y"] = (self.maps[-1], self.maps[-1].detach())
            return self.maps[-1]

    model, x = Remembers(), torch.randn(3, 4)
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="deepcopy protocol"):
        copy.deepcopy(model)
    clone = share_tensors_copy(model)
    assert clone.maps == model.maps
    assert clone.maps is not model.maps
    assert clone.last["y"][0] is model.last["y"][0]
    clone(x)
    assert (len(clone.maps), len(model.maps)) == (2, 1)
    assert clone.fc.weight.grad is model.fc.weight.grad


def test_modules_that_are_hidden_in_lists_are_copied_once() -> None:
    model = nn.Module()
    model.fc = nn.Linear(4, 4)
    model.hidden, model.again = [model.fc, nn.Linear(4, 4)], {"fc": model.fc}
    clone = share_tensors_copy(model)
    assert clone.hidden[0] is clone.fc is clone.again["fc"]
    assert clone.fc is not model.fc
    assert clone.hidden[1] is not model.hidden[1]
    assert clone.hidden[1].weight is model.hidden[1].weight


def test_dtypes_devices_and_enumerations_are_kept() -> None:
    model = nn.Module()
    model.held = {"dtype": torch.float32, "device": torch.device("cpu"), "size": torch.Size([2]), "type": nn.Linear}
    clone = share_tensors_copy(model)
    assert clone.held == model.held
    assert clone.held is not model.held


def test_exported_modules_copy_without_a_word() -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(4, 4)), (torch.ones(1, 4),))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clone = share_tensors_copy(program.module())
    assert clone.train(False) is clone


class Rounding:
    """A callable object around a forward that refuses to be pickled or copied, as those of mixed precision do."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any) -> Tensor:
        return self.function(*args).round(decimals=2)

    def __getstate__(self) -> Any:
        raise TypeError("not to be pickled")


def in_a_closure(model: nn.Module) -> None:
    forward = type(model).forward
    model.forward = types.MethodType(lambda self, x: forward(self, x).round(decimals=2), model)


def in_an_object(model: nn.Module) -> None:
    rounding = Rounding(type(model).forward)

    def forward(*args: Any) -> Tensor:
        return rounding(*args)

    model._original_forward = model.forward
    model.forward = types.MethodType(forward, model)


def with_the_method(model: nn.Module) -> None:
    old = model.forward
    model.forward = lambda x: old(x).round(decimals=2)


def with_the_method_as_a_default(model: nn.Module) -> None:
    model.forward = lambda x, old=model.forward: old(x).round(decimals=2)


def with_the_method_in_a_list(model: nn.Module) -> None:
    model.olds = [model.forward]
    model.forward = lambda x: model.olds[0](x).round(decimals=2)


def in_a_partial(model: nn.Module) -> None:
    def forward(module: Any, x: Tensor) -> Tensor:
        return module._old_forward(x).round(decimals=2)

    model._old_forward = model.forward
    model.forward = functools.update_wrapper(functools.partial(forward, model), model._old_forward)


@pytest.mark.parametrize(
    "wrap",
    [
        *(in_a_closure, in_an_object, in_a_partial),
        *(with_the_method, with_the_method_as_a_default, with_the_method_in_a_list),
    ],
)
@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(16, 8), lambda: fx.symbolic_trace(nn.Sequential(nn.Linear(16, 8)))]
)
def test_a_wrapped_forward_is_that_of_the_present_graph(build: Any, wrap: Callable[[nn.Module], None]) -> None:
    """Trainers patch ``forward`` on the instance: lowering rewrites the graph under the wrapper."""
    qat = tbn.transform(build(), tbn.TilingConfig(p=4, min_size=0))
    x = torch.randn(3, 16)
    expected = tbn.lower(qat)(x).round(decimals=2)
    wrap(qat)
    packed = tbn.lower(qat)
    assert torch.equal(packed(x), expected)
    assert torch.equal(tbn.lower(packed)(x), expected)
    with torch.no_grad():
        for parameter in qat.parameters():
            parameter.fill_(5.0)
    bias = packed.get_parameter(next(name for name, _ in packed.named_parameters() if name.endswith("bias")))
    assert torch.equal(bias, torch.full_like(bias, 5.0))  # shared, as in every copy
