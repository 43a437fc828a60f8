"""The GPU benchmark, run on the CPU with invented times: its checks, its file, goals, tables, and what ends a case."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_graphs, gpu_peers, gpu_report, memory
from benchmarks.gpu_cases import conv_cases, linear_cases, peer_cases
from benchmarks.gpu_report import fill_document, goal, misses, tables, wrong
from benchmarks.gpu_results import Case, OtherMachineError, Results, Row, run
from benchmarks.gpu_roofline import Ceilings, convolution, dense_linear, tiled_linear
from benchmarks.models import ViT

CPU = torch.device("cpu")
# What the model was first computed with.
H100 = Ceilings(bytes_per_us=3.0e6, flop_per_us=790e6, empty_us=2.5)
MACHINE = {"gpu": "none", "driver": "1", "cuda": "13.0", "torch": "2", "triton": "3"}


class Invented:
    """Runs each call once; a dense layer takes 10 us, and a tiled one 5."""

    def graph(self, run: Callable[[], object]) -> float:
        run()
        return 5.0 if run.__qualname__.startswith(("linear_row.<locals>.run", "conv_row.<locals>.run")) else 10.0

    def eager(self, run: Callable[[], object]) -> float:
        return 2 * self.graph(run)

    def wall(self, run: Callable[[], object]) -> float:
        return 3 * self.graph(run)


def measure(path: Path, cases: list[Case], **options: Any) -> Results:
    results = Results.prepare(path, MACHINE, ["linear", "conv", "peers"], resume=True)
    results.content["ceilings"] = vars(H100)
    assert run(results, cases, gpu.SHARES, 60, **options)
    return results


@pytest.fixture
def result(tmp_path: Path) -> dict[str, Any]:
    times = Invented()
    cases = [*linear_cases(times, CPU, [(64, 128)], (1, 3)), *conv_cases(times, CPU, [(32, 6)], (2,))]
    measure(tmp_path / "gpu.json", [*cases, *peer_cases(times, CPU, [(64, 128)], (1,))])
    found: dict[str, Any] = json.loads((tmp_path / "gpu.json").read_text())
    assert gpu_report.failures(found) == []
    return found


@pytest.mark.parametrize(
    ("m", "n", "p", "batch", "dense_us", "us"),
    [
        (1024, 4096, 4, 1, 5, 4),
        (1024, 4096, 8, 4096, 47, 12),
        (4096, 4096, 4, 1, 14, 5),
        (4096, 4096, 4, 16, 14, 8),
        (4096, 4096, 8, 256, 17, 9),
        (4096, 4096, 4, 4096, 182, 56),
        (14336, 4096, 4, 1, 42, 6),
        (14336, 4096, 8, 16, 42, 8),
        (14336, 4096, 4, 256, 47, 18),
        (14336, 4096, 8, 4096, 630, 105),
        (28672, 8192, 4, 1, 159, 10),
        (28672, 8192, 4, 16, 159, 14),
        (28672, 8192, 8, 256, 182, 31),
        (28672, 8192, 4, 4096, 2514, 690),
    ],
)
def test_the_model(m: int, n: int, p: int, batch: int, dense_us: int, us: int) -> None:
    """The estimates that the redesign of the kernels was planned with."""
    assert round(dense_linear(m, n, batch, H100).us) == dense_us
    assert round(tiled_linear(m, n, batch, p, H100).us) == us


def test_the_model_follows_the_card() -> None:
    slow = replace(H100, bytes_per_us=1e6, flop_per_us=100e6, empty_us=5.0)
    for batch in (1, 16, 256, 4096):
        assert tiled_linear(4096, 4096, batch, 4, slow).us > tiled_linear(4096, 4096, batch, 4, H100).us + 1
        few = tiled_linear(4096, 4096, batch, 4, H100, copies=False)
        assert few.us <= tiled_linear(4096, 4096, batch, 4, H100).us
    assert "launch 3.5" in str(tiled_linear(4096, 4096, 1, 4, H100))
    assert convolution(64, 56, 256, 4, H100, copies=False).us < convolution(64, 56, 256, 4, H100).us
    assert convolution(512, 7, 256, 8, H100).us < convolution(512, 7, 256, 1, H100).us / 3


def test_goals() -> None:
    """0.8 of what the model allows; where the dense layer is soon done, that is less than 0.8 p."""
    assert goal(28672, 8192, 1, 4, H100) == pytest.approx(0.8 * 16.5, rel=0.01)
    assert goal(4096, 4096, 256, 8, H100) == pytest.approx(0.8 * 1.95, rel=0.01)
    assert goal(4096, 4096, 16, 4, H100) is None
    assert goal(1024, 4096, 4096, 4, H100) is None


def test_rows(result: dict[str, Any]) -> None:
    rows = gpu_report.linear(result)
    assert [(row["batch"], row["p"]) for row in rows] == [(1, 4), (1, 8), (3, 4), (3, 8)]
    assert {row["times faster"] for row in (*rows, *gpu_report.conv(result))} == {2.0}
    assert {row["launched by Python us"] for row in rows} == {10.0}
    assert {row["one of many calls us"] for row in gpu_report.dense(result)} == {30.0}
    passed = gpu_report.passed_on(result)
    assert len(passed) == 2 + 2
    assert {(row["different rows us"], row["library's us"]) for row in passed} == {(5.0, 10.0)}
    errors = [row["error"] for row in result["cases"].values() if "error" in row]
    assert len(errors) == 2 * 3 + 3
    assert all(0 < error < gpu_cases.TOLERANCE for error in errors)
    assert result["seconds"].keys() == {"linear", "conv", "peers"}


@pytest.mark.skipif(gpu_peers.importable("torchao"), reason="torchao is installed")
def test_peers_that_are_not_installed(result: dict[str, Any]) -> None:
    assert result["cases"]["peers torchao int4"]["absent"] == "not installed"


def test_what_is_missed(result: dict[str, Any]) -> None:
    assert misses(result) == []
    large = {"part": "linear", "out": 4096, "in": 4096, "batch": 1, "eager_us": 1.0, "wall_us": 1.0}
    result["cases"] |= {
        "linear large dense": large | {"kind": "dense", "graph_us": 19.0},
        "linear large p 4": large | {"kind": "tiled", "p": 4, "graph_us": 13.8, "error": math.nan},
        "memory ViT TBN 4": {
            "part": "memory",
            "model": "ViT",
            "column": "TBN 4",
            "peak": 14 * 2**20,
            "library_workspace": 32 * 2**20,
        },
    }
    assert wrong(result) == ["WRONG RESULT (error nan): linear large p 4"]
    found = misses(result)
    assert found[0].startswith(
        "1.38 of 2.30 times: out x in 4096 x 4096, batch 1, p 4; 13.8 us, model sums of bits: 4.8"
    )
    assert found[1:] == ["TBN 4: peak 14.0 MiB, paper 13.4 (and a workspace of 32.0 MiB)"]
    table = gpu_report.memory_table(result)
    assert table.splitlines()[-1].endswith("| 46.0 |")
    assert len({line.count("|") for line in table.splitlines()}) == 1
    del result["ceilings"]
    assert misses(result)[:1] == found[1:]
    assert "linear" in tables(result)


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gpu_cases, "unpacked", lambda t, numel, dtype: torch.ops.tbn.unpack_bits(t ^ 1, numel, dtype=dtype)
    )
    for copies in (True, False):
        assert gpu_cases.linear_row(64, 128, 3, 4, Invented(), CPU, copies=copies)["error"] > gpu_cases.TOLERANCE
        assert gpu_cases.conv_row(32, 6, 2, 4, Invented(), CPU, copies=copies)["error"] > gpu_cases.TOLERANCE


class Clock:
    """Seconds that pass when a case is measured."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def case(self, name: str, seconds: float = 1.0) -> Case:
        def pass_time() -> Row:
            self.now += seconds
            return {"at": self.now}

        return Case(name, pass_time)


