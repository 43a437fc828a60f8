"""Networks of convolutions, most of int8, with images in the ``channels_last`` format between them, nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import tbn_compiler as tbn
from tbn_compiler.backends import cpu
from tbn_compiler.backends.cpu import library
from tbn_compiler.backends.dynamo import compile_graph, image_formats
from tbn_compiler.graph.calls import tiled_call
from tests import oracle

CONFIG = tbn.TilingConfig(p=2, min_size=0)
CHOSEN = image_formats._multiplies_bytes


@pytest.fixture(autouse=True)
def _every_int8_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the kernels do not multiply bytes: they convert images then, and compute the same."""

    def chosen(gm: fx.GraphModule, node: fx.Node) -> bool:
        call = tiled_call(node)
        return call is not None and call.kind == "conv2d" and call.activation == "int8"

    monkeypatch.setattr(image_formats, "_multiplies_bytes", chosen)


class Net(nn.Module):
    """Two convolutions of 8 channels behind one of 3, with ``between`` called on the first result."""

    def __init__(self, between: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.norm(self.stem(x)), inplace=True), 2)
        y = self.between(y)
        y = F.relu(self.body(y) + y)
        y += self.head(y)
        return y


class Classifier(Net):
    """Ends in a view of an image, and in further layers that work in place."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(8 * 16, 12), nn.ReLU(inplace=True), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return self.classifier(y.view(y.shape[0], -1))


def compare(net: nn.Module, graphs: list[fx.GraphModule], x: Tensor | None = None) -> list[torch.memory_format | None]:
    """Compiled and eager give the same values and strides; returns the formats that images are brought into."""
    torch.manual_seed(0)
    packed = tbn.lower(tbn.transform(net.eval(), CONFIG))
    expected_of = tbn.optimize(packed, activation="int8")
    x = torch.randn(2, 3, 8, 8) if x is None else x
    compiled = torch.compile(packed, backend=compile_graph, options={"activation": "int8"})
    with torch.no_grad():
        found, wanted = compiled(x.clone()), expected_of(x.clone())
    for got, expected in zip(oracle.flatten(found), oracle.flatten(wanted), strict=True):
        oracle.assert_close(got, expected, 1e-5)
        assert got.stride() == expected.stride()
    return [
        node.kwargs.get("memory_format")
        for gm in graphs
        for node in gm.graph.nodes
        if node.op == "call_method" and node.target == "contiguous"
    ]


def test_one_conversion_in_and_one_out(eager_graphs: list[fx.GraphModule]) -> None:
    assert compare(Net(), eager_graphs) == [torch.channels_last, torch.contiguous_format]


def test_a_view_of_an_image_is_one_of_its_planes(eager_graphs: list[fx.GraphModule]) -> None:
    assert compare(Classifier(), eager_graphs) == [torch.channels_last, torch.contiguous_format]


@pytest.mark.parametrize("level", cpu.info().available)
def test_every_level(level: str, eager_graphs: list[fx.GraphModule]) -> None:
    with cpu.use_level(level):
        assert len(compare(Classifier(), eager_graphs)) == 2


def test_inductor(graphs: list[fx.GraphModule]) -> None:
    assert compare(Classifier(), graphs) == [torch.channels_last, torch.contiguous_format]


@pytest.mark.parametrize("filters", [64, 8])
@pytest.mark.parametrize("level", cpu.info().available)
def test_floats_where_the_kernels_multiply_them_as_they_are(
    level: str, filters: int, eager_graphs: list[fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few filters are left to PyTorch, in planes."""
    monkeypatch.setattr(image_formats, "_multiplies_bytes", CHOSEN)
    net = nn.Sequential(nn.Conv2d(3, filters, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(filters, filters, 3)).eval()
    packed = tbn.lower(tbn.transform(net, CONFIG))
    x = torch.randn(2, 3, 12, 12)
    with cpu.use_level(level), torch.no_grad():
        found = torch.compile(packed, backend=compile_graph)(x)
        expected = packed(x)
    oracle.assert_close(found, expected, 1e-5)
    assert found.stride() == expected.stride()
    converted = [node for gm in eager_graphs for node in gm.graph.nodes if node.target == "contiguous"]
    assert len(converted) == (2 if library.keeps_floats(level) and filters == 64 else 0)


def test_what_depends_on_strides_reads_planes(eager_graphs: list[fx.GraphModule]) -> None:
    def shuffle(x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w) * x.stride(1)

    # One image is shuffled, added to the next one, and the sum read by the last convolution.
    assert compare(Net(shuffle), eager_graphs) == [torch.channels_last, torch.contiguous_format] * 3


def test_a_change_through_a_view_leaves_images_alone(eager_graphs: list[fx.GraphModule]) -> None:
    def change(x: Tensor) -> Tensor:
        x.view(x.shape[0], -1).mul_(2)
        return x

    assert compare(Net(change), eager_graphs) == []


def test_one_convolution_is_left_alone(eager_graphs: list[fx.GraphModule]) -> None:
    assert compare(nn.Sequential(nn.Conv2d(3, 8, 3)), eager_graphs) == []


class Changed(nn.Module):
    """Two convolutions of 4 channels; ``body`` calls them and changes values in place in between."""

    def __init__(self, body: Callable[[nn.Module, nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), body

    def forward(self, x: Tensor) -> object:
        return self.body(self.a, self.b, x)


def _set(x: Tensor) -> Tensor:
    x[:, 0] = 0
    return x


CHANGES: dict[str, Callable[[Any, Any, Tensor], object]] = {
    "the input of a convolution": lambda a, b, x: b(a((y := x.sin(), y.mul_(3), y.add_(1))[0])),
    "a part of it": lambda a, b, x: b(a(_set(x + 1))),
    "relu of it": lambda a, b, x: b(a((y := x + 1, F.relu(y, inplace=True))[0])),
    "the input of the graph": lambda a, b, x: b(a(x.mul_(2))),
    "between two readers": lambda a, b, x: b((h := x + 1, a(h), h.mul_(5))[1]) + a(h),
    "a result that is read twice": lambda a, b, x: (b((y := a(x), F.relu(y, inplace=True))[0]), y),
    "a result whose change is read": lambda a, b, x: (b(F.relu(y := a(x), inplace=True)), y),
    "a result, by an image": lambda a, b, x: (q := a(x), y := q, y.add_(b(x)), q * 2)[2:],
    "a result, by a number": lambda a, b, x: ((y := a(x)).add_(1), b(y), y)[1:],
    "a result, by another operation": lambda a, b, x: ((y := a(x)).mul_(2), b(y), y)[1:],
    "a result that has a view": lambda a, b, x: (v := (y := a(x)).view(2, -1), y.add_(1), b(y), v * 1)[2:],
    "indices of a maximum": lambda a, b, x: F.max_pool2d(b(a(x)), 2, return_indices=True),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_in_place(name: str, eager_graphs: list[fx.GraphModule]) -> None:
    compare(Changed(CHANGES[name]), eager_graphs, torch.randn(2, 4, 8, 8))


def test_images_without_batch(eager_graphs: list[fx.GraphModule]) -> None:
    assert compare(Changed(lambda a, b, x: b(a(x))), eager_graphs, torch.randn(4, 8, 8)) == []


@pytest.mark.parametrize("number", [1, 2])
def test_images_that_come_in_the_format(number: int, eager_graphs: list[fx.GraphModule]) -> None:
    """The result has the strides that the float graph was captured with, whatever the number of convolutions."""
    x = torch.randn(2, 4, 8, 8).contiguous(memory_format=torch.channels_last)
    net = Changed((lambda a, b, x: a(x).relu()) if number == 1 else (lambda a, b, x: b(a(x))))
    assert torch.contiguous_format not in compare(net, eager_graphs, x)
