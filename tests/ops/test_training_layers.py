"""``tbn::train_*``: layers on the rows that differ, against the chain tile -> scale -> layer of the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tbn_compiler  # noqa: F401  (registers the operators)
from tbn_compiler.ops.calls import TRAINING_OPERATORS, TiledCall
from tbn_compiler.ops.training import multiplied_rows
from tests import oracle

KINDS = list(TRAINING_OPERATORS)


@dataclass(frozen=True)
class Layer:
    """A layer and its tiling; ``shape`` is that of the weight, and ``geometry`` what its operator takes beside."""

    kind: str
    shape: tuple[int, ...]
    p: int
    p_in: int = 1
    shift: int = 0
    groups: int = 1
    geometry: dict[str, Any] = field(default_factory=dict)

    @property
    def dims(self) -> int:
        return len(self.shape) - 2

    @property
    def tile_size(self) -> int:
        return int(np.prod(self.shape)) // self.p

    @property
    def inputs(self) -> int:
        return self.shape[0] if "transpose" in self.kind else self.shape[1] * self.groups

    @property
    def outputs(self) -> int:
        return self.shape[1] * self.groups if "transpose" in self.kind else self.shape[0]

    def places(self) -> Tensor:
        return torch.from_numpy(oracle.tile_places(self.shape, self.p, self.p_in, self.shift))

    def alpha_places(self, k: int) -> Tensor:
        return torch.from_numpy(oracle.alpha_places(self.shape, self.p, k, self.p_in))

    def alphas(self) -> list[int]:
        return sorted({1, self.p // self.p_in, self.p})

    def options(self, **changes: Any) -> dict[str, Any]:
        options = {"p_in": self.p_in, "shift": self.shift, **self.geometry, **changes}
        if self.dims:
            options["groups"] = self.groups
        return {k: v for k, v in options.items() if not (k == "p_in" and "transpose" in self.kind)}

    def __call__(
        self, x: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None, k: int, **changes: Any
    ) -> Tensor:
        sizes = (self.inputs, self.outputs, *([self.shape[2:]] if self.dims else []), self.p, k)
        op = getattr(torch.ops.tbn, f"train_{self.kind}").default
        result: Tensor = op(x, weight, source, bias, *sizes, **self.options(**changes))
        return result

    def float_layer(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        options = {**self.geometry, **({"groups": self.groups} if self.dims else {})}
        result: Tensor = getattr(F, self.kind)(x, weight, bias, **options)
        return result

    def chain(
        self, x: Tensor, weight: Tensor, source: Tensor, bias: Tensor | None, k: int, binary: bool = True
    ) -> Tensor:
        """The layer on the whole weight, one weight element after the other, by differentiable functions."""
        places, of_alpha = self.places(), self.alpha_places(k)
        held = weight.shape != self.shape
        s = weight.reshape(-1)
        if not held:
            s = s.new_zeros(self.tile_size).index_add(0, places.reshape(-1), s)
        signs = torch.where(s > 0, 1.0, -1.0).to(s.dtype)
        if not binary:
            bits = s[places]
        elif held:
            bits = (s + (signs - s).detach())[places]
        else:
            bits = weight + (signs[places] - weight).detach()
        magnitude = source.abs().reshape(-1)
        if source.shape == self.shape:
            count = len(magnitude) // k
            alpha = magnitude.new_zeros(k).index_add(0, of_alpha.reshape(-1), magnitude) / count
        else:
            alpha = magnitude
        return self.float_layer(x, alpha[of_alpha] * bits, bias)

    def operands(self, held: bool, alphas_held: bool, k: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
        options = {"dtype": torch.float64} | options
        weight = torch.randn((self.tile_size,) if held else self.shape, **options)
        # Off zero, where the magnitude has no derivative; signs differ.
        source = torch.rand((k,) if alphas_held else self.shape, **options) + 0.25
        source = source * torch.where(torch.rand_like(source) > 0.5, 1, -1)
        return weight, source, torch.randn(self.outputs, **options)

    def input(self, *batch: int, **options: Any) -> Tensor:
        return torch.randn(*batch, self.inputs, *(6, 5, 4)[: self.dims], **({"dtype": torch.float64} | options))

    def call(self, k: int) -> TiledCall:
        operator = TRAINING_OPERATORS[self.kind]
        arguments = {operator.inputs_argument: self.inputs, operator.outputs_argument: self.outputs, "p": self.p}
        arguments |= {"num_alphas": k, **self.options()} | ({"kernel_size": self.shape[2:]} if self.dims else {})
        return TiledCall(operator, {**operator.defaults, **arguments})


def layers(kind: str) -> dict[str, Layer]:
    """Every layout of one kind."""
    if kind == "linear":
        tilings = {
            "flat": ((8, 6), 4),
            "one row": ((4, 6), 4),
            "half rows": ((4, 6), 8),  # rows hold several tiles
            "misaligned": ((6, 4), 4),
            "no rows repeat": ((5, 6), 3),
            "one copy": ((4, 6), 1),
            "two-axis": ((8, 6), 4, 2),
            "inputs only": ((4, 6), 3, 3),
            "rolled": ((8, 6), 4, 1, 5),
            "long": ((512, 3), 4),
        }
        return {name: Layer(kind, *tiling) for name, tiling in tilings.items()}
    d = int(kind[-2])
    kernel = (3, 2, 2)[:d]
    transposed = "transpose" in kind
    strided: dict[str, Any] = {"stride": [2, 1, 2][:d], "padding": [1, 1, 0][:d]}
    if transposed:
        strided["output_padding"] = [1, 0, 1][:d]
    dilated: dict[str, Any] = {"dilation": [1, 2, 1][:d]}
    found = {
        "flat": Layer(kind, (8, 4, *kernel), 4, geometry=strided),
        "misaligned": Layer(kind, (6, 4, *kernel), 4, geometry=dilated),
        "groups": Layer(kind, (8, 2, *kernel), 4, groups=2, geometry=strided),
        "groups cut rows": Layer(kind, (12, 2, *kernel), 6, groups=2),
        "groups share no result": Layer(kind, (8, 2, *kernel), 2, groups=2),
        "depthwise": Layer(kind, (6, 1, *kernel), 3, groups=6 if not transposed else 2),
        "rolled": Layer(kind, (8, 4, *kernel), 4, 1, 3),
        "one copy": Layer(kind, (4, 2, *kernel), 1),
    }
    if not transposed:
        found["two-axis"] = Layer(kind, (8, 4, *kernel), 4, 2, geometry=strided)
        found["two-axis groups"] = Layer(kind, (8, 4, *kernel), 8, 2, groups=2)
    return found


LAYERS = {f"{kind} {name}": layer for kind in KINDS for name, layer in layers(kind).items()}
every_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
# One of each path through the operator: results repeat, groups, summed neighbours, scaled and summed inputs, no saving.
FEW = [
    "linear flat",
    "linear misaligned",
    "linear two-axis",
    "linear rolled",
    "conv2d groups",
    "conv1d two-axis",
    "conv_transpose2d flat",
]
few_layers = pytest.mark.parametrize("layer", [LAYERS[name] for name in FEW], ids=FEW)
latents = pytest.mark.parametrize("held", [False, True], ids=["weight", "tile"])


def batches(layer: Layer) -> list[tuple[int, ...]]:
    return [(), (3,)] if layer.dims else [(), (3,), (2, 3)]


def leaves(*values: Tensor | None) -> list[Any]:
    return [None if value is None else value.detach().clone().requires_grad_() for value in values]


def variants(layer: Layer) -> Iterator[tuple[int, bool, bool, bool, bool, tuple[int, ...]]]:
    """Number of alphas, tile held, alphas held, binary, bias, batch: all of the first four, the others in turn."""
    rest = itertools.cycle(itertools.product([True, False], batches(layer)))
    for k in layer.alphas():
        for held, alphas_held, binary in itertools.product([False, True], repeat=3):
            for bias, batch in itertools.islice(rest, 2):
                yield k, held, alphas_held, binary, bias, batch
        next(rest)  # so that the turns differ


@every_layer
def test_values_and_gradients(layer: Layer) -> None:
    for k, held, alphas_held, binary, with_bias, batch in variants(layer):
        weight, source, bias = layer.operands(held, alphas_held, k)
        mine, theirs = (leaves(layer.input(*batch), weight, source, bias if with_bias else None) for _ in range(2))
        with torch.no_grad():
            theirs[0].copy_(mine[0])
        y, expected = layer(*mine, k, binary=binary), layer.chain(*theirs, k, binary=binary)
        where = f"k={k} held={held} alphas_held={alphas_held} binary={binary} bias={with_bias} batch={batch}"
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12, msg=lambda t, w=where: f"{w}: {t}")
        grad = torch.randn_like(y)
        y.backward(grad)
        expected.backward(grad)
        for name, a, e in zip(("input", "weight", "source", "bias"), mine, theirs, strict=True):
            if a is None or e is None:
                continue
            assert a.grad is not None
            assert e.grad is not None
            # One element for all weights that an alpha scales moves as their mean does, see the module's docstring.
            count = weight.new_tensor(np.prod(layer.shape) / k if name == "source" and alphas_held else 1)
            torch.testing.assert_close(
                a.grad, e.grad / count, rtol=1e-11, atol=1e-11, msg=lambda t, n=name, w=where: f"{w}, of {n}: {t}"
            )


def test_every_path_is_taken() -> None:
    """The cases above save arithmetic where they can, and do not where they cannot."""
    saved = {name: multiplied_rows(layer.call(1)) is not None for name, layer in LAYERS.items()}
    whole = ("no rows repeat", "one copy", "rolled", "share no result", "depthwise", "transpose")
    for name, saves in saved.items():
        if not any(word in name for word in whole):
            assert saves, name
    assert saved["conv_transpose2d flat"]
    assert not saved["conv_transpose2d groups"]
    assert not saved["linear rolled"]
    # Alphas within a row, or along the inputs, stand in the way.
    assert multiplied_rows(LAYERS["linear misaligned"].call(4)) is None
    assert multiplied_rows(LAYERS["linear two-axis"].call(4)) is None
