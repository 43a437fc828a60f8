"""Cases about methods, containers and sizes of layers, and about models that are changed after transform."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from tests.meaning.case import case, images, note, rows, tokens

# Methods and containers


def _methods(model: Any, x: Tensor) -> list[Tensor]:
    note(model.latent_size, type(model).describe(), model.double_of(3))
    z = model.encode(x)
    return [z, model.decode(z), model(x), model.encoder(x), model.encode.__self__ is model]


@case(step=_methods)
class Methods(nn.Module):
    """An autoencoder whose methods are called without ``forward``."""

    @classmethod
    def describe(cls) -> str:
        return cls.__doc__ or ""

    @staticmethod
    def double_of(x: int) -> int:
        return 2 * x

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        self.decoder = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16))

    @property
    def latent_size(self) -> int:
        return self.encoder[-1].out_features

    def encode(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(z)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class _Base(nn.Module):
    """A class that says how, and leaves the parts to its subclasses."""

    def __init__(self) -> None:
        super().__init__()
        self.build()

    def build(self) -> None:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@case(step=lambda model, x: [model(x), model.features(x), super(type(model), model).__class__ is type(model)])
class Inherited(_Base):
    def build(self) -> None:
        self.fc, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


@case(inputs=lambda: (*tokens(), *rows()), step=lambda model, words, x: [model(words, "words"), model(x, "rows")])
class NamedHeads(nn.Module):
    """Containers by key, and modules by a name that is put together."""

    def __init__(self) -> None:
        super().__init__()
        self.inlets = nn.ModuleDict({"words": nn.Embedding(12, 8), "rows": nn.Linear(16, 8)})
        for i in range(3):
            setattr(self, f"layer{i}", nn.Linear(8, 8))
        self.add_module("out", nn.Linear(8, 4))

    def forward(self, x: Tensor, name: str) -> Tensor:
        x = self.inlets[name](x)
        for i in range(3):
            x = torch.relu(getattr(self, f"layer{i}")(x))
        return self.get_submodule("out")(x)


@case(step=lambda model, x: [model(x), model.net[0](x), model.net[:2](x), nn.Sequential(*model.net.children())(x)])
class SlicesOfSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            OrderedDict(first=nn.Linear(16, 16), act=nn.ReLU(), second=nn.Linear(16, 16), last=nn.Linear(16, 4))
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net[:-1]:
            x = layer(x)
        note(len(self.net), [type(layer).__name__ for layer in self.net], self.net[-1].out_features)
        return self.net[-1](x) + self.net.last(x)


@case(inputs=images, step=lambda model, x: [model(x), nn.Sequential(*list(model.children())[:-1])(x)])
class ReadsSizes(nn.Module):
    """Hyperparameters of layers are read; and the model is cut before its head, as for transfer learning."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.flatten = nn.Conv2d(4, 8, 3, padding=1), nn.MaxPool2d(2), nn.Flatten()
        self.fc = nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        note(self.conv.kernel_size, self.conv.padding, self.conv.groups, self.fc.in_features, self.fc.bias is None)
        y = self.pool(self.conv(x)).view(-1, self.fc.in_features)
        return self.fc(y) * self.fc.in_features**-0.5 / self.conv.stride[0] + self.fc.bias


def _penalised(model: nn.Module, y: Tensor) -> Tensor:
    found = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    named = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    note(named, [m.weight.shape for m in found])
    decayed = [p for name, p in model.named_parameters() if name.endswith(".weight") and p.dim() > 1]
    return y.square().mean() + 0.01 * sum(p.norm() for p in decayed) + sum(m.weight.abs().mean() for m in found)


@case(loss=_penalised)
def PenaltyByClass() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def _initialise(module: nn.Module) -> None:
    name = type(module).__name__
    if "Conv" in name:
        nn.init.normal_(module.weight.data, 0.0, 0.02)
    elif name.find("Linear") != -1:
        nn.init.xavier_uniform_(module.weight)
        nn.init.constant_(module.bias, 0.1)


@case(inputs=images, prepare=lambda model: model.apply(_initialise))
def InitialisedAfter() -> nn.Module:  # noqa: N802
    """DCGAN's way: a function on every module, which looks at the name of its class."""
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 8))


@case(prepare=lambda model: [m.reset_parameters() for m in model.modules() if hasattr(m, "reset_parameters")])
def ResetAfter() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def _clip(model: Any, number: int) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.1, 0.1)
    with torch.no_grad():
        model.fc.weight.mul_(0.9)
        model.fc.weight[0] = 0.05
        model.fc.weight.data += 0.01


@case(before_step=_clip)
class ClippedWeights(nn.Module):
    """Weights are written between the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x).relu())


# Changes after transform


def _new_head(model: Any) -> None:
    model.fc = nn.Linear(model.fc.in_features, 4)
    model.trunk.append(nn.Linear(16, 16))
    model.trunk[1] = nn.Tanh()


@case(prepare=_new_head, leaves=("fc", "trunk.3"))
class NewHead(nn.Module):
    """The head is replaced, a layer appended, an activation exchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.trunk(x))


def _remove_head(model: Any) -> None:
    model.fc = nn.Identity()
    del model.trunk[-1]


@case(prepare=_remove_head)
class NoHead(NewHead):
    """The head is taken away."""


def _freeze(model: Any) -> None:
    model.first.requires_grad_(False)
    model.second.bias.requires_grad = False
    note([p.requires_grad for m in (model.first, model.second, model.third) for p in (m.weight, m.bias)])


@case(prepare=_freeze, untrained=("first",))
class FrozenLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x)).relu())


def _new_parameter(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.randn(16, 16) / 4)
    model[2].bias = None


@case(prepare=_new_parameter)
def NewParameter() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
