"""Self-tests of networks on integers: how far a float output may be from PyTorch's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tbn_compiler as tbn
from tbn_compiler.backends.c import export_c, ir
from tbn_compiler.backends.c.frontend import import_graph
from tbn_compiler.backends.c.fuse import simplify
from tbn_compiler.backends.c.options import Options
from tbn_compiler.backends.c.planner import build_plan
from tests.backends.c.test_package import compile_and_run
from tests.backends.c.toolchain import needs_cc


def on_integers(*layers: nn.Module, **options: Any) -> tuple[nn.Module, Tensor]:
    """Layers on tiles, with int8 between them."""
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    packed = tbn.lower(tbn.transform(nn.Sequential(*layers).eval(), tbn.TilingConfig(p=4, min_size=0, alpha="tile")))
    return tbn.optimize(packed, x[:1], activation="int8", calibration=[x], intermediates="int8", **options), x[:1]


def step(graph: ir.Graph) -> float:
    return build_plan(graph, Options()).outputs[0].step


def rounded(graph: ir.Graph) -> int:
    """How often integers are rounded from others."""
    return sum(getattr(operation, "output_scale", None) is not None for operation in simplify(graph)[0])


def test_a_float_may_be_off_by_a_step_of_the_last_integers() -> None:
    graph = import_graph(*on_integers(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)))
    last = [operation for operation in graph.operations if isinstance(operation, ir.Tiled)][-1]
    # The scale of its input stands in the operation that made integers of it.
    scales = [operation.scale for operation in graph.operations if isinstance(operation, ir.Quantize)]
    assert step(graph) == pytest.approx(rounded(graph) * scales[-1] * last.alpha.array.max())
    deeper = import_graph(*on_integers(*(layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.ReLU()))))
    assert rounded(deeper) > rounded(graph)  # each may be off, and move those behind it
    # Functions behind are passed over.
    graph = import_graph(*on_integers(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), nn.Sigmoid()))
    assert step(graph) > 0
    graph = import_graph(*on_integers(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8), outputs="int8"))
    scales = [operation.scale for operation in graph.operations if isinstance(operation, ir.Quantize)]
    assert step(graph) == pytest.approx(scales[-1])


def test_what_is_rounded_as_in_pytorch_may_not_be_off() -> None:
    """An input is rounded in the same way; without integers there is no step."""
    module, x = on_integers(nn.Linear(16, 8))
    assert any("int8" in kernel for kernel in build_plan(import_graph(module, x), Options()).kernels)
    assert step(import_graph(module, x)) == 0
    assert step(import_graph(nn.Linear(16, 8), x)) == 0
    # A computed input may be on the other side of the middle of two steps.
    assert step(import_graph(*on_integers(nn.Tanh(), nn.Linear(16, 8)))) > 0


@needs_cc
def test_a_self_test_takes_one_step_and_no_more(tmp_path: Path) -> None:
    module, x = on_integers(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8))
    size = export_c(module, x, tmp_path / "net.c", name="net", self_test=True).outputs[0].step
    text = (tmp_path / "net.c").read_text()
    (tmp_path / "main.c").write_text('#include "net.h"\nint main(void) { return net_self_test(); }\n')
    found = re.search(r"net_test_output\[NET_OUTPUT_SIZE\] = {\n    ([^,]*)f,", text)
    assert found is not None
    assert size > 3e-4 * module(x).abs().max().item()  # else this would not be seen
    for steps, status in ((1, 0), (-2, 1)):
        number = float(found[1]) + steps * size
        (tmp_path / "net.c").write_text(text[: found.start(1)] + f"{number:.9g}" + text[found.end(1) :])
        assert compile_and_run(tmp_path / "main.c", tmp_path / "net.c", folder=tmp_path).returncode == status, steps
