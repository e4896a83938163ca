"""The directory of an evaluation: its configuration, and a record per item as they come, so that it can resume.

    OUT/config.json     everything that the records depend on
        records.jsonl   one JSON object per item, in the order in which they were done
        results.json    the measures with their intervals, once all items are done
        .lock           held by the process that evaluates

A process that is stopped or killed loses at most the batch that it was at.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mod_star.atomic_files import write_atomically
from mod_star.errors import InputError, writing
from mod_star.runs.locks import LOCK_FILE, locked

CONFIG_FILE, RECORDS_FILE, RESULTS_FILE = "config.json", "records.jsonl", "results.json"

CONTENT = {"--run": "checkpoint_sha256", "--data": "data_sha256", "--few-shot-data": "few_shot_sha256"}
"""Options that are places, and what tells whether the same is there: runs and files may be moved."""

Record = dict[str, Any]


class Records:
    """The records of an evaluation, on disk as soon as they are added; made by `open_records`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.by_id: dict[str, Record] = {}
        self._path = directory / RECORDS_FILE
        if self._path.exists():
            self._read()
        self._file = self._path.open("a", encoding="utf-8")

    def add(self, record: Record) -> None:
        """Appends a record, which has an "id" that none before it has."""
        if record["id"] in self.by_id:
            raise ValueError(f"there is a record of {record['id']!r} already")
        with writing(self._path):
            self._file.write(_json(record) + "\n")
            self._file.flush()
        self.by_id[record["id"]] = record

    def close(self) -> None:
        """Closes the file."""
        with suppress(OSError):  # of a record that could not be written, which has been told
            self._file.close()

    def _read(self) -> None:
        data = self._path.read_bytes()
        whole = data.rfind(b"\n") + 1
        for number, line in enumerate(data[:whole].splitlines(), start=1):
            try:
                record = json.loads(line)
                self.by_id[record["id"]] = record
            except (ValueError, TypeError, KeyError):
                raise InputError(
                    f"{self._path}, line {number}: is not a record; move the file away to start anew"
                ) from None
        if whole < len(data):  # its process was killed while it wrote the last line
            os.truncate(self._path, whole)


@contextmanager
def open_records(directory: Path, config: Mapping[str, Any]) -> Iterator[Records]:
    """The records of an evaluation, new or to go on with; no other process may add to them meanwhile.

    Args:
      directory: OUT; made if absent.
      config: what the records depend on, by the name of the option; values that JSON can hold.

    Raises:
      InputError: the directory holds an evaluation of another configuration (the message says what differs), something
        else, or a record that can't be read; another process is evaluating there; or it can't be written, now or when
        a record is added.
    """
    require_evaluation(directory, config)
    name = f"--out = {str(directory)!r}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{name}: cannot be written: {error.strerror}") from error
    with locked(directory, "evaluating", name):
        require_evaluation(directory, config)
        write_json(directory / CONFIG_FILE, config)
        records = Records(directory)
        try:
            yield records
        finally:
            records.close()


def require_evaluation(directory: Path, config: Mapping[str, Any]) -> None:
    """Raises InputError unless an evaluation of this configuration can begin or go on in the directory."""
    if not directory.exists():
        return
    if not directory.is_dir():
        raise InputError(f"--out = {str(directory)!r}: must be a directory, and is a file")
    path = directory / CONFIG_FILE
    if not path.exists():
        if {entry.name for entry in directory.iterdir()} - {LOCK_FILE}:
            raise InputError(
                f"--out = {str(directory)!r}: is neither empty nor an evaluation (it has no {CONFIG_FILE})"
            )
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        stored = None
    if not isinstance(stored, dict):
        raise InputError(f"{path}: cannot be read; choose another --out")
    current = json.loads(json.dumps(config))  # tuples are lists then
    if changes := [
        f"{name}: {_value(stored, name)} → {_value(current, name)}"
        for name in dict.fromkeys([*stored, *current])
        # An option that isn't stored was not there yet, so it was not given.
        if stored.get(name) != current.get(name)
        and not (name not in stored and current[name] is False)
        and not _is_moved(directory, stored, current, name)
    ]:
        raise InputError(
            f"--out = {str(directory)!r}: holds an evaluation of another configuration: {'; '.join(changes)}"
        )


def _is_moved(directory: Path, stored: Mapping[str, Any], current: Mapping[str, Any], name: str) -> bool:
    """Whether a difference is one of places alone, or is unknown to what an older version has stored."""
    if name in CONTENT.values():
        return name not in stored
    if name not in CONTENT or not isinstance(current.get(name), str):
        return False
    digest = CONTENT[name]
    if stored.get(digest) and current.get(digest):
        return bool(stored[digest] == current[digest])
    # An older version has stored no digest of the run: an evaluation that lies in it has been moved with it.
    return name == "--run" and digest not in stored and name in stored and _lies_in(directory, Path(current[name]))


def _lies_in(directory: Path, run: Path) -> bool:
    return run.resolve() in directory.resolve().parents


def write_json(path: Path, content: Any) -> None:
    """Writes a file aside and moves it into place."""
    with writing(path):
        write_atomically(path, _json(content, indent=2) + "\n")


def _json(content: Any, indent: int | None = None) -> str:
    """JSON in UTF-8, but for what has no place there, such as the name of a file that is no text: that is escaped."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _value(config: Mapping[str, Any], name: str) -> str:
    return json.dumps(config[name], ensure_ascii=False) if name in config else "none"
