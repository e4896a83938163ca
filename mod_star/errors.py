"""Errors a user can cause: one clear line each, exit code 2 at the command line (1: worth another try)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Bad input from the user: a configuration value, a file, a checkpoint.

    The message is one line that names the field (or file), the value and what is allowed. The command line prints it
    without a traceback and exits with code 2; library callers can catch it as a `ValueError`.
    """

    exit_code = 2


class UnavailableError(InputError):
    """The request may be right but cannot be met now: a bucket cannot be read, or other processes do not come.

    The command line exits with code 1, after which the same command is worth another try.
    """

    exit_code = 1


class TrainingError(RuntimeError):
    """Training cannot go on, through no fault of the input's form; the message is one line."""

    exit_code = 1


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Makes an UnavailableError that names the file of an OSError: a full disk, a quota, a right that is missing."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"{path}: cannot be written: {error.strerror or error}") from error


def require(condition: bool, field: str, value: object, allowed: str) -> None:
    """Raises `InputError("<field> = <value>: <allowed>")` unless `condition` holds."""
    if not condition:
        raise InputError(f"{field} = {value!r}: {allowed}")
