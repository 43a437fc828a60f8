"""Cases of modules as Python objects: closures, hidden modules, references, special classes, dtypes."""

from __future__ import annotations

import copy
import functools
import types
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.meaning.case import call, case, images, note

# Closures, hidden modules and references


@case(copies=False, pickles=False)
class LambdaOverSelf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 4)
        self.f = lambda x: torch.tanh(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.f(x))


@case
class PartialOfMethod(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 4)
        self.calls = 0
        self.steps = [functools.partial(self.helper, factor=2.0), self.finish]

    def helper(self, x: Tensor, factor: float) -> Tensor:
        self.calls += 1
        return factor * self.fc(x)

    def finish(self, x: Tensor) -> Tensor:
        return self.out(x)

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


@case
class DispatchTable(nn.Module):
    """Bound methods and layers in a plain dictionary; they are registered too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.table = {"a": self.a, "b": self.b, "both": self.both}

    def both(self, x: Tensor) -> Tensor:
        return self.table["b"](self.table["a"](x))

    def forward(self, x: Tensor) -> Tensor:
        return self.table["both"](x) + self.table["a"](x)


@case
class KeepsAForward(nn.Module):
    """The bound ``forward`` of a layer is kept and called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 8)
        self.plain = self.fc.forward

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.plain(x))


@case(observe=lambda model: [(m.weight, m.weight.grad) for m in (*model._hidden, *model._table.values())])
class HiddenModules(nn.Module):
    """Modules in plain lists and dictionaries: nn.Module does not know of them, and nobody trains them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self._hidden = [nn.Linear(16, 16)]
        self._table = {"out": nn.Linear(16, 8)}

    def forward(self, x: Tensor) -> Tensor:
        return self._table["out"](self._hidden[0](self.fc(x)).relu())


class _Child(nn.Module):
    def __init__(self, parent: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.above = [parent]
        object.__setattr__(self, "parent", parent)

    def forward(self, x: Tensor) -> Tensor:
        self.parent.calls += 1
        return self.fc(x) * self.above[0].gain + self.parent.shared(x)


@case
class KnowsItsParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.calls, self.gain = nn.Linear(16, 16), 0, nn.Parameter(torch.ones(16))
        self.child = _Child(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)


class _WeakChild(nn.Module):
    def __init__(self, parent: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.parent = weakref.ref(parent)

    def forward(self, x: Tensor) -> Tensor:
        return self.parent().shared(self.fc(x))


@case(copies=False, pickles=False)
class WeakReference(nn.Module):
    """A copy keeps the reference to the original, which must stay alive: the case holds on to it."""

    originals: list[Any] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(16, 8)
        self.child = _WeakChild(self)
        self.originals.append(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.child(x)


# Modules as objects


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.block = nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.fc(x))


def _scaled(self: Any, x: Tensor) -> Tensor:
    return 2 * type(self).forward(self, x)


@case(pickles=False)
def ForwardOfAnInstance() -> nn.Module:  # noqa: N802
    """``forward`` is assigned on objects: on the model, and on a block."""
    model = _Network()
    model.forward = types.MethodType(_scaled, model)
    model.block.forward = types.MethodType(_scaled, model.block)
    return model


def _adapt(layer: nn.Linear, down: nn.Linear, up: nn.Linear) -> None:
    plain = layer.forward
    layer.down, layer.up = down, up
    layer.forward = lambda x: plain(x) + up(down(x))


@case(copies=False, pickles=False, reads=("fc",))
def ForwardOfALayer() -> nn.Module:  # noqa: N802
    """An adapter is put into a layer by a new ``forward`` that closes over the old one."""
    model = _Network()
    _adapt(model.fc, nn.Linear(16, 4), nn.Linear(4, 16))
    return model


@case(step=lambda model, x: [model(x), model.features(x), model.width, nn.DataParallel(model)(x)])
class Wrapper(nn.Module):
    """DataParallel-like: what it does not know it asks the module inside."""

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.out, self.width = nn.Linear(16, 16), nn.Linear(16, 8), 16

        def features(self, x: Tensor) -> Tensor:
            return self.fc(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.features(x))

    def __init__(self) -> None:
        super().__init__()
        self.module = self.Inside()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        return self.module(*inputs, **options)


@case
class OwnAttributeRules(nn.Module):
    """Attributes are checked when they are set, and found under a second name."""

    allowed = frozenset({"fc", "out", "scale", "training"})

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.scale = nn.Linear(16, 16), nn.Linear(16, 4), 2.0

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("_") and name not in self.allowed:
            raise AttributeError(f"{name} is not allowed")
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__({"linear": "fc"}.get(name, name))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.linear(x)) * self.scale


@case
class LoadsOldCheckpoints(nn.Module):
    """Its own loading: a new version of a checkpoint, another name, a hook before and after."""

    _version = 3

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.loaded = nn.Linear(16, 16), nn.Linear(16, 4), None
        self.register_state_dict_post_hook(self.rename)
        self.register_load_state_dict_pre_hook(self.named_back)

    @staticmethod
    def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}out.")]:
            state[key.replace("out.", "head.")] = state.pop(key)

    @staticmethod
    def named_back(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}head.")]:
            state[key.replace("head.", "out.")] = state.pop(key)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, metadata: Any, *rest: Any) -> None:
        self.loaded = metadata.get("version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)

    def forward(self, x: Tensor) -> tuple[Tensor, int | None]:
        return self.out(self.fc(x)), self.loaded


class _Counted(nn.Linear):
    """A subclass of a layer that adds state and keeps ``forward``."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.owner = "someone"

    def get_extra_state(self) -> dict[str, Any]:
        return {"owner": self.owner}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.owner = state["owner"]

    def describe(self) -> str:
        return f"{self.owner}'s {self.in_features}x{self.out_features}"


