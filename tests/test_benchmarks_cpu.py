"""``benchmarks.cpu`` on small layers: the candidates compute one layer, and goals follow from the rows."""

from __future__ import annotations

import pytest
import torch

from tbn_compiler.backends.cpu import library

cpu = pytest.importorskip("benchmarks.cpu", reason="needs the onnx extra")

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason="no library; test_library checks that")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "MIN_ROUNDS", 2)
    monkeypatch.setattr(cpu, "ROUND_SECONDS", 1e-6)


def test_candidates_compute_the_same_layer() -> None:
    torch.manual_seed(0)
    found = cpu.linear_candidates(64, 128, 4, 3, 1, True)
    expected = found["fp32"]()
    for name in ("unique fp32", "tiled fp32"):
        torch.testing.assert_close(found[name](), expected, rtol=1e-5, atol=1e-4)
    for name in ("bf16", "int8", "unique int8", "tiled int8"):
        torch.testing.assert_close(found[name]().float(), expected, rtol=0.05, atol=2.0)
    assert found["ort 4-bit"]()[0].shape == expected.shape
    found = cpu.conv_candidates(8, 6, 4)
    for name in ("unique fp32", "tiled fp32"):
        torch.testing.assert_close(found[name](), found["fp32"](), rtol=1e-5, atol=1e-4)


def test_rows_and_goals() -> None:
    case = {"out": 64, "in": 128, "p": 4, "batch": 2, "threads": 1, "peers": False}
    row = cpu.measure(case, 0.0)
    assert set(row["us"]) == {"unique fp32", "unique int8", "tiled fp32", "tiled int8"}
    assert all(us > 0 for us in row["us"].values())
    times = {"fp32": 610.0, "int8": 100.0, "ort 4-bit": 41.0, "unique fp32": 1.0, "tiled fp32": 10.0, "tiled int8": 9.0}
    rows = [{"out": 4096, "in": 4096, "p": 4, "batch": batch, "threads": 1, "us": times} for batch in (1, 512)]
    goals = {(goal["tiled"], goal["peer"]): goal for goal in cpu.goals({"linear": rows})}
    assert [goals["tiled fp32", peer]["met"] for peer in ("fp32", "int8", "ort 4-bit")] == [True, False, True]
    assert not goals["tiled fp32", "unique fp32"]["met"]
    assert goals["tiled fp32", "fp32"]["times"] == 61.0
