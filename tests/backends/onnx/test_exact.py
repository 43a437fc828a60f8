"""What ONNX or PyTorch's exporter would take for something else, against PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.onnx.exact import write_exactly
from tests.backends.onnx.runtime import assert_same, expected, run

# Of an image 6 x 7. With ceil_mode, windows of 2 every 3 pixels drop the last one here, keep it there.
POOLS: dict[str, nn.Module] = {
    "divisor": nn.AvgPool2d(2, divisor_override=3),
    "divisor, padding": nn.AvgPool2d((3, 2), (2, 3), (1, 0), divisor_override=5, count_include_pad=False),
    "divisor, ceil_mode": nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=4),
    "maximum, dropped": nn.MaxPool2d((2, 3), (3, 2), ceil_mode=True),
    "maximum, kept": nn.MaxPool2d(3, (2, 3), ceil_mode=True),
    "maximum, both": nn.MaxPool2d((2, 3), 3, ceil_mode=True),
    "maximum, dilation": nn.MaxPool2d(2, 2, dilation=2, padding=1, ceil_mode=True),
    "average, dropped": nn.AvgPool2d((2, 3), (3, 2), ceil_mode=True),
    "average, kept": nn.AvgPool2d(3, 2, 1, ceil_mode=True),
    "average, padding not counted": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "maximum of rows": nn.Sequential(nn.Flatten(2), nn.MaxPool1d(3, 4, ceil_mode=True)),
    "volume": nn.Sequential(nn.Unflatten(1, (1, 4)), nn.AvgPool3d((2, 3, 2), divisor_override=7)),
}


class SideBySide(nn.Module):
    """The results of several modules of the same input, by name."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.names, self.parts = list(modules), nn.ModuleList(modules.values())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: part(x) for name, part in zip(self.names, self.parts, strict=True)}


def test_pooling(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = SideBySide(POOLS), {"x": torch.randn(2, 4, 6, 7)}
    tbn.export_onnx(module, inputs, tmp_path / "model.onnx", dynamic_batch=False)
    assert_same(run(tmp_path / "model.onnx", inputs), expected(module, inputs))


def test_an_average_that_no_operator_computes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(tbn.ExportError, match=r"image \[6, 7\]: ceil_mode=True adds a window along some dimensions"):
        tbn.export_onnx(nn.AvgPool2d(2, 3, ceil_mode=True), torch.zeros(1, 1, 6, 7), tmp_path / "model.onnx")


class Masked(nn.Module):
    """Attention with a stored mask of each kind, and one that is computed; in all of them query 1 sees no key."""

    def __init__(self) -> None:
        super().__init__()
        shown = torch.ones(4, 4, dtype=torch.bool).tril()
        shown[1] = False
        self.register_buffer("shown", shown)
        self.register_buffer("added", torch.zeros(4, 4).masked_fill(~shown, -math.inf))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        attend: Callable[[Tensor], Tensor] = lambda mask: F.scaled_dot_product_attention(x, x, x, mask)  # noqa: E731
        return attend(self.shown), attend(self.added), attend(x < x[:, :, 1:2])


@pytest.mark.parametrize("opset", [18, 23])
def test_a_query_without_keys_gives_zeros(opset: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, inputs = Masked(), {"x": torch.randn(2, 3, 4, 4)}
    wanted = expected(module, inputs)
    assert all((output[:, :, 1] == 0).all() for output in wanted)
    tbn.export_onnx(module, inputs, tmp_path / "model.onnx", opset=opset)
    assert_same(run(tmp_path / "model.onnx", inputs), wanted)


def test_a_stored_mask_that_shows_every_query_a_key_is_left_alone() -> None:
    module = Masked()
    for shown, zeroed in ((False, 3), (True, 2)):
        module.shown[1, 0] = shown
        program = torch.export.export(module, (torch.randn(1, 3, 4, 4),))
        write_exactly(program, opset=18)
        targets = [node.target for node in program.graph.nodes]
        assert targets.count(torch.ops.aten.where.ScalarOther) == zeroed


class InPlace(nn.Module):
    """Activations and views that change a value whose result nothing reads; on request a counter, too."""

    def __init__(self, counts: bool) -> None:
        super().__init__()
        self.layer, self.act, self.counts = nn.Linear(8, 8), nn.SiLU(inplace=True), counts
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.act(y)
        y[:, 0].relu_()
        y.view(-1).add_(1)
        if self.counts:
            self.calls += 1
        return y + self.calls


def test_changes_in_place_are_seen_and_state_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config, inputs = tbn.TilingConfig(p=2, min_size=0), {"x": torch.randn(3, 8)}
    module = tbn.transform(InPlace(counts=False), config)
    tbn.export_onnx(module, inputs, tmp_path / "model.onnx")
    assert_same(run(tmp_path / "model.onnx", inputs), expected(module, inputs))
    with pytest.raises(tbn.ExportError, match="the model changes 'calls' while it runs: an ONNX file keeps no state"):
        tbn.export_onnx(tbn.transform(InPlace(counts=True), config), inputs, tmp_path / "counter.onnx")
