"""Choosing configurations by measurement, and the file that keeps them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from tbn_compiler.backends.triton import tuning
from tbn_compiler.backends.triton.plan import plan_weight
from tbn_compiler.backends.triton.search import Config, Gpu, conv_candidates, linear_candidates
from tbn_compiler.backends.triton.tuning import Tuner, tuning_file
from tbn_compiler.tiling import TiledProduct, TileLayout

ONE, TWO, THREE = Config("dot"), Config("dot", 32), Config("sum", 4, 4, 256)
TIMES = {ONE: 3.0, TWO: 1.0, THREE: 2.0}


class Bench:
    """Runs candidates and answers with :data:`TIMES`."""

    def __init__(self, seconds: float = 0.0, refused: tuple[Config, ...] = ()) -> None:
        self.measured: list[Config] = []
        self.now, self.seconds, self.refused = 0.0, seconds, refused

    def run(self, config: Config) -> Config:
        if config in self.refused:
            raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")
        return config

    def measure(self, run: Callable[[], object]) -> float:
        config = run()
        assert isinstance(config, Config)
        self.measured.append(config)
        self.now += self.seconds
        return TIMES[config]

    def tuner(self, path: Path) -> Tuner:
        return Tuner(path, self.measure, lambda: self.now)


def test_the_fastest_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.json"
    bench = Bench()
    assert bench.tuner(path).choose("key", [ONE, TWO, THREE], bench.run) == TWO
    assert bench.measured == [ONE, TWO, THREE]
    again = Bench()
    tuner = again.tuner(path)
    assert tuner.choose("key", [ONE, TWO, THREE], again.run) == TWO
    assert tuner.known("key", [ONE, TWO, THREE]) == TWO
    assert tuner.known("other", [ONE, TWO, THREE]) is None
    assert again.measured == []
    assert [p.name for p in path.parent.iterdir()] == ["b.json"]


def test_a_choice_that_is_no_candidate_is_measured_anew(tmp_path: Path) -> None:
    bench = Bench()
    tuner = bench.tuner(tmp_path / "a.json")
    tuner.choose("key", [ONE, TWO], bench.run)
    assert tuner.known("key", [ONE, THREE]) is None
    assert tuner.choose("key", [ONE, THREE], bench.run) == THREE


def test_two_processes_keep_each_others_choices(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    bench = Bench()
    first, second = bench.tuner(path), bench.tuner(path)
    first.choose("one", [ONE], bench.run)
    second.choose("two", [TWO], bench.run)
    assert set(json.loads(path.read_text())["choices"]) == {"one", "two"}


def test_the_time_of_a_shape_is_bounded(tmp_path: Path) -> None:
    bench = Bench(seconds=5.0)
    assert bench.tuner(tmp_path / "a.json").choose("key", [ONE, THREE, TWO], bench.run) == THREE
    assert bench.measured == [ONE, THREE]


def test_what_the_gpu_refuses_is_passed_over(tmp_path: Path) -> None:
    bench = Bench(refused=(TWO,))
    tuner = bench.tuner(tmp_path / "a.json")
    assert tuner.choose("key", [TWO, ONE, THREE], bench.run) == THREE
    with pytest.raises(RuntimeError, match="none of 1 configurations runs for other"):
        tuner.choose("other", [TWO], bench.run)


MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


class Memory(Bench):
    """Has no memory for some candidates."""

    def __init__(self, error: Exception, short: tuple[Config, ...], refused: tuple[Config, ...] = ()) -> None:
        super().__init__(refused=refused)
        self.error, self.short = error, short
        self.held: list[weakref.ref[torch.Tensor]] = []

    def run(self, config: Config) -> Config:
        if config in self.short:
            workspace = torch.empty(8)
            self.held.append(weakref.ref(workspace))
            raise self.error
        return super().run(config)


@pytest.mark.parametrize("error", MEMORY, ids=lambda error: str(error)[:12])
def test_candidates_without_memory_are_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    path, released = tmp_path / "a.json", []
    bench = Memory(error, (TWO,))
    # What a candidate has allocated is free when the cache is emptied.
    monkeypatch.setattr(tuning, "release_memory", lambda: released.append([held() for held in bench.held]))
    tuner = bench.tuner(path)
    assert tuner.choose("key", [TWO, ONE, THREE], bench.run) == THREE
    assert released == [[None]]
    assert tuner.choose("key", [TWO, ONE, THREE], bench.run) == THREE
    assert len(bench.measured) == 2
    assert not path.exists()  # the memory of another day may allow more
    tuner.choose("other", [ONE], bench.run)
    assert list(json.loads(path.read_text())["choices"]) == ["other"]


def test_no_memory_to_measure_anything(tmp_path: Path) -> None:
    library, split = Config("library"), Config("dot", split_k=2)
    bench = Memory(MEMORY[0], (library, split, TWO, ONE), refused=(THREE,))
    tuner = bench.tuner(tmp_path / "a.json")
    assert tuner.choose("key", [library, THREE, split, TWO, ONE], bench.run) == TWO
    assert tuner.known("key", [library, TWO]) == TWO
    with pytest.raises(RuntimeError, match="none of 2 configurations runs for other") as caught:
        tuner.choose("other", [library, split], bench.run)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_are_raised(tmp_path: Path) -> None:
    bench = Memory(RuntimeError("CUDA error: an illegal memory access was encountered"), (ONE,))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        bench.tuner(tmp_path / "a.json").choose("key", [ONE, TWO], bench.run)


def test_kernels_with_a_workspace_are_known() -> None:
    """Names of kernels are spelt in two files."""
    weight = plan_weight(TiledProduct(TileLayout((256, 256, 3, 3), 4), 4), packed=True, word_aligned=True)
    found = {
        config.kernel: tuning.needs_no_workspace(config)
        for config in conv_candidates(weight, 64, 1, 256, 2**16, torch.bfloat16, Gpu(), channels_last=False)
    }
    assert found == {"library": False, "library_last": False, "unpacked": False, "implicit": True}
    weight = plan_weight(TiledProduct(TileLayout((256, 256), 4, hadamard=True), 4), packed=True, word_aligned=True)
    found = {
        config.kernel: tuning.needs_no_workspace(config)
        for tokens in (1, 256)
        for config in linear_candidates(weight, tokens, torch.bfloat16, Gpu())
    }
    assert found == {"limbs": True, "sum": True, "groups": False, "library": False}


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 3}', '{"format": 3, "choices": {"k": {"kernel": "dot", "colour": 1}}}', "\x00"]
)
def test_a_broken_file_is_ignored_and_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    bench = Bench()
    with pytest.warns(RuntimeWarning, match=r"ignoring the tuning file .*a\.json"):
        tuner = bench.tuner(path)
    with pytest.warns(RuntimeWarning, match="ignoring the tuning file"):
        assert tuner.choose("key", [ONE, TWO], bench.run) == TWO
    assert bench.tuner(path).known("key", [TWO]) == TWO


def test_a_file_of_another_format_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"format": 999, "choices": {"key": {}}}')
    assert tuning.read_choices(path) == {}


def test_a_file_of_an_older_format_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"format": 1, "choices": {"key": {"kernel": "dot"}, "older": {"kernel": "gone", "colour": 1}}}')
    bench = Bench()
    tuner = bench.tuner(path)
    assert tuner.known("key", [ONE]) is None
    assert tuner.choose("key", [ONE, TWO], bench.run) == TWO
    assert list(json.loads(path.read_text())["choices"]) == ["key"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bench = Bench()
    with pytest.warns(RuntimeWarning, match="cannot keep tuned configurations"):
        assert bench.tuner(tmp_path / "file" / "a.json").choose("key", [ONE, TWO], bench.run) == TWO


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = f"NVIDIA-H200-triton-{triton.__version__}.json"
    assert tuning_file("NVIDIA H200") == tmp_path / "tbn_compiler" / "triton" / name
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuning_file("x/../y").parent == tmp_path / "home" / ".cache" / "tbn_compiler" / "triton"


def test_no_measuring_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench()
    tuner = bench.tuner(tmp_path / "a.json")
    monkeypatch.setattr(tuning, "tuner_for", lambda index: tuner)
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose(device, "key", [ONE, TWO], bench.run) == ONE
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("TBN_TRITON_TUNE", "0")
    assert tuning.choose(device, "key", [ONE, TWO], bench.run) == ONE
    assert bench.measured == []
    monkeypatch.delenv("TBN_TRITON_TUNE")
    assert tuning.choose(device, "key", [ONE, TWO], bench.run) == TWO
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.choose(device, "key", [ONE, TWO], bench.run) == TWO
