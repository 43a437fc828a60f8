"""The GPU benchmark, run on the CPU with invented times: its checks, limits, goals and tables."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from benchmarks import gpu, memory
from benchmarks.gpu import Deadline, fill_document, goal, limit, misses, run_conv, run_linear, tables

CPU = torch.device("cpu")


class Invented:
    """Runs each call once; a dense layer takes 10 us, and a tiled one 5."""

    def __init__(self) -> None:
        self.calls = 0

    def eager(self, run: Callable[[], object]) -> float:
        return 2 * self.graph(run)

    def graph(self, run: Callable[[], object]) -> float:
        self.calls += 1
        run()
        return 5.0 if "_row" in run.__qualname__ else 10.0


@pytest.fixture
def result(monkeypatch: pytest.MonkeyPatch) -> dict:
    monkeypatch.setattr(gpu, "BATCHES", (1, 3))
    monkeypatch.setattr(gpu, "IMAGES", (2,))
    times, deadline = Invented(), Deadline(60)
    rows, dense = run_linear(times, CPU, deadline, [(64, 128)])
    conv = run_conv(times, CPU, deadline, [(32, 6)])
    assert deadline.left_out == []
    return {"machine": {"gpu": "none"}, "linear": rows, "dense": dense, "conv": conv}


def test_limits_of_the_machine() -> None:
    """At batch 1: reading the dense weight, against a launch."""
    assert limit(28672, 8192, 1, 4) == pytest.approx(44, rel=0.01)
    assert limit(14336, 4096, 1, 4) == pytest.approx(11, rel=0.01)
    assert limit(4096, 4096, 1, 8) == pytest.approx(3.1, rel=0.01)
    assert limit(28672, 8192, 4096, 4) == pytest.approx(4, rel=0.01)
    assert goal(4096, 4096, 256, 8) == 0.8 * 8
    assert goal(4096, 4096, 1, 4) == pytest.approx(0.7 * 3.1, rel=0.01)
    assert goal(4096, 4096, 16, 4) is None
    assert goal(512, 2048, 4096, 4) is None


def test_rows(result: dict) -> None:
    assert len(result["linear"]) == len(result["dense"]) * 2 == 4
    assert len(result["conv"]) == 2
    for row in (*result["linear"], *result["conv"]):
        assert row["speedup_graph"] == 2.0
        assert 0 < row["error"] < 1e-2
    for row in result["dense"]:
        assert row["torchao int4"] == row["gemlite 1-bit"] == "not installed"
    json.dumps(result)


def test_what_is_missed(result: dict) -> None:
    assert misses(result) == []
    result["linear"][0]["goal"] = 2.5
    result["conv"][0]["error"] = math.nan
    result["memory"] = [{"model": "ViT", "column": "TBN 4", "peak": 14 * 2**20}]
    found = misses(result)
    assert found[0].startswith("WRONG RESULT (nan)")
    assert found[1].startswith("2.00 of 2.50: out 64, in 128, batch 1, p 4")
    assert found[2] == "TBN 4: peak 14.0 MiB, paper 13.4"


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = gpu.random_tile
    monkeypatch.setattr(gpu, "unpacked", lambda t, numel, dtype: torch.ops.tbn.unpack_bits(t ^ 1, numel, dtype=dtype))
    row = gpu.linear_row(64, 128, 3, 4, Invented(), CPU, {"graph_us": 1.0, "eager_us": 1.0})
    assert row["error"] > gpu.TOLERANCE
    assert tile(64, CPU).shape == (8,)


def test_no_time() -> None:
    now = iter([0.0, 1.0, 3.0])
    deadline = Deadline(2.0, lambda: next(now))
    assert [deadline.passed("first"), deadline.passed("second")] == [False, True]
    assert deadline.left_out == ["second"]


def test_tables_and_document(result: dict) -> None:
    document = memory.DOCUMENT.read_text()
    filled = fill_document(result, document)
    for name, table in tables(result).items():
        assert table in filled, name
    assert "Measured: gpu none." in filled
    assert fill_document(result, filled) == filled


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=memory.DOCUMENT.parents[1]
    )
    assert ran.returncode == 2
    assert "nothing measured" in ran.stderr
