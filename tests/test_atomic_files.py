"""Files that are there as a whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from mod_star.atomic_files import write_atomically


@pytest.mark.parametrize("content", ["ä\n", "ä\n".encode(), lambda beside: beside.write_text("ä\n", encoding="utf-8")])
def test_text_bytes_and_what_a_function_writes_take_the_file_s_place(tmp_path: Path, content: object) -> None:
    file = tmp_path / "a.json"
    file.write_text("before")
    write_atomically(file, content)  # type: ignore[arg-type]
    assert file.read_bytes() == "ä\n".encode()
    assert list(tmp_path.iterdir()) == [file]


def test_what_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("before")

    def fails(beside: Path) -> None:
        assert beside.parent == tmp_path and beside != file  # a rename within one directory is atomic
        beside.write_text("half")
        assert file.read_text() == "before"
        raise OSError(28, "No space left on device", str(beside))

    with pytest.raises(OSError, match="No space left"):
        write_atomically(file, fails)
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "absent" / "a.json", "content")


def test_an_interrupt_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text("before")

    def is_interrupted(beside: Path) -> None:
        beside.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, is_interrupted)
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]
