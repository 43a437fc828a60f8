"""Cases of models that keep state: attributes and buffers written in ``forward``, and writes in place."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.meaning.case import BATCH, case, images, mean_squares, note, rows, sequences

# Attributes


@case(loss=lambda model, y: y.square().mean() + model.aux)
class AuxiliaryLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.up(x))
        self.aux = h.pow(2).mean()
        return self.down(h)


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 4)
        self.load: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(-1)
        self.load = weights.mean(0).square().sum()
        return weights


def _balanced(model: nn.Module, y: Tensor) -> Tensor:
    return y.square().mean() + sum(m.load for m in model.modules() if isinstance(m, Router))


@case(loss=_balanced)
class BalancedExperts(nn.Module):
    """Every router leaves its load for the loss, which finds the routers by their class."""

    def __init__(self) -> None:
        super().__init__()
        self.routers = nn.ModuleList(Router() for _ in range(2))
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for router in self.routers:
            x = x + torch.einsum("be,ebd->bd", router(x), torch.stack([expert(x) for expert in self.experts]))
        return x


@case(loss=lambda model, y: y.square().mean() + sum(h.abs().mean() for h in model.features))
class DeepSupervision(nn.Module):
    """A list that is cleared and filled again in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.features.clear()
        for block in self.blocks:
            x = torch.tanh(block(x))
            self.features.append(x)
        return x


@case
class RememberedState(nn.Module):
    """Truncated backpropagation through time: the state of the last call, without its gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(24, 8), nn.Linear(8, 4)
        self.memory: dict[str, Any] = {"calls": 0}

    def forward(self, x: Tensor) -> Tensor:
        before = self.memory.get("state", x.new_zeros(len(x), 8))
        state = torch.tanh(self.inner(torch.cat([x, before], 1)))
        self.memory.update(state=state.detach(), calls=self.memory["calls"] + 1)
        return self.outer(state)


@case
class Annealing(nn.Module):
    """A counter in Python and a schedule that depends on it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.calls, self.temperatures = nn.Linear(16, 8), 0, []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        temperature = 1 / self.calls
        self.temperatures.append(temperature)
        y = self.fc(x) / temperature
        return y if self.calls > 2 else y.softmax(-1)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qk = nn.Linear(16, 16)
        self.map: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        q, k = self.qk(x).chunk(2, -1)
        self.map = (q @ k.transpose(1, 2)).softmax(-1)
        return self.map @ x


@case(inputs=sequences)
class ReadsASibling(nn.Module):
    """One module reads what another one left in its last call."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = Attention(), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.attention(x)
        assert self.attention.map is not None
        return self.head(y), self.attention.map.max(-1).values


@case(loss=lambda model, y: y[0].square().mean())
class InitialisedByData(nn.Module):
    """ActNorm: the first batch sets the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.shift, self.log_scale = nn.Parameter(torch.zeros(8)), nn.Parameter(torch.zeros(8))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.training and not self.initialised:
            with torch.no_grad():
                self.shift.copy_(-y.mean(0))
                self.log_scale.copy_(-y.std(0).log())
                self.initialised.fill_(True)
        return (y + self.shift) * self.log_scale.exp()


@case
class MadeInForward(nn.Module):
    """An attribute that exists only after the first call, of a class of its own."""

    class Statistics:
        def __init__(self) -> None:
            self.count, self.total = 0, torch.zeros(8)

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "statistics"):
            self.statistics = self.Statistics()
        y = self.fc(x)
        self.statistics.count += len(y)
        self.statistics.total += y.detach().sum(0)
        return y - self.statistics.total / self.statistics.count


# Buffers


@case
class CountsSteps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.register_buffer("n", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        self.n += 1
        return self.fc(x) / self.n


class _Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 8), nn.Linear(8, 4)
        self.register_buffer("mean", torch.zeros(8))


@case
class RunningMean(_Centred):
    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(h.mean(0), alpha=0.1)
        return self.out(h - self.mean)


@case
class ReboundBuffer(_Centred):
    """The buffer's name is bound to a new tensor in every call."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        self.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)
        return self.out(h - self.mean)


@case(copies=False)
class LateBuffer(nn.Module):
    """A buffer without a value until the first call."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.register_buffer("highest", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        self.highest = y.detach().amax(0) if self.highest is None else torch.maximum(self.highest, y.detach().amax(0))
        return y - self.highest


@case(inputs=sequences, before_step=lambda model, number: note("mask" in model.state_dict()))
class BuffersNotSaved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.register_buffer("mask", torch.ones(6, 6).tril(), persistent=False)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.mask @ self.fc(x) / self.calls


@case(inputs=images)
class BatchNorms(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 8, 3, bias=False),
            nn.BatchNorm2d(8, momentum=None),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(288, 8),
            nn.BatchNorm1d(8, affine=False),
        )


