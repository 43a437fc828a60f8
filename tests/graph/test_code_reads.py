"""What is read from the source of models: which parameters are weights, in which role, and who reads them."""

from __future__ import annotations

import functools
import linecache
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

import tbn_compiler as tbn
from tbn_compiler.graph.code_reads import parameter_uses
from tbn_compiler.graph.function_reads import ELEMENTWISE, LINEAR, PRODUCT, READ, RIGHT, WRITTEN
from tests import oracle

ALL = tbn.TilingConfig(p=4, min_size=0)


class Base(nn.Module):
    """Parameters and layers to read; each case adds a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))
        self.kernel, self.stack = nn.Parameter(torch.randn(4, 4, 3, 3)), nn.Parameter(torch.randn(3, 8, 8))
        self.fc, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.named = nn.ModuleDict({"first": nn.Linear(8, 8), "last": nn.Linear(8, 8)})
        self.weights = nn.ParameterList(torch.randn(8, 8) for _ in range(2))


def roles(model: nn.Module) -> dict[str, set[str]]:
    """The roles of every parameter that the code of a model reads, by name."""
    uses = parameter_uses(model)
    found = {}
    for path, module in model.named_modules():
        for name in module._parameters:
            if uses.of(module, name):
                found[f"{path}.{name}".lstrip(".")] = set(uses.of(module, name))
    return found


def product(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight)


def product_of_layer(x: Tensor, layer: nn.Linear) -> Tensor:
    return product(x, layer.weight)


def apply_first(module: Any, x: Tensor) -> Tensor:
    return x @ module.fc.weight + F.linear(x, module.w)


def halves(weight: Tensor) -> tuple[Tensor, ...]:
    return weight.chunk(2)


def logged(method: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator that does not say what it wraps."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return wrapper


CASES: dict[str, tuple[type[Base], dict[str, set[str]]]] = {}


def case(**expected: str | set[str]) -> Any:
    """Register a model with the roles that are expected; ``_`` stands for the dot in a name."""

    def register(cls: type[Base]) -> type[Base]:
        roles = {name.replace("__", "."): {r} if isinstance(r, str) else r for name, r in expected.items()}
        CASES[cls.__name__] = cls, roles
        return cls

    return register


# Operators


@case(w=LINEAR, v=LINEAR)
class Linear(Base):
    def forward(self, x: Tensor) -> Tensor:
        return linear(torch.nn.functional.linear(input=x, weight=self.w), self.v)


@case(kernel="conv2d", stack="conv_transpose1d")
class Convolutions(Base):
    def forward(self, x: Tensor) -> Tensor:
        return conv2d(x, self.kernel, stride=2).sum() + F.conv_transpose1d(x[0], weight=self.stack).sum()


@case(w=RIGHT, v=RIGHT)
class RightOperands(Base):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x @ self.w, self.v) + x.matmul(self.w) + x.mm(self.v)


@case(w=PRODUCT, v={PRODUCT, LINEAR, READ})
class LeftOperands(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.w @ x + self.v.matmul(x) + self.w.t().mm(x)

    def second(self, x: Tensor) -> Tensor:
        return product(x, self.v)


@case(w=LINEAR, v=RIGHT)
class Transposes(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.w.t() + x @ self.w.T + x @ self.w.mT.contiguous() + x @ self.w.transpose(0, 1)
        return y + F.linear(x, self.v.t()) + x @ self.v.t().t()


@case(w=PRODUCT, stack=PRODUCT)
class OtherProducts(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bi,ij->bj", x, self.w) + torch.tensordot(x, self.w, dims=1)
        return torch.bmm(y.expand(3, -1, -1), self.stack) + torch.bmm(y[None], self.w.expand(3, -1, -1))


@case(w=RIGHT, v=ELEMENTWISE, stack={ELEMENTWISE})
class Addends(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.v, x, self.w) + self.v.addmm(x, x)
        y += self.v
        y = (y * self.stack).sub(self.stack[0])
        return torch.add(y, self.v.mul(y))


@case(w=READ, v=READ, stack=READ)
class OtherReads(Base):
    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        y = F.embedding(rows, self.w) + torch.cat([x, self.v])
        return F.scaled_dot_product_attention(y, self.stack, self.stack)


@case()
class ReadsNoValues(Base):
    def forward(self, x: Tensor) -> Tensor:
        if (
            self.w is not None
            and isinstance(self.v, Tensor)
            and len(self.w) == self.w.shape[0]
            and self.w.requires_grad
        ):
            x = x.to(self.fc.weight.dtype, non_blocking=True).to(self.other.weight.device)
        for row in range(self.w.size(0)):
            x = x + row / math.sqrt(self.v.shape[1])
        scale = 1 / self.fc.weight.shape[0]
        return self.fc(x) * scale + torch.zeros_like(self.v).sum()


@case(w=PRODUCT, v=LINEAR, stack=PRODUCT)
class ComputedFromWeights(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.w.exp() @ x + F.linear(x, torch.tanh(self.v) * math.sqrt(2))
        return y + x @ torch.stack([self.stack[0], self.stack[1]])[0]


@case(w=ELEMENTWISE)
class ComputedFromActivations(Base):
    """What a module or an activation has part in is no weight; ``input`` is no builtin here."""

    def forward(self, input: Tensor) -> Tensor:
        y = input * self.w
        return F.linear(input, y) + y @ input


@case(w=READ)
class PassesThroughAModule(Base):
    def forward(self, x: Tensor) -> Tensor:
        tokens = self.fc(self.w)
        return F.linear(x, tokens)


# Names


@case(w=LINEAR, v=RIGHT)
class Aliases(Base):
    def forward(self, x: Tensor) -> Tensor:
        w: Tensor = self.w.to(x.dtype)
        v, bias = self.v, x.mean()
        return F.linear(x, weight=w) + x @ v + bias


@case(w=LINEAR, v=PRODUCT, stack=PRODUCT)
class DerivedNames(Base):
    def forward(self, x: Tensor) -> Tensor:
        first, second = self.w.view(2, x.shape[0], -1).chunk(2)
        scaled = self.v / self.v.norm()
        if (stack := self.stack.flatten(0, 1)) is not None:
            x = x @ stack.reshape(8, len(x))
        return F.linear(x, first) + F.linear(x, second) + x @ scaled


@case(w=LINEAR, v=LINEAR)
class Choice(Base):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.w if x.sum() > 0 else self.v
        return F.linear(x, weight)


@case(w=RIGHT, v=RIGHT, layers__0__weight=LINEAR, layers__1__weight=LINEAR, weights__0=RIGHT, weights__1=RIGHT)
class Loops(Base):
    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.w, self.v):
            x = x @ weight
        for index, (layer, weight) in enumerate(zip(self.layers, self.weights, strict=True)):
            x = F.linear(x, layer.weight) @ weight + index
        return x


@case(weights__0=LINEAR, weights__1=LINEAR, named__first__weight=LINEAR, layers__0__weight=READ, layers__1__weight=READ)
class Comprehensions(Base):
    def forward(self, x: Tensor) -> Any:
        total = sum(F.linear(x, weight) for weight in self.weights)
        stacked = sum(layer.weight.sum() for layer in self.layers)
        return total, stacked, F.linear(x, self.named["first"].weight)


@case(w=LINEAR, v=RIGHT, named__first__weight=LINEAR, named__last__weight=LINEAR)
class CountingLoops(Base):
    def forward(self, x: Tensor) -> Tensor:
        for power in range(3):
            x = F.linear(x, self.w * 2**power)
        for name, layer in self.named.items():
            x = F.linear(x, layer.weight) if name else x
        for row in self.v:
            x = x @ row
        return x


@case(w=LINEAR, v=LINEAR, fc__weight=LINEAR, named__last__weight=LINEAR)
class Getattr(Base):
    def forward(self, x: Tensor) -> Tensor:
        for name in ("w", "v"):
            x = F.linear(x, getattr(self, name))
        kind = "last"
        return F.linear(x, getattr(self, "fc").weight) + F.linear(x, self.named[f"{kind}"].weight)  # noqa: B009


CASES["Getattr"][1]["named.first.weight"] = {LINEAR}  # the text is not known


# Functions and methods


@case(w={LINEAR, READ}, v={LINEAR, READ}, fc__weight={LINEAR, READ})
class HelperFunctions(Base):
    def forward(self, x: Tensor) -> Tensor:
        first, second = halves(self.v)
        return product(x, self.w) + product_of_layer(x, layer=self.fc) + F.linear(x, first) + F.linear(x, second)


@case(w={RIGHT, READ}, v={LINEAR, READ}, fc__weight={RIGHT, READ})
class OwnMethods(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.w) + self.static(x, self.v) + self.multiply(x, weight=self.fc.weight)

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def static(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


@case(w={LINEAR, READ}, v={PRODUCT, READ}, stack={PRODUCT, READ})
class MethodsThatGiveWeights(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.used) + x @ self.standardised(self.v) + torch.bmm(x, self.cached)

    @property
    def used(self) -> Tensor:
        return self.w * 2

    def standardised(self, weight: Tensor) -> Tensor:
        return (weight - weight.mean()) / weight.std()

    @functools.cached_property
    def cached(self) -> Tensor:
        return self.stack.detach()


@case(w=LINEAR, v=RIGHT, fc__weight=READ)
class Closures(Base):
    """Made in ``__init__``, which itself does not run in forward, and in forward."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.orthogonal_(self.v)
        self.other.weight.data.copy_(self.fc.weight)
        self.f = lambda x: F.linear(x, self.w)

        def penalty() -> Tensor:
            return self.fc.weight.square().sum()

        self.penalty = penalty

    def forward(self, x: Tensor) -> Tensor:
        def inner(y: Tensor) -> Tensor:
            return y @ self.v

        return inner(self.f(x)) + self.penalty()


