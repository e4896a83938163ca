"""Runs in buckets of Google Cloud Storage, named by gs:// addresses; for single files there see `mod_star.storage`.

A run in a bucket has the same files as one in a directory. Checkpoints go there and come from there directly, each
process writing its part. The small files are kept in a working copy on this machine, in the user's cache directory, for
appending and renaming is what buckets can't do: fetched when a command starts, brought back (what has changed) before
every checkpoint and when a command ends. So a machine may be lost at any time: another one goes on from the bucket.
Of every file the copy knows which version of it was the same there. If the bucket has another by now, that one counts;
if not, what has changed in the copy is work that a killed command couldn't bring back, and is kept.

What a directory has and a bucket hasn't: a lock against a second training from another machine, and checksums of our
own, for which everything would have to be read back (Google keeps its own, of every object).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mod_star.atomic_files import UNFINISHED, write_atomically
from mod_star.errors import InputError
from mod_star.home import cache_root
from mod_star.runs.locks import LOCK_FILE, is_locked, wait_for_lock
from mod_star.runs.stored_config import (
    CONFIG_FILE,
    DATA_FILE,
    PARTS_FILE,
    TOKENIZER_DIRECTORY,
    is_run,
)
from mod_star.storage import address_of, bucket_errors, bucket_input, file_system, is_address

CHECKPOINTS_DIRECTORY = "checkpoints"
"""Of a run; see `mod_star.runs.checkpoints`."""
COPY_FILE = "working_copy.json"
"""In a working copy: the run's address; of each file size and time when it was last the same there, and its version."""
FETCHING_FILE = ".fetching"
LEFT_THERE = (CHECKPOINTS_DIRECTORY, "tensorboard", "profile")
"""Directories of a run that are not fetched: the first by nature, the others since nothing here reads them."""
NOT_BROUGHT = (COPY_FILE, FETCHING_FILE, LOCK_FILE, CHECKPOINTS_DIRECTORY)


def holds_run(path: str | Path) -> bool:
    """Whether there is a run in a directory or at an address. False for what is not an address of a bucket.

    Raises:
      InputError: the bucket can't be read, or as for `file_system`.
    """
    if not is_address(path):
        return is_run(Path(path))
    try:
        address = address_of(path)
    except InputError:
        return False
    with bucket_input(address):
        return bool(file_system(address).isfile(f"{address}/{CONFIG_FILE}"))


def working_copy(path: str | Path) -> Path:
    """A directory with the small files of the run at an address, as they are there now; a directory stays what it is.

    What an earlier command has written to the copy and couldn't bring back, since it was killed, say, is still in it. A
    copy that a training on this machine is writing to is left as it is.

    Raises:
      InputError: as for `address_of` and `file_system`; the bucket can't be read, or the copy can't be written.
    """
    if not is_address(path):
        return Path(path)
    address = address_of(path)
    odd = [character for character in address if character in "*?[]\\#" or unicodedata.category(character)[0] == "C"]
    if odd:
        shown = " ".join(repr(character)[1:-1] for character in dict.fromkeys(odd))
        raise InputError(f"{address!r}: has {shown} in it, which stand for a pattern there; choose another name")
    files = file_system(address)
    copies = _directory_of_copies()
    if copies is None:
        raise InputError(f"{address}: needs a directory for a working copy: set HOME or XDG_CACHE_HOME")
    local = copies / hashlib.sha256(address.encode()).hexdigest()[:12] / address.rpartition("/")[2]
    with bucket_input(address):
        local.mkdir(parents=True, exist_ok=True)
        with _alone(local):
            if not is_locked(local):
                _fetch(files, address, local)
    return local


def checkpoints_of(run: Path) -> Any:
    """Where the checkpoints of a run are: in its directory; of a working copy an `epath.Path` of the bucket."""
    address = copied_from(run)
    if address is None:
        return run / CHECKPOINTS_DIRECTORY
    from etils import epath

    return epath.Path(address) / CHECKPOINTS_DIRECTORY


def copied_from(run: Path) -> str | None:
    """The address that a working copy belongs to; None: it is a directory of its own."""
    record = _read_copy_file(run)
    return None if record is None else str(record["address"])


def with_addresses(message: str) -> str:
    """A message that names runs in buckets by their addresses, not by their working copies."""
    copies = _directory_of_copies()
    for named in [] if copies is None else re.findall(re.escape(f"{copies}/") + "[0-9a-f]{12}(?=/)", message):
        for local in Path(named).glob("*"):
            with suppress(OSError, ValueError):  # an error is being told, which counts
                if address := copied_from(local):
                    message = message.replace(str(local), address)
    return message


