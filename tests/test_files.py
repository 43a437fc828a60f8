from __future__ import annotations

from pathlib import Path

import pytest

from tbn_compiler.files import replacing


def test_the_file_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    with replacing(target) as temporary:
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_failure_restores_all_files_written_together(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("old")

    def write() -> None:
        with replacing(a) as new_a, replacing(b) as new_b:
            new_a.write_text("new")
            new_b.write_text("ne")
            raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        write()
    assert a.read_text() == "old"
    assert list(tmp_path.iterdir()) == [a]


def test_permissions_follow_the_umask_and_links_are_followed(tmp_path: Path) -> None:
    target, link, plain = tmp_path / "target", tmp_path / "link", tmp_path / "plain"
    plain.touch()
    link.symlink_to(target)
    with replacing(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert target.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("path", "error"),
    [("missing/file", FileNotFoundError), ("folder", IsADirectoryError), ("file/below", NotADirectoryError)],
)
def test_an_unwritable_path_is_named(path: str, error: type[OSError], tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(error) as caught, replacing(tmp_path / path):
        pass
    assert caught.value.filename == str(tmp_path / path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder"]
