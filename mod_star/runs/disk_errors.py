"""Errors of a full or failing disk, or of a bucket, during a save: one OSError with a name, not many tracebacks."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax

from mod_star.storage import bucket_errors, is_address

LOGGERS = ("absl", "asyncio")
"""Where Orbax's background threads log."""


def silence_disk_errors() -> Callable[[], None]:
    """Keeps what `disk_errors` raises out of the logs of Orbax's threads; the result ends that."""
    own = partial(_is_news)  # another object every time: several may be open at once
    for name in LOGGERS:
        logging.getLogger(name).addFilter(own)

    def log_again() -> None:
        for name in LOGGERS:
            logging.getLogger(name).removeFilter(own)

    return log_again


@contextmanager
def disk_errors(checkpoint: Path) -> Iterator[None]:
    """Makes an OSError that names the checkpoint of what Orbax and tensorstore make of a full or failing disk."""
    if is_address(checkpoint):
        with bucket_errors(str(checkpoint)):
            yield
        return
    try:
        yield
    except Exception as error:
        number = _error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(checkpoint)) from error


def _error_number(error: BaseException | None) -> int | None:
    """The operating system's, of an error that came from there; tensorstore's is a ValueError with it in the text."""
    if isinstance(error, OSError):
        return error.errno
    match = re.search(r"os_error_code='(\d+)'", str(error))
    return None if match is None else int(match[1])


def _is_news(record: logging.LogRecord) -> bool:
    """False for the tracebacks of a full or failing disk, or of another process that is gone: `wait` raises the same,
    once and in one line.

    Nor is it news that other threads of a failed save can't go on when the process ends.
    """
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, jax.errors.JaxRuntimeError):
        return False
    return _error_number(error) is None and "cannot schedule new futures after" not in str(error)
