"""The tables in the README and under ``docs`` are those of the result files."""

from __future__ import annotations

import pytest

from benchmarks.report import documents, filled


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_document_shows_the_results(path):
    document = path.read_text()
    assert filled(path, documents()[path]) == document
    for mark in documents()[path]:
        assert f"<!-- {mark} -->\n<!-- end -->" not in document, f"{mark} is empty"