def test_a_part_leaves_time_for_the_others(tmp_path: Path) -> None:
    """One part has half of 8 seconds; what is left over at the end is its own again."""
    clock = Clock()
    results = Results(tmp_path / "r.json", {})
    cases = [*(clock.case(f"linear {n}") for n in range(9)), clock.case("conv 0"), clock.case("conv 1")]
    run(results, cases, {"linear": 0.5, "conv": 0.5}, 8, clock=clock)
    assert list(results.cases) == [*(f"linear {n}" for n in range(4)), "conv 0", "conv 1", "linear 4", "linear 5"]
    assert results.content["seconds"] == {"linear": 6.0, "conv": 2.0}


def test_an_exception_costs_one_case(tmp_path: Path) -> None:
    path = tmp_path / "r.json"

    def fail() -> Row:
        assert json.loads(path.read_text())["running"] == "conv 1"
        raise RuntimeError("out of everything")

    clock = Clock()
    results = Results(path, {})
    assert run(results, [clock.case("conv 0"), Case("conv 1", fail), clock.case("conv 2")], gpu.SHARES, 60)
    found = json.loads(path.read_text())
    assert found["cases"]["conv 1"]["failed"] == "RuntimeError: out of everything"
    assert list(found["cases"]) == ["conv 0", "conv 1", "conv 2"]
    assert "running" not in found
    assert gpu_report.failures(found) == ["conv 1: RuntimeError: out of everything"]
    assert gpu.show({"machine": MACHINE} | found) == 0


