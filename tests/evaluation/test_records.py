"""Records on disk: going on where a process was stopped, and refusing what is not the same evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mod_star.errors import InputError
from mod_star.evaluation.records import open_records

CONFIG = {"--task": "gsm8k", "--limit": 3, "--stop": ("a",)}


def test_records_are_kept_and_a_half_written_line_is_dropped(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with open_records(out, CONFIG) as records:
        records.add({"id": "a", "correct": True, "text": "é\n\u2028"})
        records.add({"id": "b", "correct": False})
        assert [json.loads(line)["id"] for line in (out / "records.jsonl").read_text().split("\n")[:-1]] == ["a", "b"]
    before = (out / "records.jsonl").read_bytes()
    with (out / "records.jsonl").open("ab") as file:
        file.write(b'{"id": "c", "cor')
    with open_records(out, CONFIG) as records:
        assert {name: record["correct"] for name, record in records.by_id.items()} == {"a": True, "b": False}
        assert (out / "records.jsonl").read_bytes() == before
        records.add({"id": "c"})
        with pytest.raises(ValueError, match="already"):
            records.add({"id": "a"})
    with open_records(out, CONFIG) as records:
        assert list(records.by_id) == ["a", "b", "c"]
        assert records.by_id["a"]["text"] == "é\n\u2028"


def test_another_configuration_is_refused_with_the_difference(tmp_path: Path) -> None:
    with open_records(tmp_path, CONFIG) as records:
        records.add({"id": "a"})
    other = CONFIG | {"--limit": 4, "--chat": True}
    with pytest.raises(InputError) as error, open_records(tmp_path, other):
        raise AssertionError("not reached")
    assert "holds an evaluation of another configuration: --limit: 3 → 4; --chat: none → true" in str(error.value)
    with open_records(tmp_path, CONFIG) as records:
        assert list(records.by_id) == ["a"], "nothing was touched"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    with open_records(tmp_path, CONFIG), pytest.raises(InputError, match="another process is evaluating here"):  # noqa: SIM117
        with open_records(tmp_path, CONFIG):
            raise AssertionError("not reached")
    with open_records(tmp_path, CONFIG):
        pass


def test_directories_that_are_none(tmp_path: Path) -> None:
    file, full, broken = tmp_path / "file", tmp_path / "full", tmp_path / "broken"
    file.write_text("")
    for directory in (full, broken):
        directory.mkdir()
    (full / "thesis.tex").write_text("")
    (broken / "config.json").write_text("{")
    for out, message in (
        (file, "must be a directory, and is a file"),
        (full, "is neither empty nor an evaluation"),
        (broken, "config.json: cannot be read"),
        (file / "out", "cannot be written: Not a directory"),
    ):
        with pytest.raises(InputError, match=message), open_records(out, CONFIG):
            raise AssertionError("not reached")
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]
    with open_records(tmp_path / "new", CONFIG):
        pass
    (tmp_path / "new" / "records.jsonl").write_text('{"id": "a"}\n[]\n')
    with (
        pytest.raises(InputError, match=r"records.jsonl, line 2: is no record"),
        open_records(tmp_path / "new", CONFIG),
    ):
        raise AssertionError("not reached")
