"""A directory that one process at a time may write to."""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mod_star.errors import InputError

LOCK_FILE = ".lock"


@contextmanager
def locked(path: Path, doing: str = "training", name: str | None = None) -> Iterator[None]:
    """Keeps other processes out of a directory; the lock ends with the process, however it ends.

    Args:
      path: an existing directory.
      doing: what the other process would be doing, for the error message.
      name: what the message calls the directory; None: its path.

    Where the file system has no locks, a note on standard error says so, and nothing is kept out.

    Raises:
      InputError: another process holds it, or the directory isn't writable.
    """
    name = str(path) if name is None else name
    try:
        file = (path / LOCK_FILE).open("a")
    except OSError as error:
        raise InputError(f"{name}: is not writable: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # over NFS it is the lock of fcntl(2), which may be refused so
            raise InputError(f"{name}: another process is {doing} here") from None
        except OSError as error:
            _tell_of_no_locks(name, error, f"nothing keeps a second process from {doing} here at the same time")
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds the directory at this moment. Changes nothing."""
    try:
        with (path / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except (BlockingIOError, PermissionError):
        return True
    except OSError:  # no locks here
        return False
    return False


def wait_for_lock(file: IO[str], name: str) -> None:
    """Waits until no other process holds an open file, and holds it until it is closed.

    Args:
      file: open for writing.
      name: what the note calls it if there are no locks on its file system.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        _tell_of_no_locks(name, error, "nothing keeps other processes from writing to it at the same time")


def _tell_of_no_locks(name: str, error: OSError, consequence: str) -> None:
    """Says what is missing: some network file systems, and FUSE, have no locks (ENOLCK, EOPNOTSUPP, ENOSYS)."""
    print(f"note: {name}: its file system has no locks ({error.strerror}): {consequence}", file=sys.stderr)