@case
class PowerIteration(nn.Module):
    """Spectral normalisation by hand: a vector is improved in every call, and the weight is read."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.register_buffer("u", F.normalize(torch.randn(8), dim=0))

    def forward(self, x: Tensor) -> Tensor:
        weight = self.fc.weight
        if self.training:
            with torch.no_grad():
                v = F.normalize(weight.t() @ self.u, dim=0)
                self.u.copy_(F.normalize(weight @ v, dim=0))
        v = F.normalize(weight.t() @ self.u, dim=0).detach()
        sigma = self.u @ weight @ v
        return F.linear(x, weight / sigma, self.fc.bias)


@case(inputs=lambda: (*rows(), *rows()), untrained=("key",))
class MomentumContrast(nn.Module):
    """MoCo: a key encoder that follows the query encoder, and a queue of its results."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 8))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(8, 20), dim=0))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def follow(self) -> None:
        for q, k in zip(self.query.parameters(), self.key.parameters(), strict=True):
            k.data = k.data * 0.9 + q.data * 0.1

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        place = int(self.place)
        self.queue[:, place : place + BATCH] = keys.T
        self.place[0] = (place + BATCH) % self.queue.shape[1]

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        q = F.normalize(self.query(first), dim=1)
        with torch.no_grad():
            if self.training:
                self.follow()
            k = F.normalize(self.key(second), dim=1)
        same = torch.einsum("nc,nc->n", q, k).unsqueeze(-1)
        others = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        self.enqueue(k)
        return torch.cat([same, others], 1) / 0.07, torch.zeros(len(q), dtype=torch.long)


@case(loss=lambda model, out: F.mse_loss(*out), untrained=("teacher",))
class MeanTeacher(nn.Module):
    """The teacher is the average of the student, has no gradient and stays in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Sequential(nn.Linear(16, 8), nn.Dropout(0.2), nn.Linear(8, 8))
        self.teacher = copy.deepcopy(self.student)
        for parameter in self.teacher.parameters():
            parameter.requires_grad = False

    def train(self, mode: bool = True) -> MeanTeacher:
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def update(self) -> None:
        student = dict(self.student.named_parameters())
        for name, parameter in self.teacher.named_parameters():
            parameter.mul_(0.9).add_(student[name], alpha=0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wanted = self.teacher(x)
        if self.training:
            self.update()
        return self.student(x), wanted


@case(loss=lambda model, out: mean_squares(model, out[0]) + out[1])
class VectorQuantiser(nn.Module):
    """A codebook in buffers that averages what is assigned to it; the gradient passes straight through."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(16, 8), nn.Linear(8, 16)
        self.register_buffer("codes", torch.randn(12, 8))
        self.register_buffer("counts", torch.ones(12))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encode(x)
        index = torch.cdist(z, self.codes).argmin(1)
        if self.training:
            with torch.no_grad():
                self.counts.index_add_(0, index, torch.ones(len(x)))
                self.codes.index_add_(0, index, (z - self.codes[index]) * 0.1)
        chosen = self.codes[index]
        return self.decode(z + (chosen - z).detach()), F.mse_loss(z, chosen), index


# Writes in place


@case
class SumsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 8)
        y += self.a(x)
        y += self.b(x).mul_(0.5)
        return y


@case
class AssignsSlices(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), 16)
        y[:, :8] = self.a(x)
        y[:, 8:] = self.b(y[:, :8].clone())
        y[y < -2] = 0.0
        return y


@case(untrained=("experts.0",))  # tiled, the two rows of the gate are equal: one expert takes all
class RoutedTokens(nn.Module):
    """Switch routing: each expert sees the rows that chose it, and adds its results at their places."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(16, 2)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.gate(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (index,) = torch.where(chosen == number)
            out.index_add_(0, index, expert(x[index]) * weight[index, None])
        return out


@case
class WritesToOut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.register_buffer("lowest", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with torch.no_grad():
            torch.amin(y, dim=0, out=self.lowest)
            total = torch.empty(len(x), 8)
            torch.matmul(x, self.fc.weight.t(), out=total)
        return y - self.lowest + total


@case(inputs=images)
class ActivatesInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu_(self.conv1(x))
        value, gate = self.conv2(y).tanh_().chunk(2, 1)
        y = value * gate
        y.masked_fill_(y > 0.5, 0.5).add_(x)
        return y.clamp_(min=-1)


@case(input_gradients=False)
class WritesToItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(x.mean(0))
        x[:, 0] = 1.0
        return x + self.fc(x)


@case(inputs=sequences)
class PaddedRows(nn.Module):
    """Only the rows that a mask keeps go through the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        keep = x.mean(-1) > 0
        y = x.new_zeros(*x.shape[:2], 8)
        y[keep] = self.fc(x[keep])
        return y


@case(step=lambda model, x: [model(x), model(x)])
class WritesToItsParameter(nn.Module):
    """Prototypes that follow the data: a parameter without gradient, written under ``no_grad``."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)
        self.centre = nn.Parameter(torch.zeros(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with torch.no_grad():
            self.centre.lerp_(y.mean(0), 0.1)
        self.centre.data.clamp_(-1, 1)
        return y - self.centre
