"""Cases about control flow and signatures: branches, loops, randomness, and every form of arguments and results."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.meaning.case import BATCH, case, note, rows, sequences, tokens

# Branches


@case(step=lambda model, x: [model(x), model([x, -x]), model((x,))])
class BranchOnType(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.many = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor | list[Tensor] | tuple[Tensor, ...]) -> Any:
        if isinstance(x, Tensor):
            return self.fc(x)
        if isinstance(x, tuple):
            return tuple(self.many(item) for item in x)
        return [self.fc(item) for item in x]


@case(step=lambda model, x: [model(x), model(x[:1]), model(x[0]), model(x[:, None].expand(-1, 3, -1))], rounds=True)
class BranchOnShape(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.pooled = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.dim() == 3:
            b, t, _ = y.shape
            return self.pooled(y.reshape(b * t, -1)).view(b, t, -1).mean(1)
        if y.dim() == 2 and y.size(0) > 1:
            return self.norm(y)
        return y


@case(step=lambda model, x: [model(x), model(-x), model(x * 100)])
class BranchOnValue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative, self.shrink = nn.Linear(16, 8), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.positive(x) if x.sum() > 0 else self.negative(x)
        rounds = 0
        while y.norm() > 4:
            y, rounds = torch.tanh(self.shrink(y)), rounds + 1
        note(rounds)
        return y


@case
class BranchOnTraining(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head, self.auxiliary = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Any:
        h = self.trunk(x)
        if self.training:
            return self.head(h), self.auxiliary(h)
        return self.head(h).softmax(-1)


@case(before_step=lambda model, number: setattr(model, "features_only", number == 1))
class FlagSetLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.features_only = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        return h if self.features_only else self.head(h)


@case(steps=6)
class LayerDrop(nn.Module):
    """Whole layers are left out at random, by each of the three generators that people use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(16, 16) for _ in range(3)), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        chances = (lambda: random.random(), lambda: np.random.uniform(0, 1), lambda: torch.rand(1).item())
        for layer, chance in zip(self.layers, chances, strict=True):
            if not self.training or chance() > 0.4:
                x = x + layer(x)
        return self.head(x)


@case
class StochasticDepth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def drop_path(self, x: Tensor, p: float) -> Tensor:
        if not self.training or p == 0:
            return x
        return x * torch.empty(len(x), 1).bernoulli_(1 - p) / (1 - p)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + self.drop_path(F.dropout(layer(x), 0.1, self.training), 0.2 * i)
        return x


@case(steps=4, reads=("cell.weight_ih", "cell.weight_hh"))
class ScheduledSampling(nn.Module):
    """A decoder that feeds on its own words or on the given ones, and stops when it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.cell, self.out = nn.Embedding(12, 8), nn.GRUCell(8, 16), nn.Linear(16, 12)

    def forward(self, state: Tensor) -> Tensor:
        word = torch.zeros(len(state), dtype=torch.long)
        logits: list[Tensor] = []
        while len(logits) < 4:
            state = self.cell(self.embed(word), state)
            logits.append(self.out(state))
            word = logits[-1].argmax(-1) if random.random() < 0.5 else torch.full_like(word, len(logits))
            if (word == 3).all():
                break
        return torch.stack(logits, 1)


@case(
    step=lambda model, x: [model(x), model(x * 0.01)],
    untrained=("stages.1", "stages.2", "exits.1", "exits.2"),  # with tiled weights all leave at the first exit
)
class EarlyReturn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.exits = nn.ModuleList(nn.Linear(16, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        for depth, (stage, leave) in enumerate(zip(self.stages, self.exits, strict=True)):
            x = torch.tanh(stage(x))
            y = leave(x).softmax(-1)
            if y.max(-1).values.mean() < 0.34:
                return y, depth
        return y, None


@case(step=lambda model, x: model(((x, x + 1), (x, (x, -x)))))
class RecursiveTree(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.leaf, self.join = nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, tree: Any) -> Tensor:
        if isinstance(tree, Tensor):
            return self.leaf(tree)
        return torch.tanh(self.join(torch.cat([self(branch) for branch in tree], -1)))


@case(step=lambda model, x: [model(x), model(x[:, :8])])
class TriesAndFails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        try:
            return self.wide(x)
        except RuntimeError as error:
            note(type(error).__name__, "shapes" in str(error))
            return self.narrow(x)
        finally:
            note("done")


@case(step=lambda model, x: list(model(x)))
class Generator(nn.Module):
    """``forward`` is a generator, made of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def stages(self, x: Tensor) -> Iterator[Tensor]:
        for layer in self.layers:
            x = layer(x).relu()
            yield x

    def forward(self, x: Tensor) -> Iterator[Tensor]:
        yield from (h.mean(-1) for h in self.stages(x))
        yield x


def _with_and_without(model: Any, x: Tensor) -> list[Tensor]:
    with model.disabled():
        reference = model(x).detach()
    return [model(x), reference]


@case(step=_with_and_without)
class ContextManager(nn.Module):
    """An adapter that a context manager switches off."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.down, self.up = nn.Linear(16, 16), nn.Linear(16, 4), nn.Linear(4, 16)
        self.active = True

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + self.up(self.down(x)) if self.active else y


@case(step=lambda model, x: [model(x, "mean"), model(x, 3), model(x, None), model(x, {"power": 2})])
class PatternMatching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor, mode: Any) -> Tensor:
        y = self.fc(x)
        match mode:
            case int():
                return y * mode
            case "mean":
                return y.mean(-1)
            case {"power": power}:
                return y**power
        return y


@case
class UsesNumbers(nn.Module):
    """Values leave torch and come back: asserts, f-strings, logging, lists, NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        assert x.dim() == 2, f"expected two dimensions, got {tuple(x.shape)}"
        h = self.fc(x)
        logging.getLogger(__name__).debug("mean %s", h.mean().item())
        order = np.argsort(h.detach().numpy().sum(1)).tolist()
        text = f"{h.max().item():.6f} of {h.shape[0]}"
        return {text: self.out(h[order]), "order": order, "range": [round(v, 4) for v in h.std(1).tolist()]}


