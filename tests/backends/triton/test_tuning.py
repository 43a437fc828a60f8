"""Choosing configurations by measurement, and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton

from tbn_compiler.backends.triton import tuning
from tbn_compiler.backends.triton.search import Config
from tbn_compiler.backends.triton.tuning import Tuner, tuning_file

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


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"format": 1}', '{"format": 1, "choices": {"k": {"kernel": "dot", "colour": 1}}}', "\x00"]
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