def test_a_failing_package_costs_one_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: torch.Tensor) -> Any:
        raise AttributeError("no such format")

    monkeypatch.setattr(gpu_peers, "PEERS", {"json 1-bit": ("json", broken)})
    results = measure(tmp_path / "gpu.json", list(peer_cases(Invented(), CPU, [(64, 128)], (1, 2))))
    assert [row["failed"] for row in results.cases.values()] == ["AttributeError: no such format"] * 2


def test_a_lost_context_ends_the_process(tmp_path: Path) -> None:
    def fail() -> Row:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    results = Results(tmp_path / "r.json", {})
    assert not run(results, [Case("conv 0", fail), Clock().case("conv 1")], gpu.SHARES, 60, lambda: False)
    assert list(results.cases) == ["conv 0"]


def test_resuming(tmp_path: Path) -> None:
    path, clock = tmp_path / "r.json", Clock()
    Results(
        path,
        {
            "machine": MACHINE,
            "ceilings": vars(H100),
            "running": "conv 3",
            "cases": {
                "linear 0": {"part": "linear"},
                "conv 0": {"part": "conv"},
                "conv 1": {"part": "conv", "failed": "RuntimeError"},
            },
        },
    ).write()
    results = Results.prepare(path, MACHINE, ["conv"], resume=True)
    assert results.running is None
    assert list(results.cases) == ["linear 0", "conv 0"]
    assert results.content["ceilings"] == vars(H100)
    run(results, [clock.case(f"conv {n}") for n in range(3)], gpu.SHARES, 60)
    assert list(results.cases) == ["linear 0", "conv 0", "conv 1", "conv 2"]
    assert clock.now == 2.0
    assert list(Results.prepare(path, MACHINE, ["conv"], resume=False).cases) == ["linear 0"]
    other = MACHINE | {"gpu": "another"}
    with pytest.raises(OtherMachineError, match=r"r\.json holds results with gpu none, and here it is another"):
        Results.prepare(path, other, ["conv"], resume=True)
    anew = Results.prepare(path, other, ["linear", "conv"], resume=False)
    assert (anew.cases, "ceilings" in anew.content) == ({}, False)


WORKER = """
    import os, sys, time
    from pathlib import Path
    from benchmarks.gpu_results import Case, Results, run

    def case(name):
        def measure():
            if name == "conv 1":
                os._exit(9)
            if name == "conv 3":
                time.sleep(60)
            if name == "conv 4":
                raise RuntimeError("CUDA error")
            return {"process": os.getpid()}
        return Case(name, measure)

    results = Results.read(Path(sys.argv[1]))
    answers = run(results, [case(f"conv {n}") for n in range(6)], {"conv": 1.0}, float(sys.argv[3]), lambda: False)
    sys.exit(0 if answers else 17)
"""