@case(step=lambda model, x: model(x.double()))
class FollowsItsWeights(nn.Module):
    """The input takes the dtype and device of a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 8), nn.Linear(8, 4)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype).to(self.fc.weight.device)
        note(self.dtype, self.fc.weight.dtype, self.out.weight.requires_grad, tuple(self.out.weight.shape))
        return self.out(self.fc(x).type_as(self.out.weight))


# Arguments and results


def _options(model: Any, x: Tensor) -> list[Any]:
    mask = torch.ones(BATCH, 6, 1)
    mask[:, 3:] = 0
    return [model(x), model(x, mask), model(x, mask=mask, return_hidden=True), model(x, scale=2.0)]


@case(inputs=sequences, step=_options)
class OptionalArguments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: float = 1.0, return_hidden: bool = False) -> Any:
        h = self.fc(x)
        if mask is not None:
            h = h * mask
        y = scale * self.out(h)
        return (y, h) if return_hidden else y


def _modalities() -> tuple[dict[str, Tensor]]:
    return ({"text": torch.randn(BATCH, 16), "image": torch.randn(BATCH, 8), "name": "example"},)  # type: ignore[dict-item]


@case(inputs=_modalities)
class Dictionaries(nn.Module):
    """A dictionary in and out; the result keeps the order of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict({"image": nn.Linear(8, 8), "text": nn.Linear(16, 8)})
        self.heads = nn.ModuleDict({"mean": nn.Linear(8, 4), "log_var": nn.Linear(8, 4)})

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        encoded = {key: self.encoders[key](x) for key, x in batch.items() if key in self.encoders}
        total = sum(encoded.values())
        return {**encoded, "name": batch["name"], **{key: head(total) for key, head in self.heads.items()}}


@dataclass
class Batch:
    x: Tensor
    weight: float = 1.0


@dataclass
class Output:
    logits: Tensor
    hidden: list[Tensor]
    batch: Batch | None = None


@case(step=lambda model, x: model(Batch(x, 0.5)))
class Dataclasses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), nn.Linear(16, 4)

    def forward(self, batch: Batch) -> Output:
        hidden = [batch.x]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]) * batch.weight)
        return Output(self.head(hidden[-1]), hidden, batch)


class State(NamedTuple):
    hidden: Tensor
    steps: int = 0


@case(step=lambda model, x: model(x, model(x, State(torch.zeros(BATCH, 8)))[1]))
class NamedTuples(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.state, self.out = nn.Linear(16, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        state = state._replace(hidden=torch.tanh(self.inner(x) + self.state(state.hidden)), steps=state.steps + 1)
        return self.out(state.hidden), state


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16)

    def forward(self, *inputs: Tensor, **options: Any) -> Any:
        note(len(inputs), sorted(options))
        outputs = tuple(self.fc(x) * options.get("scale", 1) for x in inputs)
        return (*outputs, options) if options else outputs


@case(step=lambda model, x: model(x, -x, scale=0.5, name="x"))
class PassesEverythingOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Stage(), Stage()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        *outputs, options = self.first(*args, **kwargs)
        return self.second(*outputs), options


def _identities(model: Any, x: Tensor) -> list[Any]:
    given, y, extra = model(x)
    note(given is x, extra["given"] is x, y is extra["y"])
    return [given, y, extra, model(None), model(x, skip=True)]


@case(step=_identities)
class ReturnsWhatItWasGiven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor | None, skip: bool = False) -> Any:
        if x is None or skip:
            return None
        y = self.fc(x)
        return x, y, {"given": x, "y": y, "none": None, "text": "text", "number": 3, "parts": list(y.unbind(1))}


def _decode(model: Any, words: Tensor) -> list[Tensor]:
    past: list[list[Tensor]] = [[], []]
    outputs = [model(words[:, i : i + 1], past) for i in range(words.shape[1])]
    note([len(layer) for layer in past])
    return [torch.cat(outputs, 1), model(words, [[], []])]


@case(inputs=tokens, step=_decode)
class KeyValueCache(nn.Module):
    """Lists given as an argument grow in every call."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))
        self.out = nn.Linear(16, 12)

    def forward(self, words: Tensor, past: list[list[Tensor]]) -> Tensor:
        x = self.embed(words)
        for qkv, cache in zip(self.qkv, past, strict=True):
            q, k, v = qkv(x).chunk(3, -1)
            cache.append(torch.stack([k, v]))
            k, v = torch.cat(cache, 2)
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[1] > 1)
        return self.out(x)


@case(inputs=lambda: (*rows(), *rows(8)), step=lambda model, x, y: model(pair=(x, y), lengths=[3, 2]))
class ListsOfTensors(nn.Module):
    """Ragged rows, split and padded again."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, *, pair: tuple[Tensor, Tensor], lengths: list[int]) -> list[Tensor]:
        x, y = pair
        parts = [self.first(part) for part in x.split(lengths)]
        padded = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        return [padded, *(self.second(row) for row in y)]
