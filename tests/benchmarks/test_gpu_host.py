"""The benchmark of what calls cost the host runs where there is no GPU, and repeats launches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_host
from tbn_compiler.backends.triton import replay


def test_calls_are_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def first() -> Iterator[Any]:
        yield next(calls())

    calls = gpu_host.calls
    with (
        mock.patch.object(gpu_host, "calls", first),
        mock.patch.object(replay.Replay, "__call__", autospec=True, side_effect=replay.Replay.__call__) as repeated,
    ):
        (row,) = gpu_host.measure(number=3)
    assert row["call"] == "linear 1024 x 1024, 1 rows of float32"
    assert min(row["us"], row["without_replay_us"]) > 0
    # Five to begin with, of which the last two repeat at least, and seven times three: not where nothing is noted.
    assert 21 < repeated.call_count <= 24
    assert "| linear 1024 x 1024, 1 rows of float32 |" in gpu_host.table({"rows": [row]})