@case(w=LINEAR, v=LINEAR)
class Decorated(Base):
    @torch.no_grad()
    def evaluate(self, x: Tensor) -> Tensor:
        return F.linear(x, self.v)

    @logged
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


@case(w=LINEAR, v={LINEAR, READ}, fc__weight=RIGHT)
class GivesItselfAway(Base):
    """To functions that take a module, as its argument or as ``self``."""

    def forward(self, x: Tensor) -> Tensor:
        return apply_first(self, x) + LeftOperands.second(self, x)


class _Inherited(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.matrix())

    def matrix(self) -> Tensor:
        return self.w


@case(w={LINEAR, READ}, v={LINEAR, READ})
class Inherited(_Inherited):
    """The method of the subclass is the one that runs."""

    def matrix(self) -> Tensor:
        return self.v

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


del CASES["Inherited"][1]["w"]


@case(w=LINEAR)
class Overrides(RightOperands):
    """What does not run says nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


# Writes


@case(w={LINEAR, WRITTEN}, v={RIGHT, WRITTEN}, stack=WRITTEN, kernel=WRITTEN, fc__weight=WRITTEN, other__weight=WRITTEN)
class Writes(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.w.data.clamp_(-1, 1)
        self.v[0] = 0.0
        self.stack *= 2
        self.kernel.data = self.kernel.detach().clone()
        with torch.no_grad():
            self.fc.weight.copy_(torch.zeros_like(self.fc.weight))
            torch.nn.init.zeros_(self.other.weight)
        return F.linear(x, self.w) @ self.v


CASES["Writes"][1]["kernel"] = {WRITTEN, READ}  # of which a copy is put in its own place


@case(w=PRODUCT)
class WritesToACopy(Base):
    def forward(self, x: Tensor) -> Tensor:
        self.w.requires_grad_(True)
        return self.w.exp().clamp_(max=2) @ x + self.w.clone().mul_(2) @ x


@pytest.mark.parametrize("name", CASES)
def test_roles(name: str) -> None:
    cls, expected = CASES[name]
    assert roles(cls()) == expected


def test_roles_are_those_of_each_place() -> None:
    """A class that several modules have is read once, and what it reads is told apart by object."""
    model = nn.Sequential(Aliases(), nn.Sequential(Aliases()))
    assert set(roles(model)) == {"0.w", "0.v", "1.0.w", "1.0.v"}


def test_who_reads_a_weight() -> None:
    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.read, self.written = Own(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            self.written.weight.data.clamp_(-1, 1)
            return self.own(x) + F.linear(x, self.read.weight) + self.written(x)

    model = Model()
    uses = parameter_uses(model)
    outside = {name: uses.read_from_outside(module, "weight") for name, module in model.named_children()}
    assert outside == {"own": False, "read": True, "written": False}
    assert uses.of(model.own, "weight") == {LINEAR}
    assert uses.of(model.written, "weight") == {WRITTEN}


def test_functions_that_an_object_was_given() -> None:
    """A ``forward`` that was replaced, as a method or with the model in a closure."""
    first, second = nn.Sequential(Base()), nn.Sequential(Base())
    first[0].forward = types.MethodType(lambda self, x: F.linear(x, self.w) + x @ self.v, first[0])

    def replaced(x: Tensor) -> Tensor:
        return F.linear(x, second[0].w)

    second[0].forward = replaced
    assert roles(first) == {"0.w": {LINEAR}, "0.v": {RIGHT}}
    assert roles(second) == {"0.w": {LINEAR}}


def test_classes_without_a_file() -> None:
    """As in a notebook, whose cells stand in ``linecache``; one that is nowhere reads as if it had no code."""
    source = "class Cell(Base):\n    def forward(self, x):\n        return F.linear(x, self.w)\n"
    for filename, expected in (("<cell 1>", {"w": {LINEAR}}), ("<nowhere>", {})):
        if expected:
            linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        scope: dict[str, Any] = {"Base": Base, "F": F, "__name__": "__main__"}
        exec(compile(source, filename, "exec"), scope)
        assert roles(scope["Cell"]()) == expected


def test_functions_that_call_each_other() -> None:
    class Mutual(Base):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.first(3))

        def first(self, depth: int) -> Tensor:
            return self.second(depth - 1) if depth else self.w

        def second(self, depth: int) -> Tensor:
            return self.first(depth - 1) if depth else self.v

    assert {"w", "v"} <= set(roles(Mutual()))


# What tiling makes of it


def tiled(model: nn.Module) -> dict[str, str]:
    """For each tiled weight how it is seen."""
    records = tbn.graph.records.get_records(tbn.transform(model, ALL)) or ()
    return {record.parameter: record.view for record in records if record.spec is not None}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix, self.right = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(16, 8))
        self.positions, self.table = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(8, 16))
        self.clipped, self.fc = nn.Parameter(torch.randn(8, 16)), nn.Linear(16, 16)

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        self.clipped.data.clamp_(-0.1, 0.1)
        self.fc.weight.data.clamp_(-0.1, 0.1)
        y = F.linear(x + self.positions, self.matrix) + x @ self.right + F.linear(x, self.clipped)
        return y + F.embedding(rows, self.table)[:, :8] + self.fc(x)[:, :8]


def test_weights_are_tiled_as_they_are_used() -> None:
    assert tiled(Mixed()) == {"matrix": "", "right": ".t()", "fc.weight": ""}


def test_what_is_left_alone_has_a_reason() -> None:
    qat = tbn.transform(Mixed(), ALL)
    rows = {row.name: row.note for row in tbn.summary(qat).layers if not row.tiled}
    assert set(rows) == {"table", "clipped"}  # what is only added is no weight, and not listed
    assert "no product with it is seen in the code of Mixed; name it in tile_parameters" in rows["table"]
    assert "the code of a module writes to it in place" in rows["clipped"]


def test_options_name_what_the_code_does_not_tell() -> None:
    config = ALL.replace(tile_parameters=("table", "positions", "clipped"))
    qat = tbn.transform(Mixed(), config)
    rows = {row.name: row for row in tbn.summary(qat).layers}
    assert {name for name, row in rows.items() if row.tiled} == {"matrix", "right_0", "fc", "table", "positions"}
    assert "writes to it in place" in rows["clipped"].note
    x, rows_of = torch.randn(8, 16), torch.arange(8)
    qat(x, rows_of).sum().backward()
    parameters = dict(qat.named_parameters())
    assert all(parameters[f"{name}_alpha_source"].grad is not None for name in ("table", "positions"))
    with torch.no_grad():
        oracle.assert_close(tbn.lower(qat)(x, rows_of), qat.eval()(x, rows_of), 2e-6)


def test_writes_of_the_code_are_kept() -> None:
    """Into a parameter that is left in float, and into the weight of a tiled layer."""
    qat, x, rows = tbn.transform(Mixed(), ALL), torch.randn(8, 16), torch.arange(8)
    qat(x, rows).sum().backward()
    for name in ("clipped", "fc.weight"):
        assert dict(qat.named_parameters())[name].abs().max() <= 0.1


def test_the_source_of_pytorch_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    from tbn_compiler.graph import code_reads

    seen: list[str] = []
    parse = code_reads.parse_code

    def parsed(code: types.CodeType) -> Iterator[Any]:
        seen.append(code.co_filename)
        return parse(code)  # type: ignore[return-value]

    monkeypatch.setattr(code_reads, "parse_code", parsed)
    parameter_uses(nn.Sequential(nn.TransformerEncoderLayer(8, 2), Mixed()))
    assert set(seen) <= {__file__}
