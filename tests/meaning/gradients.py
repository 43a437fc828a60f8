"""Cases about autograd: functions with their own backward, gradient modes, autocast, checkpointing, tensor hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.meaning.case import call, case, note, rows, sequences


class Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradient, None


@case
class GradientReversal(nn.Module):
    """Domain adversarial training: the features learn to fool one of the two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.label, self.domain = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.features(x))
        return self.label(h), self.domain(Reverse.apply(h, 0.5))


class Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient.clamp(-0.01, 0.01) * (x.abs() < 1)


@case
class ClippedGradient(nn.Sequential):
    class Function(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Clip.apply(x)

    def __init__(self) -> None:
        super().__init__(nn.Linear(16, 16), self.Function(), nn.Linear(16, 8), self.Function())


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor) -> Tensor:
        ctx.save_for_backward(x, step)
        return torch.round(x / step) * step

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, step = ctx.saved_tensors
        return gradient, (gradient * (torch.round(x / step) - x / step)).sum()


@case
class LearnedStepSize(nn.Module):
    """Quantised activations and weights with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 8)
        self.step1, self.step2 = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor(0.05))

    def forward(self, x: Tensor) -> Tensor:
        h = Round.apply(self.fc1(x).relu(), self.step1)
        return F.linear(h, Round.apply(self.fc2.weight, self.step2), self.fc2.bias)


@case
class StraightThrough(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(16, 8), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        p = self.encode(x).softmax(-1)
        hard = F.one_hot(p.argmax(-1), 8).to(p)
        return self.decode(hard - p.detach() + p)


# Gradient modes


@case(untrained=("frozen",))
class FrozenBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.head = nn.Sequential(nn.Linear(16, 16), nn.ReLU()), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = self.frozen(x)
        note(h.requires_grad)
        return self.head(h)


@case(before_step=lambda model, number: setattr(model, "tune", number % 2 == 0))
class NestedModes(nn.Module):
    tune = True

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training and self.tune):
            h = self.a(x)
        with torch.no_grad():
            frozen = self.b(h)
            with torch.enable_grad():
                h = h + self.c(x)
            note(torch.is_grad_enabled(), h.requires_grad, frozen.requires_grad)
        return h + frozen + self.b(x)


@case
class InferenceStatistics(nn.Module):
    """What inference mode made is used as a number, or as a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.probe, self.fc = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            h = self.probe(x)
            note(h.is_inference())
            scale = 1 + h.abs().mean().item()
        return self.fc(x) / scale + h.clone() + self.probe(x)


@torch.no_grad()
def _target(model: Any, x: Tensor) -> Tensor:
    return model.project(x)


@case(loss=lambda model, out: F.mse_loss(out[0], out[1]) + out[2].square().mean())
class DecoratedMethods(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.predict = nn.Linear(16, 8), nn.Linear(8, 8)

    @torch.no_grad()
    def target(self, x: Tensor) -> Tensor:
        return self.project(x)

    @torch.enable_grad()
    def online(self, x: Tensor) -> Tensor:
        return self.predict(self.project(x))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            y = self.online(x)
        return y, self.target(x) + _target(self, x), y


@case(loss=lambda model, out: -F.cosine_similarity(*out).mean())
class StoppedGradient(nn.Module):
    """SimSiam: one side is detached."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.predict = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.encode(x)
        return self.predict(z), self.encode(x.flip(0)).detach()


def _autocast(model: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x)


@case(step=_autocast)
class AutocastDisabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        with torch.autocast("cpu", enabled=False):
            h32 = self.fc2(h.float())
        note(h.dtype, h32.dtype)
        return self.out(h32 + h)


@case(tolerance=0.02)
class AutocastInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def low(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.low(x).float()).softmax(-1)


# Gradients inside of forward or of the loss


@case
class EnergyAndForces(nn.Module):
    """The forces are a gradient: in evaluation too, whatever mode the caller is in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 4)

    @torch.enable_grad()
    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if not positions.requires_grad:
            positions = positions.detach().requires_grad_()
        energy = self.fc2(torch.tanh(self.fc1(positions))).sum()
        (gradient,) = torch.autograd.grad(energy, positions, create_graph=self.training)
        return energy, -gradient


def _penalty(model: Any, y: Tensor) -> Tensor:
    (x,) = rows()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return y.mean() + 10 * (gradient.norm(2, dim=1) - 1).square().mean()


@case(loss=_penalty)
def GradientPenalty() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Softplus(), nn.Linear(16, 4))


@torch.enable_grad()
def _adapted(model: Any, x: Tensor) -> Tensor:
    """MAML: one step on a task, by name, and then the result with the adapted parameters."""
    parameters = dict(model.named_parameters())
    loss = functional_call(model, parameters, (x,)).square().mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    adapted = {name: p - 0.1 * g for (name, p), g in zip(parameters.items(), gradients, strict=True)}
    return functional_call(model, adapted, (x.flip(0),))


