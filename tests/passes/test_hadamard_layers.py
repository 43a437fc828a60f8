"""Copies with Hadamard signs through every stage: chosen, trained, lowered, stored, optimised, compiled."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.graph.calls import tiled_call
from tbn_compiler.graph.records import get_records
from tests import oracle

CONFIG = tbn.TilingConfig(p=4, min_size=0, replicate="hadamard")


class Net(nn.Module):
    """Every kind of layer and place: norms, functions, a transpose convolution, groups, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, groups=2, bias=False)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.w = nn.Parameter(torch.randn(16, 8))
        self.head = nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).relu()
        x = self.up(self.grouped(x).relu())
        tokens = F.avg_pool2d(x, 2).flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        hidden: Tensor = F.linear(tokens, self.w).relu()
        result: Tensor = self.head(hidden.mean(1))
        return result


X = torch.randn(3, 8, 6, 6, generator=torch.Generator().manual_seed(1))


def trained(**options: Any) -> Any:
    torch.manual_seed(0)
    qat = tbn.transform(Net(), CONFIG.replace(**options))
    optimizer = torch.optim.SGD(qat.parameters(), 0.05)
    for _ in range(2):
        qat(X).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in qat.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return qat.eval()


OPTIONS: dict[str, dict[str, Any]] = {
    "layer": {},
    "tile": {"alpha": "tile"},
    "float": {"tile_dtype": "float", "alpha": "tile"},
    "W": {"alpha_source": "W"},
    "latent": {"latent": "tile", "alpha": "tile"},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


@options
@torch.no_grad()
def test_the_layer_uses_the_oracles_weight(options: dict[str, Any]) -> None:
    if options.get("latent") == "tile":
        pytest.skip("holds no weight")
    torch.manual_seed(0)
    model = Net().eval()
    qat = tbn.transform(model, CONFIG.replace(**options))
    layouts = {record.name: record.spec.layout for record in get_records(qat) or () if record.spec}
    assert {layout.hadamard for layout in layouts.values()} == {True}
    assert {layout.p for layout in layouts.values()} == {4}
    alone = {name: layer for name, layer in model.named_children() if name in ("conv", "grouped", "up", "head")}
    parts = nn.ModuleDict(alone)
    tiled = tbn.transform(parts, CONFIG.replace(**options)).double()
    expected = oracle.with_oracle_weights(parts.double(), tiled)
    for name, layer in parts.items():
        x = torch.randn(2, 16, *(() if name == "head" else (5, 5)), dtype=torch.float64)
        x = x[:, : getattr(layer, "in_channels", 16)]
        oracle.assert_close(tiled[name](x), expected[name](x))


@options
def test_every_form_gives_the_same(options: dict[str, Any], tmp_path: Path) -> None:
    qat = trained(**options)
    expected = qat(X).detach()
    packed = tbn.lower(qat).requires_grad_(False)
    oracle.assert_close(packed(X), expected)
    tbn.save(packed, tmp_path / "net.safetensors")
    loaded = tbn.load(tmp_path / "net.safetensors", Net())
    assert torch.equal(loaded(X), packed(X))
    assert get_records(loaded) == get_records(packed)
    oracle.assert_close(tbn.optimize(packed, (X,))(X), expected, 1e-5)


def test_norms_fold_into_an_alpha_for_each_row() -> None:
    packed = tbn.lower(trained(alpha="tile"))
    result = tbn.optimize(packed, (X,))
    calls = [call for node in result.graph.nodes if (call := tiled_call(node))]
    assert all(call.layout.kind == "hadamard" for call in calls)
    (first,) = (call for call in calls if call.layout.shape == (16, 8, 3, 3) and call.groups == 1)
    alpha = first.tensor(result, "alpha")
    assert alpha is not None
    assert alpha.numel() == 16
    assert first.product(result).mixes == 4
    assert not any("batch_norm" in str(node.target) for node in result.graph.nodes)


def test_convert_latent_both_ways() -> None:
    qat = trained(alpha="tile").double()
    x = X.double()
    small = tbn.convert_latent(qat, "tile")
    assert small.head.weight.shape == (3, 16)
    assert small.conv.weight.shape == (4, 8, 3, 3)
    oracle.assert_close(small(x), qat(x), 1e-12)
    again = tbn.convert_latent(small, "weight")
    assert again.head.weight.shape == (12, 16)
    oracle.assert_close(again(x), qat(x), 1e-12)
    # Every copy takes its part of the tile, with its signs.
    signs = torch.from_numpy(oracle.hadamard_signs((12, 16), 4))
    part = small.head.weight.detach().repeat(4, 1) * signs / 4
    torch.testing.assert_close(again.head.weight.detach(), part)
    oracle.assert_close(tbn.convert_latent(again, "tile").head.weight, small.head.weight, 1e-12)


def test_both_latents_take_the_same_steps() -> None:
    """Under gradient descent with momentum the tiles stay equal: gradients of copies, with signs, sum to the tile's."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False)).double()
    tile = tbn.convert_latent(tbn.transform(model, CONFIG.replace(alpha="tile")), "tile")
    weight = tbn.convert_latent(tile, "weight")
    x, y = torch.randn(20, 16, dtype=torch.float64), torch.randn(20, 8, dtype=torch.float64)
    pairs = [(m, torch.optim.SGD(m.parameters(), 0.02, momentum=0.9, weight_decay=1e-3)) for m in (weight, tile)]
    for _ in range(20):
        losses = []
        for module, optimizer in pairs:
            losses.append(F.mse_loss(module(x), y))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)


# Which layout a weight gets


@pytest.mark.parametrize(
    ("layer", "p", "found", "note"),
    [
        (nn.Linear(64, 64), 8, 8, None),
        (nn.Linear(64, 64), 12, 8, "p=12 is no power of two that divides the axes (64, 64): p=8"),
        (nn.Linear(64, 20), 8, 4, "p=8 is no power of two that divides the axes (20, 64): p=4"),
        (nn.Linear(63, 64), 8, 1, "p=8 is no power of two that divides the axes (64, 63): binary, p=1"),
        (nn.Linear(64, 64), 1, 1, None),
        (nn.Conv2d(24, 16, 3), 16, 8, "p=16 is no power of two that divides the axes (16, 24): p=8"),
        (nn.Conv2d(24, 16, 3, groups=2), 8, 4, "p=8 is no power of two that divides the axes (16, 12): p=4"),
        (nn.Conv2d(16, 16, 3, groups=16), 4, 1, "p=4 is no power of two that divides the axes (16, 1): binary, p=1"),
        (nn.ConvTranspose2d(16, 24, 3, groups=2), 8, 4, "p=8 is no power of two that divides the axes (16, 12): p=4"),
    ],
    ids=str,
)
def test_orders(layer: nn.Module, p: int, found: int, note: str | None) -> None:
    without = found == 1 < p
    with pytest.warns(UserWarning, match="1.000 bits .* Give a p that divides") if without else nullcontext():
        qat = tbn.transform(nn.Sequential(layer), CONFIG.replace(p=p, alpha="tile"))
    (record,) = get_records(qat) or ()
    assert record.spec is not None
    assert (record.spec.layout.p, record.spec.num_alphas) == (found, found)
    assert record.spec.layout.hadamard == (found > 1)
    assert record.note == note


def test_what_has_no_signs_says_so() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            return torch.bmm(x, self.w)

    (record,) = get_records(tbn.transform(Experts(), CONFIG)) or ()
    assert record.spec is not None
    assert record.spec.layout.kind == "flat"
    assert record.note == "4 weights with a tile each; flat copies"
    pair = CONFIG.replace(overrides={"0": {"p": (2, 2)}})
    (record,) = get_records(tbn.transform(nn.Sequential(nn.Linear(8, 8)), pair)) or ()
    assert record.spec is not None
    assert record.spec.layout.kind == "two-axis"
    assert record.note == "copies along both axes are equal: no replicate='hadamard'"


@pytest.mark.parametrize(
    ("options", "distinct"),
    [
        ({"p": 2, "replicate": "repeat"}, 4),
        ({"p": 4, "replicate": "repeat"}, 2),
        ({"p": 8, "replicate": "repeat"}, 1),
        ({"p": (2, 4), "replicate": "repeat"}, 4),
        ({"p": 1}, 8),
        ({"p": 8}, 8),
        ({"p": 8, "replicate": "roll"}, 8),
    ],
    ids=str,
)
def test_heads_that_are_equal_are_told(options: dict[str, Any], distinct: int) -> None:
    qat = tbn.transform(nn.MultiheadAttention(64, 8), CONFIG.replace(**options))
    *projections, out = get_records(qat) or ()
    told = f"{distinct} distinct of 8 heads, up to scale and bias: replicate='hadamard' keeps all apart"
    assert [record.note for record in projections] == [None if distinct == 8 else told] * 3
    assert out.note is None
    # So it is: the blocks of rows, without scales.
    layout = projections[0].spec.layout  # type: ignore[union-attr]
    signs = layout.replicate(torch.randn(layout.tile_size))
    assert len(torch.unique(signs.reshape(8, -1), dim=0)) == distinct == layout.distinct_blocks(8)


def test_summary_counts_additions() -> None:
    qat = tbn.transform(nn.Sequential(nn.Linear(64, 32), nn.Conv2d(8, 8, 3, groups=2)), CONFIG)
    linear, grouped = tbn.summary(qat).layers
    assert (linear.unique_rows, linear.macs, linear.macs_tiled) == (32, 2048, 512)
    assert linear.note == "copies with Hadamard signs: no rows repeat, 64 additions mix their results"
    assert grouped.macs_tiled == grouped.macs
    assert grouped.note == "copies with Hadamard signs: no rows repeat"
