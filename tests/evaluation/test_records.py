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
        pytest.raises(InputError, match=r"records.jsonl, line 2: is not a record"),
        open_records(tmp_path / "new", CONFIG),
    ):
        raise AssertionError("not reached")


def test_places_may_change_but_not_what_is_there(tmp_path: Path) -> None:
    config = {"--run": "/a/run", "--data": "/a/x.jsonl", "--few-shot-data": None, "--limit": 1}
    config |= {"data_sha256": "1", "few_shot_sha256": "", "checkpoint_sha256": "2"}
    out = tmp_path / "run" / "evaluations" / "x"
    with open_records(out, config):
        pass
    moved = config | {"--run": "/b/run", "--data": "/b/y.jsonl"}
    with open_records(out, moved):
        pass
    for name, value in (("data_sha256", "3"), ("checkpoint_sha256", "3"), ("--few-shot-data", "/a/z"), ("--limit", 2)):
        with (
            pytest.raises(InputError, match=f"another configuration: .*{name}: "),
            open_records(out, moved | {name: value}),
        ):
            raise AssertionError("not reached")
    # Without checksums, as in a bucket, the place counts.
    unknown = config | {"checkpoint_sha256": None}
    with open_records(tmp_path / "bucket", unknown):
        pass
    for other in (unknown | {"--run": "/b/run"}, moved):
        with pytest.raises(InputError, match="--run: "), open_records(tmp_path / "bucket", other):
            raise AssertionError("not reached")
    # Of an older version: what lies in the run was moved with it.
    old = {name: value for name, value in config.items() if name != "checkpoint_sha256"}
    for place in (tmp_path / "run" / "evaluations" / "old", tmp_path / "old"):
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(old))
    here = config | {"--run": str(tmp_path / "run")}
    with open_records(tmp_path / "run" / "evaluations" / "old", here):
        pass
    with pytest.raises(InputError, match="--run: "), open_records(tmp_path / "old", here):
        raise AssertionError("not reached")
