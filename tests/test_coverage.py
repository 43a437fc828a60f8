"""The table of docs/coverage.md is what the compiler does: each cell is found out by doing it.

``TBN_UPDATE_DOCS=1`` writes the table; a person reads the difference.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from examples.documents import fill, markdown
from tbn_compiler.graph.records import get_records

DOC = Path(__file__).parent.parent / "docs" / "coverage.md"
COLUMNS = ("layer", "tiled", "trains", "lowered", "deduplicated", "replica flow", "C", "ONNX")


class Functional(nn.Module):
    """A layer written as a function on a parameter of the module."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class View(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w.chunk(2)[0])


class Product(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class Einsum(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,ij->bj", x, self.w)


class Experts(Functional):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.bmm(x.expand(2, -1, -1), self.w)
        return y.mean(0)


class Bilinear(Functional):
    def forward(self, x: Tensor) -> Tensor:
        return F.bilinear(x, x, self.w)


class ReadByOther(nn.Module):
    """A layer whose weight a function uses."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.fc.weight)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return y


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.lstm(x)[0]
        return y


class Cell(nn.Module):
    """Several steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, self.cell(2 * x))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(16, 16, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bilinear(x, x)
        return y


VECTOR, TOKENS = (1, 16), (1, 5, 16)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "`nn.Linear`": (lambda: nn.Linear(16, 16, bias=False), VECTOR),
    "`nn.Linear` on `[..., tokens, features]`": (lambda: nn.Linear(16, 16, bias=False), TOKENS),
    "`F.linear` on a parameter": (lambda: Functional(16, 16), VECTOR),
    "`F.linear` on the weight of a layer": (ReadByOther, VECTOR),
    "`F.linear` on a view of a parameter": (lambda: View(32, 16), VECTOR),
    "`x @ w`, `torch.addmm` (Hugging Face `Conv1D`)": (lambda: Product(16, 16), VECTOR),
    "`torch.einsum`": (lambda: Einsum(16, 16), VECTOR),
    "`torch.bmm` on a stack of weights": (lambda: Experts(2, 16, 16), VECTOR),
    "`nn.Conv1d`": (lambda: nn.Conv1d(16, 16, 3, bias=False), (1, 16, 8)),
    "`nn.Conv2d`": (lambda: nn.Conv2d(16, 16, 3, bias=False), (1, 16, 8, 8)),
    "`nn.Conv2d`, padding `same`, `reflect`": (
        lambda: nn.Conv2d(16, 16, 3, padding="same", padding_mode="reflect", bias=False),
        (1, 16, 8, 8),
    ),
    "`nn.Conv2d`, 2 groups": (lambda: nn.Conv2d(16, 16, 3, groups=2, bias=False), (1, 16, 8, 8)),
    "`nn.Conv2d`, depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16, bias=False), (1, 16, 8, 8)),
    "`nn.Conv3d`": (lambda: nn.Conv3d(16, 16, 2, bias=False), (1, 16, 4, 4, 4)),
    "`nn.ConvTranspose1d`": (lambda: nn.ConvTranspose1d(16, 16, 3, bias=False), (1, 16, 4)),
    "`nn.ConvTranspose2d`": (lambda: nn.ConvTranspose2d(16, 16, 3, bias=False), (1, 16, 4, 4)),
    "`nn.ConvTranspose3d`": (lambda: nn.ConvTranspose3d(16, 16, 2, bias=False), (1, 16, 2, 2, 2)),
    "`nn.MultiheadAttention`": (SelfAttention, TOKENS),
    "`nn.TransformerEncoderLayer`": (lambda: nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), TOKENS),
    "`nn.LSTM`, `nn.GRU`, `nn.RNN`": (Recurrent, TOKENS),
    "`nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`": (Cell, VECTOR),
    "`F.bilinear`": (lambda: Bilinear(16, 16, 16), VECTOR),
    "`nn.Bilinear`": (Twice, VECTOR),
}


def follow(layer: nn.Module, x: Tensor) -> nn.Module:
    """The layer, a ReLU and a further tiled layer: what the copies in the layer's result can flow to."""
    y = layer(x)
    last = nn.Linear(16, 8, bias=False) if y.dim() <= 3 and y.shape[-1] == 16 else None
    convs = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    return nn.Sequential(layer, nn.ReLU(), last or convs[y.dim()](16, 8, 1, bias=False))


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).abs().max() <= 1e-5 * expected.abs().max())


def runs_in_onnx_runtime(packed: nn.Module, x: Tensor, path: Path) -> bool:
    try:
        tbn.export_onnx(packed, x, path)
    except tbn.ExportError:
        return False
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        return close(torch.from_numpy(result), packed(x))


def exported_to_c(packed: nn.Module, x: Tensor, path: Path) -> bool | str:
    """Whether the C backend takes a model; how, if it stores a tiled weight decoded."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is stored decoded")
        try:
            plan = tbn.export_c(packed, x, path)
        except tbn.ExportError:
            return False
    return "decoded" if any(step.notes for step in plan.steps) else True


def find_out(build: Callable[[], nn.Module], shape: tuple[int, ...], path: Path) -> dict[str, bool | str]:
    torch.manual_seed(0)
    x = torch.randn(shape)
    model = follow(build(), x)
    qat: Any = tbn.transform(model, tbn.TilingConfig(p=4, min_size=0, alpha="tile", overrides={"2": {"p": 1}}))
    tiled = [record for record in get_records(qat) or () if record.spec and record.name != "2"]
    if not tiled:
        return {}
    qat.train()(x).sum().backward()
    sources = [value for name, value in qat.named_parameters() if "alpha_source" in name]
    qat.eval()
    packed = tbn.lower(qat)
    plain, flown = (tbn.summary(module, x) for module in (packed, tbn.optimize(packed, x)))
    rows = [row for row in flown.layers if row.tiled and row.name != "2"]
    last = {summary: next(row.macs_tiled for row in summary.layers if row.name == "2") for summary in (plain, flown)}
    return {
        "tiled": True,
        "trains": all(value.grad is not None and bool(value.grad.isfinite().all()) for value in sources),
        "lowered": close(packed(x), qat(x)) and not any(key.split(".")[-1] == "weight" and value.dim() > 1
                                                         for key, value in packed.state_dict().items()),
        "deduplicated": all(row.macs is not None and row.macs_tiled < row.macs for row in rows),
        "replica flow": last[flown] < last[plain],
        "C": exported_to_c(packed, x, path),
        "ONNX": runs_in_onnx_runtime(packed, x, path.with_suffix(".onnx")),
    }  # fmt: skip


def _text(cell: bool | str | None) -> str:
    return cell if isinstance(cell, str) else "yes" if cell else "-"


def table(folder: Path) -> str:
    rows = []
    for name, (build, shape) in LAYERS.items():
        try:
            cells = find_out(build, shape, folder / "layer.c")
        except tbn.TransformError:
            cells = {}
        rows.append([name, *(_text(cells.get(column)) for column in COLUMNS[1:])])
    return markdown(COLUMNS, rows, left=COLUMNS)


def test_coverage_table_is_true(tmp_path: Path) -> None:
    text = DOC.read_text()
    found = fill(text, {"coverage": table(tmp_path)})
    if os.environ.get("TBN_UPDATE_DOCS"):
        DOC.write_text(found)
    else:
        assert text == found
