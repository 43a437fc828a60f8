"""What is made of coverage.py's report."""

from __future__ import annotations

from tests.package.coverage_run import by_room, table


def file(statements: int, executed: int) -> dict[str, dict[str, int]]:
    return {"summary": {"num_statements": statements, "covered_lines": executed}}


def test_rooms() -> None:
    files = {
        "tbn_compiler/backends/c/kernels/convs.py": file(30, 30),
        "tbn_compiler/backends/c/emit.py": file(10, 7),
        "tbn_compiler/tiling.py": file(2000, 1000),
    }
    rooms = by_room(files)
    assert rooms == {
        "backends/c": {"statements": 40, "executed": 37},
        ".": {"statements": 2000, "executed": 1000},
    }
    assert table({"rooms": rooms}).splitlines()[2:] == [
        "| `tbn_compiler/backends/c` | 40 | 92.5% |",
        "| `tbn_compiler` | 2,000 | 50.0% |",
        "| together | 2,040 | 50.8% |",
    ]