def bring_back(local: Path) -> None:
    """Writes what has changed in a working copy to its bucket, and removes there what was removed. Else does nothing.

    Raises:
      OSError: the bucket can't be written.
    """
    if copied_from(local) is None:
        return
    with _alone(local):
        copy = _read_copy_file(local)
        assert copy is not None, local
        address, known, now = copy["address"], copy["files"], _stamps(local)
        changed = [name for name in now if now[name] != known.get(name, [])[:2]]
        gone = sorted(known.keys() - now.keys())
        if not changed and not gone:
            return
        files = file_system(address)
        try:
            with bucket_errors(address):
                for name in sorted(changed, key=lambda name: (name == CONFIG_FILE, name)):  # last: it makes them a run
                    files.pipe_file(f"{address}/{name}", (local / name).read_bytes())
                    files.invalidate_cache()
                    known[name] = [*now[name], _version(files.info(f"{address}/{name}"))]
                for name in gone:
                    if files.exists(f"{address}/{name}"):
                        files.rm_file(f"{address}/{name}")
                    del known[name]
        finally:
            _write_copy_file(local, address, known)


def _directory_of_copies() -> Path | None:
    """Where all working copies are; None: the user has no cache directory."""
    cache = cache_root()
    return None if cache is None else cache / "mod_star" / "runs"


def _fetch(files: Any, address: str, local: Path) -> None:
    """Makes the copy what the bucket holds, but for what is left there, and what only the copy has up to now.

    Files are replaced one by one and only if the bucket's are others: processes that read the copy aren't disturbed.
    """
    root = address.removeprefix("gs://") + "/"
    files.invalidate_cache()
    versions = {name.removeprefix(root): _version(about) for name, about in files.find(root[:-1], detail=True).items()}
    there = {short: version for short, version in versions.items() if short and not short.endswith("/")}  # no "folders"
    left_by_a_killed_start = {short.split("/")[0] for short in there} <= {TOKENIZER_DIRECTORY, PARTS_FILE, DATA_FILE}
    if CONFIG_FILE not in there and not left_by_a_killed_start:
        raise InputError(f"{address}: is neither empty nor a run (it has no {CONFIG_FILE}); choose another address")
    outside = {short for short in there if ".." in short.split("/")}  # a bucket takes any name, even one that climbs
    fetched = {short for short in there.keys() - outside if short.split("/")[0] not in LEFT_THERE}
    known = (_read_copy_file(local) or {"files": {}})["files"]
    if CONFIG_FILE not in there or known.get(CONFIG_FILE, [])[2:] != [there[CONFIG_FILE]]:  # another run, or none yet
        known = {}
        for path in local.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name not in (FETCHING_FILE, LOCK_FILE):
                path.unlink()
    for short in fetched:
        target = local / short
        if known.get(short, [])[2:] != [there[short]] or not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(target, files.cat_file(f"{root}{short}"))
            known[short] = [*_stamp(target), there[short]]
    here = _stamps(local).keys()
    removed = {short for short in (here & known.keys()) - fetched if short.split("/")[0] not in LEFT_THERE}
    for short in removed:
        (local / short).unlink()
    _write_copy_file(local, address, {short: known[short] for short in (here & known.keys()) - removed})


def _version(about: dict[str, Any]) -> str:
    """The number of an object's state, which every write changes."""
    return str(about["generation"])


@contextmanager
def _alone(local: Path) -> Iterator[None]:
    """Keeps other processes from fetching or bringing back this working copy meanwhile."""
    with (local / FETCHING_FILE).open("a") as file:
        wait_for_lock(file, str(local))
        yield


def _stamps(local: Path) -> dict[str, list[int]]:
    """Size and time of change of every file that is brought back, by its name in the run."""
    stamps = {}
    for path in sorted(local.rglob("*")):
        name = path.relative_to(local)
        if path.is_file() and name.parts[0] not in NOT_BROUGHT and path.suffix != UNFINISHED and path.name != LOCK_FILE:
            stamps[name.as_posix()] = _stamp(path)
    return stamps


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _read_copy_file(local: Path) -> dict[str, Any] | None:
    """Address, and size, time and version of every file; None: no working copy."""
    try:
        record: dict[str, Any] = json.loads((local / COPY_FILE).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return record


def _write_copy_file(local: Path, address: str, known: dict[str, list[Any]]) -> None:
    write_atomically(local / COPY_FILE, json.dumps({"address": address, "files": known}))
