"""What is made of coverage.py's report."""

from __future__ import annotations

from tests.package.coverage_run import by_room, counts, table


def file(statements: int, executed: int) -> dict[str, dict[str, int]]:
    return {"summary": {"num_statements": statements, "covered_lines": executed}}


def test_rooms() -> None:
    files = {
        "tbn_compiler/backends/c/kernels/convs.py": file(30, 30),
        "tbn_compiler/backends/c/emit.py": file(10, 7),
        "tbn_compiler/tiling.py": file(2000, 1000),
        "tests/test_other.py": file(10, 10),
    }
    rooms = by_room(files)
    assert rooms == {
        "backends/c": {"statements": 40, "executed": 37},
        ".": {"statements": 2000, "executed": 1000},
    }
    outcome = '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="1006"></testsuite></testsuites>'
    tests, machine = counts(outcome), {"python": "3.12.1", "torch": "2.13.0", "date": "2026-01-02"}
    assert table({"rooms": rooms, "tests": tests, "machine": machine}).splitlines()[2:] == [
        "| `tbn_compiler/backends/c` | 40 | 92.5% |",
        "| `tbn_compiler` | 2,000 | 50.0% |",
        "| together | 2,040 | 50.8% |",
        "",
        "1,000 tests passed, 3 failed, 3 were skipped; Python 3.12.1, PyTorch 2.13.0, 2026-01-02.",
    ]