def _sign(model: Any, number: int) -> None:
    model.fc.owner = model.name = f"step {number}"


@case(before_step=_sign, step=lambda model, x: [model(x), model.fc.describe()])
class ExtraState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out, self.name = _Counted(16, 16), nn.Linear(16, 4), "new"

    def get_extra_state(self) -> str:
        return self.name

    def set_extra_state(self, state: str) -> None:
        self.name = state

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x))


class _Scaled(nn.Linear):
    """A subclass of a layer with a method and a property, called by others."""

    @property
    def fan(self) -> int:
        return self.in_features

    def scaled(self, x: Tensor) -> Tensor:
        return self(x) / self.fan**0.5


@case
class SubclassOfALayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = _Scaled(16, 16), _Scaled(16, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out.scaled(self.fc.scaled(x))


class _Odd(nn.Linear):
    """Names that graph modules and tiled layers use themselves."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.graph, self.code, self.meta, self.print_readable = "graph", [1, 2], {"a": 1}, None
        self.tile, self.scale, self.layer = nn.Identity(), nn.Parameter(torch.ones(4)), 3
        self.register_buffer("strength", torch.ones(4))


class _SlottedLayer(nn.Linear):
    __slots__ = ("history",)

    def forward(self, x: Tensor) -> Tensor:
        self.history = (*getattr(self, "history", ()), len(x))
        return super().forward(x)


@case(
    copies=False,
    pickles=False,
    reads=("w", "fc"),
    observe=lambda model: [model.seen, model.fc.history, model.layer.note, model.child() is model.fc, model.doubles()],
)
class Slots(nn.Module):
    """Attributes in slots, which PyTorch's own copies lose: of a model, of a layer, and of one with its own forward."""

    __slots__ = ("__count", "child", "project", "seen", "unset")

    class Noted(nn.Linear):
        __slots__ = ("note",)

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.layer, self.w = _SlottedLayer(16, 16), self.Noted(16, 8), nn.Parameter(torch.randn(8, 8))
        self.layer.note, self.seen, self.__count = ["kept"], [], 2
        self.project, self.child = lambda x: self.layer(self.fc(x)), weakref.ref(self.fc)

    def doubles(self) -> int:
        return 2 * self.__count

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        self.seen.append(y.detach().mean())
        return y @ self.w


@case
class OddNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.tile, self.graph = _Odd(16, 16), _Odd(16, 4), nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        note(self.fc.graph, self.fc.code, self.fc.meta, self.tile.layer)
        return self.graph(self.tile.tile(self.tile(self.fc(x))) * self.tile.scale * self.tile.strength)


class _Registered(nn.Module):
    """A class that keeps a list of its subclasses."""

    known: dict[str, type] = {}  # noqa: RUF012

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.known[cls.__name__] = cls


@case(reads=("w",))
class RegisteredClass(_Registered):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.w = nn.Linear(16, 16), nn.Parameter(torch.randn(8, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        note(sorted(self.known), self.known["RegisteredClass"] is RegisteredClass)
        return self.fc(x) @ self.w.T


def _cloned(model: Any, x: Tensor) -> list[Tensor]:
    clone = model.clone()
    with torch.no_grad():
        for own, other in zip(clone.parameters(), (model.w, model.fc.weight, model.fc.bias), strict=True):
            own.copy_(other)
    return [model(x), clone.train(model.training)(x)]


@case(step=_cloned, infer=call, reads=("w",))
class MakesAnother(nn.Module):
    """A method makes a new instance of its class, with weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.w = nn.Linear(16, 16), nn.Parameter(torch.randn(8, 16) / 4)

    def clone(self) -> MakesAnother:
        return type(self)()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.w)


@case
class SharedModules(nn.Module):
    """One block under three names, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.first, self.layers, self.fc = block, nn.ModuleList([block, block]), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        note(self.first is self.layers[1], self.first[0] is self.layers[0][0])
        return self.fc(torch.relu(self.fc(self.layers[1](self.layers[0](self.first(x))))))


@case(before_step=lambda model, number: note(model.a.weight is model.b.weight, model.c.weight is model.a.weight))
class TiedLayers(nn.Module):
    """Two layers hold one parameter; a method ties a third."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))
        self.b.weight = self.a.weight
        self.tie()

    def tie(self) -> None:
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def _lazy() -> nn.Module:
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(8))


@case(inputs=images)
def LazyThatRan() -> nn.Module:  # noqa: N802
    model = _lazy()
    model(*images())
    return model


@case(inputs=lambda: (torch.randn(5, 16, dtype=torch.double),))
def Double() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).double()


@case(inputs=lambda: (torch.randn(5, 16, dtype=torch.bfloat16),))
def BFloat16() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).bfloat16()


@case(inputs=lambda: (torch.randn(5, 16, dtype=torch.half),))
def Half() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8)).half()


@case(inputs=lambda: (images()[0].to(memory_format=torch.channels_last),))
def ChannelsLast() -> nn.Module:  # noqa: N802
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    return model.to(memory_format=torch.channels_last)


@case(prepare=lambda model: model.double(), inputs=lambda: (torch.randn(5, 16, dtype=torch.double),), runs_before=False)
def MovedAfter() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 8))


@case
def PartlyInEvaluation() -> nn.Module:  # noqa: N802
    """Modes differ between the submodules, and the whole is never called with ``train``."""
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 8))
    model[1].eval()
    return model


@case
def RootLayer() -> nn.Module:  # noqa: N802
    """A model that is nothing but one layer."""
    return nn.Linear(16, 8)


@case(step=lambda model, x: [layer(x) for layer in model] + [call(model[-1], x)])
def RootList() -> nn.Module:  # noqa: N802
    """A model without a ``forward``."""
    return nn.ModuleList(nn.Linear(16, 8) for _ in range(2))


@case(saves=False, copies=False)
class CompiledBlock(nn.Module):
    """One block is compiled, the way people compile what is hot."""

    def __init__(self) -> None:
        super().__init__()
        self.block = torch.compile(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), backend="eager")
        self.out = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.block(x))


@case(infer=lambda model, x: model.online(x))
class CopiesALayer(nn.Module):
    """A copy of a layer is made in every call, and its weights are changed."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        target = copy.deepcopy(self.online).requires_grad_(False)
        target.weight.mul_(0.5)
        return self.online(x), target(x)
