import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tbn_compiler as tbn
from tbn_compiler.summary import _compact


def paper_mlp():
    return nn.Sequential(nn.Linear(784, 128, bias=False), nn.ReLU(), nn.Linear(128, 10, bias=False))


class ConvNet(nn.Module):
    """Two convolutions (one called twice, one grouped), an embedding-free head and layers that are left alone."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.body = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.mix = nn.Bilinear(16, 16, 16)
        self.unused = nn.Linear(4, 4)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = self.body(self.body(self.stem(x).relu()))
        x = x.mean((2, 3))
        return self.head(self.mix(x, x))


def rows_by_name(summary):
    return {row.name: row for row in summary.layers}


@pytest.mark.parametrize(("p", "bits"), [(1, 101_632), (4, 26_368)])
def test_stored_bits_of_the_papers_microcontroller_model(p, bits):
    # Table 6: 12.70 KB binary; 3.32 KB tiled by 4 (3,296 B of tiles and 5 alphas).
    summary = tbn.summary(tbn.transform(paper_mlp(), tbn.TilingConfig(p=p, alpha="tile")))
    assert summary.totals["stored_bits"] == bits
    assert summary.totals["weights"] == 101_632
    assert bits // 8 + 4 * summary.totals["alphas"] == {1: 12_712, 4: 3_316}[p]


def test_rows_describe_the_tiling():
    summary = tbn.summary(tbn.transform(paper_mlp(), tbn.TilingConfig(p=4, alpha="tile")))
    first, last = summary.layers
    assert (first.p, first.tile_size, first.unique_rows, first.alphas) == (4, 25_088, 32, 4)
    assert (first.macs, first.macs_tiled, first.bits_per_weight) == (100_352, 25_088, 0.25)
    assert (last.p, last.tile_size, last.unique_rows, last.alphas) == (1, 1_280, 10, 1)
    assert "min_size=64000" in last.note
    assert summary.per_position


def test_example_inputs_count_positions_and_calls():
    qat = tbn.transform(ConvNet(), tbn.TilingConfig(p=4, min_size=0))
    for module in (qat, tbn.lower(qat)):
        rows = rows_by_name(tbn.summary(module, torch.zeros(2, 3, 8, 8)))
        positions = 2 * 4 * 4
        assert rows["stem"].macs == 16 * 27 * positions
        assert rows["stem"].macs_tiled == 4 * 27 * positions
        # Called twice. Each group of 8 rows repeats the 4 unique rows: 2 x 4 of 16 rows are computed.
        assert rows["body"].macs == 2 * 16 * 72 * positions
        assert rows["body"].macs_tiled == 2 * 8 * 72 * positions
        assert rows["head"].macs == 10 * 16 * 2
        assert rows["unused"].macs == 0


def test_every_layer_is_listed_with_its_reason():
    summary = tbn.summary(tbn.transform(ConvNet(), tbn.TilingConfig(p=4, min_size=0, float_layers=("head",))))
    rows = rows_by_name(summary)
    assert set(rows) == {"stem", "body", "mix", "unused", "head"}
    assert "float_layers pattern 'head'" in rows["head"].note
    assert "p=4 leaves a tile of 4 weights, under 8" in rows["unused"].note
    assert "bilinear layers are not supported" in rows["mix"].note
    assert rows["mix"].kind == "Bilinear"
    assert rows["head"].stored_bits == 32 * 160
    assert rows["head"].macs == rows["head"].macs_tiled == 160
    assert summary.totals["tiled_layers"] == 2
    assert summary.totals["float_layers"] == 3


class Functions(nn.Module):
    """Weights that functions use: how often is known from a graph alone."""

    def __init__(self):
        super().__init__()
        self.matrix, self.right = nn.Parameter(torch.randn(8, 16)), nn.Parameter(torch.randn(8, 12))
        self.read, self.head = nn.Linear(12, 16, bias=False), nn.Linear(16, 4, bias=False)

    def forward(self, x):
        y = F.linear(x, self.matrix).relu() @ self.right
        return self.head(F.linear(y, self.read.weight))


def test_weights_of_functions_are_counted_in_a_graph():
    qat, x = tbn.transform(Functions(), tbn.TilingConfig(p=4, min_size=0)), torch.zeros(3, 16)
    for module in (qat, tbn.lower(qat)):
        assert rows_by_name(tbn.summary(module))["matrix"].macs == 8 * 16  # per position
        rows = rows_by_name(tbn.summary(module, x))
        assert list(rows) == ["matrix", "right_0", "read", "head"]
        unknown = (None, None)
        counts = [(row.macs, row.macs_tiled) for row in rows.values()]
        assert counts == [unknown, unknown, unknown, (3 * 16 * 4, 3 * 16)]
        assert tbn.summary(module, x).totals["macs"] == 3 * 16 * 4
    rows = rows_by_name(tbn.summary(tbn.optimize(qat, x), x))
    assert {name: row.macs for name, row in rows.items()} == {
        "matrix": 3 * 8 * 16,
        "right_0": 3 * 8 * 12,
        "read": 3 * 16 * 12,
        "head": 3 * 16 * 4,
    }
    assert rows["right_0"].macs_tiled <= 3 * 8 * 12 // 4


def test_float_tiles_count_32_bits():
    config = tbn.TilingConfig(p=4, min_size=0, tile_dtype="float")
    summary = tbn.summary(tbn.transform(nn.Sequential(nn.Linear(8, 8)), config))
    assert summary.layers[0].stored_bits == 32 * 16
    assert summary.layers[0].bits_per_weight == 8.0


def test_misaligned_tiles_are_pointed_out():
    config = tbn.TilingConfig(p=4, min_size=0, alpha="tile")
    row = tbn.summary(tbn.transform(nn.Sequential(nn.Linear(8, 10)), config)).layers[0]
    assert "misaligned" in row.note
    assert row.macs_tiled == row.macs  # alphas change inside rows: every row is its own


def test_outputs_agree():
    summary = tbn.summary(tbn.transform(ConvNet(), tbn.TilingConfig(p=4, min_size=0)))
    data = json.loads(json.dumps(summary.to_dict()))
    assert [layer["name"] for layer in data["layers"]] == [row.name for row in summary.layers]
    assert data["totals"] == summary.totals
    text, markdown = str(summary), summary.to_markdown()
    lines = markdown.splitlines()
    assert len(lines) == 2 + len(summary.layers) + 1
    assert len({line.count("|") for line in lines}) == 1
    for row in summary.layers:
        assert re.search(rf"^ *{row.name} +{row.kind} .* {_compact(row.stored_bits)} ", text, re.MULTILINE)
        assert not row.note or f"{row.name}: {row.note}" in text.replace("\n", "")
        assert f"| {row.name} |" in markdown
    assert f" {_compact(summary.totals['stored_bits'])} " in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 120


def test_a_weight_that_two_rows_share_is_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.hidden = nn.Embedding(100, 32), nn.Linear(32, 32)
            self.head = nn.Linear(32, 100, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(self.hidden(self.embedding(tokens)))

    model = Tied()
    qat = tbn.transform(model, tbn.TilingConfig(p=4, min_size=0))
    for module in (qat, tbn.lower(qat)):
        found = tbn.summary(module)
        rows = {row.name: row for row in found.layers}
        assert (rows["head"].stored_with, rows["head"].stored_bits) == ("embedding", 0)
        assert rows["embedding"].stored_with is None
        assert found.totals["weights"] == 100 * 32 + 32 * 32
        assert found.totals["stored_bits"] == 32 * 100 * 32 + 32 * 32 // 4
        assert found.totals["macs"] == 100 * 32 + 32 * 32
    pytest.importorskip("scipy")
    chosen = tbn.plan(model, budget={"bytes": 100 * 32 * 4 + 36}, candidates=[4, "float"])
    assert chosen.to_dict()["costs"] == {"bytes": 100 * 32 * 4 + 36}


def test_summary_is_kept_by_lowering():
    qat = tbn.transform(ConvNet(), tbn.TilingConfig(p=4, min_size=0))
    assert tbn.summary(tbn.lower(qat)) == tbn.summary(qat)


def test_summary_of_an_untransformed_module():
    with pytest.raises(tbn.TBNError, match=r"Sequential has no layer records: pass the module that transform"):
        tbn.summary(paper_mlp())


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (9_999, "9999"), (10_000, "10.0k"), (999_949, "999.9k"), (1_048_576, "1.0M"), (2**41, "2.2T")],
)
def test_rounded_numbers(value, text):
    assert _compact(value) == text
