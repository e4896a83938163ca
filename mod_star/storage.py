"""Files in buckets of Google Cloud Storage, named by gs:// addresses: which path is one, and how they are read.

Runs in buckets are `mod_star.runs.buckets`, which writes there, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mod_star.errors import InputError, UnavailableError


def is_address(path: str | Path) -> bool:
    """Whether a path is meant to be an address: it begins with a scheme, such as gs://."""
    return re.match(r"[a-z][a-z0-9]+:/", str(path)) is not None


def address_of(path: str | Path) -> str:
    """A gs:// address as it should be written; `Path` makes one slash of two.

    Raises:
      InputError: it is another kind of address, or has no bucket or no name in it.
    """
    match = re.fullmatch(r"gs:/+([^/]+(?:/+[^/]+)+)/*", str(path))
    shown = re.sub(":/+", "://", str(path), count=1)
    if match is None:
        raise InputError(f"{shown}: must be a directory, or gs://BUCKET/NAME")
    if {".", ".."} & set(match[1].split("/")):
        raise InputError(f"{shown}: '.' and '..' are not names in a bucket")
    return "gs://" + re.sub("/+", "/", match[1])


def file_system(address: str) -> Any:
    """fsspec's file system for an address.

    Raises:
      InputError: the package gcsfs is missing.
    """
    import fsspec

    try:
        return fsspec.filesystem("gs")
    except ImportError:
        raise InputError(f"{address}: needs the package gcsfs: pip install 'mod_star[gcs]'") from None


@contextmanager
def bucket_errors(address: str) -> Iterator[None]:
    """Makes an OSError that names the address of what gcsfs, Google's libraries, Orbax and tensorstore raise."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        number = error.errno if isinstance(error, OSError) and error.errno else 5
        raise OSError(number, f"{type(error).__name__}: {reason}", address) from error


@contextmanager
def bucket_input(address: str) -> Iterator[None]:
    """Makes an UnavailableError of the same, for commands that have begun nothing yet."""
    try:
        with bucket_errors(address):
            yield
    except OSError as error:
        raise UnavailableError(f"{error.filename}: {error.strerror}") from error


def find_files(pattern: str) -> list[str]:
    """The addresses of the files that an address names, or a glob of addresses; sorted.

    Raises:
      InputError: as for `holds_run`.
    """
    address = address_of(pattern)
    with bucket_input(address):
        files = file_system(address)
        files.invalidate_cache()  # others write there, too
        entries = {address: {"type": "file"}} if files.isfile(address) else files.glob(address, detail=True)
        names = [name for name, about in entries.items() if about["type"] == "file" and not name.endswith("/")]
        return sorted(f"gs://{name.removeprefix('gs://')}" for name in names)


def read_file(address: str) -> bytes:
    """A whole file. Raises OSError if that can't be."""
    with bucket_errors(address):
        return bytes(file_system(address).cat_file(address))