def test_a_crash_and_a_hanging_case_cost_one_case_each(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.json"
    Results(path, {}).write()
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(path)]
    assert gpu.supervise(command, path, 60, case_seconds=1.0) is None
    cases = Results.read(path).cases
    assert list(cases) == [f"conv {n}" for n in range(6)]
    assert cases["conv 1"]["failed"] == "the process ended with status 9"
    assert cases["conv 3"]["failed"] == "no result within 1 s"
    assert cases["conv 4"]["failed"] == "RuntimeError: CUDA error"
    assert len({cases[f"conv {n}"]["process"] for n in (0, 2, 5)}) == 3
    assert "conv 1 ended the worker" in capfd.readouterr().out


def test_the_end_of_the_time_costs_one_case(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    Results(path, {"cases": {f"conv {n}": {"part": "conv"} for n in range(3)}}).write()
    command = [sys.executable, "-c", textwrap.dedent(WORKER), str(path)]
    assert gpu.supervise(command, path, 2) is None
    found = Results.read(path)
    assert len(found.cases) == 3
    assert found.running is None


def test_a_worker_that_cannot_begin(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    Results(path, {}).write()
    command = [sys.executable, "-c", "import sys; sys.exit(5)"]
    assert gpu.supervise(command, path, 60) == "the worker ended with status 5 outside any case"


def test_the_names_of_all_cases(tmp_path: Path) -> None:
    """Each name is one case's, and begins with its part."""
    names = gpu.missing(Results(tmp_path / "r.json", {}), list(gpu.SHARES))
    assert len(set(names)) == len(names)
    assert {name.partition(" ")[0] for name in names} == set(gpu.SHARES)
    assert names[:3] == [f"linear 4096x4096 batch 1 {what}" for what in ("dense", "p 4", "p 8")]
    left = gpu.missing(Results(tmp_path / "r.json", {"cases": {names[0]: {}}}), ["linear"])
    assert left == [name for name in names[1:] if name.startswith("linear")]
    assert sum(gpu.SHARES.values()) == pytest.approx(1)


@pytest.mark.usefixtures("inductor")
def test_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights that change; CUDA graphs are left out on the CPU."""
    small = lambda: ViT(image_size=64, dim=64, depth=1, heads=2, mlp_dim=64, classes=16)  # noqa: E731
    monkeypatch.setattr(gpu_graphs, "MODELS", {"ViT": (small, (3, 64, 64))})
    cases = {case.name: case for case in gpu_graphs.graph_cases(Invented(), CPU, (2,))}
    assert list(cases) == [f"graphs ViT batch 2 {way}" for way in gpu_graphs.WAYS]
    row = cases["graphs ViT batch 2 compiled"].measure()
    assert (row["model"], row["batch"], row["way"]) == ("ViT", 2, "compiled")
    assert max(row["error"], row["changed_error"]) < gpu_graphs.TOLERANCE
    result = {"cases": {"graphs ViT batch 2 compiled": {"part": "graphs"} | row}}
    assert gpu_report.graphs(result)[0]["compiled us"] == 30.0
    row["changed_error"] = 0.5
    result = {"cases": {"graphs ViT batch 2 compiled": {"part": "graphs"} | row}}
    assert wrong(result) == ["WRONG RESULT (changed_error 0.5): graphs ViT batch 2 compiled"]


def test_tables_and_document(result: dict[str, Any]) -> None:
    document = memory.DOCUMENT.read_text()
    for name in (*gpu_report.TABLES, "memory"):
        assert f"<!-- {name} -->\n" in document
    filled = fill_document(result, document)
    for name, table in tables(result).items():
        assert table in filled, name
    assert "Measured: gpu none, driver 1" in filled
    assert "A copy reaches 3.00 TB/s, a product of bf16 matrices 790 TFLOP/s" in filled
    assert fill_document(result, filled) == filled


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], capture_output=True, text=True, cwd=memory.DOCUMENT.parents[1]
    )
    assert ran.returncode == 2
    assert "nothing measured" in ran.stderr