@case(step=_adapted, infer=call)
def MetaLearning() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))


def _per_sample(model: Any, x: Tensor) -> list[Tensor]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, parameters, (row[None],)).square().sum()

    gradients = vmap(grad(loss), (None, 0))(parameters, x)
    return [model(x), gradients["0.weight"], gradients["2.bias"]]


@case(step=_per_sample, infer=call, saves=False)
def PerSampleGradients() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


def _jacobian(model: Any, x: Tensor) -> list[Tensor]:
    return [vmap(jacrev(model))(x), model(x)]


@case(step=_jacobian, infer=call, saves=False)
def Jacobians() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4))


def _stacked(model: Any, x: Tensor) -> Tensor:
    members = list(model)
    parameters, buffers = stack_module_state(members)

    def member(parameters: Any, buffers: Any, x: Tensor) -> Tensor:
        return functional_call(members[0], (parameters, buffers), (x,))

    return vmap(member, (0, 0, None))(parameters, buffers, x) + sum(one(x) for one in members)


@case(step=_stacked, infer=lambda model, x: model[0](x), saves=False)
def StackedEnsemble() -> nn.Module:  # noqa: N802
    return nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))


@case(observe=lambda model: None if model.h.is_leaf else model.h.grad)
class GradCam(nn.Module):
    """Activations that keep their gradient, for a heat map afterwards."""

    h = torch.zeros(())

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.h = self.fc1(x).relu()
        if self.h.requires_grad:
            self.h.retain_grad()
        return self.fc2(self.h)


@case
class TensorHooks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        if h.requires_grad:
            h.register_hook(lambda g: note("h", g))
            h.register_hook(lambda g: g.clamp(-0.01, 0.01))
        y = self.fc2(h)
        if y.requires_grad:
            y.grad_fn.register_hook(lambda given, taken: note("y", *taken))
        return y


@case(copies=False)
class HooksOnParameters(nn.Module):
    """A part of a weight is frozen by a mask on its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 8)
        mask = torch.ones(16, 16)
        mask[:4] = 0
        self.fc1.weight.register_hook(lambda g: g * mask)
        self.fc2.bias.register_hook(lambda g: note("bias", g))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


def _step_in_backward(model: Any) -> None:
    @torch.no_grad()
    def step(parameter: Tensor) -> None:
        parameter -= 0.05 * parameter.grad
        parameter.grad = None

    for parameter in (model[0].weight, model[0].bias):
        parameter.register_post_accumulate_grad_hook(step)


@case(prepare=_step_in_backward, copies=False)
def OptimiserInBackward() -> nn.Module:  # noqa: N802
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


# Checkpointing: the activations that are saved are compared for every case


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return x + scale * self.drop(self.down(F.gelu(self.up(x))))


@case(inputs=sequences)
class CheckpointedBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(2)), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, scale=0.5, use_reentrant=False) if self.training else block(x)
        return self.head(x)


@case
class ReentrantCheckpoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block, self.head = Block(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.block, x, use_reentrant=True) if x.requires_grad else self.block(x))


@case
class CheckpointedSequential(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(Block() for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.net, 2, x, use_reentrant=False)


@case
class CheckpointedMethod(nn.Module):
    """A method, a closure and a layer itself are checkpointed; the method counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 8)
        self.runs = 0

    def inner(self, x: Tensor) -> Tensor:
        self.runs += 1
        return F.dropout(torch.sigmoid(self.fc1(x)), 0.3, self.training)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.inner, x, use_reentrant=False)
        x = checkpoint(lambda x: torch.tanh(self.fc2(x)) * 2, x, use_reentrant=False)
        return checkpoint(self.fc3, x, use_reentrant=False)


@case
class SavedOnCpu(nn.Module):
    """A policy of its own for what autograd keeps: here, in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 8)

    @contextlib.contextmanager
    def kept_small(self) -> Iterator[None]:
        def pack(x: Tensor) -> Tensor:
            return x.bfloat16() if x.shape == (5, 16) else x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.float()):
            yield

    def forward(self, x: Tensor) -> Tensor:
        with self.kept_small():
            h = torch.tanh(self.fc1(x) * self.fc1(-x))
        return self.fc2(h)


@case(step=lambda model, x: [model(x), 0.01 * model.penalty()], infer=call)
class PenaltyOfWeights(nn.Module):
    """A regulariser reads the weights outside of ``forward``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 16), nn.Linear(16, 8)

    def penalty(self) -> Tensor:
        return sum((m.weight @ m.weight.t() - torch.eye(len(m.weight))).square().sum() for m in (self.fc1, self.fc2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).relu())
