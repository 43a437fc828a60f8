"""Cases of hooks on layers, blocks and models, set before or after transform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from tests.meaning.case import case, note


class _Hooked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.block = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.fc(x))


def _add_hooks(model: Any) -> None:
    """Hooks that see, and hooks that change, on layers, on a block and on the model."""
    model.fc.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model.fc.register_forward_hook(lambda m, args, y: note("fc", isinstance(m, nn.Linear), args, y))
    model.fc.register_forward_hook(lambda m, args, y: y + 1, prepend=True)
    model.block.register_forward_hook(lambda m, args, y: note("block", type(m).__name__, args, y))
    model.block[2].register_forward_hook(lambda m, args, y: y * m.weight.shape[0])
    model.register_forward_pre_hook(lambda m, args: note("model", args))
    model.register_forward_hook(lambda m, args, y: {"y": y})


@case(pickles=False)
def HooksBefore() -> nn.Module:  # noqa: N802
    model = _Hooked()
    _add_hooks(model)
    return model


@case(prepare=_add_hooks, pickles=False)
def HooksAfter() -> nn.Module:  # noqa: N802
    return _Hooked()


def _add_backward_hooks(model: Any) -> None:
    model.fc.register_full_backward_hook(lambda m, given, taken: note("fc", given, taken))
    model.fc.register_full_backward_pre_hook(lambda m, taken: (taken[0] * 2,))
    model.block.register_full_backward_hook(lambda m, given, taken: (given[0] / 2,))
    model.block[0].register_full_backward_hook(lambda m, given, taken: note(m.in_features, given, taken))


@case(pickles=False)
def BackwardHooksBefore() -> nn.Module:  # noqa: N802
    model = _Hooked()
    _add_backward_hooks(model)
    return model


@case(prepare=_add_backward_hooks, pickles=False)
def BackwardHooksAfter() -> nn.Module:  # noqa: N802
    return _Hooked()


@case(pickles=False)
class HooksWithKeywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 8)
        self.fc.register_forward_pre_hook(self.doubled, with_kwargs=True)
        self.fc.register_forward_hook(lambda m, args, kwargs, y: note(len(args), kwargs, y), with_kwargs=True)
        self.out.register_forward_hook(lambda m, args, y: note("always", y), always_call=True)

    @staticmethod
    def doubled(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {name: 2 * x for name, x in kwargs.items()}

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(input=x))


@case
class BoundMethodHooks(nn.Module):
    """Hooks are methods of the model: of a copy, they must write to the copy."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 8)
        self.seen: list[Tensor] = []
        self.gain = 2.0
        self.fc.register_forward_hook(self.remember)
        self.out.register_forward_pre_hook(functools.partial(self.amplify, by=0.5))

    def remember(self, module: nn.Module, args: Any, y: Tensor) -> None:
        self.seen = [*self.seen[-2:], y.detach()]

    def amplify(self, module: nn.Module, args: Any, by: float) -> Any:
        return tuple(x * self.gain * by for x in args)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x)) + self.seen[-1].mean()


@case(copies=False, pickles=False, before_step=lambda model, number: setattr(model, "gain", 1.0 + number))
class ClosureHooks(nn.Module):
    """Hooks close over ``self``: what they read and write is that of the model that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.features: dict[str, Tensor] = {}
        self.gain = 1.0
        for i, block in enumerate(self.blocks):
            block.register_forward_hook(self.keep(str(i)))
        self.blocks[0].register_forward_hook(lambda m, args, y: y * self.gain)

    def keep(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, y: Tensor) -> None:
            self.features[name] = y

        return hook

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x, self.features["0"].mean(1)


def _take_off(model: Any, number: int) -> None:
    if number == 1:
        model.take_off()


@case(before_step=_take_off)
class RemovedHooks(nn.Module):
    """The model keeps the handles of its hooks, and takes them off later."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 8)
        self.handles = [self.fc.register_forward_hook(self.halve), self.out.register_forward_hook(self.halve)]

    @staticmethod
    def halve(module: nn.Module, args: Any, y: Tensor) -> Tensor:
        return y / 2

    def take_off(self) -> None:
        for handle in self.handles:
            handle.remove()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(x))


def _observed(model: Any, x: Tensor) -> Tensor:
    def hook(module: nn.Module, args: Any, y: Tensor) -> None:
        if isinstance(module, nn.Linear):
            note(module.out_features, y)

    with register_module_forward_hook(hook):
        return model(x)


@case(step=_observed)
def GlobalHook() -> nn.Module:  # noqa: N802
    return _Hooked()
