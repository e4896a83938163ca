"""A directory that one process at a time may write to."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mod_star.errors import InputError

LOCK_FILE = ".lock"


@contextmanager
def locked(path: Path, doing: str = "training", name: str | None = None) -> Iterator[None]:
    """Keeps other processes out of a directory; the lock ends with the process, however it ends.

    Args:
      path: an existing directory.
      doing: what the other process would be doing, for the error message.
      name: what the message calls the directory; None: its path.

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
        except BlockingIOError:
            raise InputError(f"{name}: another process is {doing} here") from None
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds the directory at this moment. Changes nothing."""
    try:
        with (path / LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
